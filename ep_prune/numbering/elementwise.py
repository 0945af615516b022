"""The algebra of each kind of operation: rows in, rows out.

    Normalize  gain * row + shift                        Sum      entries joined, equal atoms added up
    Pointwise  a new atom per class of rows that are     Product  atoms of pairs, scales multiplied
               equal up to the function's symmetry       Stencil  every atom mapped, constants if kept
    Extreme    a new atom per class of directions        Pad      as Stencil, constants become patterns
    Move       labels moved as data; an atom whose positions are rearranged becomes a new one
    Cat, Split labels joined and cut

The contraction of channels by a weight is in `ports`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor

from ep_prune.channels import Channels, Edge, Rows, along, mix, number
from ep_prune.find import Freedom, Sparse, congruence
from ep_prune.graph import (
    Barrier,
    Choice,
    Extreme,
    Item,
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
from ep_prune.numbering.align import align, index_along, on_axis
from ep_prune.numbering.state import Known, Numbering, Refused, Unknown, Value
from ep_prune.numbering.straight import straight_parts
from ep_prune.slots import Standardized


@singledispatch
def transfer(op: Operation, node: Node, n: Numbering) -> Value:
    """The value of a node, given its kind and the values of its operands. Raises `Refused`."""
    raise Refused(op.reason if isinstance(op, Barrier) else f"no algebra for {type(op).__name__}")


def identity_edge(x: Channels) -> tuple[Edge, ...]:
    """Row i comes from row i."""
    rows = torch.arange(len(x.rows))
    return (Edge(x, rows, rows),)


@transfer.register(Pass)
def _pass(op: Pass, node: Node, n: Numbering) -> Value:
    return n.values[op.x]


@transfer.register(Item)
def _item(op: Item, node: Node, n: Numbering) -> Value:
    value = n.values[op.x]
    if isinstance(value, tuple):
        return value[op.index]
    if isinstance(value, Channels) and op.index == 0:
        if node.shape in (None, value.shape):
            return value
        shape = node.shape or ()  # of several results the operation has no shape of its own
        return n.record(replace(value, shape=shape, edges=identity_edge(value)))
    if isinstance(value, Unknown):
        return Unknown(int(mix(value.number, op.index)), node.shape or (), value.origin)
    raise Refused("a second result, such as the places of a maximum")


@transfer.register(Normalize)
def _normalize(op: Normalize, node: Node, n: Numbering) -> Value:
    x = on_axis(n, op.x, 1)
    place = index_along(x, 1)
    mean, variance = n.tensor(op.mean)[place], n.tensor(op.variance)[place]
    gain = torch.ones_like(mean) if op.weight is None else n.tensor(op.weight)[place]
    bias = torch.zeros_like(mean) if op.bias is None else n.tensor(op.bias)[place]
    for part in (op.weight, op.bias, op.mean, op.variance):
        if part is not None:
            n.slots.unify(n.slots.of(str(part.tensor), 0, (part.shape or (0,))[0])[place], x.slots)
    deviation = (variance + op.eps).sqrt()
    factor = gain / deviation
    eps = n.eps(op.mean)
    rounding = eps * ((factor * x.rows.norm()).square() + bias.square() + (mean * factor).square()).sqrt()
    rows = x.rows.scaled(factor).shifted(bias - mean * factor, torch.where(factor == 0, 0.0, rounding))
    rows = replace(rows, error=torch.where(factor == 0, 0.0, rows.error))
    spread = gain.abs() * (variance / (variance + op.eps)).sqrt()
    return n.record(replace(x, rows=rows, edges=identity_edge(x), mean=bias, deviation=spread))


@transfer.register(Standardize)
def _standardize(op: Standardize, node: Node, n: Numbering) -> Value:
    """What comes out depends on all channels; equal channels come out equal, up to their gain and bias."""
    axis = len(node.args[0].shape) - 1
    x = on_axis(n, op.x, axis)
    reason = f"read by a layer norm, which sees all channels, {node.where}"
    n.sink(x, reason)
    place = index_along(x, axis)
    classes = congruence(Sparse(x.rows, True), Freedom.NONE)
    order = place.argsort()
    n.slots.constraints.append(Standardized(x.slots[order], reason, place[classes.leader[order]]))
    for part in (op.weight, op.bias):
        if part is not None:
            n.slots.unify(n.slots.of(str(part.tensor), 0, len(place))[place], x.slots)
    gain = torch.ones(len(place), dtype=torch.float64) if op.weight is None else n.tensor(op.weight)[place]
    bias = torch.zeros_like(gain) if op.bias is None else n.tensor(op.bias)[place]
    atoms = mix(n.unknown(node).number, classes.leader)
    rounding = n.eps(op.weight) * (gain.square() + bias.square()).sqrt()
    rows = Rows.of_atoms(atoms).scaled(gain).shifted(bias, rounding)
    labels = along(axis, len(x.shape), place.argsort())
    return n.record(Channels(x.shape, labels, rows, x.slots, mean=bias, deviation=gain.abs()))


@transfer.register(Pointwise)
def _pointwise(op: Pointwise, node: Node, n: Numbering) -> Value:
    x = n.values[op.x]
    if isinstance(x, Unknown):
        return Unknown(int(mix(number(op.signature), x.number)), x.shape, x.origin)
    if isinstance(x, Known):
        n.sink(x, f"goes through {node.where}")
        return Known(op.function(x.value))
    if not isinstance(x, Channels):
        raise Refused("several tensors at once")
    shape = op.symmetry
    center, level = shape.center or (0.0, 0.0)
    freedom = Freedom.NONE
    if shape.degree:
        freedom = Freedom.SCALE if shape.even else Freedom.POSITIVE
    elif shape.even or shape.center is not None:
        freedom = Freedom.SIGN
    signature = f"{op.signature} at {_position_shape(x)}"

    def outcome(scale: Tensor) -> Tensor:
        if shape.degree:
            return scale.abs() ** shape.degree
        return scale if shape.center is not None else torch.ones_like(scale)

    bent = x.rows.shifted(torch.tensor(-center))
    straight = straight_parts(op, node, n, x)
    return _new_atoms(n, x, signature, freedom, bent, outcome, level, op.function, straight=straight)


def _new_atoms(
    n: Numbering,
    x: Channels,
    signature: str,
    freedom: Freedom,
    rows: Rows,
    outcome: Callable[[Tensor], Tensor],
    level: float,
    function: Callable[[Tensor], Tensor],
    tag: Tensor | None = None,
    straight: tuple[Tensor, Tensor] | None = None,
) -> Channels:
    """f(row) = outcome(scale) * atom + level on rows that are no constants, f(offset) on those that are.

    straight (n,), (n,): where not NaN, the number that f multiplies the row with; the constant that f is there.
    """
    constant = rows.is_constant()
    some = (~constant).nonzero().squeeze(1)
    size = len(rows)
    atoms = torch.zeros(size, 1, dtype=torch.int64)
    coef = torch.zeros(size, 1, dtype=torch.float64)
    error = rows.error.clone()
    offset = torch.where(constant, function(x.rows.offset), level)
    if len(some):
        found, scale, spread = n.intern(
            signature, Sparse(rows[some], True), freedom, None if tag is None else tag[some]
        )
        atoms[some, 0], coef[some, 0], error[some] = found, outcome(scale), spread
    mean, deviation = _moments(x, function)
    result = Rows(atoms, coef, offset, error)
    if straight is not None:
        gain, value = straight
        result = _choose(~gain.isnan(), x.rows.scaled(gain.nan_to_num(0.0)), result)
        result = _choose(~value.isnan(), Rows.constants(value.nan_to_num(0.0)), result)
    return n.record(replace(x, rows=result, edges=identity_edge(x), mean=mean, deviation=deviation))


def _moments(x: Channels, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of f(mean + deviation z), z standard normal, by Gauss-Hermite quadrature."""
    if not bool(x.mean.isfinite().any()):
        return x.mean, x.deviation
    points, weights = np.polynomial.hermite_e.hermegauss(64)
    weight = torch.tensor(weights / weights.sum())
    values = function(x.mean.unsqueeze(1) + x.deviation.unsqueeze(1) * torch.tensor(points))
    mean = (values * weight).sum(1)
    return mean, ((values - mean.unsqueeze(1)).square() * weight).sum(1).sqrt()


def _position_shape(x: Channels) -> tuple[int, ...]:
    return tuple(size for size, labels in zip(x.shape, x.labels.shape, strict=True) if labels == 1)


@transfer.register(Slope)
def _slope(op: Slope, node: Node, n: Numbering) -> Value:
    x = on_axis(n, op.x, 1)
    slope = n.tensor(op.slope).reshape(-1)
    if len(slope) > 1:
        place = index_along(x, 1)
        n.slots.unify(n.slots.of(str(op.slope.tensor), 0, len(slope))[place], x.slots)
        slope = slope[place]
    slope = slope.expand(len(x.rows))

    def function(values: Tensor) -> Tensor:
        a = slope.reshape(-1, *[1] * (values.ndim - 1))
        return values.clamp_min(0) + a * values.clamp_max(0)

    signature = f"slope at {_position_shape(x)}"
    tag = slope.contiguous().view(torch.int64)
    return _new_atoms(n, x, signature, Freedom.POSITIVE, x.rows, lambda s: s, 0.0, function, tag)


@transfer.register(Sum)
def _sum(op: Sum, node: Node, n: Numbering) -> Value:
    values = [n.values[side] if isinstance(side, Node) else float(side) for side in (op.x, op.y)]
    combined = _without_channels(f"sum {op.alpha}", values, node, n)
    if combined is not None:
        return combined
    x, y, labels, slots, edges = align(n, values, node)
    rows = x.rows.plus(y.rows.scaled(torch.tensor(op.alpha, dtype=torch.float64).expand(len(y.rows))))
    mean = x.mean + op.alpha * y.mean
    deviation = (x.deviation.square() + (op.alpha * y.deviation).square()).sqrt()
    return n.record(Channels(node.shape or (), labels, rows, slots, edges, mean, deviation))


@transfer.register(Product)
def _product(op: Product, node: Node, n: Numbering) -> Value:
    name = "quotient" if op.divide else "product"
    values = [n.values[side] if isinstance(side, Node) else float(side) for side in (op.x, op.y)]
    combined = _without_channels(name, values, node, n)
    if combined is not None:
        return combined
    x, y, labels, slots, edges = align(n, values, node)
    x_fixed, y_fixed = x.rows.is_constant(), y.rows.is_constant()
    if op.divide and bool((y_fixed & (y.rows.offset == 0)).any()):
        raise Refused("division by a channel that is 0")
    factor = torch.where(y_fixed, y.rows.offset, 1.0)
    scaled = x.rows.scaled(1 / factor if op.divide else factor)
    if not op.divide:
        other = y.rows.scaled(torch.where(x_fixed, x.rows.offset, 1.0))
        scaled = _choose(x_fixed & ~y_fixed, other, scaled)
    pair = ~y_fixed if op.divide else ~(x_fixed | y_fixed)
    if bool(pair.any()):
        x_atom, x_scale = _factors(n, x.rows)
        y_atom, y_scale = _factors(n, y.rows)
        if not op.divide:
            x_atom, y_atom = torch.minimum(x_atom, y_atom), torch.maximum(x_atom, y_atom)
        made = Rows.of_atoms(mix(number(name), number(str(node.shape)), x_atom, y_atom))
        made = made.scaled(x_scale / y_scale if op.divide else x_scale * y_scale)
        made = replace(made, error=x.rows.error + y.rows.error)
        scaled = _choose(pair, made, scaled)
    if bool((x_fixed & y_fixed).any()) or not bool(pair.any()):
        gain = torch.where(y_fixed, (1 / factor if op.divide else factor), 1.0)
        mean, deviation = x.mean * gain, x.deviation * gain.abs()
    else:
        mean = deviation = torch.empty(0)
    return n.record(Channels(node.shape or (), labels, scaled, slots, edges, mean, deviation))


def _factors(n: Numbering, rows: Rows) -> tuple[Tensor, Tensor]:
    """Every row as a scale times an interned atom; constants are their value times ONE-like atom 0."""
    atoms = torch.zeros(len(rows), dtype=torch.int64)
    scale = rows.offset.clone()
    some = (~rows.is_constant()).nonzero().squeeze(1)
    if len(some):
        atoms[some], scale[some], _ = n.intern("factor", Sparse(rows[some], True), Freedom.SCALE)
    return atoms, scale


def _choose(mask: Tensor, a: Rows, b: Rows) -> Rows:
    width = max(a.atoms.shape[1], b.atoms.shape[1])
    a, b = a.widened(width), b.widened(width)
    column = mask.unsqueeze(1)
    return Rows(
        torch.where(column, a.atoms, b.atoms),
        torch.where(column, a.coef, b.coef),
        torch.where(mask, a.offset, b.offset),
        torch.where(mask, a.error, b.error),
    ).pruned()


@transfer.register(Choice)
def _choice(op: Choice, node: Node, n: Numbering) -> Value:
    """where(c, s x, s y) = s where(c, x, y): a new atom per condition and class of directions of (x, y)."""
    condition = n.values[op.condition]
    # Two numbers make a tensor of the default type: they are what that type makes of them.
    rounded = [side if isinstance(side, Node) else torch.tensor(side, dtype=node.dtype) for side in (op.x, op.y)]
    values = [n.values[side] if isinstance(side, Node) else float(side) for side in rounded]
    if any(isinstance(value, Channels) for value in values):
        x, y, labels, slots, edges = align(n, values, node)
        pair = n.record(Channels(node.shape or (), labels, _both(x.rows, y.rows), slots, edges))
        both, test, labels, slots, edges = align(n, [pair, condition], node)
        picked = edges[0].into
        first, second, joined = x.rows[picked], y.rows[picked], both.rows
    elif isinstance(condition, Channels):
        (test, x, labels, slots, edges), (_, y, _, tied, more) = (
            align(n, [condition, value], node) for value in values
        )
        n.slots.unify(slots, tied)
        first, second, joined, edges = x.rows, y.rows, _both(x.rows, y.rows), (*edges, *more)
    else:
        combined = _without_channels("choice", [condition, *values], node, n)
        assert combined is not None
        return combined
    question, _ = _factors(n, test.rows)
    some = (~joined.is_constant()).nonzero().squeeze(1)
    atoms = torch.zeros(len(joined), 1, dtype=torch.int64)
    coef = torch.zeros(len(joined), 1, dtype=torch.float64)
    error = joined.error.clone()
    if len(some):
        found = n.intern(f"choice at {node.shape}", Sparse(joined[some], False), Freedom.SCALE, question[some])
        atoms[some, 0], coef[some, 0], error[some] = found
    rows = Rows(atoms, coef, torch.zeros(len(joined), dtype=torch.float64), error)
    decided = _choose(test.rows.offset != 0, first, second)
    rows = _choose(test.rows.is_constant(), decided, rows)
    return n.record(Channels(node.shape or (), labels, rows, slots, edges))


def _both(x: Rows, y: Rows) -> Rows:
    """(x, y) as one row."""
    sides = [rows.with_offset_as_atom().mapped(number(f"choice {k}")) for k, rows in enumerate((x, y))]
    return sides[0].plus(sides[1])


def _without_channels(name: str, values: list[Value | float], node: Node, n: Numbering) -> Value | None:
    """The result where no operand has known channels; None where one has."""
    if any(isinstance(value, tuple) for value in values):
        raise Refused("several tensors at once")
    if any(isinstance(value, Channels) for value in values):
        return None
    if all(isinstance(value, Known | float) for value in values):
        raise Refused("of known tensors alone")  # which the walk computes as it does for any operator
    parts = []
    for value in values:
        if isinstance(value, Known):
            n.sink(value, f"meets unknown channels in {node.where}")
            parts.append(number(f"{node.name} known"))
        elif isinstance(value, Unknown):
            parts.append(value.number)
        else:
            parts.append(number(f"{value}"))
    origin = next(value.origin for value in values if isinstance(value, Unknown))
    return Unknown(int(mix(number(name), number(str(node.shape)), *parts)), node.shape or (), origin)


@transfer.register(Stencil)
def _stencil(op: Stencil, node: Node, n: Numbering) -> Value:
    x = n.values[op.x]
    if isinstance(x, Unknown):
        return Unknown(int(mix(number(op.signature), x.number)), node.shape or (), x.origin)
    if not isinstance(x, Channels):
        raise Refused("over a known tensor")
    labels = _without_axes(x, op.space, node)
    signature = number(f"{op.signature} at {_position_shape(x)}")
    rows = x.rows.mapped(signature, op.keeps_constants)
    shape = x.shape if node.shape is None else node.shape
    return n.record(replace(x, shape=shape, labels=labels, rows=rows, edges=identity_edge(x)))


@transfer.register(Extreme)
def _extreme(op: Extreme, node: Node, n: Numbering) -> Value:
    x = n.values[op.x]
    if isinstance(x, Unknown):
        return Unknown(int(mix(number(op.signature), x.number)), node.shape or (), x.origin)
    if not isinstance(x, Channels):
        raise Refused("over a known tensor")
    labels = _without_axes(x, op.space, node)
    constant = x.rows.is_constant()
    some = (~constant).nonzero().squeeze(1)
    atoms = torch.zeros(len(x.rows), 1, dtype=torch.int64)
    coef = torch.zeros(len(x.rows), 1, dtype=torch.float64)
    error = x.rows.error.clone()
    if len(some):
        signature = f"{op.signature} at {_position_shape(x)}"
        atoms[some, 0], coef[some, 0], spread = n.intern(signature, Sparse(x.rows[some], False), Freedom.POSITIVE)
        error[some] = (error[some].square() + spread.square()).sqrt()
    rows = Rows(atoms, coef, x.rows.offset, error)
    shape = x.shape if node.shape is None else node.shape
    return n.record(replace(x, shape=shape, labels=labels, rows=rows, edges=identity_edge(x)))


def _without_axes(x: Channels, space: tuple[int, ...], node: Node) -> Tensor:
    """Labels after an operation over `space`; its axes are gone where the result has fewer."""
    if set(space) & set(x.axes()):
        raise Refused("an operation over the channels themselves")
    if node.shape is not None and len(node.shape) < len(x.shape):
        return x.labels.squeeze(space)
    return x.labels
