"""Seeded inputs for a model that nobody gave any for.

A model with batch norm has recorded the mean and variance of its channels on the training data. Noise is
moved by gradient descent until the moments that it causes come near the recorded ones (Yin et al., "Dreaming
to Distill", CVPR 2020, without the class loss): inputs on which every layer works in its usual range. A
model without batch norm gets normal noise with the example's mean and deviation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ep_prune.trace import as_arguments

COUNT = 16
STEPS = 20


def synthetic_probes(model: nn.Module, example_inputs: Any, seed: int = 0) -> list[Any]:
    """Two batches of up to `COUNT` samples: normal noise, and noise moved towards batch norm's moments.

    Returned in the form of `example_inputs` (positional as a tuple), on the model's device and type.
    """
    args, kwargs = as_arguments(example_inputs)
    leaves, tree = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    batch = tensors[0].shape[0] if tensors else 0
    batched = bool(tensors) and all(leaf.shape[0] == batch for leaf in tensors)
    generator = torch.Generator().manual_seed(seed)

    def noise(leaf: Any, matched: bool) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = (COUNT, *leaf.shape[1:]) if batched and leaf.ndim else leaf.shape
        if not leaf.is_floating_point():
            low, high = int(leaf.min()), int(leaf.max())
            drawn = torch.randint(low, high + 1, shape, generator=generator)
            return drawn.to(leaf)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        if matched and leaf.numel() > 1 and float(leaf.std()) > 0:
            drawn = drawn * leaf.double().std().cpu() + leaf.double().mean().cpu()
        return drawn.to(leaf)

    plain = [noise(leaf, matched=False) for leaf in leaves]
    found = [plain]
    moved = _towards_moments(model, [noise(leaf, matched=True) for leaf in leaves], tree)
    found.append(moved if moved is not None else [noise(leaf, matched=True) for leaf in leaves])
    calls = []
    for batch_leaves in found:
        new_args, new_kwargs = pytree.tree_unflatten(batch_leaves, tree)
        calls.append(new_kwargs if kwargs else new_args)
    return calls


def _towards_moments(model: nn.Module, leaves: list[Any], tree: Any) -> list[Any] | None:
    """The inputs after `STEPS` of Adam on the distance to batch norm's moments; None without batch norm."""
    working = copy.deepcopy(model).float().eval().requires_grad_(False)
    losses: list[Tensor] = []

    def compare(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        rest = [axis for axis in range(x.ndim) if axis != 1]
        recorded, spread = module.get_buffer("running_mean"), module.get_buffer("running_var")
        variance, mean = torch.var_mean(x, rest)
        scale = spread + 1e-5
        losses.append(((mean - recorded).square() / scale).mean())
        losses.append(((variance.clamp_min(0) + 1e-5).sqrt() / scale.sqrt() - 1).square().mean())

    norms = [m for m in working.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.running_mean is not None]
    for norm in norms:
        norm.register_forward_pre_hook(compare)
    values = [leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
    free = [leaf for leaf in values if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not norms or not free:
        return None
    with torch.enable_grad():
        for leaf in free:
            leaf.requires_grad_(True)
        optimizer = torch.optim.Adam(free, lr=0.1)
        for _ in range(STEPS):
            losses.clear()
            args, kwargs = pytree.tree_unflatten(values, tree)
            working(*args, **kwargs)
            total = torch.stack(losses).sum()
            if not bool(torch.isfinite(total)):
                return None
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return [
        value.detach().to(leaf) if isinstance(value, Tensor) else value
        for value, leaf in zip(values, leaves, strict=True)
    ]
