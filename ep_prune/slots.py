"""Slots: the keep-or-drop variables of channels, and what ties them together.

Every index of a parameter's axis has a slot, and so has every channel of a tensor. Operations that need two
channels to go together (a sum of branches, a batch norm and its convolution, a depthwise filter) unify their
slots; what may never go (inputs, outputs, whatever a barrier reads, sizes written into the user's code) is
pinned, with the reason. Unions are recorded and resolved once, vectorized.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class EqualCounts:
    """All sections must keep equally many channels (chunk, split into equal parts)."""

    sections: tuple[Tensor, ...]


@dataclass(frozen=True)
class Groups:
    """A grouped convolution: every group that stays keeps equally many inputs and equally many outputs.

    inputs (G, C/G), outputs (G, O/G).
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Fewer:
    """Of `few` fewer must stay than of `many`: `nn.LSTM` projects to a smaller size, or not at all."""

    few: Tensor
    many: Tensor


@dataclass(frozen=True)
class Standardized:
    """A layer norm reads these channels: only equal multiplicities keep what it computes.

    leader (n,): classes of equal rows. Pinned too, with `reason`: `streams` says where that may be lifted."""

    slots: Tensor
    reason: str
    leader: Tensor


@dataclass(frozen=True)
class Isometric:
    """An RMS norm reads these channels: what keeps the mean of their squares keeps what it computes.

    row i is scale[i] times row leader[i]; zero (n,) bool. Pinned too, with `reason`, as in `Standardized`.
    node: the one that reads them, by name.
    """

    slots: Tensor
    reason: str
    node: str
    leader: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Grid:
    """Channels that one axis of the code's `view` lays out on several axes, in their order.

    slots (n_1, ..., n_m): at every level all the parts that stay keep equally many of theirs.
    """

    slots: Tensor


@dataclass(frozen=True)
class Whole:
    """slots (parts, size): what meets a tensor of fixed size stays with all of its part (rotary positions)."""

    slots: Tensor


@dataclass(frozen=True)
class Scores:
    """Attention's scores: each head sums the products of its queries and keys.

    score (H,), query (H, d), key (H, d; repeated where heads share keys), needed (H, d): products that are no
    constants. A head stays with all that it needs, and at least one channel. cancels: the scores go to a softmax
    over the keys, so that what is the same for all keys does not count.
    """

    score: Tensor
    query: Tensor
    key: Tensor
    needed: Tensor
    cancels: bool = True
    layer: str = ""
    node: str = ""


@dataclass(frozen=True)
class Blends:
    """Attention's means of the values: score (H,), value (H, e; repeated where heads share values), out (H, e).

    keeps_constants: the weights of the mean sum up to 1."""

    score: Tensor
    value: Tensor
    out: Tensor
    keeps_constants: bool = True
    node: str = ""


Constraint = EqualCounts | Groups | Fewer | Standardized | Isometric | Grid | Whole | Scores | Blends


@dataclass
class Slots:
    """All slots of one numbering. `grids`: channels on several axes, of which only attention makes use as such."""

    count: int = 0
    bound: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    constraints: list[Constraint] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)
    _unions: list[Tensor] = field(default_factory=list)
    _pins: list[tuple[Tensor, str]] = field(default_factory=list)

    def fresh(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)

    def of(self, tensor: str, axis: int, size: int) -> Tensor:
        """The slots of a parameter's axis, the same at every use of the parameter."""
        key = (tensor, axis)
        if key not in self.bound:
            self.bound[key] = self.fresh(size)
        return self.bound[key]

    def unify(self, a: Tensor, b: Tensor) -> None:
        if a is not b:
            a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
            self._unions.append(torch.stack([a.reshape(-1), b.reshape(-1)]))

    def pin(self, slots: Tensor, reason: str) -> None:
        self._pins.append((slots.reshape(-1), reason))

    def pin_heads(self) -> None:
        """Keep all channels that attention divides into heads, for those who do not know how to."""
        for constraint in self.constraints:
            if isinstance(constraint, Scores | Blends):
                for part in _sides(constraint):
                    self.pin(part, "divided into attention heads")
            elif isinstance(constraint, Grid | Whole):
                self.pin(constraint.slots, "divided into attention heads")

    def join_heads(self) -> None:
        """Make one slot of every head, for those who take whole heads alone."""
        for constraint in self.constraints:
            if isinstance(constraint, Scores | Blends):
                for part in _sides(constraint):
                    self.unify(part, constraint.score.unsqueeze(1))

    def settle_grids(self) -> None:
        """Channels on several axes of a tensor: where attention reads them, each head by itself keeps equally
        many; elsewhere a full grid stays, and what goes, goes along the longest axis at once."""
        if not self.grids:
            return
        roots = self.roots()
        sides = [_sides(c) for c in self.constraints if isinstance(c, Scores | Blends)]
        heads = [part.reshape(-1) for pair in sides for part in pair]
        of_heads = torch.zeros(self.count, dtype=torch.bool)
        if heads:
            of_heads[roots[torch.cat(heads)]] = True
        for grid in self.grids:
            if bool(of_heads[roots[grid]].all()):
                self.constraints.append(Grid(grid))
            else:
                self.keep_rectangular(grid)
        self.grids.clear()

    def keep_rectangular(self, grid: Tensor) -> None:
        """A full grid stays: what goes, goes along the longest of the axes that carry different slots, at once.

        Of axes equally long the innermost, as the slots are numbered, so that a transposed view of the same
        channels is cut in the same way."""
        carries = [grid.shape[a] > 1 and bool((grid != grid.narrow(a, 0, 1)).any()) for a in range(grid.ndim)]
        step = [int((grid.narrow(a, -1, 1) - grid.narrow(a, 0, 1)).abs().max()) for a in range(grid.ndim)]
        cut = max(range(grid.ndim), key=lambda a: (carries[a], grid.shape[a], -step[a]))
        lead = grid.movedim(cut, 0).reshape(grid.shape[cut], -1)
        self.unify(lead, lead[:, :1])

    def roots(self) -> Tensor:
        """(count,) the smallest slot of every slot's set: min-label propagation with pointer jumping."""
        root = torch.arange(self.count)
        if not self._unions:
            return root
        a, b = torch.cat(self._unions, 1)
        while True:
            low = torch.minimum(root[a], root[b])
            proposed = root.clone()
            for side in (a, b):
                proposed.scatter_reduce_(0, root[side], low, "amin")
                proposed.scatter_reduce_(0, side, low, "amin")
            proposed = proposed[proposed]
            if bool((proposed == root).all()):
                return root
            root = proposed

    def pinned(
        self, roots: Tensor, apart_from: Collection[str] = (), kept: Iterable[tuple[str, int]] = ()
    ) -> Tensor:
        """(count,) bool by root; pins for the reasons `apart_from` do not count, all of the axes `kept` does."""
        mask = torch.zeros(self.count, dtype=torch.bool)
        for slots, reason in self._pins:
            if reason not in apart_from:
                mask[roots[slots]] = True
        for axis in kept:
            if axis in self.bound:
                mask[roots[self.bound[axis]]] = True
        return mask

    def reasons(self, roots: Tensor) -> dict[str, Tensor]:
        """Reason -> the roots that are pinned for it."""
        found: dict[str, list[Tensor]] = {}
        for slots, reason in self._pins:
            found.setdefault(reason, []).append(roots[slots])
        return {reason: torch.unique(torch.cat(parts)) for reason, parts in found.items()}


def _sides(constraint: Scores | Blends) -> tuple[Tensor, Tensor]:
    if isinstance(constraint, Scores):
        return constraint.query, constraint.key
    return constraint.value, constraint.out
