"""Data movement: what happens to the data happens to the labels, by the same operator.

Sizes in the user's code (`view(-1, 512)`, `x[:, :32]`) cannot be told from sizes that follow the input: they
are hypotheses, and the narrow model is run to test them (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ep_prune.graph import Cat, Move, Node, Operation, Pass, Pick, Split
from ep_prune.rules.registry import Tensors, arguments, rule


def _act(node: Node) -> Callable[[Tensor], Tensor]:
    def act(labels: Tensor) -> Tensor:
        assert node.target is not None
        moved: Tensor = node.target(labels, *node.args[1:], **node.kwargs)
        return moved

    return act


@rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten.using_ints", "aten.unflatten.int",
      "aten.permute", "aten.transpose.int", "aten.t", "aten.squeeze", "aten.squeeze.dim", "aten.squeeze.dims",
      "aten.unsqueeze", "aten.expand", "aten.repeat", "aten.flip", "aten.roll", "aten.movedim.intlist",
      "aten.swapaxes", "aten.channel_shuffle", "aten.native_channel_shuffle", "aten.unfold",
      "aten.view_copy", "aten.permute_copy", "aten.expand_copy", "aten.numpy_T", "aten.tile",
      "aten.repeat_interleave.self_int")  # fmt: skip
def move(node: Node, tensors: Tensors) -> Operation:
    return Move((node.args[0],), _act(node))


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(node: Node, tensors: Tensors) -> Operation:
    return Move((node.args[0],), _act(node), regroup=(len(node.shape or ()) - 3,))


@rule("aten.cat", "aten.concat")
def cat(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    parts = tuple(part for part in call["tensors"] if part.shape != (0,))
    return Cat(parts, call["dim"] % len(node.shape or ()))


@rule("aten.stack")
def stack(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    return Cat(tuple(call["tensors"]), call["dim"] % len(node.shape or ()), stack=True)


@rule("aten.slice.Tensor", "aten.narrow")
def slice_(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    x = call["self"] if "self" in call else call["input"]
    axis = call["dim"] % len(x.shape)
    size = x.shape[axis]
    if node.op == "aten.narrow":
        start, end, step = call["start"], call["start"] + call["length"], 1
    else:
        start, end, step = call["start"] or 0, call["end"], call["step"]
        end = size if end is None else end
    start, end = (min(max(bound + size if bound < 0 else bound, 0), size) for bound in (start, end))
    if (start, end, step) == (0, size, 1):
        return Pass(x)
    if step != 1:
        return Move((x,), _act(node))
    return Split(x, axis, (start, end - start, size - end), take=1)


@rule("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_split.Tensor",
      "aten.unsafe_chunk", "aten.tensor_split.sections")  # fmt: skip
def split(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    x = call["self"]
    axis = call["dim"] % len(x.shape)
    assert node.target is not None
    parts = node.target(torch.empty(x.shape[axis]), *node.args[1:2])
    return Split(x, axis, tuple(len(part) for part in parts))


@rule("aten.select.int")
def select(node: Node, tensors: Tensors) -> Operation:
    x, axis, index = node.args
    axis %= len(x.shape)
    size = x.shape[axis]
    return Split(x, axis, (index % size, 1, size - 1 - index % size), take=1, squeeze=True)


def _stored(place: Any) -> str | None:
    """The name of the tensor that an index reads, itself or through a copy (a list in the user's code)."""
    while isinstance(place, Node) and place.tensor is None and place.op in _COPIES:
        place = place.args[0]
    return place.tensor if isinstance(place, Node) else None


_COPIES = ("aten.clone", "aten.lift_fresh_copy", "aten.detach", "aten.detach_", "aten.alias")


@rule("aten.index.Tensor", "aten.index_select")
def index(node: Node, tensors: Tensors) -> Operation:
    places: Any = node.args[1] if node.op == "aten.index.Tensor" else (node.args[2],)
    names = [_stored(place) for place in places]

    def pick(labels: Tensor, known: list[Tensor | None]) -> Tensor:
        assert node.target is not None
        if node.op == "aten.index_select":
            return labels.index_select(node.args[1], torch.as_tensor(known[0]))
        moved: Tensor = node.target(labels, known)
        return moved

    if any(place is not None and name is None for place, name in zip(places, names, strict=True)):
        return Pick(node.args[0], tuple(places), pick)
    stored = [None if name is None else tensors[name] for name in names]
    return Move((node.args[0],), lambda labels: pick(labels, [None if t is None else t.cpu() for t in stored]))


@rule("aten.unbind.int")
def unbind(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    axis = call["dim"] % len(call["self"].shape)
    return Split(call["self"], axis, (1,) * call["self"].shape[axis], squeeze=True)
