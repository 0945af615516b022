"""Sums, differences, products and quotients of two tensors, or of a tensor and a number."""

from __future__ import annotations

from ep_prune.graph import Barrier, Choice, Node, Operation, Product, Sum
from ep_prune.rules.registry import Tensors, arguments, rule


@rule("aten.add.Tensor", "aten.add.Scalar")
def add(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    return Sum(call["self"], call["other"], float(call["alpha"]))


@rule("aten.sub.Tensor", "aten.sub.Scalar")
def subtract(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    return Sum(call["self"], call["other"], -float(call["alpha"]))


@rule("aten.rsub.Tensor", "aten.rsub.Scalar")
def subtract_from(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    if call["alpha"] != 1:
        return Barrier("rsub with a factor")
    return Sum(call["other"], call["self"], -1.0)


@rule("aten.neg")
def negate(node: Node, tensors: Tensors) -> Operation:
    return Product(node.args[0], -1.0)


@rule("aten.mul.Tensor", "aten.mul.Scalar")
def multiply(node: Node, tensors: Tensors) -> Operation:
    x, y = node.args
    return Product(x, y)


@rule("aten.div.Tensor", "aten.div.Scalar")
def divide(node: Node, tensors: Tensors) -> Operation:
    x, y = node.args
    return Product(x, y, divide=True)


@rule("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(node: Node, tensors: Tensors) -> Operation:
    condition, x, y = node.args
    return Choice(condition, x, y)


@rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(node: Node, tensors: Tensors) -> Operation:
    x, mask, value = node.args
    return Choice(mask, value, x)
