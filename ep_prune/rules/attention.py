"""Attention: products of computed tensors, softmax over positions, and the fused operator.

Which axis of a product carries channels (queries and keys inside a head) and which one positions, only the
numbering can tell; here stands what is multiplied with what, and by which scale.
"""

from __future__ import annotations

from ep_prune.graph import Attention, Barrier, Matmul, Node, Operation, Softmax
from ep_prune.rules.registry import Tensors, arguments, rule


@rule("aten.bmm")
def batched_product(node: Node, tensors: Tensors) -> Operation:
    x, y = node.args
    return Matmul(x, y)


@rule("aten.einsum")
def einsum(node: Node, tensors: Tensors) -> Operation:
    """...ik, ...jk -> ...ij and ...ik, ...kj -> ...ij."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    sides, _, result = equation.partition("->")
    if sides.count(",") == 1 and "." not in sides and all(part.tensor is None for part in operands):
        x, y = sides.split(",")
        if x[:-2] == y[:-2] == result[:-2] and len({*x}) == len(x) and x[-2] == result[-2]:
            if x[-1] == y[-1] and y[-2] == result[-1]:
                return Matmul(operands[0], operands[1], transposed=True)
            if x[-1] == y[-2] and y[-1] == result[-1]:
                return Matmul(operands[0], operands[1])
    return Barrier("a sum over indices that is neither attention's scores nor its means")


@rule("aten.softmax.int", "aten._softmax", "aten._safe_softmax")
def softmax(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    return Softmax(call["self"], call["dim"] % len(node.shape or ()))


@rule("aten.scaled_dot_product_attention")
def attention(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    query, key, value = call["query"], call["key"], call["value"]
    if call["dropout_p"]:
        return Barrier("dropout inside attention")
    scale = call["scale"]
    if scale is not None and not isinstance(scale, int | float):
        return Barrier("a scale that is computed in the forward pass")
    return Attention(
        query,
        key,
        value,
        call["attn_mask"],
        bool(call["is_causal"]),
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        bool(call["enable_gqa"]),
    )
