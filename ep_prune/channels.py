"""The language of claims: every channel of a tensor is an affine combination of *atoms*.

    x_i(b, p) = sum_k coef_ik * atom_ik(b, p) + offset_i          p: the position (space, tokens)

An atom is a function of the network's input and of the position, known only by its number. Two atoms are the
same function if they have the same number: numbers are content hashes (64 bits) of what makes the atom, so
that equality is identity, across layers, without a table. What makes an atom is integral (an operation's
signature and other atoms); where it depends on real weights, the *leader* of a congruence class is chosen
first (`find`), and the leader's own place is hashed.

`Rows` holds the combinations of n channels; `Channels` is a tensor of the program: its labels say which row
stands at which index, its slots which channels must be kept or dropped together.

Nothing here knows the graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

ONE = 1
"""The atom that is 1 everywhere. It enters rows only where a constant meets a position (zero padding)."""


def number(text: str) -> int:
    """A 63-bit number of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def mix(*columns: Tensor | int) -> Tensor:
    """Hash integer columns (broadcast together) to one column of 63-bit numbers: chained splitmix64."""
    tensors = [torch.as_tensor(column, dtype=torch.int64) for column in columns]
    state = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        state = _scramble(state ^ (tensor - 7046029254386353131))
    return state & 0x7FFFFFFFFFFFFFFF


def _scramble(z: Tensor) -> Tensor:
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ (z >> 31 & 0x1FFFFFFFF)


def directions(atoms: Tensor, count: int = 1) -> Tensor:
    """`count` pseudo-random numbers in (-1, 1) for every atom, the same ones for the same atom. (..., count)"""
    hashed = mix(atoms.unsqueeze(-1), torch.arange(1, count + 1) * 1000003)
    return (hashed >> 10).double() / 2.0**52 - 1


@dataclass(frozen=True)
class Rows:
    """n affine combinations of up to r atoms each, entries sorted by atom, unused ones (0, 0.0).

    atoms (n, r) int64, coef (n, r), offset (n,) float64. `error` (n,): estimated absolute rounding error
    of a row's coefficients and offset (root mean square), given how the weights were stored.
    """

    atoms: Tensor
    coef: Tensor
    offset: Tensor
    error: Tensor

    @staticmethod
    def of_atoms(atoms: Tensor) -> Rows:
        """One row for every atom: 1 * atom."""
        zero = torch.zeros(len(atoms), dtype=torch.float64)
        return Rows(atoms.unsqueeze(1), torch.ones(len(atoms), 1, dtype=torch.float64), zero, zero)

    @staticmethod
    def constants(values: Tensor, error: Tensor | None = None) -> Rows:
        empty = torch.zeros(len(values), 0, dtype=torch.float64)
        error = torch.zeros_like(values) if error is None else error
        return Rows(empty.long(), empty, values, error)

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(self.atoms[index], self.coef[index], self.offset[index], self.error[index])

    def linear_norm(self) -> Tensor:
        """(n,) Euclidean norm of the coefficients, without the offset."""
        norm: Tensor = torch.linalg.vector_norm(self.coef, dim=1)
        return norm

    def norm(self) -> Tensor:
        return (self.coef.square().sum(1) + self.offset.square()).sqrt()

    def is_constant(self) -> Tensor:
        return (self.coef == 0).all(dim=1)

    def scaled(self, factor: Tensor) -> Rows:
        return Rows(
            self.atoms, self.coef * factor.unsqueeze(1), self.offset * factor, self.error * factor.abs()
        ).pruned()

    def shifted(self, shift: Tensor, error: Tensor | float = 0.0) -> Rows:
        return replace(self, offset=self.offset + shift, error=(self.error.square() + error**2).sqrt())

    def with_offset_as_atom(self) -> Rows:
        """The offset moved to an entry on the atom ONE."""
        n = len(self)
        atoms = torch.cat([self.atoms, torch.full((n, 1), ONE)], 1)
        coef = torch.cat([self.coef, self.offset.unsqueeze(1)], 1)
        return Rows(atoms, coef, torch.zeros_like(self.offset), self.error).sorted()

    def mapped(self, signature: Tensor | int, keeps_constants: bool = True) -> Rows:
        """The rows under a linear map that acts on every atom alone; `signature` (scalar or (n,)) names it."""
        rows = self if keeps_constants else self.with_offset_as_atom()
        signature = torch.as_tensor(signature)
        atoms = mix(signature.reshape(-1, 1), rows.atoms)
        return replace(rows, atoms=torch.where(rows.coef == 0, 0, atoms)).sorted()

    def plus(self, other: Rows) -> Rows:
        """Row by row sum; equal atoms are added up, and what cancels to rounding is dropped."""
        joined = Rows(
            torch.cat([self.atoms, other.atoms], 1),
            torch.cat([self.coef, other.coef], 1),
            self.offset + other.offset,
            (self.error.square() + other.error.square()).sqrt(),
        )
        return joined.sorted().merged()

    def sorted(self) -> Rows:
        order = self.atoms.argsort(dim=1, descending=True, stable=True)
        return replace(self, atoms=self.atoms.gather(1, order), coef=self.coef.gather(1, order)).pruned()

    def merged(self) -> Rows:
        """Add up neighbouring entries of the same atom."""
        if self.atoms.shape[1] < 2:
            return self
        fresh = torch.ones_like(self.atoms, dtype=torch.bool)
        fresh[:, 1:] = self.atoms[:, 1:] != self.atoms[:, :-1]
        place = fresh.long().cumsum(1) - 1
        coef = torch.zeros_like(self.coef).scatter_add_(1, place, self.coef)
        size = torch.zeros_like(self.coef).scatter_add_(1, place, self.coef.abs())
        atoms = torch.zeros_like(self.atoms).scatter_reduce_(1, place, self.atoms, "amax", include_self=False)
        coef = torch.where(coef.abs() <= 8 * torch.maximum(1.2e-16 * size, self.error[:, None]), 0.0, coef)
        return replace(self, atoms=torch.where(coef == 0, 0, atoms), coef=coef).sorted()

    def pruned(self) -> Rows:
        """Without the columns that no row uses."""
        used = (self.coef != 0).any(dim=0)
        if bool(used.all()):
            return self
        keep = used.nonzero().squeeze(1)
        return replace(self, atoms=self.atoms[:, keep], coef=self.coef[:, keep])

    def widened(self, width: int) -> Rows:
        """Padded with unused entries to `width` columns."""
        extra = width - self.atoms.shape[1]
        if extra <= 0:
            return self
        pad = torch.zeros(len(self), extra, dtype=torch.float64)
        return replace(self, atoms=torch.cat([self.atoms, pad.long()], 1), coef=torch.cat([self.coef, pad], 1))

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        width = max(part.atoms.shape[1] for part in parts)
        parts = [part.widened(width) for part in parts]
        return Rows(
            torch.cat([part.atoms for part in parts]),
            torch.cat([part.coef for part in parts]),
            torch.cat([part.offset for part in parts]),
            torch.cat([part.error for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class Edge:
    """Row `out[k]` of a tensor is computed from row `into[k]` of `source`."""

    source: Channels
    out: Tensor
    into: Tensor


@dataclass(frozen=True, eq=False)
class Channels:
    """A tensor of the program with known channels.

    labels: int64, as many axes as the tensor, size 1 on the axes along which the channel does not change;
    the row that stands at an index. slots (n,): the keep-or-drop variable of every row. `mean`, `deviation`
    (n,): moments of every channel where batch norm recorded them, else NaN.
    """

    shape: tuple[int, ...]
    labels: Tensor
    rows: Rows
    slots: Tensor
    edges: tuple[Edge, ...] = ()
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    deviation: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.rows):
            unknown = torch.full((len(self.rows),), float("nan"), dtype=torch.float64)
            object.__setattr__(self, "mean", unknown)
            object.__setattr__(self, "deviation", unknown)

    def axes(self) -> tuple[int, ...]:
        """The axes along which the channel changes."""
        return tuple(axis for axis, size in enumerate(self.labels.shape) if size > 1)

    def positions(self) -> int:
        """How many positions one channel has, batch included, at the example's sizes."""
        total = 1
        for axis, size in enumerate(self.shape):
            total *= size if self.labels.shape[axis] == 1 else 1
        return total

    def root_mean_square(self) -> Tensor:
        return (self.mean.square() + self.deviation.square()).sqrt()


def along(axis: int, rank: int, labels: Tensor) -> Tensor:
    """One-dimensional labels laid along `axis` of a tensor with `rank` axes."""
    shape = [1] * rank
    shape[axis] = len(labels)
    return labels.reshape(shape)
