"""How much memory a call takes, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ep_prune.trace import run


def peak_memory_of(model: nn.Module, inputs: Any) -> int:
    """Bytes of weights, buffers, inputs, and of all tensors that one call makes, the most that stand at one time;
    what kernels use inside aside."""
    given = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    standing = _Standing()
    standing.count([*model.parameters(), *model.buffers(), *given])
    with standing:
        run(model, inputs)
    return standing.peak


class _Standing(TorchDispatchMode):
    """Counts the bytes of tensors as long as they stand. peak: the most so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known: dict[StorageWeakRef, int] = {}

    def count(self, found: Any) -> None:
        self._known = {key: size for key, size in self._known.items() if not key.expired()}  # type: ignore[no-untyped-call]
        for tensor in pytree.tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._known.setdefault(key, storage.nbytes())
        self.peak = max(self.peak, sum(self._known.values()))

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count(found)
        return found
