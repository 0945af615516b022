"""The norms whose moments are those of the input: instance, group and RMS norm.

instance   (x - mean) / sqrt(variance + eps): an offset is gone, and because of eps a sign alone goes through;
           a constant channel is 0
group      moments over a group of channels: they stay; what goes in equal comes out equal, within a group
RMS        x r, r the same positive function for all channels: they stay, and any ratio goes through
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ep_prune.channels import Channels, Rows, mix
from ep_prune.find import Freedom, Sparse, congruence
from ep_prune.graph import GroupStandardize, Instance, MeanSquare, Node, RootMeanSquare, Stencil
from ep_prune.numbering.align import index_along, on_axis
from ep_prune.numbering.elementwise import _position_shape, identity_edge, transfer
from ep_prune.numbering.state import Numbering, Value
from ep_prune.slots import Isometric


@transfer.register(Instance)
def _instance(op: Instance, node: Node, n: Numbering) -> Value:
    x = on_axis(n, op.x, 1)
    some = (~x.rows.is_constant()).nonzero().squeeze(1)
    atoms, coef, error = _blank(x)
    if len(some):
        signature = f"instance norm {node.args[-2:]} at {_position_shape(x)}"
        found = n.intern(signature, Sparse(x.rows[some], False), Freedom.SIGN)
        atoms[some, 0], coef[some, 0], error[some] = found
    rows = Rows(atoms, coef, torch.zeros(len(error), dtype=torch.float64), error)
    return _affine(n, x, rows, 1, op.weight, op.bias)


@transfer.register(GroupStandardize)
def _group(op: GroupStandardize, node: Node, n: Numbering) -> Value:
    x = on_axis(n, op.x, 1)
    n.sink(x, f"read by a group norm, which sees all channels of a group, {node.where}")
    group = index_along(x, 1) * op.groups // len(x.rows)
    classes = congruence(Sparse(x.rows, True), Freedom.NONE, apart=group)
    rows = Rows.of_atoms(mix(n.unknown(node).number, classes.leader))
    return _affine(n, x, rows, 1, op.weight, op.bias)


@transfer.register(RootMeanSquare)
def _root_mean_square(op: RootMeanSquare, node: Node, n: Numbering) -> Value:
    axis = len(node.shape or ()) - 1
    x = on_axis(n, op.x, axis)
    some = _squares_count(x, node, n)
    atoms, coef, error = _blank(x)
    if len(some):
        found = n.intern(f"RMS norm {node.name}", Sparse(x.rows[some], True), Freedom.SCALE)
        atoms[some, 0], coef[some, 0], error[some] = found
    rows = Rows(atoms, coef, torch.zeros(len(error), dtype=torch.float64), error)
    return _affine(n, x, rows, axis, op.weight, None)


@transfer.register(MeanSquare)
def _mean_square(op: MeanSquare, node: Node, n: Numbering) -> Value:
    axis, x = len(op.x.shape or ()) - 1, n.values[op.x]
    if isinstance(x, Channels) and x.labels.shape[axis] == 1:  # the last axis is one of space
        squared = node.args[0]
        return transfer(Stencil(squared, f"{node.op} {node.args[1:]}", (axis,), True), node, n)
    _squares_count(on_axis(n, op.x, axis), node, n)
    return n.unknown(node)


def _squares_count(x: Channels, node: Node, n: Numbering) -> Tensor:
    """Keep the channels whose squares a norm sums up; which of their rows are not zero."""
    reason = f"read by an RMS norm, which sees all channels, {node.where}"
    n.sink(x, reason)
    zero = x.rows.norm() == 0
    some = (~zero).nonzero().squeeze(1)
    leader, scale = torch.arange(len(zero)), torch.ones(len(zero), dtype=torch.float64)
    found = congruence(Sparse(x.rows[some], True), Freedom.SCALE)
    leader[some], scale[some] = some[found.leader], found.scale
    n.slots.constraints.append(Isometric(x.slots, reason, node.name, leader, scale, zero))
    return some


def _blank(x: Channels) -> tuple[Tensor, Tensor, Tensor]:
    count = len(x.rows)
    zero = torch.zeros(count, 1, dtype=torch.float64)
    return zero.long(), zero, torch.zeros(count, dtype=torch.float64)


def _affine(n: Numbering, x: Channels, rows: Rows, axis: int, weight: Node | None, bias: Node | None) -> Channels:
    """gain * row + shift, by channel."""
    place = index_along(x, axis)
    for part in (weight, bias):
        if part is not None:
            n.slots.unify(n.slots.of(str(part.tensor), 0, len(place))[place], x.slots)
    gain = torch.ones(len(place), dtype=torch.float64) if weight is None else n.tensor(weight)[place]
    shift = torch.zeros_like(gain) if bias is None else n.tensor(bias)[place]
    rounding = n.eps(weight) * ((gain * rows.norm()).square() + shift.square()).sqrt()
    rows = rows.scaled(gain).shifted(shift, rounding)
    return n.record(replace(x, rows=rows, edges=identity_edge(x), mean=torch.empty(0), deviation=torch.empty(0)))
