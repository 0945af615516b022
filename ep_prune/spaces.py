"""Spaces: the sets of channels that are narrowed together, as a user knows them, and what became of each.

A space is what the outputs of one or more layers share once every tie is counted: a convolution with its batch
norm, or a residual stream with all the branches that add to it. It goes by the first layer that writes to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.selection import DISTINCT, STAYED, Selection


@dataclass(frozen=True)
class Space:
    """One space, before and after. `gone`: by one of `KINDS`; `stayed`: reason -> count."""

    name: str
    producers: tuple[str, ...]
    axes: tuple[tuple[str, int], ...]
    before: int
    after: int
    gone: dict[str, int]
    stayed: dict[str, int]


TIED = "goes or stays with one that is distinct and read"
KINDS = ("null", "constant", "split", "scaled", "flipped", "linear")


def spaces(chosen: Selection, linear: Mapping[tuple[str, int], Tensor] | None = None) -> list[Space]:
    """All spaces that a selection covers, in the order of their first layers.

    linear: axis -> the channels that a fold to the rank has left unread.
    """
    n, roots = chosen.numbering, chosen.roots
    axes = _producing_axes(chosen)
    space = torch.full((n.slots.count,), -1, dtype=torch.int64)
    groups: list[list[tuple[str, int]]] = []
    merged: list[int] = []

    def find(k: int) -> int:
        while merged[k] != k:
            k = merged[k]
        return k

    for key in axes:  # over layers, not over channels
        own = roots[n.slots.bound[key]]
        touched = sorted({find(int(k)) for k in torch.unique(space[own]).tolist() if k >= 0})
        if touched:
            head = touched[0]
            for other in touched[1:]:
                merged[other] = head
                groups[head] += groups[other]
        else:
            head = len(groups)
            groups.append([])
            merged.append(head)
        groups[head].append(key)
        space[own] = torch.where(space[own] >= 0, space[own], head)
    home = torch.tensor([find(k) for k in range(len(merged))] or [0])
    space = torch.where(space >= 0, home[space.clamp_min(0)], -1)
    kinds = _kinds(chosen)
    for axis, left in (linear or {}).items():
        if axis in n.slots.bound:
            kinds[roots[n.slots.bound[axis][left]]] = KINDS.index("linear")
    reasons = chosen.numbering.slots.reasons(roots)
    result = []
    for head in sorted({find(k) for k in range(len(merged))}):
        longest = longest_axis(chosen, groups[head])
        own = units_along(chosen, longest)
        kept = chosen.kept[own]
        gone = {kind: int((kinds[own[~kept]] == k).sum()) for k, kind in enumerate(KINDS)}
        stayed = {
            why: int((chosen.why[own[kept]] == code).sum())
            for code, why in enumerate(STAYED)
            if why not in ("gone", "pinned")
        }
        distinct = own[kept & (chosen.why[own] == STAYED.index(DISTINCT))]
        stayed[DISTINCT] = len(torch.unique(distinct))
        stayed[TIED] = len(distinct) - stayed[DISTINCT]
        left = own[chosen.why[own] == STAYED.index("pinned")]
        for reason, members in reasons.items():
            mask = torch.isin(left, members)
            stayed[reason] = int(mask.sum())
            left = left[~mask]
        stayed["rolled back or protected"] = len(left)
        producers = tuple(dict.fromkeys(name for name, _ in groups[head]))
        first = _layer(producers[0])
        result.append(
            Space(
                first,
                producers,
                tuple(groups[head]),
                len(own),
                int(kept.sum()),
                gone,
                {why: count for why, count in stayed.items() if count},
            )
        )
    return result


def longest_axis(chosen: Selection, axes: Iterable[tuple[str, int]]) -> tuple[str, int]:
    """The axis that counts as a space's width."""
    return max(axes, key=lambda axis: len(units_along(chosen, axis)))


def units_along(chosen: Selection, axis: tuple[str, int]) -> Tensor:
    """The roots along an axis; of a recurrent weight's, with a row for every gate, those of its first gate."""
    n = chosen.numbering
    own = chosen.roots[n.slots.bound[axis]]
    return own[: len(own) // n.gates.get(axis[0], 1)]


def _layer(weight: str) -> str:
    """Whose outputs a weight writes: its module's, or one layer's and direction's of a recurrent module."""
    path, _, leaf = weight.rpartition(".")
    part = re.fullmatch(r"weight_(ih_|hh_|hr_)(l\d+(?:_reverse)?)", leaf)
    if part is None:
        return path or weight
    leaf = part[2] + (" projected" if part[1] == "hr_" else "")
    return f"{path}.{leaf}" if path else leaf


def _producing_axes(chosen: Selection) -> list[tuple[str, int]]:
    """The weight axes that write channels, in the order of the graph."""
    bound = chosen.numbering.slots.bound
    axes: list[tuple[str, int]] = []
    looped = {id(before) for before, _ in chosen.numbering.loops}  # W_hh writes what W_ih writes
    written = {port.name: port.op.layout for port in chosen.numbering.ports if id(port.x) not in looped}
    for name, axis in bound:
        if name in written:
            layout = written[name]
            out = -1 if layout.groups > 1 else int(layout.inputs_first)
            if axis == out:
                axes.append((name, axis))
        elif axis == 1 and name not in chosen.numbering.gates and name not in chosen.numbering.pinned_tensors:
            table = chosen.numbering.graph.tensors[name]
            if table.ndim == 2 and table.is_floating_point():  # an embedding table: no mask, no list of places
                axes.append((name, axis))
    return axes


def _kinds(chosen: Selection) -> Tensor:
    """By root: what kind of redundancy a channel is at the first weight that reads it, as a place in `KINDS`."""
    kind = torch.zeros(chosen.numbering.slots.count, dtype=torch.int64)
    for demand in reversed(list(chosen.demands.values())):
        kept = chosen.kept[demand.roots]
        n = len(kept)
        member = kept & ~demand.constant
        first = torch.full((n,), n).scatter_reduce_(0, demand.leader[member], torch.arange(n)[member], "amin")
        target = first[demand.leader].clamp_max(n - 1)
        ratio = demand.scale / demand.scale[target]
        own = torch.full((n,), KINDS.index("scaled"))
        own[ratio == 1] = KINDS.index("split")
        own[ratio == -1] = KINDS.index("flipped")
        own[~demand.live[demand.leader]] = KINDS.index("null")
        own[demand.constant] = KINDS.index("constant")
        own[demand.constant & (demand.port.x.rows.offset == 0)] = KINDS.index("null")
        kind[demand.roots] = own
    return kind
