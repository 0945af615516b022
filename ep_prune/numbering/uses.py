"""What one use of a weight sends, read off the weight as it is stored: in float64 only while it is looked at.

Small weights are kept in float64, up to `ROOM` numbers in all. What is beyond is cast again whenever it is asked
for, and walked through in blocks of outputs, so that no temporaries of a large weight's size are ever there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ep_prune.graph import Layout

ROOM = 2**20
BLOCK = 2**17
Outputs = slice | Tensor
ALL = slice(None)


class Net:
    """What classes of channels send, at their leaders, (n, O/G, taps); `sent` (n, O/G): whether it is anything."""

    def __init__(self, use: Use, make: Callable[[Outputs], Tensor]) -> None:
        self._make = make
        self._made = make(ALL) if use.keep else None
        parts = [(self.values(outputs) != 0).any(2) for outputs in use.blocks()]
        sent = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        whole = bool((sent == sent[:, :1]).all())  # to all outputs alike, as is usual, or to none
        self.sent = sent[:, :1].clone().expand(sent.shape) if whole else sent

    def values(self, outputs: Outputs = ALL) -> Tensor:
        return self._make(outputs) if self._made is None else self._made[:, outputs]


class Use:
    """A weight as it consumes, of `shape` (G, O/G, C/G, taps); `keep`: there is room to keep it in float64."""

    def __init__(self, stored: Tensor, layout: Layout, keep: bool) -> None:
        self.stored, self.layout, self.keep = stored, layout, keep
        self.shape = tuple(layout.canonical(stored).shape)
        self._made: Tensor | None = self._cast(ALL) if keep else None

    def weight(self, outputs: Outputs = ALL) -> Tensor:
        """(n, O/G, taps), float64: what each input position sends."""
        return self._cast(outputs) if self._made is None else self._made[:, outputs]

    def _cast(self, outputs: Outputs) -> Tensor:
        groups, _, inputs, taps = self.shape
        some = self.layout.canonical(self.stored)[:, outputs].to("cpu", torch.float64)
        return some.transpose(1, 2).reshape(groups * inputs, -1, taps)

    def blocks(self) -> list[slice]:
        """Runs of outputs that are looked at together."""
        groups, outputs, inputs, taps = self.shape
        size = max(1, BLOCK // max(1, groups * inputs * taps))
        if self.keep or size >= outputs:
            return [ALL]
        return [slice(start, start + size) for start in range(0, outputs, size)]
