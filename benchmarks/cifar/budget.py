"""Multiply-accumulates of a network and of its narrowed copies, and the largest width that a budget lets
through.

Every method has one knob; `largest` turns it until at most the asked share of the wide network's MACs is
left. A convolution or linear layer costs (positions of its output) x (elements of its weight), and narrowing
changes the second alone, so one forward pass of the wide network prices every copy of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

PRICED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Prices:
    """Output positions of every convolution and linear layer of `model` for one of the `images`."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.positions: dict[str, int] = {}
        hooks = []
        for name, module in model.named_modules():
            if isinstance(module, PRICED):
                hooks.append(module.register_forward_hook(self._note(name)))
        try:
            with torch.no_grad():
                model(images[:1])
        finally:
            for hook in hooks:
                hook.remove()
        self.wide = self.macs(model)

    def _note(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, _: object, output: Tensor) -> None:
            channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            self.positions[name] = self.positions.get(name, 0) + output.numel() // channels

        return note

    def macs(self, model: nn.Module) -> int:
        """MACs of `model`, a copy of the wide network with other widths, for one image."""
        modules = dict(model.named_modules())
        return sum(count * modules[name].weight.numel() for name, count in self.positions.items())

    def fits(self, model: nn.Module, keep_macs: float) -> bool:
        """Whether at most this share of the wide network's MACs is left."""
        return self.macs(model) <= keep_macs * self.wide


def largest(fits: Callable[[float], bool], steps: int = 12) -> float:
    """The largest share in (0, 1] for which `fits`, to 2^-steps; `fits` must not come back once it has failed.

    Raises ValueError if no share fits.
    """
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0.0:
        raise ValueError("no width of at least one channel a layer meets this budget: ask for more MACs")
    return low
