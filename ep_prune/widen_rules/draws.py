"""The random numbers of an embedding, by name: drawn when first asked for, and the same at every later asking.

So an embedding is a function of its numbers. Those that may vary continuously, on the weights of the model, are
the coordinates of the manifold on which it lies (`manifold` moves them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Draws:
    """Named numbers. `values`: what was drawn; `fixed`: names that are no coordinates (choices, buffers);
    `closed`: what was not drawn before is zero."""

    generator: torch.Generator
    values: dict[str, Tensor] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    closed: bool = False

    def normal(self, name: str, *shape: int, vary: bool = True, fixed: bool = False) -> Tensor:
        """Standard normal numbers; zeros, as the point about which to move, where not to `vary`."""
        return self._get(name, torch.randn(shape, generator=self.generator, dtype=torch.float64), vary, fixed)

    def uniform(self, name: str, count: int, vary: bool = True, fixed: bool = False) -> Tensor:
        """Numbers in (-1, 1); zeros where not to `vary`."""
        draw = torch.rand(count, generator=self.generator, dtype=torch.float64) * 2 - 1
        return self._get(name, draw, vary, fixed)

    def chance(self, name: str, count: int, share: float) -> Tensor:
        """(count,) bool, True with probability `share`: a choice, and no coordinate."""
        draw = torch.rand(count, generator=self.generator, dtype=torch.float64)
        return self._get(name, draw < share, True, True)

    def _get(self, name: str, draw: Tensor, vary: bool, fixed: bool) -> Tensor:
        if fixed:
            self.fixed.add(name)
        return self.values.setdefault(name, draw if vary and not self.closed else torch.zeros_like(draw))

    def coordinates(self) -> dict[str, int]:
        """How many numbers of each name may be moved."""
        return {name: value.numel() for name, value in self.values.items() if name not in self.fixed}

    def moved(self, step: Mapping[str, Tensor], size: float = 1.0) -> Draws:
        """The same numbers, some of them moved by `size` times `step`; what was never drawn is zero."""
        values = {
            name: value + size * step[name] if name in step else value for name, value in self.values.items()
        }
        return Draws(torch.Generator(), values, set(self.fixed), closed=True)
