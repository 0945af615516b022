"""The nearest copy of a channel: rows of real weights, and the distance between them under the freedom of readers.

A *facet* describes channels where they are told apart: the last place on the way from the weights to a reader
whose rows are made of weights, with the ratios and offsets that everything behind it admits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep_prune.channels import Channels, Rows, mix, number
from ep_prune.demand import Demand
from ep_prune.find import MARGIN, Dense, Freedom, Sparse
from ep_prune.graph import Extreme, Node, Operation, Pointwise, Slope
from ep_prune.numbering import Numbering
from ep_prune.rules import kind_of

CANDIDATES = 4
"""Pairs that are compared in full, for each channel and reader: inner products alone lose half of the digits."""


@dataclass(frozen=True)
class Block:
    """Vectors over one set of columns: `place` (n,) the row of `values` that is a channel's, -1 for zeros."""

    place: Tensor
    values: Tensor

    def rows(self, index: Tensor) -> Tensor:
        found = self.values[self.place[index].clamp_min(0)]
        return torch.where((self.place[index] >= 0).unsqueeze(1), found, 0.0)


@dataclass(frozen=True)
class Facet:
    """n channels. blocks: their vectors; offset, error (n,); kind (n,): only rows of one kind can be copies, -1
    of none. scale, sign, shift (n,) bool: whether a positive ratio, a sign, an offset makes no difference."""

    blocks: dict[object, Block]
    offset: Tensor
    error: Tensor
    kind: Tensor
    scale: Tensor
    sign: Tensor
    shift: Tensor

    def taken(self, index: Tensor) -> Facet:
        """The facet of rows `index` (m,); -1 for a row of no kind."""
        some = index.clamp_min(0)
        return Facet(
            {
                key: replace(block, place=torch.where(index >= 0, block.place[some], -1))
                for key, block in self.blocks.items()
            },
            self.offset[some],
            self.error[some],
            torch.where(index >= 0, self.kind[some], -1),
            self.scale[some],
            self.sign[some],
            self.shift[some],
        )

    def with_constant(self) -> Tensor:
        """(n,) the offsets where they count, else 0."""
        return torch.where(self.shift, 0.0, self.offset)

    def inner(self, i: Tensor, j: Tensor) -> Tensor:
        constant = self.with_constant()
        total = constant[i] * constant[j]
        for block in self.blocks.values():
            total = total + (block.rows(i) * block.rows(j)).sum(1)
        return total

    def distance(self, i: Tensor, j: Tensor, ratio: Tensor) -> Tensor:
        constant = self.with_constant()
        total = (constant[i] - ratio * constant[j]).square()
        for block in self.blocks.values():
            total = total + (block.rows(i) - ratio.unsqueeze(1) * block.rows(j)).square().sum(1)
        return total.sqrt()

    def ratio(self, inner: Tensor, square: Tensor, i: Tensor) -> Tensor:
        """The admitted ratio with which row j comes nearest to row i, given <i, j> and <j, j>."""
        free = inner / square.clamp_min(1e-300)
        free = torch.where(self.sign[i], free, free.clamp_min(0.0))
        fixed = torch.where(self.sign[i] & (inner < 0), -1.0, 1.0).double()
        return torch.where(self.scale[i], free, fixed)


class Facets:
    """The facets of one numbering, made when they are asked for."""

    def __init__(self, n: Numbering) -> None:
        self.n = n
        self._made: dict[int, Facet] = {}
        self._kinds: dict[int, tuple[Node, Operation]] = {}
        for node, value in n.values.items():
            if isinstance(value, Channels) and node.target is not None:
                self._kinds.setdefault(id(value), (node, kind_of(node, n.graph)))
        # Where the vectors of an atom stand: a signature of `intern`, which weight of it, which row.
        self._bases: list[tuple[object, Dense | Sparse]] = []
        atoms, base, row = [], [], []
        for (signature, freedom, keys), entries in n._leaders.items():
            for vectors, own, _ in entries:
                weights = isinstance(vectors, Dense) or not vectors.offset
                if freedom is Freedom.SCALE and weights and "choice" not in str(signature):
                    atoms.append(own)
                    base.append(torch.full_like(own, len(self._bases)))
                    row.append(torch.arange(len(own)))
                    self._bases.append(((signature, keys), vectors))
        empty = [torch.empty(0, dtype=torch.int64)]
        order = torch.cat(atoms or empty).argsort()
        self._atoms, self._base, self._row = (torch.cat(part or empty)[order] for part in (atoms, base, row))

    def _born(self, atoms: Tensor) -> Tensor:
        """The place of each atom among those with weights of their own, -1 for others."""
        if not len(self._atoms):
            return torch.full_like(atoms, -1)
        place = torch.searchsorted(self._atoms, atoms.contiguous()).clamp_max(len(self._atoms) - 1)
        return torch.where(self._atoms[place] == atoms, place, -1)

    def of(self, x: Channels) -> Facet:
        """The facet of a tensor's channels."""
        if id(x) not in self._made:
            self._made[id(x)] = self._make(x)
        return self._made[id(x)]

    def size(self, x: Channels) -> Tensor:
        """(n,) how large channels are, as far as weights say: the norms of their rows of weights where all between
        is positively homogeneous, else (behind tanh, GELU, ...) the factors before what they are made of."""
        facet = self.of(x)
        rows = torch.arange(len(x.rows))
        return torch.where(facet.scale, facet.inner(rows, rows).sqrt(), x.rows.linear_norm())

    def _make(self, x: Channels) -> Facet:
        here = bool(((self._born(x.rows.atoms) >= 0) & (x.rows.coef != 0)).any())
        source = None if here else self._source(x)
        if source is None:
            return self._expanded(x.rows)
        node, op = self._kinds.get(id(x), (None, None))
        kind = torch.where(source.kind < 0, -1, mix(source.kind.clamp_min(0), number(f"{node and node.args[1:]}")))
        made = replace(source, kind=torch.where(x.rows.is_constant(), -1, kind))
        if isinstance(op, Pointwise):
            shape = op.symmetry
            even = shape.even
            return replace(
                made,
                offset=made.offset - (shape.center or (0.0, 0.0))[0],
                kind=torch.where(made.kind < 0, -1, mix(made.kind.clamp_min(0), number(op.signature))),
                scale=made.scale & bool(shape.degree),
                sign=made.sign & (even or (shape.center is not None and not shape.degree)),
                shift=torch.zeros_like(made.shift),
            )
        if isinstance(op, Slope):
            return replace(made, sign=torch.zeros_like(made.sign), shift=torch.zeros_like(made.shift))
        if isinstance(op, Extreme):
            return replace(made, sign=torch.zeros_like(made.sign))
        return made

    def _source(self, x: Channels) -> Facet | None:
        """The facets of what the rows come from, one source row each; None where it is several or none."""
        parts = []
        covered = torch.zeros(len(x.rows), dtype=torch.int64)
        for edge in x.edges:
            covered.index_add_(0, edge.out, torch.ones_like(edge.out))
            index = torch.full((len(x.rows),), -1, dtype=torch.int64)
            index[edge.out] = edge.into
            part = self.of(edge.source).taken(index)
            # Rows of one channel at several positions (flattened space): only equal positions compare.
            turn = torch.full_like(index, 0)
            turn[edge.out] = _turn(edge.into)
            parts.append(replace(part, kind=torch.where(part.kind < 0, -1, mix(part.kind.clamp_min(0), turn))))
        if not parts or int(covered.max()) > 1:
            return None
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _expanded(self, rows: Rows) -> Facet:
        """Rows of atoms over the weights that the atoms stand for; atoms without weights over themselves."""
        size = len(rows)
        used = rows.coef != 0
        born = torch.where(used, self._born(rows.atoms), -1)
        blocks: dict[object, Block] = {}
        square = rows.error.square()
        here = torch.arange(size)
        bases = torch.where(born >= 0, self._base[born.clamp_min(0)] if len(self._base) else born, -1)
        for base in torch.unique(bases[bases >= 0]).tolist():  # over weights
            key, vectors = self._bases[base]
            row, entry = (bases == base).nonzero(as_tuple=True)
            at, coef = self._row[born[row, entry]], rows.coef[row, entry]
            square = square.index_add(0, row, (coef * vectors.error[at]).square())
            if isinstance(vectors, Dense):
                new = vectors.rows(at) * coef.unsqueeze(1)
                blocks[key] = _added(blocks.get(key), row, new, size)
            else:
                atoms, values = vectors.rows.atoms[at], vectors.rows.coef[at] * coef.unsqueeze(1)
                _add_columns(blocks, row.unsqueeze(1).expand_as(atoms), atoms, values, size)
        row, entry = (used & (born < 0)).nonzero(as_tuple=True)
        _add_columns(blocks, row, rows.atoms[row, entry], rows.coef[row, entry], size)
        yes = torch.ones(size, dtype=torch.bool)
        kind = torch.where(rows.is_constant(), -1, torch.zeros_like(here))
        return Facet(blocks, rows.offset, square.sqrt(), kind, yes, yes, yes)


def _turn(into: Tensor) -> Tensor:
    """(m,) how many earlier entries are equal."""
    order = into.argsort(stable=True)
    ranked = into[order]
    start = torch.searchsorted(ranked, ranked)
    turn = torch.empty_like(into)
    turn[order] = torch.arange(len(into)) - start
    return turn


def _added(block: Block | None, row: Tensor, values: Tensor, size: int) -> Block:
    """A block with more vectors added to its rows."""
    if block is None:
        block = Block(torch.full((size,), -1, dtype=torch.int64), values[:0])
    own = torch.unique(row)
    fresh = own[block.place[own] < 0]
    place = block.place.clone()
    place[fresh] = torch.arange(len(block.values), len(block.values) + len(fresh))
    room = torch.cat([block.values, values.new_zeros(len(fresh), values.shape[1])])
    return Block(place, room.index_add(0, place[row], values))


def _add_columns(blocks: dict[object, Block], row: Tensor, atoms: Tensor, values: Tensor, size: int) -> None:
    """A block of its own for entries (row, atom, value), a column an atom; empty entries are 0."""
    some = values != 0
    row, atoms, values = row[some], atoms[some], values[some]
    if len(atoms):
        columns, column = torch.unique(atoms, return_inverse=True)
        dense = torch.zeros(size, len(columns), dtype=torch.float64)
        dense.index_put_((row, column), values, accumulate=True)
        key = ("columns", len(blocks))
        blocks[key] = Block(torch.arange(size), dense)


def _joined(parts: Sequence[Facet]) -> Facet:
    """Facets that describe different rows of one tensor. Rows of different facets share their blocks' columns."""
    result = parts[0]
    for part in parts[1:]:
        mine = part.kind >= 0
        blocks = dict(result.blocks)
        for key, block in part.blocks.items():
            if key in blocks and isinstance(key, tuple) and key[0] != "columns":
                first = blocks[key]
                place = torch.where(block.place >= 0, block.place + len(first.values), first.place)
                blocks[key] = Block(place, torch.cat([first.values, block.values]))
            else:
                blocks[(key, len(blocks)) if key in blocks else key] = block
        fields = ("offset", "error", "kind", "scale", "sign", "shift")
        merged = {name: torch.where(mine, getattr(part, name), getattr(result, name)) for name in fields}
        result = Facet(blocks, **merged)
    return result


@dataclass(frozen=True)
class Copies:
    """For k channels: the nearest other one (k,), by root, -1 for none; ratio, residual and rounding (k,)."""

    other: Tensor
    ratio: Tensor
    residual: Tensor
    rounding: Tensor


def nearest_copies(facets: Facets, needs: Sequence[Demand], roots: Tensor) -> Copies:
    """The nearest copies of the channels `roots` (k,) among all that stand beside them at the weights that read
    them: the largest residual over all readers, the smallest of these over candidates."""
    readers = []
    for demand in needs:
        for port in demand.ports:
            if bool(torch.isin(demand.roots, roots).any()):
                readers.append((demand, facets.of(port.x), port.groups))
    pairs = [_proposed(facet, demand.roots, groups, roots) for demand, facet, groups in readers]
    k = len(roots)
    nothing = torch.full((k,), torch.nan, dtype=torch.float64)
    found = torch.unique(torch.cat([torch.empty(0, 2, dtype=torch.int64), *pairs]), dim=0)
    if not len(found):
        return Copies(torch.full((k,), -1), nothing, nothing, nothing)
    own, other = roots[found[:, 0]], found[:, 1]
    worst = torch.full((len(found),), -1.0, dtype=torch.float64)
    ratio, rounding = torch.ones_like(worst), torch.zeros_like(worst)
    for demand, facet, groups in readers:
        i, j, pair = _places(demand.roots, own, other)
        if bool((~torch.isin(torch.arange(len(own)), pair) & torch.isin(own, demand.roots)).any()):
            lost = torch.isin(own, demand.roots)
            lost[pair] = False
            worst[lost] = torch.inf  # the other one does not stand before this reader
        inner, square = facet.inner(i, j), facet.inner(j, j)
        factor = facet.ratio(inner, square, i)
        size = facet.inner(i, i).sqrt().clamp_min(1e-300)
        off = facet.distance(i, j, factor) / size
        group = len(demand.roots) // groups
        apart = (facet.kind[i] != facet.kind[j]) | (facet.kind[i] < 0) | (i // group != j // group)
        off = torch.where(apart, torch.inf, off)
        allowed = MARGIN * (facet.error[i] + factor.abs() * facet.error[j]) / size
        largest = torch.full_like(worst, -1.0).scatter_reduce_(0, pair, off, "amax")
        now = (off == largest[pair]) & (off > worst[pair])
        ratio[pair[now]], rounding[pair[now]] = factor[now], allowed[now]
        worst = torch.maximum(worst, largest)
    worst = torch.where(worst < 0, torch.inf, worst)
    best = torch.full((k,), torch.inf, dtype=torch.float64).scatter_reduce_(0, found[:, 0], worst, "amin")
    first = (worst == best[found[:, 0]]) & worst.isfinite()
    place = torch.full((k,), len(found))
    place.scatter_reduce_(0, found[first, 0], first.nonzero().squeeze(1), "amin")
    some = place < len(found)
    place = place.clamp_max(len(found) - 1)
    return Copies(
        torch.where(some, other[place], -1),
        torch.where(some, ratio[place], torch.nan),
        torch.where(some, worst[place], torch.nan),
        torch.where(some, rounding[place], torch.nan),
    )


def _proposed(facet: Facet, positions: Tensor, groups: int, roots: Tensor) -> Tensor:
    """(m, 2) pairs (place in `roots`, root of another channel) that may be nearest at one reader."""
    rank, mine = _first_place(positions, roots)
    if not len(mine):
        return torch.empty(0, 2, dtype=torch.int64)
    size = len(positions)
    constant = facet.with_constant()
    gram = constant[mine].unsqueeze(1) * constant
    square = constant.square()
    for block in facet.blocks.values():
        rows = (block.place >= 0).nonzero().squeeze(1)
        values = block.rows(rows)
        gram.index_add_(1, rows, block.rows(mine) @ values.T)
        square = square.index_add(0, rows, values.square().sum(1))
    here = torch.arange(size)
    group = here * groups // size
    ratio = facet.ratio(gram, square.unsqueeze(0), mine.unsqueeze(1))
    off = square[mine].unsqueeze(1) - 2 * ratio * gram + ratio.square() * square
    apart = facet.kind[mine].unsqueeze(1) != facet.kind
    apart |= (facet.kind[mine] < 0).unsqueeze(1) | (group[mine].unsqueeze(1) != group)
    apart |= positions[mine].unsqueeze(1) == positions
    off = torch.where(apart, torch.inf, off)
    near, place = off.topk(min(CANDIDATES, size), dim=1, largest=False)
    some = near.isfinite()
    left = rank.unsqueeze(1).expand_as(place)[some]
    return torch.stack([left, positions[place[some]]], 1)


def _first_place(positions: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
    """For the roots that stand at the reader: (m,) their places in `roots`, and the first position of each."""
    size = int(max(positions.max(), roots.max())) + 1
    first = torch.full((size,), len(positions)).scatter_reduce_(0, positions, torch.arange(len(positions)), "amin")
    there = first[roots] < len(positions)
    return there.nonzero().squeeze(1), first[roots[there]]


def _places(positions: Tensor, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places (i, j) of pairs of roots at one reader, and the numbers of the pairs that stand there, each position
    of a channel with that of the same turn (flattened space) of the other."""
    turn = _turn(positions)
    most = int(turn.max()) + 1
    size = int(max(positions.max(), own.max(), other.max())) + 1
    table = torch.full((size, most), -1, dtype=torch.int64)
    table[positions, turn] = torch.arange(len(positions))
    i, j = table[own], table[other]
    pair, at = ((i >= 0) & (j >= 0)).nonzero(as_tuple=True)
    return i[pair, at], j[pair, at], pair
