"""Linear layers, convolutions, transposed convolutions, products with a weight, embedding tables.

    y_o = sum over inputs i and taps of W[o, i, tap] x_i + b_o

A tap is *interior* when it never reads the zero padding, whatever the input's size: with kernel k, dilation d
and padding p on the left, q on the right, tap t reads position o s - p + t d, so that it must have
p <= t d <= d (k - 1) - q. A constant input leaves interior taps as a constant. In a transposed convolution
the number of taps that reach a position varies, so none is interior.
"""

from __future__ import annotations

import itertools

from ep_prune.graph import Barrier, Contract, Layout, Lookup, Matmul, Node, Operation
from ep_prune.rules.registry import Tensors, arguments, repeated, rule


@rule("aten.linear")
def linear(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    return _contract(call["input"], call["weight"], call["bias"], Layout(axis=len(node.shape or ()) - 1))


@rule("aten.matmul", "aten.mm")
def matmul(node: Node, tensors: Tensors) -> Operation:
    x, weight = node.args
    if x.tensor is None and weight.tensor is None and min(len(x.shape or ()), len(weight.shape or ())) > 1:
        return Matmul(x, weight)
    if weight.tensor is None or len(weight.shape or ()) != 2:
        return Barrier("a product with a known tensor that is not a weight")
    return _contract(x, weight, None, Layout(inputs_first=True, axis=len(node.shape or ()) - 1))


@rule("aten.addmm")
def addmm(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    if call["beta"] != 1 or call["alpha"] != 1:
        return Barrier("addmm with factors")
    return _contract(call["mat1"], call["mat2"], call["self"], Layout(inputs_first=True, axis=1))


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.conv1d.padding", "aten.conv2d.padding",
      "aten.conv3d.padding")  # fmt: skip
def convolution(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    weight: Node = call["weight"]
    kernel = (weight.shape or ())[2:]
    count = len(kernel)
    stride, dilation = (repeated(call[key], count) for key in ("stride", "dilation"))
    if isinstance(call["padding"], str):
        same = call["padding"] == "same"
        total = [d * (k - 1) if same else 0 for d, k in zip(dilation, kernel, strict=True)]
        before = tuple(t // 2 for t in total)
        after = tuple(t - b for t, b in zip(total, before, strict=True))
    else:
        before = after = repeated(call["padding"], count)
    inside = [
        [p <= t * d <= d * (k - 1) - q for t in range(k)]
        for k, d, p, q in zip(kernel, dilation, before, after, strict=True)
    ]
    layout = Layout(
        groups=call["groups"],
        axis=len(node.shape or ()) - count - 1,
        interior=tuple(all(taps) for taps in itertools.product(*inside)),
        signature=f"conv {kernel} stride {stride} dilation {dilation} padding {before} {after}",
    )
    return _contract(call["input"], weight, call["bias"], layout)


@rule("aten.conv_transpose1d", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed_convolution(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    weight: Node = call["weight"]
    kernel = (weight.shape or ())[2:]
    taps = 1
    for size in kernel:
        taps *= size
    settings = [repeated(call[k], len(kernel)) for k in ("stride", "padding", "output_padding", "dilation")]
    layout = Layout(
        groups=call["groups"],
        inputs_first=True,
        axis=len(node.shape or ()) - len(kernel) - 1,
        interior=(False,) * taps,
        signature=f"transposed conv {kernel} {settings}",
    )
    return _contract(call["input"], weight, call["bias"], layout)


@rule("aten.embedding")
def embedding(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    if call["weight"].tensor is None:
        return Barrier("an embedding table that is computed")
    return Lookup(call["weight"], call["indices"])


def _contract(x: Node, weight: Node, bias: Node | None, layout: Layout) -> Operation:
    if weight.tensor is None:
        return Barrier("its weight is computed in the forward pass")
    if bias is not None and bias.tensor is None:
        return Barrier("its bias is computed in the forward pass")
    outputs = (weight.shape or ())[1] * layout.groups if layout.inputs_first else (weight.shape or ())[0]
    if bias is not None and bias.shape != (outputs,):  # addmm broadcasts a bias over rows
        return Barrier("its bias is not one number an output")
    return Contract(x, weight, bias, layout)
