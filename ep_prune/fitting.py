"""The fit: all weights of a narrow network, one after the other in the order in which they run.

Each is fitted to what the wide network writes there, from what the narrow network has there to read, so that
earlier errors are corrected and do not add up. Where the output is added to a residual stream, the target is the
wide stream less what the narrow one already holds. Where a ReLU comes next, errors below zero do not count: with z
the wide value, the loss is (u - z)^2 for z > 0 and max(u, 0)^2 elsewhere. It is convex; each sweep minimizes a
quadratic that lies above it and touches it at the last u, a least-squares problem with the same matrix.

The narrow network runs in wide shapes here, with zero weights for what went: it is the same function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ep_prune.calibrate import Program, Rows, Values
from ep_prune import pairs as pairs_
from ep_prune.curves import Chunks, Step, silent, with_constant
from ep_prune.projection import Moments, fit
from ep_prune.readers import Reader, Structure

SMALL_GAIN = 1e-2
"""Of a batch norm's largest gain: where it is smaller, errors of the residual stream are not corrected through
it."""
SWEEPS = 4
"""Of the fit to a rectified output (`_fit_reader`)."""


def fitted(
    program: Program,
    structure: Structure,
    kept: Tensor,
    chunks: Chunks,
    seed: int,
    step: Step = silent,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """All weights of the narrow network, in wide shapes, and the error of each on held-out rows (share of
    variance)."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(chunk[0]) for chunk in chunks)
    held_out = set(range(len(chunks) - max(1, len(chunks) // 5), len(chunks)))
    own: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    by_node = {r.node: r for r in structure.readers if not r.kept_whole}
    wide = [program.begin(chunk, {}) for chunk in chunks]
    narrow = [program.begin(chunk, {}) for chunk in chunks]
    moved = False
    found = pairs_.pairs(program, [r for r in structure.readers if not r.kept_whole]) if PAIRS else {}
    firsts = {p.first.node: p for p in found.values()}
    inputs: dict[str, list[Tensor]] = {}
    known: dict[str, tuple[Tensor, Tensor]] = {}
    for node in program.nodes:
        for values in wide:
            values[node] = program.call(node, values)
        reader = by_node.get(node)
        if reader is not None and (moved or not bool(kept[reader.roots].all())):
            moved = True
            rows = reader.sampled(count, generator)
            errors[reader.name] = _fit_reader(program, reader, kept, wide, narrow, held_out, own, rows, known)
            if node in firsts:
                inputs[reader.name] = [n[reader.op.x] for n in narrow]
            if node in found and found[node].first.name in inputs:
                _improve(program, structure, found[node], kept, own, wide, narrow, held_out, inputs.pop(found[node].first.name), known)
                errors[reader.name] = _fit_reader(program, reader, kept, wide, narrow, held_out, own, rows, known)
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
    known: dict[str, tuple[Tensor, Tensor]] | None = None,
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
    if known is not None and len(mask) == 1:
        covariance, _, mean, _, _ = (sums[0] + sums[1]).centred()
        known[reader.name] = covariance[0], mean[0]
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


def _residual(program: Program, reader: Reader, kept: Tensor, own: dict[str, Tensor], w: Values, n: Values, gain: Tensor):
    device = gain.device
    outputs = kept[reader.outputs.reshape(-1)].nonzero().squeeze(1).to(device)
    axis = reader.op.layout.axis
    y = w[reader.node]
    shape = [1] * y.ndim
    shape[axis] = -1
    if reader.other is not None and reader.other in n and reader.other in w:
        divisor = torch.where(gain.abs() > SMALL_GAIN * gain.abs().max(), gain, math.inf)
        y = y + (w[reader.other] - n[reader.other]) / divisor.reshape(shape)
    y = y.index_select(axis, outputs)
    slope = gain.index_select(0, outputs).reshape(shape)
    extra = 0.0
    if reader.mean is not None:
        extra = (program.graph.tensors[reader.mean] - own[reader.mean]).index_select(0, outputs).reshape(shape)
    if not reader.rectified:
        return lambda u: slope * (u + extra - y)
    shift = torch.zeros_like(gain)
    if reader.norm is not None:
        shift = -gain * program.graph.tensors[str(reader.norm.mean.tensor)]
        if reader.norm.bias is not None:
            shift = shift + program.graph.tensors[str(reader.norm.bias.tensor)]
    offset = shift.index_select(0, outputs).reshape(shape)
    if reader.other is not None:
        offset = offset + n[reader.other].index_select(axis, outputs)
    z = slope * y + offset
    on = z > 0

    def residual(u: Tensor) -> Tensor:
        made = slope * (u + extra) + offset
        return torch.where(on, made - z, made.relu())

    return residual


def _improve(program, structure, pair, kept, own, wide, narrow, held_out, inputs, known) -> None:
    first, second = pair.first, pair.second
    block = pairs_.Block(program, structure, pair, kept, own)
    gain = _gain(program, second)
    size = len(inputs[0])
    fit_on = [k for k in range(len(inputs)) if k not in held_out][: max(1, pairs_.IMAGES // size)]
    test_on = sorted(held_out)[: max(1, pairs_.IMAGES // 2 // size)]
    picked = lambda ks: [inputs[k].index_select(first.op.layout.axis, block.inputs) for k in ks]
    targets = lambda ks: [_residual(program, second, kept, own, wide[k], narrow[k], gain) for k in ks]
    weight, constant, before, after = pairs_.improve(block, picked(fit_on), targets(fit_on), picked(test_on), targets(test_on), *known[first.name])
    if VERBOSE:
        print(first.name, f"{before:.4g} -> {after:.4g} ({after / before:.3f})", flush=True)
    if after >= before:
        return
    device = weight.device
    rows = kept[first.outputs.reshape(-1)].nonzero().squeeze(1).to(device)
    wide_weight = torch.zeros_like(own[first.name])
    wide_weight[rows.unsqueeze(1), block.inputs] = weight
    own[first.name] = wide_weight
    name = str(first.constant)
    whole = own[name].clone()
    whole[rows] += constant if first.mean is None else -constant
    own[name] = whole
    for n, x in zip(narrow, inputs, strict=True):
        program.exchange(n, own, (first.name, name))
        values = dict(n)
        values[first.op.x] = x
        for node in (first.node, *pair.between):
            values[node] = program.call(node, values)
        n[second.op.x] = values[second.op.x]


PAIRS = True
VERBOSE = False
