"""Arguments and outputs as trees of tensors, and copies of models: tools of `compare`."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.errors import InputError
from ep_prune.verification.float64 import sharing

Call = Any  # (positional arguments, keyword arguments) of one forward pass
Outputs = dict[str, Tensor]  # the tensors of one forward pass by their path, such as "output.logits"


def gap_of(wide: Tensor, narrow: Tensor) -> tuple[float, float, int]:
    """max |wide - narrow| and max |wide| where wide is finite, and how many elements that is.

    A narrow NaN or inf there is a gap of inf, and so is all but the same infinity where wide is infinite;
    where wide is NaN there is nothing to keep. Of integers: unequal elements, all elements, all elements.
    """
    if not wide.is_floating_point():
        return float((wide != narrow).sum()), float(wide.numel()), wide.numel()
    finite, lost = wide.isfinite(), False
    wide, narrow = wide.detach(), narrow.detach()
    if not finite.all():
        lost = bool((wide.isinf() & (wide != narrow)).any())
        wide, narrow = wide[finite], narrow[finite]
    wide, narrow = wide.double(), narrow.double()
    if not wide.numel():
        return math.inf if lost else 0.0, 0.0, 0
    gap = float((wide - narrow).abs_().nan_to_num_(nan=math.inf, posinf=math.inf).max())
    return math.inf if lost else gap, float(wide.abs().max()), wide.numel()


def gradients(value: Tensor, points: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of `value` at each point, 0 where it does not depend on one."""
    slopes = torch.autograd.grad(value, points, allow_unused=True)
    return [torch.zeros_like(p) if slope is None else slope for p, slope in zip(points, slopes, strict=True)]


def copied(model: nn.Module, role: str, share: bool) -> nn.Module:
    """A private copy in eval mode, without gradients; share: with its parameters in the model's own memory."""
    try:
        return (sharing(model) if share else copy.deepcopy(model)).eval().requires_grad_(False)
    except Exception as error:
        raise InputError(f"the {role} model cannot be copied, and only copies are run: {short(error)}") from error


def main_dtype(model: nn.Module, example: Call) -> torch.dtype:
    """The floating dtype of most parameter elements, or without parameters of the example's."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in list(model.parameters()) or all_tensors(example):
        sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    return max((n, str(d), d) for d, n in sizes.items())[2] if any(sizes.values()) else torch.float32


def as_leaf(points: list[Tensor], tensor: Tensor) -> Tensor:
    """A float64 leaf of the graph, listed in `points`; integers and masks of -inf stay as they are."""
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        return tensor
    points.append(tensor.detach().double().clone().requires_grad_())
    return points[-1]


def rows_of(rows: slice | None, tensor: Tensor) -> Tensor:
    """Some samples of a batch, or all."""
    return tensor if rows is None else tensor[rows]


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    """Positional arguments as a tuple."""
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def as_batch(batch: Any, example: Call) -> Call:
    """The model's arguments of one batch of the user's: those that the example has, the rest is dropped."""
    args, names = example
    inner: Any = Mapping if names else tuple | list if args and isinstance(args[0], Tensor) else ()
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], inner):
        batch = batch[0]  # ((arguments), y)
    if isinstance(batch, Mapping) and names and all(name in batch for name in names):
        return (), {name: batch[name] for name in names}
    values = as_tuple(batch)
    if names or isinstance(batch, Mapping) or len(values) < len(args):
        wanted = f"a mapping with {', '.join(names)}" if names else f"{len(args)} positional arguments"
        raise InputError(f"a batch of the probes is not like the example inputs: it must be {wanted}")
    return values[: len(args)], {}


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same containers, `change` applied to every tensor; others are copied, a model may own them."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple | list):
        parts = [map_tensors(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, Mapping):
        return {name: map_tensors(part, change) for name, part in tree.items()}
    return copy.deepcopy(tree)


def all_tensors(tree: Any) -> list[Tensor]:
    """Every tensor of a tree, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, tuple | list) else ()
    return [tensor for part in parts for tensor in all_tensors(part)]


def shared_rows(call: Call) -> int:
    """The size of dimension 0 if all tensors share it, else 0."""
    sizes = {t.shape[0] if t.dim() else 0 for t in all_tensors(call)}
    return sizes.pop() if len(sizes) == 1 else 0


def flatten(value: Any, name: str = "output") -> tuple[Outputs, list[str]]:
    """The tensors of a nested structure by path; the paths of what is no tensor, number or container."""
    if isinstance(value, bool | int | float):
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if isinstance(value, Tensor) and not value.is_nested:
        value = value if value.layout == torch.strided else value.to_dense()
        return {name: torch.view_as_real(value) if value.is_complex() else value}, []
    if isinstance(value, Mapping):  # so is an output of transformers
        parts = {f"{name}.{key}": part for key, part in value.items()}
    elif dataclasses.is_dataclass(value):
        parts = {f"{name}.{key.name}": getattr(value, key.name) for key in dataclasses.fields(value)}
    elif isinstance(value, tuple | list | Tensor):
        parts = {f"{name}[{i}]": part for i, part in enumerate(value)}
    else:
        return {}, [] if value is None else [name]
    pairs = [flatten(part, path) for path, part in parts.items()]
    return {k: v for outputs, _ in pairs for k, v in outputs.items()}, [k for _, more in pairs for k in more]


def short(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
