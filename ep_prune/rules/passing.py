"""Operations that hand on their values: dropout at inference, copies, casts between floating types; and tensors
that are made of numbers in the user's code."""

from __future__ import annotations

from ep_prune.graph import Barrier, Create, Item, Node, Operation, Pass, Zeros
from ep_prune.rules.registry import Tensors, arguments, rule


@rule("aten.dropout", "aten.alpha_dropout", "aten.feature_dropout", "aten.feature_alpha_dropout")
def dropout(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    return Barrier("dropout in training mode") if call["train"] and call["p"] > 0 else Pass(call["input"])


@rule("aten.clone", "aten.contiguous", "aten.detach", "aten.detach_", "aten.alias", "aten.lift_fresh_copy",
      "aten._to_copy", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.type_as",
      "aten.positive", "aten.resolve_conj", "aten.resolve_neg")  # fmt: skip
def same(node: Node, tensors: Tensors) -> Operation:
    x = node.args[0]
    kinds = [getattr(dtype, "is_floating_point", False) for dtype in (x.dtype, node.dtype)]
    return Pass(x) if all(kinds) or x.dtype == node.dtype else Barrier("a cast that is not between floats")


@rule("<built-in function getitem>")
def item(node: Node, tensors: Tensors) -> Operation:
    return Item(node.args[0], int(node.args[1]))


@rule("aten.arange", "aten.arange.start", "aten.arange.start_step", "aten.full", "aten.zeros", "aten.ones")
def created(node: Node, tensors: Tensors) -> Operation:
    if node.sized and node.op == "aten.zeros":
        return Zeros()
    return Barrier("its size follows the batch") if node.sized else Create()
