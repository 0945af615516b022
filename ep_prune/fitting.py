"""The fit: all weights of a narrow network, one after the other in the order in which they run.

Each is fitted to what the wide network writes there, from what the narrow network has there to read, so that
earlier errors are corrected and do not add up. Where the output is added to a residual stream, the target is the
wide stream less what the narrow one already holds. Where a ReLU comes next, errors below zero do not count: with z
the wide value, the loss is (u - z)^2 for z > 0 and max(u, 0)^2 elsewhere. It is convex; each sweep minimizes a
quadratic that lies above it and touches it at the last u, a least-squares problem with the same matrix.

Where a weight alone reads what another makes, both are moved together once they are fitted (`pairs`,
`gauss_newton`), and the second is fitted again.

The narrow network runs in wide shapes here, with zero weights for what went: it is the same function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.branches import inside
from ep_prune.calibrate import Program, Rows, Values
from ep_prune.curves import Chunks, Step, silent, with_constant
from ep_prune.gauss_newton import Residual, improved
from ep_prune.graph import Node
from ep_prune.pairs import Block, Pair, pairs_of
from ep_prune.projection import Fit, Moments, fit
from ep_prune.readers import Reader
from ep_prune.structure import Structure

SMALL_GAIN = 1e-2
"""Of a batch norm's largest gain: where it is smaller, errors of the residual stream are not corrected through
it."""
SWEEPS = 4
"""Of the fit to a rectified output (`_fit_reader`)."""
Spread = tuple[Tensor, Tensor]
"""Covariance (P, P) and mean (P,) of what a weight reads."""


@dataclass(frozen=True, eq=False)
class Reads:
    """What the first weight of a pair reads, until the second is there: inputs by chunk, and their moments."""

    inputs: list[Tensor]
    spread: Spread


def fitted(
    program: Program,
    structure: Structure,
    kept: Tensor,
    chunks: Chunks,
    seed: int,
    step: Step = silent,
    distinct: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All weights of the narrow network, in wide shapes, and the error of each on held-out rows (share of
    variance). distinct: after so many chunks come copies of the same samples (`augment`); None: there are none."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(chunk[0]) for chunk in chunks)
    distinct = distinct or len(chunks)
    held_out = {k for k in range(len(chunks)) if k % distinct >= distinct - max(1, distinct // 5)}
    own: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    by_node = {r.node: r for r in structure.readers if not r.kept_whole}
    wide = [program.begin(chunk, {}) for chunk in chunks]
    narrow = [program.begin(chunk, {}) for chunk in chunks]
    pairs = pairs_of(program, list(by_node.values()))
    firsts = {pair.first.node: pair for pair in pairs.values()}
    read: dict[Node, Reads] = {}
    moved = False
    gone = structure.vanished(kept)
    lasts = {branch.last for branch in gone}
    for node in program.nodes:
        for values in wide:
            values[node] = program.call(node, values)
        reader = by_node.get(node)
        read_on = reader is not None and (reader in lasts or not inside(gone, reader.name))
        wanted = reader is not None and read_on and (moved or not bool(kept[reader.roots].all()))
        if reader is not None and read_on and (wanted or _lends(reader, firsts, kept)):
            moved = moved or wanted
            rows = reader.sampled(count, generator)
            found, spread = _fit_reader(program, reader, kept, wide, narrow, held_out, own, rows)
            if node in pairs and (before := read.pop(pairs[node].first.node, None)) is not None:
                step(f"moving {pairs[node].first.node.layer or pairs[node].first.name}")
                block = Block(program, structure, pairs[node], kept, own)
                if _move_pair(program, block, own, wide, narrow, held_out, before, spread, generator):
                    found, spread = _fit_reader(program, reader, kept, wide, narrow, held_out, own, rows)
            if node in firsts:
                read[node] = Reads([values[reader.op.x] for values in narrow], spread)
            if wanted:
                errors[reader.name] = found.error
            for values in narrow:
                program.exchange(values, own, (reader.name, str(reader.constant)))
            step(f"fitting {node.layer or reader.name}")
        for a, b in zip(wide, narrow, strict=True):
            b[node] = program.call(node, b) if moved else a[node]
        for values in (*wide, *narrow):
            program.release(node, values)
    return own, errors


def _lends(reader: Reader, firsts: Mapping[Node, Pair], kept: Tensor) -> bool:
    """Whether a weight that lacks nothing itself is fitted, to itself, because the next one lacks something.

    One that would gain a bias by that is left alone (`Structure.size` does not count it)."""
    pair = firsts.get(reader.node)
    return pair is not None and reader.new_bias is None and not bool(kept[pair.second.roots].all())


def _fit_reader(
    program: Program,
    reader: Reader,
    kept: Tensor,
    wide: Sequence[Values],
    narrow: Sequence[Values],
    held_out: set[int],
    own: dict[str, Tensor],
    rows: Rows,
) -> tuple[Fit, Spread]:
    """Fit one weight; `own` gains it and its constant."""
    weight = program.graph.tensors[reader.name]
    device = weight.device
    mask = kept[reader.columns]
    lengths = mask.sum(1)
    if bool((lengths != lengths[0]).any()):  # groups that are gone: their columns are never read
        mask[lengths == 0] = mask[lengths.argmax()].clone()
    columns = mask.nonzero()[:, 1].reshape(len(mask), int(lengths.max())).to(device)
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
    covariance, _, mean, _, _ = (sums[0] + sums[1]).centred()
    return found, (covariance[0], mean[0])


def _move_pair(
    program: Program,
    block: Block,
    own: dict[str, Tensor],
    wide: Sequence[Values],
    narrow: Sequence[Values],
    held_out: set[int],
    first: Reads,
    second: Spread,
    generator: torch.Generator,
) -> bool:
    """Move both weights of a pair together, and let the second read what comes of it; whether anything changed."""
    pair, inputs = block.pair, first.inputs
    gain = _gain(program, pair.second)
    fitted_on = [k for k in range(len(inputs)) if k not in held_out]
    count = pair.chunks(len(inputs[0]))

    def some(chunks: Sequence[int]) -> list[tuple[Tensor, Residual]]:
        return [(block.input(inputs[k]), _residual(program, block, own, wide[k], narrow[k], gain)) for k in chunks]

    data, held = some(fitted_on[:count]), some(sorted(held_out)[: max(count // 3, 1)])
    moved = improved(block, block.start(), data, held, (first.spread, second), generator)
    if moved is None:
        return False
    block.write(own, moved)
    for values, x in zip(narrow, inputs, strict=True):
        program.exchange(values, own, (pair.first.name, str(pair.first.constant)))
        between = {**values, pair.first.op.x: x}
        for node in (pair.first.node, *pair.between):
            between[node] = program.call(node, between)
        values[pair.second.op.x] = between[pair.second.op.x]
    return True


def _residual(
    program: Program, block: Block, own: dict[str, Tensor], wide: Values, narrow: Values, gain: Tensor
) -> Residual:
    """What is wrong with the outputs of a pair's second weight, as the loss of its own fit counts it."""
    reader, outputs = block.pair.second, block.parts[1].rows
    axis = reader.op.layout.axis

    def shaped(vector: Tensor, like: Tensor) -> Tensor:
        """A value a channel, of the kept ones, along the channels' axis."""
        return vector[outputs].reshape([-1 if k == axis else 1 for k in range(like.ndim)])

    target = _whole_target(reader, wide, narrow, gain).index_select(axis, outputs)
    slope = shaped(gain, target)
    if reader.mean is not None:  # the constant of the fit stands behind the outputs
        target = target - shaped(program.graph.tensors[reader.mean] - own[reader.mean], target)
    if not reader.rectified:
        return lambda made: slope * (made - target)
    shift = own[reader.mean] if reader.mean is not None else None
    offset = shaped(_shift(program, reader, gain, shift), target)
    if reader.other is not None:
        offset = offset + narrow[reader.other].index_select(axis, outputs)
    asked = slope * target + offset

    def residual(made: Tensor) -> Tensor:
        found = slope * made + offset
        return torch.where(asked > 0, found - asked, found.relu())

    return residual


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


def _whole_target(reader: Reader, wide: Values, narrow: Values, gain: Tensor) -> Tensor:
    """What the wide weight writes, and what the stream that it is added to lacks; in the outputs' own shape."""
    y: Tensor = wide[reader.node]
    if reader.other is not None and reader.other in narrow and reader.other in wide:
        missing = wide[reader.other] - narrow[reader.other]
        divisor = torch.where(gain.abs() > SMALL_GAIN * gain.abs().max(), gain, math.inf)
        shape = [1] * y.ndim
        shape[reader.op.layout.axis] = -1
        y = y + missing / divisor.reshape(shape)
    return y


def _target(reader: Reader, rows: Rows, wide: Values, narrow: Values, gain: Tensor) -> Tensor:
    """(G, r, O/G) of `_whole_target`."""
    return rows.output(_whole_target(reader, wide, narrow, gain))


def _shift(program: Program, reader: Reader, gain: Tensor, mean: Tensor | None = None) -> Tensor:
    """(O,) what the batch norm behind adds to the outputs, scaled by the gain; `mean`: in place of its own."""
    if reader.norm is None:
        return torch.zeros_like(gain)
    tensors = program.graph.tensors
    shift = -gain * (tensors[str(reader.norm.mean.tensor)] if mean is None else mean)
    return shift if reader.norm.bias is None else shift + tensors[str(reader.norm.bias.tensor)]


def _offset(program: Program, reader: Reader, rows: Rows, narrow: Values, gain: Tensor) -> Tensor:
    """(G, r, O/G) or broadcastable: the ReLU reads gain * output + this."""
    offset = _shift(program, reader, gain).reshape(reader.outputs.shape[0], 1, -1)
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
    total = torch.zeros(reader.outputs.numel(), dtype=torch.float64, device=weight.device)
    for w, n in zip(wide, narrow, strict=True):
        values = dict(n)
        own = {reader.name: weight}
        if reader.bias is not None:
            own[reader.bias] = torch.zeros_like(program.graph.tensors[reader.bias])
        program.exchange(values, own, own)
        made = rows.output(program.call(reader.node, values)).double()
        total = total + (_target(reader, rows, w, n, gain).double() - made).mean(1).reshape(-1)
    return total / len(wide)
