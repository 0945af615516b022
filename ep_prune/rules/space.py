"""Pooling, means, resizing and padding: operations over space that treat every channel alike.

What matters to the algebra is whether a constant comes out constant. It does for means, for resizing, for
average pools that leave the padding out of the count and for reflecting or replicating pads; it does not for
zero padding, sums over space, nor average pools that count the padding: there it becomes a pattern.
"""

from __future__ import annotations

from typing import Any

from ep_prune.graph import Barrier, Extreme, MeanSquare, Node, Operation, Pad, Pass, Stencil
from ep_prune.rules.registry import Tensors, arguments, repeated, rule


def _signature(node: Node) -> str:
    return f"{node.op} {node.args[1:]} {dict(node.kwargs)}"


def _space(x: Node, count: int) -> tuple[int, ...]:
    rank = len(x.shape or ())
    return tuple(range(rank - count, rank))


def _dimensions(name: str) -> int:
    return int(name[name.index("d", name.index("pool")) - 1]) if "pool" in name else 0


@rule("aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d", "aten.adaptive_max_pool1d",
      "aten.adaptive_max_pool2d", "aten.adaptive_max_pool3d", "aten.max_pool2d_with_indices",
      "aten.max_pool3d_with_indices")  # fmt: skip
def max_pool(node: Node, tensors: Tensors) -> Operation:
    x = node.args[0]
    return Extreme(x, _signature(node), _space(x, _dimensions(node.op)))


@rule("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d")
def average_pool(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    count = _dimensions(node.op)
    padded = any(repeated(call["padding"], count)) and call["count_include_pad"]
    keeps = not padded and call.get("divisor_override") is None
    return Stencil(call["self"], _signature(node), _space(call["self"], count), keeps)


@rule("aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d")
def adaptive_average_pool(node: Node, tensors: Tensors) -> Operation:
    x = node.args[0]
    return Stencil(x, _signature(node), _space(x, _dimensions(node.op)), keeps_constants=True)


@rule("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax", "aten.mean", "aten.sum")
def reduction(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    x = call["self"]
    rank = len(x.shape or ())
    axes: Any = call.get("dim")
    space = tuple(axis % rank for axis in repeated(axes, 1)) if axes not in (None, []) else tuple(range(rank))
    if call.get("dtype") not in (None, x.dtype):
        return Barrier("a reduction that changes the type")
    if space == (rank - 1,) and node.op == "aten.mean.dim" and (squared := _squared(x)) is not None:
        return MeanSquare(squared)
    if node.op == "aten.amax":
        return Extreme(x, _signature(node), space)
    return Stencil(x, _signature(node), space, keeps_constants="mean" in node.op)


def _squared(x: Node) -> Node | None:
    """What a node squares, if it does."""
    one, *other = x.args or (None,)
    square = x.op == "aten.square" or (x.op == "aten.pow.Tensor_Scalar" and other == [2])
    square |= x.op == "aten.mul.Tensor" and other == [one]
    return one if square and isinstance(one, Node) and one.shape == x.shape and x.tensor is None else None


@rule("aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec", "aten.upsample_nearest3d.vec",
      "aten._upsample_nearest_exact1d.vec", "aten._upsample_nearest_exact2d.vec",
      "aten._upsample_nearest_exact3d.vec", "aten.upsample_linear1d.vec", "aten.upsample_bilinear2d.vec",
      "aten.upsample_trilinear3d.vec", "aten.upsample_bicubic2d.vec", "aten._upsample_bilinear2d_aa.vec",
      "aten._upsample_bicubic2d_aa.vec", "aten.upsample_nearest1d", "aten.upsample_nearest2d",
      "aten.upsample_nearest3d", "aten.upsample_linear1d", "aten.upsample_bilinear2d",
      "aten.upsample_trilinear3d", "aten.upsample_bicubic2d")  # fmt: skip
def resize(node: Node, tensors: Tensors) -> Operation:
    x = node.args[0]
    return Stencil(x, _signature(node), _space(x, len(x.shape or ()) - 2), keeps_constants=True)


@rule("aten.reflection_pad1d", "aten.reflection_pad2d", "aten.reflection_pad3d", "aten.replication_pad1d",
      "aten.replication_pad2d", "aten.replication_pad3d")  # fmt: skip
def mirror_pad(node: Node, tensors: Tensors) -> Operation:
    x = node.args[0]
    return Stencil(x, _signature(node), _space(x, len(node.args[1]) // 2), keeps_constants=True)


@rule("aten.pad", "aten.constant_pad_nd")
def pad(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    x, sizes = call["self"], call["pad"]
    rank = len(x.shape or ())
    if not any(sizes):
        return Pass(x)
    if call.get("mode", "constant") != "constant":
        return Stencil(x, _signature(node), _space(x, len(sizes) // 2), keeps_constants=True)
    before, after = [0] * rank, [0] * rank
    for place in range(len(sizes) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = sizes[2 * place], sizes[2 * place + 1]
    if min(sizes) < 0:
        return Barrier("negative padding")
    return Pad(x, tuple(before), tuple(after), float(call["value"] or 0.0))
