"""Which scales are one variable: sizes |d| and signs of every wide row, before and after each operation.

positively homogeneous   |d| before = |d| after, sign +, e = 0
odd about (c, l)         |d| = 1, one sign before and after, e = c (1 - d) before, l (1 - d) after
even                     sign before, none after
none                     d = 1, e = 0
sum                      d equal on both sides, e adds up
max pool                 sign +
layer norm               d = 1, e = 0 before, any after
batch norm, weights      any d after any d before
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from ep_prune.graph import (
    Barrier,
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
    Symmetry,
)
from ep_prune.widen_rules.state import Widening

_HOMOGENEOUS = Symmetry(degree=1)


@singledispatch
def link(op: Operation, node: Node, w: Widening) -> None:
    """Tie the scale variables before and after an operation. Raises `Stuck`."""
    if isinstance(op, Barrier) and node.op == "aten._assert_tensor_metadata":
        return
    raise w.stuck_at(node, *node.operands(), reason="no rule to widen this operation")


@link.register(Pass)
@link.register(Item)
def _(op: Pass | Item, node: Node, w: Widening) -> None:
    w.same(op.x, node)


@link.register
def _(op: Stencil, node: Node, w: Widening) -> None:
    if not op.keeps_constants:
        raise w.stuck_at(node, op.x, reason="a constant does not stay one")
    w.same(op.x, node)


@link.register
def _(op: Extreme, node: Node, w: Widening) -> None:
    w.same(op.x, node)
    w.signs.pin(w.wide[node].sign, "an extreme")


@link.register
def _(op: Sum, node: Node, w: Widening) -> None:
    for side in (op.x, op.y):
        if isinstance(side, Node) and w.number(side) is None:
            w.same(side, node)


@link.register
def _(op: Product, node: Node, w: Widening) -> None:
    tensors = [side for side in (op.x, op.y) if isinstance(side, Node) and w.number(side) is None]
    if (op.divide and w.number(op.y) is None) or w.factor(op) == 0:
        raise w.stuck_at(node, *node.operands(), reason="division by channels")
    for side in tensors:
        w.same(side, node)
    if len(tensors) == 2:
        w.fix(node)


@link.register
def _(op: Pointwise, node: Node, w: Widening) -> None:
    w.through(op.symmetry, op.x, node)


@link.register
def _(op: Slope, node: Node, w: Widening) -> None:
    w.through(_HOMOGENEOUS, op.x, node)


@link.register
def _(op: Normalize, node: Node, w: Widening) -> None:
    w.pair(op.x, node)


@link.register
def _(op: Standardize, node: Node, w: Widening) -> None:
    if op.weight is None or op.bias is None:
        raise w.stuck_at(node, op.x, reason="a layer norm without gains and offsets")
    w.pair(op.x, node)
    w.fix(op.x)


@link.register
def _(op: Contract, node: Node, w: Widening) -> None:
    groups, _, inputs, _ = op.layout.canonical(w.tensor(op.weight)).shape
    x, out = w.wide.get(op.x), w.wide.get(node)
    if x is not None:
        rows = int(x.source.max()) + 1
        if rows != groups * inputs or (groups > 1 and inputs > 1):
            raise w.stuck_at(node, op.x, reason="a grouped weight, or inputs that are not its channels")
    if groups > 1:
        if x is None or out is None:
            raise w.stuck_at(node, op.x, reason="a depthwise weight whose two sides differ")
        if not all(op.layout.interior):
            w.rigid.append(x.sign)
    elif x is not None and not w.passes_constants(op, node):
        # W' t = 0 leaves W[pi] only to a copy without offset; the backward condition asks for no offset at all.
        w.rigid.append(x.sign if w.critical else x.sign[w.plain[x.slot]])
        if w.critical:
            w.silent[x.slot[x.null]] = True
    if out is not None and not w.has_room(op, node):
        w.rigid.append(out.sign)


@link.register
def _(op: Move, node: Node, w: Widening) -> None:
    (x,) = op.inputs
    if x not in w.wide or node not in w.wide:
        raise w.stuck_at(node, x, reason="channels that are moved among others")
    before, after = w.wide[x].slot, w.wide[node].slot
    out = torch.arange(len(after))
    if torch.equal(before, after):
        into = out
    else:
        place = torch.full((w.first[-1],), -1)
        place[before] = torch.arange(len(before))
        into = place[after]
        if len(torch.unique(before)) < len(before) or bool((into < 0).any()):
            raise w.stuck_at(node, x, reason="channels that are repeated or dropped")
    _link_moved(w, node, [(x, out, into)])


@link.register
def _(op: Cat, node: Node, w: Widening) -> None:
    if node not in w.wide or op.stack:
        raise w.stuck_at(node, *op.inputs, reason="stacked channels")
    slot = w.wide[node].slot
    parts, start = [], 0
    for x in op.inputs:
        size = len(w.wide[x].slot) if x in w.wide else (x.shape or ())[op.axis]
        out = torch.arange(start, start + size)
        start += size
        if x in w.wide:
            if start > len(slot) or not torch.equal(slot[out], w.wide[x].slot):
                raise w.stuck_at(node, *op.inputs, reason="joined channels that do not lie in order")
            parts.append((x, out, torch.arange(size)))
    if start != len(slot):
        raise w.stuck_at(node, *op.inputs, reason="joined channels that do not lie in order")
    _link_moved(w, node, parts)


def _link_moved(w: Widening, node: Node, parts: list[tuple[Node, Tensor, Tensor]]) -> None:
    w.moved[node] = parts
    rows = w.wide[node]
    for x, out, into in parts:
        w.signs.unify(rows.sign[out], w.wide[x].sign[into])
        w.sizes.unify(rows.size[out], w.wide[x].size[into])
