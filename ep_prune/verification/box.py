"""A declared domain: a box of inputs, and whether inputs lie in it.

    domain = (lo, hi)             two numbers for all floating inputs; or, for a model of one input, two arrays
                                  that broadcast to one sample: (F,) by feature, (C, 1, 1) by channel
    domain = [(lo, hi), None]     one for each floating input of several, in order; None: not bounded
    domain = {"x": (lo, hi)}      by name, for inputs given by keyword

The ends count as inside as the input's own type rounds them: 0.6 in float32 is a little more than 0.6.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ep_prune.errors import InputError
from ep_prune.verification.trees import all_tensors

Box = tuple[Tensor, Tensor]
"""(low, high), float64, of the shape of one sample."""


def boxes_of(domain: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Box | None]:
    """The box of every tensor among the inputs, in order; None for integers and for what is not bounded.

    Raises `InputError` where the domain does not fit the inputs.
    """
    tensors = all_tensors((tuple(args), dict(kwargs)))
    places = [k for k, tensor in enumerate(tensors) if tensor.is_floating_point()]
    if not places:
        raise InputError("domain is declared for a model without floating inputs: leave it out")
    boxes: list[Box | None] = [None] * len(tensors)
    if isinstance(domain, Mapping):
        for name, pair in domain.items():
            if not isinstance(kwargs.get(name), Tensor):
                raise InputError(f"domain names {name!r}, no keyword input: give one of {', '.join(kwargs)}")
            place = next(k for k, tensor in enumerate(tensors) if tensor is kwargs[name])
            boxes[place] = _box(pair, tensors[place], f"domain[{name!r}]")
        return boxes
    if not isinstance(domain, tuple | list):
        raise InputError(f"domain is {type(domain).__name__}: give a pair (lo, hi)")
    both = len(domain) == 2 and all(isinstance(end, numbers.Real) for end in domain)
    if both or len(places) == 1:
        alone = len(domain) == 1 and isinstance(domain[0], tuple | list)
        for place in places:
            boxes[place] = _box(domain[0] if alone else domain, tensors[place], "domain")
        return boxes
    if len(domain) != len(places):
        raise InputError(
            f"domain has {len(domain)} entries, not {len(places)}: give a pair for each floating input"
        )
    for place, pair in zip(places, domain, strict=True):
        boxes[place] = None if pair is None else _box(pair, tensors[place], f"domain[{places.index(place)}]")
    return boxes


def _box(pair: Any, example: Tensor, name: str) -> Box:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(f"{name} is no pair: give (lo, hi), two numbers or two arrays")
    shape = tuple(example.shape[1:])
    ends = []
    for end in pair:
        try:
            value = torch.as_tensor(end, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} holds {type(end).__name__}, no number: give (lo, hi)") from error
        if not bool(value.isfinite().all()):
            raise InputError(f"{name} has NaN or infinite ends: give finite numbers")
        try:
            ends.append(value.expand(shape).clone())
        except RuntimeError as error:
            raise InputError(
                f"{name} has an end of shape {tuple(value.shape)}, which does not fit one sample of shape {shape}"
            ) from error
    low, high = ends
    if bool((low > high).any()):
        raise InputError(f"{name} has lo > hi at {int((low > high).sum())} places: give the lower end first")
    if example.is_floating_point():
        low = torch.minimum(low, low.to(example.dtype).double())
        high = torch.maximum(high, high.to(example.dtype).double())
    return low, high


def check_inside(boxes: Sequence[Box | None], call: Any, what: str) -> None:
    """Raise `InputError` where inputs lie outside their box."""
    for box, tensor in zip(boxes, all_tensors(call), strict=True):
        if box is None:
            continue
        value = tensor.detach().double().cpu()
        outside = (value < box[0]) | (value > box[1]) | value.isnan()
        if bool(outside.any()):
            raise InputError(
                f"{what} has {int(outside.sum())} values outside the declared domain, such as "
                f"{float(value[outside][0]):.6g}: pass inputs inside, or declare a wider domain"
            )


def draw(box: Box, family: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Samples in a box: `uniform`, or its `corners`."""
    low, high = box
    share = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return torch.where(share < 0.5, low, high) if family == "corners" else low + share * (high - low)


def clamped(box: Box, value: Tensor) -> Tensor:
    """The nearest point of the box."""
    return torch.maximum(torch.minimum(value, box[1].to(value)), box[0].to(value))


def plain(domain: Any) -> Any:
    """A domain as nested lists, dicts and numbers, as JSON takes them."""
    if isinstance(domain, Mapping):
        return {str(name): plain(part) for name, part in domain.items()}
    if isinstance(domain, tuple | list):
        return [plain(part) for part in domain]
    return domain if domain is None else torch.as_tensor(domain, dtype=torch.float64).tolist()


def described(boxes: Sequence[Box | None]) -> str:
    """A domain for a person: `[0, 1]`, `[-1.2, 0.6] x [-0.07, 0.07]`, or how many sides it has."""

    def side(low: float, high: float) -> str:
        return f"[{low:.6g}, {high:.6g}]"

    texts = []
    for low, high in (box for box in boxes if box is not None):
        ends = torch.stack([low.reshape(-1), high.reshape(-1)], 1)
        if bool((ends == ends[:1]).all()):
            texts.append(side(*ends[0].tolist()))
        elif len(ends) <= 4:
            texts.append(" x ".join(side(*pair) for pair in ends.tolist()))
        else:
            texts.append(f"{len(ends)} sides, within {side(float(low.min()), float(high.max()))}")
    return ", ".join(texts)
