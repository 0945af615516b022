"""A linear layer or convolution as a matrix, and what it reads and writes as rows.

Two views of a weight, by its size:

    patches    (g, o, p): o outputs of each of g groups, p = channels * taps: the patches that it really reads
    channels   (g, o * taps, c): channels alone, for transposed convolutions and where patches are too large. What
               is fitted then is not the output but the channels themselves: x_all ~ T x_kept + t, W' = W T

`stride`: inputs of a linear layer for each channel of a flattened image, which lie side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 4700
"""Columns of a patch in a fit, at most: a 3x3 convolution of 512 channels has 4,608."""
ROWS = 49152
"""Rows that a weight is fitted on, about."""


@dataclass(frozen=True)
class Site:
    """How one module is seen. groups, taps: of a convolution, or 1."""

    groups: int
    taps: int
    stride: int
    transposed: bool
    by_channels: bool

    @staticmethod
    def of(module: nn.Module, stride: int = 1, largest: int | None = None) -> Site:
        """By channels if a patch has more than `largest` columns."""
        largest = LARGEST if largest is None else largest
        if isinstance(module, nn.Linear):
            return Site(1, 1, stride, False, module.in_features > largest)
        assert isinstance(module, nn.modules.conv._ConvNd)
        taps = math.prod(module.kernel_size)
        wide = module.in_channels // module.groups * taps > largest
        return Site(module.groups, taps, 1, module.transposed, wide or module.transposed)

    @property
    def spots(self) -> int:
        """Columns of the patch view for each channel."""
        return self.taps * self.stride

    def view(self, weight: Tensor) -> Tensor:
        """(g, o, p), or (g, o * spots, c) by channels."""
        if self.transposed:
            wide = weight.reshape(
                self.groups, weight.shape[0] // self.groups, weight.shape[1], self.spots
            ).transpose(1, 2)
        else:
            wide = weight.reshape(self.groups, weight.shape[0] // self.groups, -1, self.spots)
        return wide.transpose(2, 3).flatten(1, 2) if self.by_channels else wide.flatten(2)

    def restore(self, view: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `view`; `shape` is that of the weight."""
        if self.by_channels:
            wide = view.reshape(self.groups, -1, self.spots, view.shape[2]).transpose(2, 3)
        else:
            wide = view.reshape(*view.shape[:2], -1, self.spots)
        if self.transposed:
            wide = wide.transpose(1, 2)
        return wide.reshape(shape)

    def channels_of(self, columns: Tensor) -> Tensor:
        """Input columns of the module (n,) as channels of the view by channels."""
        return columns[:: self.stride] // self.stride

    # ---- rows ------------------------------------------------------------------------------------------

    def read(self, module: nn.Module, x: Tensor, keep: Tensor | None, quota: int, seed: int) -> Tensor:
        """What the columns of the view read (g, r, p), of the input channels `keep` alone; about `quota` rows."""
        if isinstance(module, nn.Linear):
            flat = _some(x.reshape(-1, x.shape[-1]), quota, seed)
            flat = flat if keep is None else flat.index_select(1, keep.to(x.device))
            if not self.by_channels:
                return flat.unsqueeze(0)
            return flat.reshape(len(flat), -1, self.stride).transpose(1, 2).flatten(0, 1).unsqueeze(0)
        assert isinstance(module, nn.modules.conv._ConvNd)
        count = len(module.kernel_size)
        x = x if x.ndim == count + 2 else x.unsqueeze(0)
        x = x if keep is None else x.index_select(1, keep.to(x.device))
        if self.by_channels:
            rows = _some(x.movedim(1, -1).reshape(-1, x.shape[1]), quota, seed)
        else:
            rows = _patches(module, x, quota, seed)
        return rows.reshape(len(rows), self.groups, -1).transpose(0, 1)

    def written(self, module: nn.Module, y: Tensor, quota: int, seed: int) -> Tensor:
        """The outputs at the same places, (r, all outputs)."""
        if isinstance(module, nn.modules.conv._ConvNd):
            y = (y if y.ndim == len(module.kernel_size) + 2 else y.unsqueeze(0)).movedim(1, -1)
        return _some(y.reshape(-1, y.shape[-1]), quota, seed)


def outgoing(layer: Any) -> Tensor:
    """(outputs, .) float64: the weights that write each output of a linear layer or convolution."""
    weight: Tensor = layer.weight.detach().double().cpu()
    if getattr(layer, "transposed", False):
        weight = weight.reshape(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _chosen(count: int, quota: int, seed: int) -> Tensor | None:
    """Which of `count` rows, in their order; None for all."""
    if count <= quota:
        return None
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:quota].sort().values


def _some(flat: Tensor, quota: int, seed: int) -> Tensor:
    chosen = _chosen(len(flat), quota, seed)
    return flat if chosen is None else flat[chosen.to(flat.device)]


def _patches(module: nn.modules.conv._ConvNd, x: Tensor, quota: int, seed: int) -> Tensor:
    """(r, channels * taps) of a batch (N, channels, ...)."""
    count = len(module.kernel_size)
    if module.padding_mode != "zeros":
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    elif isinstance(module.padding, str):
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice)
    else:
        x = nn.functional.pad(x, [p for side in reversed(module.padding) for p in (side, side)])
    for axis in range(count):
        dilation, stride = module.dilation[axis], module.stride[axis]
        x = x.unfold(2 + axis, dilation * (module.kernel_size[axis] - 1) + 1, stride)[..., ::dilation]
    x = x.movedim(1, 1 + count)  # (N, *space, channels, *kernel)
    places = x.shape[: 1 + count]
    chosen = _chosen(math.prod(places), quota, seed)
    if chosen is not None:
        x = x[torch.unravel_index(chosen.to(x.device), places)]
    return x.reshape(-1, math.prod(x.shape[-1 - count :]))
