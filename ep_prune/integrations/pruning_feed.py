"""Calibration inputs for a model that is called as its user calls it, and passes over them.

    feed = feed_of(calibration, example, model, forward, limit)
    with hooked(model, names, after=seen): feed.run(model)

What a user has at hand is taken: one batch, or a loader of batches, labels and all. A pass runs in eval mode and
without gradients, and leaves modes as they were. The model is a plain module here, and may be of shapes that only
torch-pruning knows of: nothing is traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ep_prune.calibrate import CHUNK, SAMPLES
from ep_prune.errors import InputError
from ep_prune.trace import as_arguments

Forward = Callable[[nn.Module, Any], Any]
Seen = Callable[[str, Tensor, Tensor | None], Tensor | None]


class Enough(Exception):
    """A hook has seen all that the pass was for."""


@dataclass(frozen=True)
class Feed:
    """Batches of `sizes` samples, each as the model takes it, by `forward(model, batch)` if given."""

    batches: tuple[Any, ...]
    sizes: tuple[int, ...]
    forward: Forward | None

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def call(self, model: nn.Module, number: int) -> Any:
        """One batch; a hook that raises `Enough` ends it early. Raises `InputError`: the model does not run."""
        try:
            if self.forward is not None:
                return self.forward(model, self.batches[number])
            args, kwargs = as_arguments(self.batches[number])
            return model(*args, **kwargs)
        except Enough:
            return None
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:160]
            raise InputError(
                f"the model does not run on its calibration data ({reason}): if pruning has changed a shape that "
                "the model keeps as a number (num_heads, head_dim), set it first"
            ) from error

    def joined(self) -> Feed | None:
        """All batches as one, or None where they do not fit together."""
        flat = [pytree.tree_flatten(batch) for batch in self.batches]
        if any(tree != flat[0][1] for _, tree in flat):
            return None
        columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
        if any(not isinstance(leaf, Tensor) or leaf.shape[1:] != c[0].shape[1:] for c in columns for leaf in c):
            return None
        whole = pytree.tree_unflatten([torch.cat(column) for column in columns], flat[0][1])
        return Feed((whole,), (self.samples,), self.forward)


def feed_of(
    calibration: Any, example: Any, model: nn.Module, forward: Forward | None = None, limit: int = SAMPLES
) -> Feed:
    """Read a batch or a loader of batches; of each, what `example` says the model takes (None: its first entry).

    Raises `InputError`: no samples, no tensors, NaN or infinite values.
    """
    batches: list[Any] = []
    sizes: list[int] = []
    for number, batch in enumerate(_batches(calibration, example)):
        inputs = _inputs(batch, example)
        leaves, tree = pytree.tree_flatten(inputs)
        lengths = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
        where = f"batch {number} of the calibration data"
        if len(lengths) != 1:
            raise InputError(f"{where} holds no tensors of one length: pass inputs, or (inputs, labels)")
        count = min(lengths.pop(), limit - sum(sizes))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise InputError(f"{where} holds NaN or infinite values: leave it out")
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            batches.append(pytree.tree_unflatten([_placed(leaf, model, start, stop) for leaf in leaves], tree))
            sizes.append(stop - start)
        if sum(sizes) >= limit:
            break
    if sum(sizes) < 2:
        raise InputError(f"calibration holds {sum(sizes)} samples: pass at least 2, some hundreds are good")
    return Feed(tuple(batches), tuple(sizes), forward)


def _batches(calibration: Any, example: Any) -> Iterable[Any]:
    """A loader as it is; one batch as a loader of one."""
    if isinstance(calibration, Tensor | Mapping):
        return [calibration]
    if isinstance(calibration, tuple) and calibration and isinstance(calibration[0], Tensor):
        return [calibration]
    if isinstance(calibration, list) and calibration and isinstance(calibration[0], Tensor):
        first = calibration[0]
        alike = all(
            isinstance(part, Tensor) and part.shape[1:] == first.shape[1:] and part.dtype == first.dtype
            for part in calibration
        )
        if not alike or len(as_arguments(example)[0]) == len(calibration) > 1:
            return [calibration]  # (inputs, labels), or the model's several inputs
    if not isinstance(calibration, Iterable):
        raise InputError(
            f"calibration is of type {type(calibration).__name__}: pass a batch or a loader of batches"
        )
    return calibration


def _inputs(batch: Any, example: Any) -> Any:
    """The part of a batch that the model takes, in the form of the example."""
    if isinstance(example, Mapping) and isinstance(batch, Mapping):
        return {key: batch[key] for key in example if key in batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    takes = 1 if isinstance(example, Tensor | Mapping) or example is None else len(tuple(example))
    if isinstance(batch, tuple | list):
        parts = tuple(batch)[:takes]
        return parts[0] if isinstance(example, Tensor) else parts
    return batch if isinstance(example, Tensor) else (batch,)


def _placed(leaf: Any, model: nn.Module, start: int, stop: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    at = next(model.parameters(), torch.empty(0))
    part = leaf.detach()[start:stop] if leaf.ndim else leaf
    return part.to(at.device, at.dtype if leaf.is_floating_point() else leaf.dtype)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, and every module's own mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], seen: Seen, before: bool = False) -> Iterator[None]:
    """Call `seen(name, x, y)` whenever a module of these names runs; before it runs (without y) where asked."""
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[..., None]:
        def after_it(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
            seen(name, args[0] if args else kwargs["input"], output[0] if output else None)

        return after_it

    handles = []
    try:
        for name in names:
            module = modules[name]
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Course:
    """One forward pass: linear layers and convolutions by name, as they were called, and bytes of a sample."""

    calls: tuple[str, ...]
    bytes_a_sample: int

    @staticmethod
    def of(model: nn.Module, feed: Feed) -> Course:
        calls: list[str] = []
        largest = [1]

        def seen(name: str, x: Tensor, y: Tensor | None) -> None:
            calls.append(name)
            if isinstance(y, Tensor):
                size = max(math.prod(x.shape) * x.element_size(), math.prod(y.shape) * y.element_size())
                largest[0] = max(largest[0], size // max(feed.sizes[0], 1))

        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        with evaluating(model), hooked(model, names, seen):
            feed.call(model, 0)
        return Course(tuple(calls), largest[0])
