"""Backward linear bounds (CROWN): tighter than intervals, since they remember what values have in common.

    A y  >=  A' x + c        stepping back from a tensor y to what it is made of, at last to the inputs:
    A x  >=  A m - |A| r     on a box of middle m and radius r

A linear operation gives A' = A W, exact. ReLU with low < 0 < high lies between two lines,

    alpha z  <=  relu(z)  <=  high (z - low) / (high - low)      alpha = 1 where high > -low, else 0,

and each entry of A takes the line that its sign needs (Zhang et al., Efficient Neural Network Robustness
Certification, NeurIPS 2018). Tensors that have bounds but no such step (max pools, tanh, products) end the walk
like inputs: their own bounds are taken.

Every row of the batch carries one functional: one pass bounds as many elements as there are rows. The rows
must not mix: `are_rows_apart` says whether a graph keeps them apart.

Rounding: a step off by delta, relative to the terms that it sums, changes the bound by at most
delta <|A|, size>, `size` being the magnitude of the terms at y (`Bounds`). They are added up and taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.bounds.interval import EPS, LINEAR_RESIZES, Bounds, Found, applied
from ep_prune.errors import InputError
from ep_prune.graph import (
    Cat,
    Contract,
    Extreme,
    Graph,
    Item,
    Move,
    Node,
    Normalize,
    Operation,
    Pad,
    Pass,
    Pointwise,
    Product,
    Slope,
    Split,
    Stencil,
    Sum,
)
from ep_prune.rules import kind_of

RELU = "aten.relu"


@dataclass
class Rows:
    """The graph traced at R rows, and the bounds of its nodes on P pieces of the box."""

    graph: Graph
    kinds: Mapping[Node, Operation]
    bounds: Mapping[Node, Found]
    count: int


@dataclass
class _Pass:
    """One walk: functionals that wait at nodes, and what is known of the bound so far."""

    rows: Rows
    piece: Tensor
    waiting: dict[Node, Tensor]
    total: Tensor
    slack: Tensor
    _fetched: dict[Node, Bounds] = field(default_factory=dict)

    def bounds(self, node: Node) -> Bounds:
        """The node's bounds, one row for each functional."""
        if node not in self._fetched:
            found = self.rows.bounds[node]
            assert isinstance(found, Bounds)
            parts = (part[self.piece] if len(part) > 1 else part for part in (found.low, found.high, found.size))
            self._fetched[node] = Bounds(*parts)
        return self._fetched[node]

    def add(self, node: Node, functional: Tensor) -> None:
        if node in self.waiting:
            self.waiting[node] = self.waiting[node] + functional
            self.slack += 2 * EPS * _inner(self.waiting[node].abs(), self.bounds(node).magnitude())
        else:
            self.waiting[node] = functional


def lower_bounds(rows: Rows, target: Node, functional: Tensor, piece: Tensor) -> Tensor:
    """(R,) a number that functional[r] applied to the target is never below, on piece[r] of the box.

    functional: (R, *shape of the target without its batch).
    """
    zero = torch.zeros(rows.count, dtype=torch.float64)
    walk = _Pass(rows, piece, {target: functional}, zero, zero.clone())
    with torch.enable_grad():
        for node in reversed(rows.graph.nodes[: rows.graph.nodes.index(target) + 1]):
            waiting = walk.waiting.pop(node, None)
            if waiting is not None and not _step(walk, node, waiting):
                _end(walk, node, waiting)
    return (walk.total - walk.slack * (1 + 1e-6) - 1e-300).detach()


def _end(walk: _Pass, node: Node, functional: Tensor) -> None:
    """The least value that the functional takes between the node's own bounds."""
    found = walk.bounds(node)
    middle, radius = (found.low + found.high) / 2, (found.high - found.low) / 2
    walk.total = walk.total + _inner(functional, middle) - _inner(functional.abs(), radius)
    terms = functional[0].numel() + 16
    walk.slack += 4 * terms * EPS * _inner(functional.abs(), found.magnitude())


def _step(walk: _Pass, node: Node, functional: Tensor) -> bool:
    """Hand the functional on to what the node is made of; False where the node is an end."""
    op = walk.rows.kinds.get(node)
    if op is None:
        return False
    if isinstance(op, Pass):
        walk.add(op.x, functional)
        return True
    if isinstance(op, Pointwise) and node.op == RELU:
        _through_relu(walk, op, functional)
        return True
    sources = affine_sources(op, node, walk.rows.graph, walk.rows.bounds)
    return sources is not None and _through_affine(walk, op, node, sources, functional)


def _through_relu(walk: _Pass, op: Pointwise, functional: Tensor) -> None:
    z = walk.bounds(op.x)
    across = (z.low < 0) & (z.high > 0)
    on = (z.low >= 0).double()
    slope = torch.where(across, z.high / (z.high - z.low).clamp_min(1e-300), on)
    # The line must lie above relu at both ends for the slope as it was rounded.
    shift = torch.where(across, torch.maximum(-slope * z.low, z.high - slope * z.high) * (1 + 8 * EPS), 0.0)
    below = torch.where(across, (z.high > -z.low).double(), on)
    positive, negative = functional.clamp_min(0), functional.clamp_max(0)
    walk.total = walk.total + _inner(negative, shift)
    walk.add(op.x, positive * below + negative * slope)
    terms = functional[0].numel() + 16
    walk.slack += 4 * terms * EPS * _inner(functional.abs(), z.magnitude() + shift)


def _through_affine(walk: _Pass, op: Operation, node: Node, sources: Sequence[Node], functional: Tensor) -> bool:
    """y = L x + y(0): the functional through L by differentiation, and what it makes of y(0)."""
    graph, count = walk.rows.graph, walk.rows.count
    zeros = {
        x: torch.zeros((count, *(x.shape or ())[1:]), dtype=torch.float64, requires_grad=True) for x in sources
    }
    made = node.args[0] if isinstance(op, Item) else node
    try:
        y = applied(made, graph, zeros)
    except InputError:
        return False
    if isinstance(y, tuple | list):
        y = y[op.index if isinstance(op, Item) else 0]
    found = torch.autograd.grad(y, list(zeros.values()), functional.expand_as(y), allow_unused=True)
    walk.total = walk.total + _inner(functional, y.detach())
    terms = functional[0].numel() + sum(x[0].numel() for x in zeros.values()) + 16
    walk.slack += 4 * terms * EPS * _inner(functional.abs(), walk.bounds(node).size)
    for x, slope in zip(zeros, found, strict=True):
        if slope is not None:
            walk.add(x, slope)
    return True


def affine_sources(
    op: Operation, node: Node, graph: Graph, bounds: Mapping[Node, Found]
) -> tuple[Node, ...] | None:
    """The computed tensors that the node is an affine function of; None where it is none, or one has no bounds."""
    if isinstance(op, Item):
        parent = kind_of(op.x, graph)
        if not isinstance(parent, Split | Normalize):
            return None
        found = affine_sources(parent, op.x, graph, bounds)
        return found if isinstance(parent, Split) or op.index == 0 else None
    if isinstance(op, Stencil):
        linear = "pool" in node.op or node.op.startswith(("aten.mean", "aten.sum")) or "pad" in node.op
        if not (linear or any(name in node.op for name in LINEAR_RESIZES)):
            return None
    elif isinstance(op, Product):
        computed = [side for side in (op.x, op.y) if isinstance(side, Node) and side.tensor is None]
        if len(computed) != 1 or (op.divide and computed[0] is not op.x):
            return None
    elif not isinstance(op, Contract | Normalize | Sum | Pad | Move | Cat | Split):
        return None
    sources = tuple(dict.fromkeys(x for x in node.operands() if x.tensor is None))
    known = all(isinstance(bounds.get(x), Bounds) and x.shape for x in sources)
    return sources if sources and known else None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """(R,) sums of products, row by row."""
    product = a * b
    return product.reshape(len(product), -1).sum(1)


def are_rows_apart(graph: Graph, kinds: Mapping[Node, Operation], count: int) -> bool:
    """Whether row r of every computed tensor is a function of row r of the inputs alone; axis 0 is the batch."""
    rows = torch.arange(count)
    for node, op in kinds.items():
        if node.shape is None:
            continue
        computed = [x for x in node.operands() if x.tensor is None]
        if any(not x.shape or x.shape[0] != count for x in (*computed, node) if x.shape is not None):
            return False
        rank = len(node.shape)
        if isinstance(op, Contract):
            apart = op.layout.axis != 0
        elif isinstance(op, Stencil | Extreme):
            apart = 0 not in op.space and rank > 0
        elif isinstance(op, Sum | Product):
            apart = all(len(x.shape or ()) == rank for x in computed)
        elif isinstance(op, Pad):
            apart = op.before[0] == op.after[0] == 0
        elif isinstance(op, Cat | Split):
            apart = op.axis != 0
        elif isinstance(op, Move):
            (x,) = op.inputs
            labels = rows.reshape(-1, *[1] * (len(x.shape or ()) - 1)).expand(x.shape or ()).contiguous()
            apart = bool((op.act(labels).reshape(count, -1) == rows.unsqueeze(1)).all())
        else:
            apart = isinstance(op, Pass | Pointwise | Slope | Normalize | Item)
        if not apart:
            return False
    return True
