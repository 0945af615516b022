"""Offsets carried through each operation, and the wide parameters that follow.

batch norm   g' (x' - m') / s' + b' = d (g (x - m) / s + b) + e, with m' and s' at random
weights      forward condition: W' T = R, with R = diag(d) W[pi], and W' t = 0 on taps that can fall on zero
             padding; through the other taps the bias takes -W' t. With A = [T, t] and any left inverse A' of it,
             W' = R A' + Z (1 - A A'), Z at random.
             backward condition: B_out' W' = W B_in', for which A' = B_in' and Z is kept from the left by
             1 - T_out B_out'. Without Z, W' = T_out W B_in': a splitting or null embedding
depthwise    wide channel j reads wide channel j: W'_j = W_pi(j) d_out / d_in
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import torch
from torch import Tensor

from ep_prune.graph import (
    Cat,
    Contract,
    Extreme,
    Item,
    Move,
    Node,
    Normalize,
    Operation,
    Pass,
    Pointwise,
    Product,
    Slope,
    Standardize,
    Stencil,
    Sum,
)
from ep_prune.widen_rules.state import Wide, Widening, required


@singledispatch
def settle(op: Operation, node: Node, w: Widening) -> None:
    """Carry the offsets through an operation, and write its wide parameters. Raises `Stuck`."""


@settle.register(Pass)
@settle.register(Item)
@settle.register(Stencil)
@settle.register(Extreme)
def _(op: Pass | Item | Stencil | Extreme, node: Node, w: Widening) -> None:
    w.wide[node].e = w.wide[op.x].offset


@settle.register(Move)
@settle.register(Cat)
def _(op: Move | Cat, node: Node, w: Widening) -> None:
    e = torch.zeros_like(w.wide[node].d)
    for x, out, into in w.moved[node]:
        e[out] = w.wide[x].offset[into]
    w.wide[node].e = e


@settle.register
def _(op: Sum, node: Node, w: Widening) -> None:
    """(d x + e) + alpha (d y + f) = d (x + alpha y) + e + alpha f; a number c adds (1 - d) c."""
    rows = w.wide[node]
    e = torch.zeros_like(rows.d)
    for side, alpha in ((op.x, 1.0), (op.y, op.alpha)):
        constant = w.number(side)
        if constant is not None:
            e = e + alpha * constant * (1 - rows.d)
        elif isinstance(side, Node):
            e = e + alpha * w.wide[side].offset
    rows.e = e


@settle.register
def _(op: Product, node: Node, w: Widening) -> None:
    rows = w.wide[node]
    factor = w.factor(op)
    tensors = [side for side in (op.x, op.y) if isinstance(side, Node) and side in w.wide]
    if factor is not None:
        rows.e = w.wide[tensors[0]].offset * factor
        return
    for side in tensors:
        w.need(side, torch.zeros_like(rows.d))
    rows.e = torch.where(rows.null, w.wide[tensors[0]].offset * w.wide[tensors[1]].offset, 0.0)


@settle.register
def _(op: Pointwise, node: Node, w: Widening) -> None:
    x, rows = w.wide[op.x], w.wide[node]
    w.need(op.x, required(op, x))
    level = (op.symmetry.center or (0.0, 0.0))[1]
    rows.e = torch.where(rows.null, op.function(x.offset), level * (1 - rows.d))


@settle.register
def _(op: Slope, node: Node, w: Widening) -> None:
    x, rows = w.wide[op.x], w.wide[node]
    w.need(op.x, torch.zeros_like(x.d))
    slope = w.tensor(op.slope)
    if slope.numel() > 1:
        slope = _pulled(slope, rows, w.draws.uniform(f"{node.name} slope", len(rows.d)).abs())
        w.new[str(op.slope.tensor)] = slope
    rows.e = x.offset.clamp_min(0) + slope * x.offset.clamp_max(0)


@settle.register
def _(op: Normalize, node: Node, w: Widening) -> None:
    """g' (x' - m') / s' + b' = d (g (x - m) / s + b) + e: s' and m' at random, g' and b' follow."""
    x, rows = w.wide[op.x], w.wide[node]
    assert op.weight is not None and op.bias is not None
    count = len(rows.d)
    gain, shift, mean, variance = (
        _pulled(w.tensor(part), rows, other)
        for part, other in (
            (op.weight, w.draws.normal(f"{node.name} gain", count)),
            (op.bias, w.draws.normal(f"{node.name} shift", count)),
            (op.mean, w.draws.normal(f"{node.name} mean of nulls", count, fixed=True)),
            (op.variance, 2 ** w.draws.uniform(f"{node.name} variance of nulls", count, fixed=True)),
        )
    )
    e = w.produce(node)
    # Other moments mean another mix of gain and shift: their gradients vanish together only if both are trained.
    # And four times the variance must fit into the type.
    trained = not ({op.weight.tensor, op.bias.tensor} & w.untrained)
    fits = float(variance.max()) * 4 < torch.finfo(w.n.graph.tensors[str(op.variance.tensor)].dtype).max
    varied = w.general and fits and (trained or not w.critical)
    moments = [
        draw(f"{node.name} {name}", count, vary=varied, fixed=True)
        for draw, name in ((w.draws.uniform, "variance"), (w.draws.normal, "mean"))
    ]
    wide_variance = variance * 4 ** moments[0]
    deviation, wide_deviation = (variance + op.eps).sqrt(), (wide_variance + op.eps).sqrt()
    anything = x.offset.isnan()
    e_in = x.offset.nan_to_num(0.0)
    wide_mean = x.d * mean + e_in + 0.5 * moments[1] * wide_deviation
    into = torch.where(rows.null, 1.0, x.d)
    wide_gain = torch.where(rows.null, gain, rows.d * gain * wide_deviation / (deviation * into))
    wide_gain = torch.where(anything, 0.0, wide_gain)
    constant = torch.where(rows.null, e, rows.d * (shift - gain * mean / deviation) + e)
    wide_shift = constant - wide_gain * (e_in - wide_mean) / wide_deviation
    for part, value in zip(
        (op.weight, op.bias, op.mean, op.variance), (wide_gain, wide_shift, wide_mean, wide_variance), strict=True
    ):
        w.new[str(part.tensor)] = value
    rows.e = e


@settle.register
def _(op: Standardize, node: Node, w: Widening) -> None:
    """Every channel r times: the moments are those of the narrow network. g' = d g, b' = d b + e."""
    rows = w.wide[node]
    w.need(op.x, torch.zeros_like(rows.d))
    assert op.weight is not None and op.bias is not None
    rows.e = w.produce(node)
    w.new[str(op.weight.tensor)] = rows.d * w.tensor(op.weight)[rows.source]
    w.new[str(op.bias.tensor)] = rows.d * w.tensor(op.bias)[rows.source] + rows.e


def _pulled(narrow: Tensor, rows: Wide, otherwise: Tensor) -> Tensor:
    return torch.where(rows.null, otherwise, narrow[rows.source.clamp_min(0)])


@settle.register
def _(op: Contract, node: Node, w: Widening) -> None:
    x, rows = w.wide.get(op.x), w.wide.get(node)
    weight = op.layout.canonical(w.tensor(op.weight))
    if op.layout.groups > 1:
        assert x is not None and rows is not None
        wide = _depthwise(op, node, w, weight, x, rows)
    else:
        wide = _dense(op, node, w, weight[0], x, rows).unsqueeze(0)
    kernel = tuple((op.weight.shape or ())[2:])
    w.new[str(op.weight.tensor)] = op.layout.original(wide, kernel).contiguous()


def _dense(op: Contract, node: Node, w: Widening, weight: Tensor, x: Wide | None, rows: Wide | None) -> Tensor:
    """W' (N_out, N_in, taps): the forward condition and, in critical mode, the backward one."""
    outputs, inputs, taps = weight.shape
    scale = torch.ones(outputs, dtype=torch.float64) if rows is None else rows.d
    target = weight if rows is None else weight[rows.source.clamp_min(0)] * scale.reshape(-1, 1, 1)
    anything = torch.zeros(len(scale), dtype=torch.bool)
    if rows is not None and w.general and w.before_norm(node):
        anything = rows.null & w.draws.chance(f"{node.name} anything", len(scale), 0.3)
    t = torch.zeros(inputs, dtype=torch.float64) if x is None else x.offset
    if x is not None and not (w.critical or w.mode.mixed):
        t = torch.where(x.null, 0.0, t)  # nothing reads the nulls
    passes = torch.tensor(op.layout.interior) & w.has_room(op, node)
    size = weight.square().mean().sqrt()
    draw = w.draws.normal(f"{node.name} mix", len(scale), len(t), taps, vary=w.mode.mixed) * size
    if w.critical:
        draw = _unseen_behind(draw, rows, outputs)
    wide = torch.empty_like(draw)
    for some, cancels in ((passes, False), (~passes, bool((t.abs() > 1e-14).any()))):
        if not bool(some.any()):
            continue
        wanted = target[:, :, some].transpose(1, 2)
        part = draw[:, :, some].transpose(1, 2)
        if x is None:
            part = wanted
        else:
            inverse = _left_inverse(x, t if cancels else None, inputs, node, op, w)
            for _ in range(3):  # the second and third pass remove the rounding of the first
                part = part + inverse(wanted - x.times(part, inputs), -part @ t)
        wide[:, :, some] = part.transpose(1, 2)
    wide = torch.where(wide.abs() <= 1e-14 * _scale(wide, draw, x), 0.0, wide)  # zero but for rounding
    wide[anything] = w.draws.normal(f"{node.name} junk", *wide.shape)[anything] * size
    sent = torch.einsum("oit,i->o", wide[:, :, passes], t)
    if rows is not None:
        rows.e = w.produce(node) if op.bias is not None else torch.where(passes.any(), sent, 0.0)
        rows.e[anything] = torch.nan
    if op.bias is not None:
        bias = w.tensor(op.bias)
        if rows is not None:
            bias = torch.where(rows.null, 0.0, bias[rows.source.clamp_min(0)] * scale) + rows.offset.nan_to_num(
                0.0
            )
        w.new[str(op.bias.tensor)] = bias - torch.where(anything, 0.0, sent)
    return wide


def _scale(wide: Tensor, draw: Tensor, x: Wide | None) -> Tensor:
    """(N_out, N_in, 1): the size that an entry of a weight (N_out, N_in, taps) has by its row and its column.

    A row that is all rounding is measured by the numbers it was drawn from, a copy that is by the other copies of
    its channel, a null by the other nulls.
    """
    rows = torch.maximum(wide.abs(), draw.abs()).amax((1, 2))
    columns = wide.abs().amax((0, 2))
    if x is not None:
        channel = x.source + 1
        most = torch.zeros(int(channel.max()) + 1, dtype=torch.float64)
        size = x.size_of_copies()
        columns = most.scatter_reduce_(0, channel, columns * size, "amax")[channel] / size
    return torch.minimum(rows.unsqueeze(1), columns).unsqueeze(2)


def _unseen_behind(draw: Tensor, rows: Wide | None, outputs: int) -> Tensor:
    """(1 - T B') Z for the outputs: what no gradient from behind sees."""
    if rows is None:
        return torch.zeros_like(draw)
    flat = draw.flatten(1).T
    return draw - rows.gather(rows.add_up(flat, rows.shares_over_scales(), outputs)).T.reshape(draw.shape)


def _left_inverse(
    x: Wide, t: Tensor | None, k: int, node: Node, op: Contract, w: Widening
) -> Callable[[Tensor, Tensor], Tensor]:
    """A' with A' A = 1 for A = T, or [T, t]: the one of the backward condition, or the shortest one.

    It is applied from the right to q (..., k) and, where there is t, to one more column (...). Each row of T has
    one entry at most, so that T' T is diagonal, and no dense inverse is needed: A' comes from T' and from the part
    r of t that no combination of channels makes.
    """
    if w.critical:
        if t is not None:
            raise w.stuck_at(node, op.x, reason="a constant that neither vanishes nor has a bias", may_calm=True)
        entries, source = x.shares_over_scales(), x.source.clamp_min(0)
        return lambda q, _: q[..., source] * entries
    squares = x.squares(k)
    if t is None:
        _check_condition(squares.min().sqrt(), squares.max().sqrt(), torch.tensor(torch.inf), node, op, w)
        return lambda q, _: x.gather(q / squares)
    size = t.norm()
    c = x.times(t / size, k) / squares
    rest = t / size - x.gather(c)
    length = rest.square().sum()
    _check_condition(squares.min().sqrt(), squares.max().sqrt(), length.sqrt(), node, op, w)
    return lambda q, last: x.gather(q / squares) + (last / size - q @ c).unsqueeze(-1) * (rest / length)


def _check_condition(least: Tensor, most: Tensor, rest: Tensor, node: Node, op: Contract, w: Widening) -> None:
    """|A| |A'| by a bound: the sizes of T's columns, and of what the constants' column adds to them."""
    inverse = (1 + 1 / rest) / least + 1 / rest
    if not float(inverse * most.clamp_min(1.0 if rest.isfinite() else 0.0)) <= 1e4:
        raise w.stuck_at(node, op.x, reason="constants too small to cancel one another", may_calm=True)


def _depthwise(op: Contract, node: Node, w: Widening, weight: Tensor, x: Wide, rows: Wide) -> Tensor:
    """(N, m, 1, taps): wide channel j reads wide channel j; a null's weights are zero behind padding."""
    each = weight.shape[1]
    padded = not all(op.layout.interior)
    if padded:
        w.need(op.x, torch.zeros_like(x.d))
    out_d, null = rows.d.reshape(-1, each), x.null
    ratio = out_d / torch.where(null, 1.0, x.d).unsqueeze(1)
    wide = weight[x.source.clamp_min(0)] * ratio.reshape(-1, each, 1, 1)
    junk = w.draws.normal(f"{node.name} junk", *wide.shape) * weight.square().mean().sqrt()
    anything = torch.zeros_like(null)
    free = op.bias is not None or w.before_norm(node)
    if w.general and w.before_norm(node):
        anything = null & w.draws.chance(f"{node.name} anything", len(null), 0.3)
    keep = null & (not padded and free) | anything
    wide = torch.where(keep.reshape(-1, 1, 1, 1), junk, wide)
    sent = torch.where(null & padded, 0.0, 1.0).unsqueeze(1) * (wide.sum((2, 3)) * x.offset.unsqueeze(1))
    if not free and bool((sent != 0).any()):
        raise w.stuck_at(node, op.x, reason="a constant without a bias to go to", may_calm=True)
    sent = sent.reshape(-1)
    rows.e = w.produce(node) if op.bias is not None else sent.clone()
    if op.bias is not None:
        bias = torch.where(rows.null, 0.0, w.tensor(op.bias)[rows.source.clamp_min(0)] * rows.d)
        w.new[str(op.bias.tensor)] = bias + rows.offset - sent
    rows.e[anything.repeat_interleave(each)] = torch.nan
    w.groups[str(op.weight.tensor)] = len(wide)
    return wide
