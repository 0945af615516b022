"""What the outputs depend on, and what each width costs.

    moments        the covariance of what every weight reads, on the wide network
    importances    G = E[g g'], g the gradient of the output's log-likelihood (labels drawn from the network's own
                   answer) at a weight's outputs: the Fisher metric, label-free
    curves         for every space: in which order its channels go (`projection.eliminate`), and the divergence
                   of the outputs, measured end to end, with this space alone narrowed to each of several widths

Narrowed networks run in wide shapes here, with zero weights for what went: it is the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.calibrate import Program, Rows
from ep_prune.divergence import divergence, own_answer_loss
from ep_prune.errors import InputError
from ep_prune.graph import Node
from ep_prune.projection import Moments, Reading, eliminate, through, weighted
from ep_prune.readers import Free, Reader, reads
from ep_prune.structure import Structure

FRACTIONS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Widths at which a space is measured, as shares of its channels."""
FORWARDS = 15_000
"""Samples run through the whole network, at most, to measure all curves; those run through its end count in
part."""
Chunks = Sequence[Sequence[Tensor]]
Step = Callable[[str], None]


def silent(_: str) -> None:
    """No progress is shown."""
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
        """(steps + 1,) the divergence once 0, 1, ... channels are gone: measured where it was, elsewhere by
        `costs`."""
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
    program: Program, readers: Sequence[Reader], chunks: Chunks, seed: int, step: Step = silent
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
    program: Program, readers: Sequence[Reader], chunks: Chunks, seed: int, step: Step = silent
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
                    raise InputError(
                        "no floating output follows from the weights: let the model return its scores"
                    )
                return {}
            found = torch.autograd.grad(loss, [value for _, value in reached], allow_unused=True)
        for (reader, value), gradient in zip(reached, found, strict=True):
            whole = Rows(reader.node, reader.op, value.numel(), generator)
            rows = whole.output(torch.zeros_like(value) if gradient is None else gradient).double()
            rows = rows.nan_to_num(0.0, 0.0, 0.0)
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
    place = torch.full((int(max(columns.max(), free.max())) + 1,), -1)
    place[free] = torch.arange(len(free))
    number = place[columns]
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
    step: Step = silent,
    fractions: Sequence[float] = FRACTIONS,
    known: Mapping[str, Curve] | None = None,
    keep: Callable[[Curve], None] | None = None,
) -> list[Curve]:
    """One for each space that something reads, measured on the last chunks, as many as `FORWARDS` allows, from
    where it is first read. known: those that need not be measured, by the space's name; keep: takes the others."""
    graph = program.graph
    first: dict[Node, list[tuple[Free, list[Reader]]]] = {}
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
            if known is not None and space.name in known:
                found.append(known[space.name])
                continue
            readings = [
                _reading(r, space.roots, covariances[r.name], metrics[r.name], graph.tensors[r.name])
                for r in [r for r in readers if not r.depthwise] or readers
            ]
            count = len(space.roots)
            whole = bool(torch.isin(space.longest, space.roots).all())
            whole &= space.name not in structure.branches
            order, costs = eliminate(readings, at_least=1 if whole else 0)
            each, least = 1, int(whole)
            if space.sections is not None:
                each = least = int(space.sections.max()) + 1
                order, costs = in_turn(order, costs, space.sections)
            shares = [*fractions, 0.0] if space.name in structure.branches else fractions
            widths = sorted({max(least, each * round(f * count / each)) for f in shares} - {count}, reverse=True)
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
            if keep is not None:
                keep(found[-1])
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
