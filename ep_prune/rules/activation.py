"""Functions of one variable, with what each lets through (the table of identities).

    positively homogeneous   f(s x) = s^k f(x), s > 0      ReLU, leaky ReLU, PReLU, abs (k = 1), square (k = 2)
    odd about a point        f(c + x) - d odd               tanh, erf, ...: (0, 0); (hard) sigmoid: (0, 1/2);
                                                            ReLU6, hardtanh, clamp: the middle of the ramp, twice
    even                     f(-x) = f(x)                   abs, square, cos, cosh
    none                     equal inputs only              GELU, SiLU, ELU, Mish, softplus, ...

Even-plus-linear functions (GELU, SiLU, softplus, ...) leave s(z) - z for a flipped copy: not a multiple of
s(z), so a flipped copy is not merged here. Functions that PyTorch composes of others (softsign, tanhshrink,
Gaussian) need no entry: their symmetry follows from their parts.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ep_prune.graph import Barrier, Node, Operation, Pointwise, Slope, Symmetry
from ep_prune.rules.registry import Tensors, arguments, rule

_HOMOGENEOUS = Symmetry(degree=1)
_ODD = Symmetry(center=(0.0, 0.0))
_NONE = Symmetry()

TABLE: dict[str, Symmetry] = {
    **dict.fromkeys(("aten.relu", "aten.leaky_relu"), _HOMOGENEOUS),
    "aten.abs": Symmetry(degree=1, even=True),
    "aten.square": Symmetry(degree=2, even=True),
    **dict.fromkeys(
        ("aten.tanh", "aten.erf", "aten.atan", "aten.sin", "aten.sinh", "aten.asinh", "aten.softshrink",
         "aten.hardshrink", "aten.tan", "aten.asin", "aten.atanh", "aten.sign", "aten.erfinv"), _ODD
    ),
    **dict.fromkeys(("aten.sigmoid", "aten.hardsigmoid"), Symmetry(center=(0.0, 0.5))),
    "aten.relu6": Symmetry(center=(3.0, 3.0)),
    **dict.fromkeys(("aten.cos", "aten.cosh"), Symmetry(even=True)),
    **dict.fromkeys(
        ("aten.gelu", "aten.silu", "aten.mish", "aten.elu", "aten.selu", "aten.celu", "aten.softplus",
         "aten.log_sigmoid", "aten.hardswish", "aten.threshold", "aten.exp", "aten.expm1", "aten.log",
         "aten.log1p", "aten.log2", "aten.sqrt", "aten.rsqrt", "aten.reciprocal", "aten.gt.Scalar",
         "aten.ge.Scalar", "aten.lt.Scalar", "aten.le.Scalar", "aten.eq.Scalar", "aten.ne.Scalar"), _NONE
    ),
}  # fmt: skip


@rule(*TABLE)
def pointwise(node: Node, tensors: Tensors) -> Operation:
    return _pointwise(node, TABLE[node.op])


@rule("aten.hardtanh", "aten.clamp")
def clamped(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    low, high = (call.get(a, call.get(b)) for a, b in (("min_val", "min"), ("max_val", "max")))
    if any(isinstance(bound, Node) for bound in (low, high)):
        return Barrier("clamp between tensors")
    if low is not None and high is not None:
        middle = (low + high) / 2
        return _pointwise(node, Symmetry(center=(middle, middle)))
    return _pointwise(node, _HOMOGENEOUS if low in (0, None) and high in (0, None) else _NONE)


@rule("aten.clamp_min", "aten.clamp_max")
def clamped_on_one_side(node: Node, tensors: Tensors) -> Operation:
    return _pointwise(node, _HOMOGENEOUS if node.args[1] == 0 else _NONE)


@rule("aten.pow.Tensor_Scalar")
def power(node: Node, tensors: Tensors) -> Operation:
    return _pointwise(node, Symmetry(degree=2, even=True) if node.args[1] == 2 else _NONE)


@rule("aten.rrelu")
def randomized_relu(node: Node, tensors: Tensors) -> Operation:
    return Barrier("rrelu in training mode") if arguments(node)["training"] else _pointwise(node, _HOMOGENEOUS)


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(node: Node, tensors: Tensors) -> Operation:
    x, slope = node.args
    return Slope(x, slope)


def _pointwise(node: Node, symmetry: Symmetry) -> Operation:
    rest = node.args[1:]
    if any(True for _ in Node("", "", rest, node.kwargs).operands()):
        return Barrier("its settings are computed in the forward pass")
    signature = f"{node.op} {rest} {dict(node.kwargs)}"
    return Pointwise(node.args[0], signature, partial(_apply, node), symmetry)


def _apply(node: Node, x: Tensor) -> Tensor:
    assert node.target is not None
    result: Tensor = node.target(x, *node.args[1:], **node.kwargs)
    return result.double()
