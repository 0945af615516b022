"""Which channels stay, and how the others are made of them.

Channels are only ever *selected*: the kept ones compute what they computed, and wherever a weight consumes
channels, those that went are written through those that stayed, x = T z + t. So the narrow network is right
if and only if, at every port, each live channel is an affine combination of kept ones; the narrowest such
selection hits every live class of equal directions at every port at least once.

    a class that no live output reads     T row 0 (its weights cancel or are zero)
    a constant                            t, folded into a bias; where zero padding sees it, a multiple of one
                                          kept constant
    a copy                                its leader's column, times the ratio of their scales

What ties channels together (`slots`) closes the selection: whatever must stay with a kept channel stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.demand import Demand, demands
from ep_prune.embedding import ChannelEmbedding, Cut, Fold, Round, Scale
from ep_prune.find import MARGIN
from ep_prune.heads import NEEDED, close_heads, heads_of
from ep_prune.numbering import Numbering
from ep_prune.slots import EqualCounts, Fewer, Groups
from ep_prune.streams import Norms, needed_by, scales_of, streams_of

STUCK = "a constant that no bias can take: zero padding follows, or there is no bias"
DISTINCT = "distinct and read"
COPY = "a copy but for a constant that no bias can take: zero padding follows, or there is no bias"
NORMED = "read by a norm that sees all channels"
STAYED = (
    "gone",
    "pinned",
    DISTINCT,
    "leads the constants",
    "kept for equal parts",
    "last of its layer",
    "near a copy, but its outgoing weights tell them apart",
    NEEDED,
    STUCK,
    COPY,
    NORMED,
)


@dataclass
class Selection:
    """The kept slots (bool by root), and every weight's embedding."""

    numbering: Numbering
    roots: Tensor
    pinned: Tensor
    kept: Tensor
    demands: dict[str, Demand]
    embeddings: dict[str, ChannelEmbedding] = field(default_factory=dict)
    why: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """By root, why it stays: a place in `STAYED`."""
    scales: tuple[Scale, ...] = ()
    """What makes up for channels that norms no longer see."""
    optional: Tensor | None = None
    """(slots,) by root: those of a layer of which all may go; None: of every layer one stays."""

    def keep(self, roots: Tensor, why: str) -> None:
        """Keep more slots, noting why."""
        new = roots[~self.kept[roots]]
        self.kept[new] = True
        self.why[new] = STAYED.index(why)

    def needs_one(self, layer: Tensor) -> bool:
        """Whether none of a layer's roots is kept, and one must be."""
        some = bool(self.kept[layer].any())
        return not some and (self.optional is None or not bool(self.optional[layer].all()))

    def is_kept(self, slots: Tensor) -> Tensor:
        return self.kept[self.roots[slots]]


def select(n: Numbering, frozen: Tensor | None = None) -> Selection:
    """The narrowest selection that the claims allow. `frozen`: roots that must stay (rolled back, protected)."""
    roots = n.slots.roots()
    streams = streams_of(n, roots)
    while True:
        chosen = _select(n, roots, frozen, [norm for stream in streams for norm in stream])
        scales = [scales_of(n, stream, roots, chosen.kept) for stream in streams]
        if None not in scales:
            chosen.scales = tuple(scale for found in scales for scale in found or ())
            return chosen
        streams = [stream for stream, found in zip(streams, scales, strict=True) if found is not None]


def _select(n: Numbering, roots: Tensor, frozen: Tensor | None, norms: Norms) -> Selection:
    pinned = n.slots.pinned(roots, apart_from={norm.reason for norm in norms})
    if frozen is not None:
        pinned[roots[frozen]] = True
    needs = demands(n, roots)
    chosen = Selection(n, roots, pinned, pinned.clone(), needs, why=pinned.long())
    while True:
        before = int(chosen.kept.sum())
        for only_choice in (True, False):  # what has no choice first: it may stand for classes that have one
            for demand in needs.values():
                demand.refresh(chosen.kept)
                _hit_classes(chosen, demand, only_choice)
            for norm in norms:
                chosen.keep(needed_by(norm, roots, chosen.kept), NORMED)
            close(chosen, last=not only_choice)
            if only_choice and int(chosen.kept.sum()) > before:
                break
        if int(chosen.kept.sum()) > before:
            continue
        settled = [_embed(chosen, name, demand) for name, demand in needs.items()]
        if all(settled) and int(chosen.kept.sum()) == before:
            return chosen


def _hit_classes(chosen: Selection, demand: Demand, only_choice: bool) -> None:
    """Keep a member of every live class that has no kept member yet: the preferred one, else the earliest.

    only_choice: do so only for classes all of whose members stand or fall together.
    """
    n = len(demand.roots)
    some = ~demand.constant
    kept = chosen.kept[demand.roots] & some
    hit = torch.zeros(n, dtype=torch.bool)
    hit[demand.leader[kept]] = True
    missing = demand.live & ~hit & some
    if only_choice:
        ends = [
            torch.zeros(n, dtype=torch.int64).scatter_reduce_(
                0, demand.leader[some], demand.roots[some], way, include_self=False
            )
            for way in ("amin", "amax")
        ]
        missing &= ends[0] == ends[1]
    constant = demand.port.x.rows.is_constant()
    copy = _copies_but_for_constants(demand, missing, kept) if demand.rigid else torch.zeros_like(missing)
    chosen.keep(demand.roots[demand.prefer[missing & ~constant & ~copy]], DISTINCT)
    chosen.keep(demand.roots[demand.prefer[missing & copy]], COPY)
    chosen.keep(demand.roots[demand.prefer[missing & constant]], STUCK)


def _copies_but_for_constants(demand: Demand, missing: Tensor, kept: Tensor) -> Tensor:
    """(n,) which of the `missing` would have gone as copies of others, had a constant a bias to go to."""
    n = len(missing)
    here, leader = torch.arange(n), demand.port.classes.leader
    member = (missing | kept) & ~demand.port.constant
    first = torch.full((n,), n).scatter_reduce_(0, leader[member], here[member] - n * kept[member].long(), "amin")
    return member & missing & (first[leader] != here)


def close(chosen: Selection, last: bool = True) -> None:
    """Grow the selection until every constraint holds: equal counts, groups, and (last) at least one channel."""
    slots, roots = chosen.numbering.slots, chosen.roots
    while True:
        close_heads(slots.constraints, roots, chosen.kept, chosen.keep)
        before = int(chosen.kept.sum())
        for constraint in slots.constraints:
            if isinstance(constraint, Groups):
                _even_groups(chosen, roots[constraint.inputs], roots[constraint.outputs])
            elif isinstance(constraint, EqualCounts):
                _even_sections(chosen, [roots[section] for section in constraint.sections])
            elif isinstance(constraint, Fewer):
                least = chosen.kept[roots[constraint.few]].sum() + 1
                _fill(chosen, roots[constraint.many].unsqueeze(0), least.reshape(1))
        if int(chosen.kept.sum()) > before:
            continue
        if not last:
            return
        for bound in slots.bound.values():  # last: a head that stays brings its channels along
            if chosen.needs_one(roots[bound]):
                chosen.keep(roots[bound[:1]], "last of its layer")
        for demand in chosen.demands.values():
            if chosen.needs_one(demand.roots):
                chosen.keep(demand.roots[:1], "last of its layer")
        if int(chosen.kept.sum()) == before:
            return


def _fill(chosen: Selection, rows: Tensor, target: Tensor) -> None:
    """Keep more channels of each row of `rows` (G, m), earliest first, until row g has target[g]."""
    have = chosen.kept[rows]
    short = (target - have.sum(1)).clamp_min(0).unsqueeze(1)
    extra = ~have & ((~have).long().cumsum(1) <= short)
    chosen.keep(rows[extra], "kept for equal parts")


def _even_groups(chosen: Selection, inputs: Tensor, outputs: Tensor) -> None:
    counts = [chosen.kept[side].sum(1) for side in (inputs, outputs)]
    active = (counts[0] > 0) | (counts[1] > 0)
    if not bool(active.any()):
        if not chosen.needs_one(inputs.reshape(-1)):
            return
        active[0] = True
    for side, count in zip((inputs, outputs), counts, strict=True):
        _fill(chosen, side, torch.where(active, count.max().clamp_min(1), 0))


def _even_sections(chosen: Selection, sections: Sequence[Tensor]) -> None:
    counts = torch.stack([chosen.kept[section].sum() for section in sections])
    _fill(chosen, torch.stack(list(sections)), counts.max().clamp_min(1).expand(len(sections)))


def _embed(chosen: Selection, name: str, demand: Demand) -> bool:
    """Write every position of a weight's input through the kept ones; False if that needed more kept ones."""
    n = len(demand.roots)
    here = torch.arange(n)
    kept = chosen.kept[demand.roots]
    varies = ~demand.constant
    candidate = kept & varies
    first = torch.full((n,), n).scatter_reduce_(0, demand.leader[candidate], here[candidate], "amin")
    first = torch.where(candidate[demand.prefer] & (demand.leader == here), demand.prefer, first)
    stand_in = first[demand.leader]  # the kept member that represents the class, or n
    members = torch.zeros(n).index_add_(0, demand.leader[varies], torch.ones(int(varies.sum())))
    cancelled = varies & demand.net_zero[demand.leader] & (members[demand.leader] > 1) & demand.foldable
    if bool((cancelled & kept).any()):  # those whose weights are gone already have nothing left to cancel
        sent = torch.stack([port.weight.flatten(1).abs().amax(1) for port in demand.ports]).amax(0)
        cancelled &= ~(kept & (sent == 0))
    merged = varies & ~kept & (stand_in < n) & ~cancelled
    told_apart = (merged | cancelled) & (demand.leader != here)
    if bool(told_apart.any()):
        told_apart &= demand.amplified()
    if bool(told_apart.any()):
        demand.tell_apart(told_apart)
        chosen.keep(demand.roots[told_apart], "near a copy, but its outgoing weights tell them apart")
        return False
    target = torch.where(merged, stand_in, here).clamp_max(n - 1)
    ratio = torch.where(merged, demand.scale / demand.scale[target], 1.0)
    t = torch.where(kept & ~cancelled, 0.0, demand.offset)
    t = torch.where(merged, demand.offset - ratio * demand.offset[target], t)
    t = torch.where(t.abs() <= MARGIN * demand.port.x.rows.error, 0.0, t)

    wide, narrow = here[kept & ~cancelled], here[kept & ~cancelled]
    values = torch.ones(len(wide), dtype=torch.float64)
    wide = torch.cat([wide, here[merged]])
    narrow = torch.cat([narrow, target[merged]])
    values = torch.cat([values, ratio[merged]])

    if bool((t != 0).any()) and not demand.can_fold(t):
        led = _lead_constants(chosen, demand, t, kept)
        if led is None:
            return False
        lead_wide, lead_narrow, lead_values, t = led
        wide = torch.cat([wide, lead_wide])
        narrow = torch.cat([narrow, lead_narrow])
        values = torch.cat([values, lead_values])
    number = kept.long().cumsum(0) - 1
    chosen.embeddings[name] = ChannelEmbedding(n, int(kept.sum()), wide, number[narrow], values, t)
    return True


def _lead_constants(
    chosen: Selection, demand: Demand, t: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Entries that write the constants t as multiples of one kept constant per group; None: keep one first.

    Where a space has no constant channel to lead, offsets become part of the direction: only channels that
    are equal with their offsets count as copies.
    """
    groups = demand.port.groups
    n = len(t)
    group = torch.arange(n) * groups // n
    usable = demand.constant & (demand.offset != 0)
    if demand.rigid or not demand.foldable:
        usable = torch.zeros_like(usable)
    needy = torch.zeros(groups, dtype=torch.bool)
    needy[group[t != 0]] = True
    available = torch.zeros(groups, dtype=torch.bool)
    available[group[usable]] = True
    if bool((needy & ~available).any()):
        demand.make_rigid()
        demand.refresh(chosen.kept, force=True)
        return None
    # The largest constant leads, a kept one if there is any.
    weight = torch.where(usable, demand.offset.abs() * (1 + 1e100 * kept.double()), -1.0)
    best = torch.full((groups,), -2.0, dtype=torch.float64).scatter_reduce_(0, group, weight, "amax")
    place = torch.full((groups,), n).scatter_reduce_(
        0, group[weight == best[group]], torch.arange(n)[weight == best[group]], "amin"
    )
    lead = place[needy]
    if not bool(kept[lead].all()):
        chosen.keep(demand.roots[lead], "leads the constants")
        return None
    wide = (t != 0).nonzero().squeeze(1)
    head = place[group[wide]]
    return wide, head, t[wide] / demand.offset[head], torch.zeros_like(t)


def to_round(chosen: Selection) -> Round:
    """The edits that a selection makes; what stays as it is has no edit."""
    n = chosen.numbering
    folds, cuts = [], []
    folded_axes: set[tuple[str, int]] = set()
    for name, demand in chosen.demands.items():
        layout, embedding = demand.port.op.layout, chosen.embeddings[name]
        kept_out = chosen.kept[demand.out_roots]
        kept_in = chosen.kept[demand.roots].reshape(layout.groups, -1)
        folded_axes |= {(name, 0), (name, 1), (name, -1)}
        groups = kept_in.any(1).nonzero().squeeze(1)
        outputs = kept_out[groups].nonzero()[:, 1].reshape(len(groups), -1)
        if embedding.is_identity() and bool(kept_out.all()) and not bool((embedding.t != 0).any()):
            continue
        room = (demand.bias, demand.mean, demand.new_bias) if bool((embedding.t != 0).any()) else (None,) * 3
        folds.append(Fold(name, layout, embedding, groups, outputs, kept_out.numel(), *room))
    for (name, axis), slots in n.slots.bound.items():
        keep = chosen.is_kept(slots)
        if (name, axis) not in folded_axes and not bool(keep.all()):
            cuts.append(Cut(name, axis, keep.nonzero().squeeze(1), len(keep)))
    return Round(
        tuple(folds), tuple(cuts), heads=heads_of(n, roots=chosen.roots, kept=chosen.kept), scales=chosen.scales
    )
