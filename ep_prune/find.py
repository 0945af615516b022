"""Equal rows: congruence classes of n vectors up to a scale or a sign, in near-linear time.

Every row is projected on one pseudo-random direction (after scaling to length 1 where the scale is free), the
projections are sorted, and only rows whose projections meet within their errors are compared in full. All
comparisons of one round are one vectorized operation; a round settles at least one class per group of
neighbours, and groups of more than one class are rare, so that two or three rounds do.

A projection only proposes; the exact comparison decides: row i is c times its leader when

    || r_i - c r_leader ||  <=  8 (error_i + |c| error_leader)  +  tolerance * || r_i ||.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ep_prune.channels import ONE, Rows, directions

BLOCK = 2**17
"""How many numbers of a matrix are looked at together."""

MARGIN = 8.0
"""How many estimated errors two rows may lie apart (design: 8 eps of the storage type)."""


class Freedom(Enum):
    """Up to what rows count as equal."""

    NONE = "equal"
    SIGN = "equal up to sign"
    POSITIVE = "equal up to a positive scale"
    SCALE = "equal up to any scale but 0"


class Vectors(Protocol):
    """n vectors, dense or sparse; `error` (n,): estimated absolute rounding error of each."""

    @property
    def error(self) -> Tensor: ...
    def norm(self) -> Tensor: ...
    def project(self) -> Tensor: ...
    def inner(self, i: Tensor, j: Tensor) -> Tensor: ...
    def distance(self, i: Tensor, j: Tensor, scale: Tensor) -> Tensor: ...


def in_blocks(places: Tensor, size: int) -> Sequence[Tensor]:
    """Runs of `size` places."""
    parts: Sequence[Tensor] = places.split(size)  # type: ignore[no-untyped-call]
    return parts


@dataclass(frozen=True)
class Dense:
    """Rows of a matrix (n, columns); `keys` (columns,) name the columns across matrices.

    A large matrix is given as a function of the rows that are wanted, and walked through in blocks.
    """

    values: Tensor | Callable[[Tensor], Tensor]
    keys: Tensor
    error: Tensor
    known: tuple[Tensor, Tensor] | None = None
    """Norms and projections of the rows, where they were measured."""

    def _block(self) -> int:
        return max(1, BLOCK // max(1, len(self.keys)))

    def rows(self, index: Tensor) -> Tensor:
        return self.values[index] if isinstance(self.values, Tensor) else self.values(index)

    def taken(self, index: Tensor) -> Dense:
        """Some of the rows, in their order."""
        if len(index) == len(self.error):
            return self
        if isinstance(self.values, Tensor):
            return Dense(self.values[index], self.keys, self.error[index])
        norm, projection = self._measured
        known = norm[index], projection[index]
        return Dense(lambda inner: self.rows(index[inner]), self.keys, self.error[index], known)

    @cached_property
    def _measured(self) -> tuple[Tensor, Tensor]:
        if self.known is not None:
            return self.known
        direction = directions(self.keys).squeeze(-1)
        norms, projections = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.float64)]
        for block in in_blocks(torch.arange(len(self.error)), self._block()):
            rows = self.rows(block)
            norms.append(torch.linalg.vector_norm(rows, dim=1))
            projections.append(rows @ direction)
        return torch.cat(norms), torch.cat(projections)

    def norm(self) -> Tensor:
        if isinstance(self.values, Tensor):
            norm: Tensor = torch.linalg.vector_norm(self.values, dim=1)
            return norm
        return self._measured[0]

    def project(self) -> Tensor:
        if isinstance(self.values, Tensor):
            return self.values @ directions(self.keys).squeeze(-1)
        return self._measured[1]

    def _over(self, measure: Callable[..., Tensor], *places: Tensor) -> Tensor:
        """measure (m,) of rows and what goes with them, block by block."""
        pieces = (in_blocks(place, self._block()) for place in places)
        parts = [measure(*block) for block in zip(*pieces, strict=True)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def inner(self, i: Tensor, j: Tensor) -> Tensor:
        return self._over(lambda i, j: (self.rows(i) * self.rows(j)).sum(1), i, j)

    def distance(self, i: Tensor, j: Tensor, scale: Tensor) -> Tensor:
        def off(i: Tensor, j: Tensor, scale: Tensor) -> Tensor:
            norm: Tensor = torch.linalg.vector_norm(self.rows(i) - scale.unsqueeze(1) * self.rows(j), dim=1)
            return norm

        return self._over(off, i, j, scale)


def stacked(parts: Sequence[Dense]) -> Dense:
    """The rows of matrices with the same columns, one below the other."""
    error = torch.cat([part.error for part in parts])
    tensors = [part.values for part in parts if isinstance(part.values, Tensor)]
    if len(tensors) == len(parts):
        return Dense(torch.cat(tensors), parts[0].keys, error)
    starts = [0, *itertools.accumulate(len(part.error) for part in parts)]

    def rows(index: Tensor) -> Tensor:
        found = torch.empty(len(index), len(parts[0].keys), dtype=torch.float64)
        for part, start, end in zip(parts, starts[:-1], starts[1:], strict=True):
            mine = (index >= start) & (index < end)
            found[mine] = part.rows(index[mine] - start)
        return found

    known = torch.cat([part.norm() for part in parts]), torch.cat([part.project() for part in parts])
    return Dense(rows, parts[0].keys, error, known)


@dataclass(frozen=True)
class Sparse:
    """Rows of affine combinations; `offset`: whether the constant is part of the vector."""

    rows: Rows
    offset: bool

    @property
    def error(self) -> Tensor:
        return self.rows.error

    def norm(self) -> Tensor:
        return self.rows.norm() if self.offset else self.rows.linear_norm()

    def project(self) -> Tensor:
        linear = (self.rows.coef * directions(self.rows.atoms).squeeze(-1)).sum(1)
        constant = directions(torch.tensor([ONE])).squeeze()
        return linear + constant * self.rows.offset if self.offset else linear

    def inner(self, i: Tensor, j: Tensor) -> Tensor:
        same = self.rows.atoms[i] == self.rows.atoms[j]
        linear = (self.rows.coef[i] * self.rows.coef[j] * same).sum(1)
        return linear + self.rows.offset[i] * self.rows.offset[j] if self.offset else linear

    def distance(self, i: Tensor, j: Tensor, scale: Tensor) -> Tensor:
        a, b = self.rows[i], self.rows[j]
        same = (a.atoms == b.atoms).all(dim=1)
        square = (a.coef - scale.unsqueeze(1) * b.coef).square().sum(1)
        if self.offset:
            square = square + (a.offset - scale * b.offset).square()
        return torch.where(same, square.sqrt(), torch.inf)


@dataclass(frozen=True)
class Classes:
    """Row i is `scale[i]` times row `leader[i]` (the earliest of its class); `residual` is how far it is off."""

    leader: Tensor
    scale: Tensor
    residual: Tensor


def congruence(vectors: Vectors, freedom: Freedom, tolerance: float = 0.0, apart: Tensor | None = None) -> Classes:
    """Classes of equal rows. `apart` (n,): rows with different labels are never equal. Zero rows must have been
    taken out, where the scale is free."""
    norm = vectors.norm()
    n = len(norm)
    unit = norm if freedom in (Freedom.POSITIVE, Freedom.SCALE) else torch.ones_like(norm)
    key = vectors.project() / unit
    slack = MARGIN * vectors.error / unit + (tolerance + 1e-14) * norm / unit
    if freedom in (Freedom.SIGN, Freedom.SCALE):
        key = key.abs()
    group = _groups(key, 4 * slack, apart)

    leader = torch.arange(n)
    scale = torch.ones(n, dtype=torch.float64)
    residual = torch.zeros(n, dtype=torch.float64)
    todo = (torch.bincount(group)[group] > 1).nonzero().squeeze(1) if n else group  # whoever is alone leads itself
    while len(todo):
        first = torch.full((int(group.max()) + 1,), n, dtype=torch.int64)
        first.scatter_reduce_(0, group[todo], todo, "amin")
        head = first[group[todo]]
        factor = _factor(vectors, todo, head, freedom)
        off = vectors.distance(todo, head, factor)
        allowed = MARGIN * (vectors.error[todo] + factor.abs() * vectors.error[head]) + tolerance * norm[todo]
        # A ratio that is 1 within its own error is 1: a split copy, not a scaled one.
        snapped = factor.round().clamp(-1, 1)
        plain = (factor.abs() - 1).abs() * norm[head] <= MARGIN * (vectors.error[todo] + vectors.error[head])
        factor = torch.where(plain & (snapped != 0), snapped, factor)
        member = (off <= allowed) | (todo == head)
        leader[todo[member]] = head[member]
        scale[todo[member]] = torch.where(todo == head, 1.0, factor)[member]
        residual[todo[member]] = torch.where(todo == head, 0.0, off)[member]
        todo = todo[~member]
    return Classes(leader, scale, residual)


def _groups(key: Tensor, slack: Tensor, apart: Tensor | None) -> Tensor:
    """Number the runs of neighbouring keys that meet within their slack."""
    order = key.argsort()
    if apart is not None:
        order = order[apart[order].argsort(stable=True)]
    ranked, reach = key[order], slack[order]
    gap = (ranked[1:] - ranked[:-1]).abs() > reach[1:] + reach[:-1]
    if apart is not None:
        gap |= apart[order][1:] != apart[order][:-1]
    group = torch.empty_like(order)
    group[order] = torch.cat([torch.zeros(1, dtype=torch.int64), gap.long().cumsum(0)])[: len(order)]
    return group


def _factor(vectors: Vectors, i: Tensor, j: Tensor, freedom: Freedom) -> Tensor:
    if freedom is Freedom.NONE:
        return torch.ones(len(i), dtype=torch.float64)
    inner = vectors.inner(i, j)
    if freedom is Freedom.SIGN:
        return torch.where(inner < 0, -1.0, 1.0).double()
    square = vectors.inner(j, j).clamp_min(1e-300)
    factor = inner / square
    return factor.clamp_min(0.0) if freedom is Freedom.POSITIVE else factor
