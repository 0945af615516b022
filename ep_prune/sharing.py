"""Copies of a model that share its parameters, so that a model on its way to being narrow is there once.

Edits replace parameters, and never write into one; so a copy needs memory of its own only for what was edited.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ep_prune.errors import InputError
from ep_prune.trace import own_parameters, prepare, run

SMALL = 2**22
"""How many parameters make no difference in memory."""


def copy_of(model: nn.Module, share: bool) -> nn.Module:
    """A copy; share: its parameters are in the memory of the model's, until they are replaced."""
    return copy.deepcopy(model, own_parameters(model) if share else None)


def prepare_and_run(
    model: nn.Module, inputs: Any, replace_modules: bool = False
) -> tuple[nn.Module, list[str], bool]:
    """`prepare`, once the copy is seen to run on `inputs`; and whether it shares the model's parameters.

    A large one does unless the forward pass writes into one (a weight clipped or normalized in place, an
    embedding's max_norm), for the user's model must stay as it is. A small one is copied: casts take longer.
    """
    if isinstance(model, nn.Module) and _is_large(model):
        with contextlib.suppress(Exception):  # the second attempt will say what is wrong
            working, notes = prepare(model, replace_modules, share=True)
            with _NoWriting(_memory(model)):
                run(working, inputs)
            return working, notes, True
    working, notes = prepare(model, replace_modules)
    run(working, inputs)
    return working, notes, False


def _is_large(model: nn.Module) -> bool:
    with contextlib.suppress(ValueError):  # a lazy parameter has no size
        return sum(p.numel() for p in model.parameters()) > SMALL
    return False


def _memory(model: nn.Module) -> set[int]:
    """Where the parameters are stored."""
    return {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}


class _NoWriting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops an operator before it writes into one of these storages."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                for tensor in pytree.tree_leaves(value):
                    if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self.storages:
                        raise InputError(f"{func} writes into a parameter")
        return func(*args, **kwargs)


def unshare_(narrow: nn.Module, model: nn.Module) -> None:
    """Give `narrow` memory of its own for the parameters that are in the memory of the model's."""
    own = _memory(model)
    for parameter in narrow.parameters():
        if parameter.untyped_storage().data_ptr() in own:
            parameter.data = parameter.detach().clone()
