"""Which heads and which of their channels must stay together, grown until every condition of attention holds.

A head is active if its score, one of its queries or one of its outputs is kept. An active head keeps all products
that its scores are made of; a query goes with its key, a value with the output that it is averaged to. All heads
that stay have equally many channels, and all that share keys and values are equally many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ep_prune.embedding import Heads
from ep_prune.numbering import Numbering
from ep_prune.slots import Blends, Constraint, Grid, Scores, Whole

Keep = Callable[[Tensor, str], None]
"""Keeps slots (by root), for a reason."""

NEEDED = "read by a head that stays"
EVEN = "kept for equal parts"


def close_heads(constraints: Sequence[Constraint], roots: Tensor, kept: Tensor, keep: Keep) -> None:
    """Close a selection under all constraints of attention; `kept` (by root) grows through `keep`.

    First what the heads need, until they need no more; only then is filled up what must be equally many, which
    may take any channel.
    """
    while True:
        before = int(kept.sum())
        heads = _needed(constraints, roots, kept, keep)
        if int(kept.sum()) > before:
            continue
        for _, _, other, score, active in heads:
            _even_shares(score, other, active, kept, keep)
        if int(kept.sum()) > before:
            continue
        widths: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for first, one, _, _, active in heads:
            widths.setdefault((first, one.shape[1]), []).append((one, active))
        for sides in widths.values():
            _even_heads(sides, kept, keep)
        if int(kept.sum()) > before:
            continue
        for constraint in constraints:
            if isinstance(constraint, Grid):
                _even_grid(roots[constraint.slots], kept, keep)
        if int(kept.sum()) == before:
            return


def _needed(
    constraints: Sequence[Constraint], roots: Tensor, kept: Tensor, keep: Keep
) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Keep what the heads that stay are made of; of every attention (first score, one, other, scores, active)."""
    heads = []
    for constraint in constraints:
        if isinstance(constraint, Scores):
            score, one, other = roots[constraint.score], roots[constraint.query], roots[constraint.key]
            active = _pair(score, one, other, constraint.needed, kept, keep)
        elif isinstance(constraint, Blends):
            score, one, other = roots[constraint.score], roots[constraint.out], roots[constraint.value]
            active = _pair(score, one, other, torch.zeros_like(one, dtype=torch.bool), kept, keep)
        elif isinstance(constraint, Whole):
            parts = roots[constraint.slots]
            keep(parts[kept[parts].any(1)].reshape(-1), NEEDED)
            continue
        else:
            continue
        heads.append((int(score[0]), one, other, score, active))
    return heads


def _pair(score: Tensor, one: Tensor, other: Tensor, needed: Tensor, kept: Tensor, keep: Keep) -> Tensor:
    """(H,) the active heads, once what each of them needs is kept: (H, d) queries with keys, outputs with values.

    `other` may be shared: what is kept of it makes one of the heads that read it active, if none is.
    """
    active = kept[score] | kept[one].any(1)
    _, share = torch.unique(other[:, 0], return_inverse=True)
    served = torch.zeros(int(share.max()) + 1, dtype=torch.bool)
    served[share[active]] = True
    lonely = kept[other].any(1) & ~served[share]
    first = torch.full((len(served),), len(score)).scatter_reduce_(0, share, torch.arange(len(score)), "amin")
    active |= lonely & (first[share] == torch.arange(len(score)))
    if not bool(active.any()):
        return active
    keep(score[active], NEEDED)
    wanted = kept[one] | kept[other] | needed
    wanted[:, 0] |= ~wanted.any(1)
    wanted &= active.unsqueeze(1)
    keep(one[wanted], NEEDED)
    keep(other[wanted], NEEDED)
    return active


def _even_shares(score: Tensor, other: Tensor, active: Tensor, kept: Tensor, keep: Keep) -> None:
    """Every set of heads that share keys or values keeps equally many, or none."""
    _, share = torch.unique(other[:, 0], return_inverse=True)
    counts = torch.bincount(share[active], minlength=int(share.max()) + 1)
    short = torch.where(counts > 0, counts.max() - counts, 0)
    order = share.argsort(stable=True)
    idle = (~active)[order]
    before = idle.long().cumsum(0) - idle.long()
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(share).cumsum(0)[:-1]])
    rank = before - before[start][share[order]]
    keep(score[order[idle & (rank < short[share[order]])]], EVEN)


def _even_heads(sides: Sequence[tuple[Tensor, Tensor]], kept: Tensor, keep: Keep) -> None:
    """All active heads keep equally many channels, of queries as of values where these were equally wide."""
    most = max(int(kept[one].sum(1).max()) for one, _ in sides)
    for one, active in sides:
        have = kept[one]
        short = (most - have.sum(1)).clamp_min(0).unsqueeze(1)
        extra = ~have & ((~have).long().cumsum(1) <= short) & active.unsqueeze(1)
        keep(one[extra], EVEN)


def _even_grid(grid: Tensor, kept: Tensor, keep: Keep) -> None:
    """At every level, the parts that stay keep equally many parts of theirs."""
    for level in range(1, grid.ndim):
        blocks = grid.flatten(0, level - 1).flatten(2) if level < grid.ndim - 1 else grid.flatten(0, level - 1)
        blocks = blocks.reshape(len(blocks), grid.shape[level], -1)
        there = kept[blocks].any(2)
        count = there.sum(1)
        short = torch.where(count > 0, count.max() - count, 0).unsqueeze(1)
        extra = ~there & ((~there).long().cumsum(1) <= short)
        keep(blocks[extra][:, 0], EVEN)


def heads_of(n: Numbering, roots: Tensor, kept: Tensor) -> tuple[Heads, ...]:
    """What a selection makes of every attention that it narrows."""
    found = []
    for constraint in n.slots.constraints:
        if not isinstance(constraint, Scores):
            continue
        query, key = roots[constraint.query], roots[constraint.key]
        active = kept[query].any(1)
        sizes = query.shape[1], int(kept[query].sum(1).max())
        shared = tuple(len(torch.unique(key[rows, 0])) for rows in (torch.ones_like(active), active))
        if bool(active.all()) and sizes[0] == sizes[1]:
            continue
        heads = len(active), int(active.sum())
        found.append(
            Heads(constraint.layer, heads, (shared[0], shared[1]), sizes, _writers(n, roots, kept, query))
        )
    every = sum(isinstance(constraint, Scores) for constraint in n.slots.constraints)
    alike = len(found) == every and len({(h.heads, h.shared, h.size) for h in found}) == 1
    return tuple(replace(heads, alike=alike) for heads in found)


def _writers(n: Numbering, roots: Tensor, kept: Tensor, query: Tensor) -> tuple[tuple[str, int, Tensor], ...]:
    """The weights' and biases' axes that write the queries, and where on them the kept ones will stand."""
    mine = torch.zeros(len(kept), dtype=torch.bool)
    mine[query] = True
    axes: dict[tuple[str, int], None] = {}
    for port in n.ports:
        if port.groups == 1:
            axes[(port.name, int(port.op.layout.inputs_first))] = None
        if port.op.bias is not None:
            axes[(str(port.op.bias.tensor), 0)] = None
    found = []
    for name, axis in axes:
        if (name, axis) in n.slots.bound:
            own = roots[n.slots.bound[(name, axis)]]
            places = mine[own[kept[own]]].nonzero().squeeze(1)
            if len(places):
                found.append((name, axis, places))
    return tuple(found)
