"""From activations to weights: what the outputs depend on, what each width costs, and the fit itself.

    moments        the covariance of what every weight reads, on the wide network
    importances    G = E[g g'], g the gradient of the output's log-likelihood (labels drawn from the network's own
                   answer) at a weight's outputs: the Fisher metric, label-free
    curves         for every space: in which order its channels go (`projection.eliminate`), and the divergence of the
                   outputs, measured end to end, with this space alone narrowed to each of several widths
    fitted         all weights of a narrow network, one after the other in the order in which they run: each to what
                   the wide network writes there, from what the narrow network has there to read, so that earlier
                   errors are corrected and do not add up. Where the output is added to a residual stream, the
                   target is the wide stream less what the narrow one already holds

The narrow network runs in wide shapes here, with zero weights for what went: it is the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_prune.calibrate import Program, Rows, Values
from ep_prune.divergence import divergence, own_answer_loss
from ep_prune.errors import InputError
from ep_prune.graph import Node
from ep_prune.projection import Moments, Reading, eliminate, fit, through, weighted
from ep_prune.readers import Free, Reader, Structure, reads

FRACTIONS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Widths at which a space is measured, as shares of its channels."""
FORWARDS = 15_000
"""Samples run through the whole network, at most, to measure all curves; those run through its end count in part."""
SMALL_GAIN = 1e-2
"""Of a batch norm's largest gain: where it is smaller, errors of the residual stream are not corrected through it."""
SWEEPS = 4
"""Of the fit to a rectified output (`_fit_reader`)."""
Chunks = Sequence[Sequence[Tensor]]
Step = Callable[[str], None]


def _silent(_: str) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Covariance:
    """Of what a weight reads: (G, P, P) float32, and its mean (G, P) float64."""

    matrix: Tensor
    mean: Tensor


@dataclass(frozen=True, eq=False)
class Curve:
    """One space: `order` (roots, first to go first), costs (as many), and the divergence measured at widths.

    measured: (channels left, divergence), widest first.
    """

    space: Free
    order: Tensor
    costs: Tensor
    measured: tuple[tuple[int, float], ...]

    def losses(self) -> Tensor:
        """(steps + 1,) the divergence once 0, 1, ... channels are gone: measured where it was, elsewhere by `costs`."""
        count = len(self.space.roots)
        costs = torch.cat([torch.zeros(1, dtype=torch.float64), self.costs.cummax(0).values])
        gone = [0, *(count - width for width, _ in self.measured)]
        found = (
            torch.tensor([0.0, *(max(loss, 0.0) for _, loss in self.measured)], dtype=torch.float64)
            .cummax(0)
            .values
        )
        result = torch.zeros(len(costs), dtype=torch.float64)
        for start, end, low, high in zip(gone, gone[1:], found, found[1:], strict=False):
            x = costs[start : end + 1] - costs[start]
            share = x / x[-1] if float(x[-1]) > 0 else torch.linspace(0, 1, len(x), dtype=torch.float64)
            result[start : end + 1] = low + share * (high - low)
        if gone[-1] < len(costs) - 1:
            result[gone[-1] :] = found[-1] + (costs[gone[-1] :] - costs[gone[-1]]) * _slope(costs, found, gone)
        return result + 1e-9 * torch.arange(len(costs), dtype=torch.float64)


def _slope(costs: Tensor, found: Tensor, gone: Sequence[int]) -> float:
    span = float(costs[gone[-1]])
    return float(found[-1]) / span if span > 0 else 1.0


def moments(
    program: Program, readers: Sequence[Reader], chunks: Chunks, seed: int, step: Step = _silent
) -> dict[str, Covariance]:
    """Of every weight's input, on the wide network."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(chunk[0]) for chunk in chunks)
    rows = {r.node: r.sampled(count, generator) for r in readers if not r.kept_whole}
    by_node = {r.node: r for r in readers if not r.kept_whole}
    sums: dict[Node, Moments] = {}
    for chunk in chunks:
        values = program.begin(chunk, {})
        for node in program.nodes:
            if node in by_node:
                x = by_node[node].rows_of(rows[node], values[by_node[node].op.x])
                nothing = x.new_zeros(*x.shape[:2], 0)
                if node not in sums:
                    sums[node] = Moments.empty(x.shape[0], x.shape[2], 0, x.device)
                sums[node].add(x, nothing)
            values[node] = program.call(node, values)
            program.release(node, values)
        step("moments")
    found = {}
    for node, total in sums.items():
        matrix, _, mean, _, _ = total.centred()
        found[by_node[node].name] = Covariance(matrix.float(), mean)
    return found


def importances(
    program: Program, readers: Sequence[Reader], chunks: Chunks, seed: int, step: Step = _silent
) -> dict[str, Tensor]:
    """(G, O/G, O/G) of every weight's outputs: tr(G E[d d']) says what an error d there does to the outputs."""
    generator = torch.Generator().manual_seed(seed)
    by_node = {r.node: r for r in readers if not r.kept_whole}
    sums: dict[str, Tensor] = {}
    count = 0
    for chunk in chunks:
        with torch.enable_grad():
            values = program.begin(chunk, {})
            reached: list[tuple[Reader, Tensor]] = []
            for node in program.nodes:
                value = program.call(node, values)
                if node in by_node:
                    value = value if value.requires_grad else value.requires_grad_()
                    reached.append((by_node[node], value))
                values[node] = value
                program.release(node, values)
            loss = own_answer_loss([values[node] for node in program.graph.outputs], generator)
            if not loss.requires_grad:
                if reached:
                    raise InputError("no floating output follows from the weights: let the model return its scores")
                return {}
            found = torch.autograd.grad(loss, [value for _, value in reached], allow_unused=True)
        for (reader, value), gradient in zip(reached, found, strict=True):
            whole = Rows(reader.node, reader.op, value.numel(), generator)
            rows = whole.output(torch.zeros_like(value) if gradient is None else gradient).double()
            sums[reader.name] = sums.get(reader.name, 0.0) + rows.transpose(1, 2) @ rows
        count += len(chunk[0])
        step("importances")
    return {name: total / count for name, total in sums.items()}


def _weighted_view(reader: Reader, weight: Tensor, metric: Tensor) -> Tensor:
    view = reader.view(weight).double()
    if not reader.by_channels:
        return weighted(view, metric)
    split = view.reshape(1, metric.shape[1], -1)
    return weighted(split, metric).reshape(view.shape)


def _reading(reader: Reader, free: Tensor, covariance: Covariance, metric: Tensor, weight: Tensor) -> Reading:
    """One weight in the eyes of `eliminate`."""
    columns = reader.columns
    place = {int(root): k for k, root in enumerate(free.tolist())}
    number = torch.tensor([place.get(root, -1) for root in columns.reshape(-1).tolist()]).reshape(columns.shape)
    group, column = (number >= 0).nonzero(as_tuple=True)
    channel = number[group, column]
    order = channel.argsort(stable=True)
    group, column, channel = group[order], column[order], channel[order]
    home = torch.full((len(free),), -1).scatter_reduce_(0, channel, group, "amax")
    same = group == home[channel]
    column, channel = column[same], channel[same]
    counts = torch.bincount(channel, minlength=len(free))
    starts = counts.cumsum(0) - counts
    blocks = torch.full((len(free), max(int(counts.max()), 1)), -1)
    blocks[channel, torch.arange(len(channel)) - starts[channel]] = column
    device = covariance.matrix.device
    return Reading(
        covariance.matrix.double(),
        _weighted_view(reader, weight, metric),
        blocks.to(device),
        home.clamp_min(0).to(device),
        (counts > 0).to(device),
    )


def narrowed(reader: Reader, weight: Tensor, kept: Tensor, covariance: Covariance) -> tuple[Tensor, Tensor]:
    """The weight that reads only the kept channels, nearest to itself, and what its constant gains, (G * O/G,)."""
    mask = kept[reader.columns].to(covariance.matrix.device)
    view = reader.view(weight).double()
    matrix = covariance.matrix.double()
    if reader.by_channels:
        eye = torch.eye(view.shape[2], dtype=torch.float64, device=view.device).unsqueeze(0)
        new = view @ through(eye, matrix, mask)
    else:
        new = through(view, matrix, mask)
    lost = ((view - new) @ covariance.mean.unsqueeze(2)).squeeze(2)
    outputs = reader.outputs.numel()
    shift = lost.reshape(outputs, -1).sum(1)
    return reader.restore(new).to(weight.dtype), shift.to(weight.dtype)


def with_constant(
    reader: Reader, program: Program, own: dict[str, Tensor], shift: Tensor, *, replace: bool = False
) -> None:
    """Put a constant that a weight's outputs gain (or, `replace`, have) where it has its place."""
    name = str(reader.constant)
    if reader.mean is not None:
        base = program.graph.tensors[name]
        own[name] = base - shift.to(base)
    elif reader.bias is not None:
        base = program.graph.tensors[name]
        own[name] = shift.to(base) if replace else base + shift.to(base)
    else:
        own[name] = shift


def curves(
    program: Program,
    structure: Structure,
    covariances: Mapping[str, Covariance],
    metrics: Mapping[str, Tensor],
    chunks: Chunks,
    step: Step = _silent,
    fractions: Sequence[float] = FRACTIONS,
) -> list[Curve]:
    """One for each space that something reads, measured on the last chunks, as many as `FORWARDS` allows, from where
    it is first read."""
    graph = program.graph
    first: dict[Node, list[tuple[Free, Sequence[Reader]]]] = {}
    for space in structure.spaces:
        readers = [r for r in reads(structure.readers, space.roots) if r.name in covariances]
        if readers:
            first.setdefault(readers[0].node, []).append((space, readers))
    passes = sum(
        len(fractions) * len(spaces) * (1 - program.place[node] / len(program.nodes))
        for node, spaces in first.items()
    )
    affordable = max(1, int(FORWARDS / max(passes * len(chunks[0][0]), 1)))
    values = [program.begin(chunk, {}) for chunk in chunks[-affordable:]]
    answers = [program.finish(v, {}) for v in values]
    found = []
    for place, node in enumerate(program.nodes):
        for space, readers in first.get(node, ()):
            readings = [
                _reading(r, space.roots, covariances[r.name], metrics[r.name], graph.tensors[r.name])
                for r in [r for r in readers if not r.depthwise] or readers
            ]
            count = len(space.roots)
            whole = bool(torch.isin(space.longest, space.roots).all())
            order, costs = eliminate(readings, at_least=1 if whole else 0)
            each, least = 1, int(whole)
            if space.sections is not None:
                each = least = int(space.sections.max()) + 1
                order, costs = in_turn(order, costs, space.sections)
            widths = sorted({max(least, each * round(f * count / each)) for f in fractions} - {count}, reverse=True)
            measured = []
            for width in widths:
                kept = structure.everything()
                kept[space.roots[order[: count - width]]] = False
                own: dict[str, Tensor] = {}
                for reader in readers:
                    own[reader.name], shift = narrowed(
                        reader, graph.tensors[reader.name], kept, covariances[reader.name]
                    )
                    with_constant(reader, program, own, shift)
                losses = [
                    divergence(answer, program.finish(v, own, place))
                    for answer, v in zip(answers, values, strict=True)
                ]
                measured.append((width, sum(losses) / len(losses)))
            found.append(Curve(space, space.roots[order], costs, tuple(measured)))
            step(f"measuring {space.name}")
        for v in values:
            v[node] = program.call(node, v)
            program.release(node, v)
    return found


def in_turn(order: Tensor, costs: Tensor, sections: Tensor) -> tuple[Tensor, Tensor]:
    """An order of elimination in which every section loses its first channel before any loses its second."""
    own = sections[order]
    earlier = torch.tril((own.unsqueeze(1) == own).long(), -1).sum(1)
    turn = earlier.argsort(stable=True)
    return order[turn], costs.diff(prepend=costs.new_zeros(1))[turn].cumsum(0)


def fitted(
    program: Program,
    structure: Structure,
    kept: Tensor,
    chunks: Chunks,
    seed: int,
    step: Step = _silent,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All weights of the narrow network, in wide shapes, and the error of each on held-out rows (share of variance)."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(chunk[0]) for chunk in chunks)
    held_out = set(range(len(chunks) - max(1, len(chunks) // 5), len(chunks)))
    own: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    by_node = {r.node: r for r in structure.readers if not r.kept_whole}
    wide = [program.begin(chunk, {}) for chunk in chunks]
    narrow = [program.begin(chunk, {}) for chunk in chunks]
    moved = False
    for node in program.nodes:
        for values in wide:
            values[node] = program.call(node, values)
        reader = by_node.get(node)
        if reader is not None and (moved or not bool(kept[reader.roots].all())):
            moved = True
            errors[reader.name] = _fit_reader(
                program, reader, kept, wide, narrow, held_out, own, reader.sampled(count, generator)
            )
            for values in narrow:
                program.exchange(values, own, (reader.name, str(reader.constant)))
            step(f"fitting {node.layer or reader.name}")
        for a, b in zip(wide, narrow, strict=True):
            b[node] = program.call(node, b) if moved else a[node]
        for values in (*wide, *narrow):
            program.release(node, values)
    return own, errors


def _fit_reader(
    program: Program,
    reader: Reader,
    kept: Tensor,
    wide: Sequence[Values],
    narrow: Sequence[Values],
    held_out: set[int],
    own: dict[str, Tensor],
    rows: Rows,
) -> float:
    """Fit one weight; `own` gains it and its constant. The error on held-out rows, as a share of the variance."""
    weight = program.graph.tensors[reader.name]
    device = weight.device
    mask = kept[reader.columns]
    lengths = mask.sum(1)
    if bool((lengths != lengths[0]).any()):  # groups that are gone: their columns are never read
        mask[lengths == 0] = mask[lengths.argmax()].clone()
    columns = mask.nonzero()[:, 1].reshape(len(mask), -1).to(device)
    view = reader.view(weight).double()
    gain = _gain(program, reader)
    outputs = view.shape[1] if not reader.by_channels else view.shape[2]
    sums = [Moments.empty(len(mask), columns.shape[1], outputs, device) for _ in range(2)]
    stored = []
    for number, (w, n) in enumerate(zip(wide, narrow, strict=True)):
        x = reader.rows_of(rows, n[reader.op.x])
        x = x.gather(2, columns.unsqueeze(1).expand(-1, x.shape[1], -1))
        y = reader.rows_of(rows, w[reader.op.x]) if reader.by_channels else _target(reader, rows, w, n, gain)
        sums[int(number in held_out)].add(x, y)
        if reader.rectified and not reader.by_channels:
            stored.append((int(number in held_out), x, y, _offset(program, reader, rows, n, gain)))
    importance = None if reader.by_channels else gain.square().reshape(len(mask), -1)
    if reader.by_channels:
        identity = torch.eye(view.shape[2], dtype=torch.float64, device=device).unsqueeze(0)
        found = fit(sums[0], sums[1], identity[:, :, columns[0]])
        part = view @ found.weight
    else:
        original = view.gather(2, columns.unsqueeze(1).expand(-1, view.shape[1], -1))
        found = fit(sums[0], sums[1], original, importance)
        slope = gain.reshape(len(mask), 1, -1)
        safe = slope.abs() > SMALL_GAIN * slope.abs().max()
        for _ in range(SWEEPS if stored else 0):
            for total in sums:
                total.forget_targets()
            for part_, x, y, offset in stored:
                made = x @ found.weight.transpose(1, 2).to(x) + found.intercept.unsqueeze(1).to(x)
                off = (slope * y + offset <= 0) & safe
                z = slope * made + offset
                y = torch.where(off, torch.where(z <= 0, made, -offset / slope), y)
                sums[part_].add_targets(x, y)
            found = fit(sums[0], sums[1], original, importance)
        part = found.weight
    new = torch.zeros_like(view).scatter_(2, columns.unsqueeze(1).expand(-1, view.shape[1], -1), part)
    own[reader.name] = reader.restore(new).to(weight.dtype)
    constant = found.intercept.reshape(-1) if not reader.by_channels else None
    if constant is None:  # whatever the borders do, the outputs have the right mean
        constant = _mean_error(program, reader, rows, wide, narrow, gain, own[reader.name])
    with_constant(reader, program, own, constant, replace=True)
    return found.error


def _gain(program: Program, reader: Reader) -> Tensor:
    """(O,) by what the batch norm behind multiplies the outputs; 1 where there is none."""
    outputs = reader.outputs.numel()
    norm = reader.norm
    device = program.graph.tensors[reader.name].device
    if norm is None:
        return torch.ones(outputs, device=device)
    variance = program.graph.tensors[str(norm.variance.tensor)]
    weight = 1.0 if norm.weight is None else program.graph.tensors[str(norm.weight.tensor)]
    return weight / (variance + norm.eps).sqrt()


def _target(reader: Reader, rows: Rows, wide: Values, narrow: Values, gain: Tensor) -> Tensor:
    """(G, r, O/G): what the wide weight writes, and what the stream that it is added to lacks."""
    y = wide[reader.node]
    if reader.other is not None and reader.other in narrow and reader.other in wide:
        missing = wide[reader.other] - narrow[reader.other]
        divisor = torch.where(gain.abs() > SMALL_GAIN * gain.abs().max(), gain, math.inf)
        shape = [1] * y.ndim
        shape[reader.op.layout.axis] = -1
        y = y + missing / divisor.reshape(shape)
    return rows.output(y)


def _offset(program: Program, reader: Reader, rows: Rows, narrow: Values, gain: Tensor) -> Tensor:
    """(G, r, O/G) or broadcastable: the ReLU reads gain * output + this."""
    shift = torch.zeros_like(gain)
    if reader.norm is not None:
        shift = -gain * program.graph.tensors[str(reader.norm.mean.tensor)]
        if reader.norm.bias is not None:
            shift = shift + program.graph.tensors[str(reader.norm.bias.tensor)]
    offset = shift.reshape(reader.outputs.shape[0], 1, -1)
    return offset + rows.output(narrow[reader.other]) if reader.other is not None else offset


def _mean_error(
    program: Program,
    reader: Reader,
    rows: Rows,
    wide: Sequence[Values],
    narrow: Sequence[Values],
    gain: Tensor,
    weight: Tensor,
) -> Tensor:
    """(O,) what the outputs lack on average with the new weight and no constant."""
    total: Any = 0.0
    for w, n in zip(wide, narrow, strict=True):
        values = dict(n)
        own = {reader.name: weight}
        if reader.bias is not None:
            own[reader.bias] = torch.zeros_like(program.graph.tensors[reader.bias])
        program.exchange(values, own, own)
        made = rows.output(program.call(reader.node, values)).double()
        total = total + (_target(reader, rows, w, n, gain).double() - made).mean(1).reshape(-1)
    return total / len(wide)


def answers_of(
    program: Program, chunks: Iterable[Sequence[Tensor]], own: Mapping[str, Tensor]
) -> list[list[Tensor]]:
    """The outputs on every chunk."""
    return [program.finish(program.begin(chunk, own), {}) for chunk in chunks]
