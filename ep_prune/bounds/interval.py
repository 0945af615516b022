"""Interval arithmetic through a graph: between which numbers every element of every tensor lies.

    y = W x + b      middle c, radius r of x:   W c + b  -+  |W| r          (Contract)
    y = f(x)         f(low), f(high) where f grows; the least value besides where f falls, then grows
    sums, products, pools, resizing, padding, data movement: element by element, or the operator on both ends

The bounds hold for the exact real function of the stored weights. What float64 may round away is added outside:
a sum of k terms is off by at most k eps times the sum of their magnitudes, which `size` bounds for every element.
(Moore, Interval Analysis, 1966; Rump, INTLAB, for the middle-radius form.)

What has no rule here has no bounds (None), and neither has what follows from it. Left out: layer norm, softmax,
embedding tables, choices, and activations that are neither monotone nor fall-then-grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ep_prune.errors import InputError
from ep_prune.evaluate import call
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

EPS = 2.0**-52
TINY = 1e-300
FUNCTION_ERROR = 64 * EPS
"""How far torch's float64 tanh, erf, ... may lie off, relative to 1 + |value|: some units in the last place."""

GROWING = {
    "aten.relu", "aten.tanh", "aten.sigmoid", "aten.erf", "aten.atan", "aten.relu6", "aten.hardtanh", "aten.clamp",
    "aten.clamp_min", "aten.clamp_max", "aten.hardsigmoid", "aten.selu", "aten.softplus", "aten.log_sigmoid",
    "aten.exp", "aten.expm1", "aten.sinh", "aten.asinh", "aten.softshrink", "aten.hardshrink",
}  # fmt: skip

FALLING_THEN_GROWING = {
    "aten.abs": (0.0, 0.0),
    "aten.square": (0.0, 0.0),
    "aten.gelu": (-0.752, -0.1701),
    "aten.silu": (-1.2785, -0.2785),
    "aten.hardswish": (-1.5, -0.375),
    "aten.mish": (-1.1925, -0.3089),
}
"""Activation -> about where it is least, and a number not above its least value."""
TURN = 0.01
"""Within this distance of the place where an activation turns, its least value is assumed."""

LINEAR_RESIZES = ("nearest", "linear1d", "bilinear", "trilinear")


@dataclass(frozen=True, eq=False)
class Bounds:
    """low <= x <= high element by element. size: at least the sum of the magnitudes that x was summed up from."""

    low: Tensor
    high: Tensor
    size: Tensor

    @staticmethod
    def of(low: Tensor, high: Tensor, size: Tensor | None = None) -> Bounds:
        return Bounds(low, high, torch.maximum(low.abs(), high.abs()) if size is None else size)

    @staticmethod
    def widened(low: Tensor, high: Tensor, size: Tensor, relative: float) -> Bounds:
        """Bounds that were computed with an error of up to `relative` times `size`."""
        slack = relative * size + TINY
        return Bounds(low - slack, high + slack, size + slack)

    def magnitude(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())

    def is_fixed(self) -> bool:
        return torch.equal(self.low, self.high)

    def meet(self, low: Tensor, high: Tensor) -> Bounds:
        """Both at once. They never cross: where rounding makes them, the wider of the two is taken."""
        new_low, new_high = torch.maximum(self.low, low), torch.minimum(self.high, high)
        crossed = new_low > new_high
        return Bounds(
            torch.where(crossed, self.low, new_low), torch.where(crossed, self.high, new_high), self.size
        )


Found = Bounds | tuple["Bounds | None", ...] | None
Values = Mapping[Node, Found]


def bounds_of(node: Node, graph: Graph, values: Values) -> Found:
    """The bounds of one node, given those of its operands; None where there are none."""
    if node.tensor is not None:
        tensor = graph.tensors[node.tensor].detach().to("cpu")
        return Bounds.of(tensor.double(), tensor.double()) if tensor.is_floating_point() else None
    op = kind_of(node, graph)
    try:
        found = interval(op, node, graph, values)
    except InputError:
        return None
    if isinstance(found, Bounds) and bool((found.low.isnan() | found.high.isnan() | found.size.isinf()).any()):
        return None
    return found


def one(values: Values, side: Node | float) -> Bounds | None:
    """The bounds of one operand, if it has some; a number lies between itself and itself."""
    if not isinstance(side, Node):
        number = torch.tensor(float(side), dtype=torch.float64)
        return Bounds.of(number, number)
    found = values.get(side)
    return found if isinstance(found, Bounds) else None


def applied(node: Node, graph: Graph, values: Mapping[Node, Tensor]) -> Any:
    """The node's operator in float64 on the given tensors, its other operands as they are stored."""
    own = {x: graph.tensors[x.tensor].detach().to("cpu") for x in node.operands() if x.tensor is not None}
    own = {x: tensor.double() if tensor.is_floating_point() else tensor for x, tensor in own.items()}
    return call(node, {**own, **values}, torch.device("cpu"))


@singledispatch
def interval(op: Operation, node: Node, graph: Graph, values: Values) -> Found:
    """No rule: no bounds."""
    return None


@interval.register(Pass)
def _pass(op: Pass, node: Node, graph: Graph, values: Values) -> Found:
    return values.get(op.x)


@interval.register(Item)
def _item(op: Item, node: Node, graph: Graph, values: Values) -> Found:
    found = values.get(op.x)
    if isinstance(found, tuple):
        return found[op.index]
    return found if op.index == 0 else None


@interval.register(Contract)
def _contract(op: Contract, node: Node, graph: Graph, values: Values) -> Found:
    x = one(values, op.x)
    assert op.weight.tensor is not None
    weight = graph.tensors[op.weight.tensor].detach().to("cpu", torch.float64)
    bias = None if op.bias is None else graph.tensors[str(op.bias.tensor)].detach().to("cpu", torch.float64)
    return None if x is None else contracted(op, node, graph, x, weight, bias)


def contracted(op: Contract, node: Node, graph: Graph, x: Bounds, weight: Tensor, bias: Tensor | None) -> Bounds:
    """W x + b for a weight of the node's layout, of any number of outputs."""
    middle, radius = (x.high + x.low) / 2, (x.high - x.low) / 2
    magnitude = x.magnitude()
    zero = {} if op.bias is None else {op.bias: torch.zeros(_outputs(op, weight), dtype=torch.float64)}
    given = {} if op.bias is None else {op.bias: zero[op.bias] if bias is None else bias}
    terms = weight.numel() // max(min(weight.shape[:2]), 1) + 16
    relative = terms * EPS
    center = applied(node, graph, {op.x: middle, op.weight: weight, **given})
    spread = applied(node, graph, {op.x: radius + 4 * EPS * magnitude, op.weight: weight.abs(), **zero})
    size = applied(
        node, graph, {op.x: magnitude, op.weight: weight.abs(), **{k: v.abs() for k, v in given.items()}}
    )
    size = size * (1 + 2 * relative)
    return Bounds.widened(center - spread, center + spread, size, 4 * relative)


def _outputs(op: Contract, weight: Tensor) -> int:
    return int(weight.shape[1] * op.layout.groups if op.layout.inputs_first else weight.shape[0])


@interval.register(Normalize)
def _normalize(op: Normalize, node: Node, graph: Graph, values: Values) -> Found:
    x = one(values, op.x)
    if x is None:
        return None

    def vector(part: Node | None, default: float) -> Tensor:
        count = len(graph.tensors[str(op.mean.tensor)])
        if part is None:
            return torch.full((count,), default, dtype=torch.float64)
        return graph.tensors[str(part.tensor)].detach().to("cpu", torch.float64)

    factor = vector(op.weight, 1.0) / (vector(op.variance, 1.0) + op.eps).sqrt()
    mean, bias = vector(op.mean, 0.0), vector(op.bias, 0.0)
    shape = [1, -1, *[1] * (x.low.ndim - 2)]
    factor, shift = factor.reshape(shape), (bias - mean * factor).reshape(shape)
    ends = x.low * factor + shift, x.high * factor + shift
    size = x.magnitude() * factor.abs() + (bias.abs() + (mean * factor.reshape(-1)).abs()).reshape(shape)
    return Bounds.widened(torch.minimum(*ends), torch.maximum(*ends), size, 16 * EPS)


@interval.register(Sum)
def _sum(op: Sum, node: Node, graph: Graph, values: Values) -> Found:
    x, y = one(values, op.x), one(values, op.y)
    if x is None or y is None:
        return None
    low, high = (y.low, y.high) if op.alpha >= 0 else (y.high, y.low)
    size = x.magnitude() + abs(op.alpha) * y.magnitude()
    return Bounds.widened(x.low + op.alpha * low, x.high + op.alpha * high, size, 4 * EPS)


@interval.register(Product)
def _product(op: Product, node: Node, graph: Graph, values: Values) -> Found:
    x, y = one(values, op.x), one(values, op.y)
    if x is None or y is None:
        return None
    if op.divide:
        if bool(((y.low <= 0) & (y.high >= 0)).any()):
            return None
        y = Bounds.widened(1 / y.high, 1 / y.low, 1 / torch.minimum(y.low.abs(), y.high.abs()), 4 * EPS)
    ends = torch.stack(torch.broadcast_tensors(x.low * y.low, x.low * y.high, x.high * y.low, x.high * y.high))  # type: ignore[no-untyped-call]
    return Bounds.widened(ends.amin(0), ends.amax(0), x.magnitude() * y.magnitude(), 4 * EPS)


@interval.register(Stencil)
def _stencil(op: Stencil, node: Node, graph: Graph, values: Values) -> Found:
    x = one(values, op.x)
    averages = "pool" in node.op or node.op.startswith(("aten.mean", "aten.sum")) or "pad" in node.op
    if x is None or not (averages or any(name in node.op for name in LINEAR_RESIZES)):
        return None
    low, high, size = (applied(node, graph, {op.x: side}) for side in (x.low, x.high, x.magnitude()))
    terms = x.low[0].numel() + 16
    return Bounds.widened(low, high, size * (1 + 2 * terms * EPS), 2 * terms * EPS)


@interval.register(Extreme)
def _extreme(op: Extreme, node: Node, graph: Graph, values: Values) -> Found:
    x = one(values, op.x)
    if x is None:
        return None
    low, high = (_first(applied(node, graph, {op.x: side})) for side in (x.low, x.high))
    return Bounds.of(low, high)


@interval.register(Pad)
def _pad(op: Pad, node: Node, graph: Graph, values: Values) -> Found:
    return _moved(node, graph, values)


@interval.register(Cat)
def _cat(op: Cat, node: Node, graph: Graph, values: Values) -> Found:
    return _moved(node, graph, values)


@interval.register(Split)
def _split(op: Split, node: Node, graph: Graph, values: Values) -> Found:
    return _moved(node, graph, values)


@interval.register(Move)
def _move(op: Move, node: Node, graph: Graph, values: Values) -> Found:
    return _moved(node, graph, values)


def _moved(node: Node, graph: Graph, values: Values) -> Found:
    """Data movement: the operator on both ends."""
    own = [x for x in node.operands() if x.tensor is None or values.get(x) is not None]
    found = {x: one(values, x) for x in own}
    if any(value is None for value in found.values()):
        return None
    known = {x: value for x, value in found.items() if value is not None}
    low = applied(node, graph, {x: value.low for x, value in known.items()})
    high = applied(node, graph, {x: value.high for x, value in known.items()})
    if isinstance(low, Tensor):
        return Bounds.of(low, high)
    return tuple(Bounds.of(*ends) for ends in zip(low, high, strict=True))


@interval.register(Slope)
def _slope(op: Slope, node: Node, graph: Graph, values: Values) -> Found:
    x = one(values, op.x)
    if x is None:
        return None
    low, high = (applied(node, graph, {op.x: side}) for side in (x.low, x.high))
    least, most = torch.minimum(low, high), torch.maximum(low, high)
    across = (x.low < 0) & (x.high > 0)
    least = torch.where(across, least.clamp_max(0), least)
    most = torch.where(across, most.clamp_min(0), most)
    return Bounds.widened(least, most, torch.maximum(least.abs(), most.abs()), 4 * EPS)


@interval.register(Pointwise)
def _pointwise(op: Pointwise, node: Node, graph: Graph, values: Values) -> Found:
    x = one(values, op.x)
    return None if x is None else activated(op, node, x)


def activated(op: Pointwise, node: Node, x: Bounds) -> Bounds | None:
    """f(x), where f is monotone or falls, then grows."""
    low, high = op.function(x.low), op.function(x.high)
    if node.op in ("aten.relu",):
        return Bounds.of(low, high)
    turn = FALLING_THEN_GROWING.get(node.op) or ((0.0, 0.0) if _is_square(node) else None)
    if is_growing(node):
        least, most = low, high
    elif turn is not None:
        place, value = turn
        least, most = torch.minimum(low, high), torch.maximum(low, high)
        across = (x.low <= place + TURN) & (x.high >= place - TURN)
        least = torch.where(across, least.clamp_max(value), least)
    else:
        return None
    return Bounds.widened(least, most, 1 + torch.maximum(least.abs(), most.abs()), FUNCTION_ERROR)


def is_growing(node: Node) -> bool:
    """Whether the activation never falls, whatever its settings."""
    if node.op in ("aten.leaky_relu", "aten.elu", "aten.celu"):
        numbers = [v for v in (*node.args[1:], *node.kwargs.values()) if isinstance(v, int | float)]
        return all(value >= 0 for value in numbers)
    return node.op in GROWING


def _is_square(node: Node) -> bool:
    return node.op == "aten.pow.Tensor_Scalar" and node.args[1] == 2


def _first(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, tuple | list) else value
    return found
