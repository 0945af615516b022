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

from ep_prune.embedding import ChannelEmbedding, Cut, Fold, Round
from ep_prune.find import MARGIN, Freedom, Sparse, congruence
from ep_prune.graph import Node, Normalize
from ep_prune.numbering import Numbering, Port
from ep_prune.rules import kind_of
from ep_prune.slots import EqualCounts, Groups

STAYED = (
    "gone",
    "pinned",
    "distinct and read",
    "leads the constants",
    "kept for equal parts",
    "last of its layer",
)


@dataclass
class Demand:
    """What one weight needs of its input channels, over all its uses."""

    ports: list[Port]
    roots: Tensor
    """(n,) slot of every input position."""
    leader: Tensor
    scale: Tensor
    constant: Tensor
    live: Tensor
    """(n,) at leaders: the class is read."""
    net_zero: Tensor
    """(n,) at leaders: its weights are zero or cancel, exactly."""
    offset: Tensor
    live_out: Tensor
    """(G, O/G)"""
    eps: float
    """Rounding unit of the type in which the weight is stored."""
    foldable: bool
    """Copies may be merged into their leaders (not where the weight has another use)."""
    bias: str | None = None
    mean: str | None = None
    new_bias: str | None = None
    rigid: bool = False
    """Offsets count as part of the direction: no constant can be folded or led here."""

    @property
    def port(self) -> Port:
        return self.ports[0]

    @property
    def takes_constants(self) -> bool:
        return self.bias is not None or self.mean is not None or self.new_bias is not None


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

    def keep(self, roots: Tensor, why: str) -> None:
        """Keep more slots, noting why."""
        new = roots[~self.kept[roots]]
        self.kept[new] = True
        self.why[new] = STAYED.index(why)

    def is_kept(self, slots: Tensor) -> Tensor:
        return self.kept[self.roots[slots]]


def select(n: Numbering, frozen: Tensor | None = None) -> Selection:
    """The narrowest selection that the claims allow. `frozen`: roots that must stay (rolled back, protected)."""
    roots = n.slots.roots()
    pinned = n.slots.pinned(roots)
    if frozen is not None:
        pinned[roots[frozen]] = True
    live = n.liveness()
    demands = _demands(n, roots, live)
    chosen = Selection(n, roots, pinned, pinned.clone(), demands, why=pinned.long())
    while True:
        for demand in demands.values():
            _hit_classes(chosen, demand)
        _close(chosen)
        before = int(chosen.kept.sum())
        settled = [_embed(chosen, name, demand) for name, demand in demands.items()]
        if all(settled) and int(chosen.kept.sum()) == before:
            return chosen


def _demands(n: Numbering, roots: Tensor, live: dict[int, Tensor]) -> dict[str, Demand]:
    users = n.graph.users()
    by_weight: dict[str, list[Port]] = {}
    for port in n.ports:
        by_weight.setdefault(port.name, []).append(port)
    ports_of_node = {port.node for port in n.ports}
    demands = {}
    for name, ports in by_weight.items():
        port = ports[0]
        nodes = {p.node for p in ports}
        readers = {node for node in users[port.op.weight]}
        same_layout = len({(p.op.layout.groups, p.op.layout.inputs_first) for p in ports}) == 1
        foldable = same_layout and readers <= nodes and name not in n.pinned_tensors
        demand = Demand(
            ports,
            roots[port.x.slots],
            port.classes.leader,
            port.classes.scale,
            port.constant,
            torch.stack([p.live_classes(live[id(p.out)], n.tolerance) for p in ports]).any(0),
            torch.stack([_net_zero(p, live[id(p.out)]) for p in ports]).all(0),
            port.x.rows.offset,
            torch.stack([live[id(p.out)] for p in ports]).any(0).reshape(port.groups, -1),
            n.eps(port.op.weight),
            foldable,
        )
        if len(ports) > 1:
            _join_sites(demand)
        if not foldable:
            demand.leader = torch.arange(len(demand.roots))
            demand.scale = torch.ones_like(demand.scale)
            reads = (port.weight != 0).any(2) & _expand(demand.live_out, port)
            demand.live = reads.any(1) & ~demand.constant
            demand.net_zero = ~demand.live
        _find_room_for_constants(n, demand, users, ports_of_node)
        demands[name] = demand
    return demands


def _expand(live_out: Tensor, port: Port) -> Tensor:
    """(G, O/G) -> (n, O/G)."""
    groups, outputs = live_out.shape
    inputs = len(port.weight) // groups
    return live_out.unsqueeze(1).expand(groups, inputs, outputs).reshape(-1, outputs)


def _net_zero(port: Port, live_out: Tensor) -> Tensor:
    live = _expand(live_out.reshape(port.groups, -1), port)
    return ~((port.net != 0).any(2) & live).any(1)


def _join_sites(demand: Demand) -> None:
    """A weight with several uses: channels are equal only if they are so, with one ratio, at every use."""
    ports = demand.ports
    leaders = torch.stack([torch.where(p.constant, -1, p.classes.leader) for p in ports], 1)
    _, inverse = torch.unique(leaders, dim=0, return_inverse=True)
    n = len(inverse)
    first = torch.full((n,), n).scatter_reduce_(0, inverse, torch.arange(n), "amin")
    leader = first[inverse]
    scales = torch.stack([p.classes.scale for p in ports], 1)
    ratio = scales / scales[leader]
    varies = torch.stack([~p.constant for p in ports], 1)
    reference = torch.where(varies, ratio, torch.nan).nanmean(1).nan_to_num(1.0)
    offsets = torch.stack([p.x.rows.offset for p in ports], 1)
    rest = offsets - reference.unsqueeze(1) * offsets[leader]
    constant = ~varies.any(1)
    rest = torch.where(constant.unsqueeze(1), offsets, rest)
    agree = torch.where(varies, (ratio - reference.unsqueeze(1)).abs(), 0.0).amax(1) <= 1e-12 * reference.abs()
    agree &= (rest - rest[:, :1]).abs().amax(1) <= 1e-12 * (1 + offsets.abs().amax(1))
    alone = ~agree
    demand.leader = torch.where(alone, torch.arange(n), leader)
    # A member whose leader turned out to stand alone still belongs to that leader's class: ratios are to it.
    demand.scale = torch.where(alone | constant, 1.0, reference)
    demand.constant = constant & agree
    live = torch.zeros(n, dtype=torch.bool)
    net_zero = torch.ones(n, dtype=torch.bool)
    for port in ports:
        read = (port.weight != 0).any(2) & _expand(demand.live_out, port)
        own = read.any(1) & ~demand.constant
        live[demand.leader[own]] = True
        net_zero[demand.leader[own]] = False
    demand.live, demand.net_zero = live, net_zero


def _find_room_for_constants(
    n: Numbering, demand: Demand, users: dict[Node, list[Node]], port_nodes: set[Node]
) -> None:
    """Where W t can go: the layer's own bias, the mean of the batch norm that follows, or a new bias."""
    nodes = {port.node for port in demand.ports}
    bias = demand.port.op.bias
    if bias is not None:
        alone = set(users[bias]) <= nodes and str(bias.tensor) not in n.pinned_tensors
        shared = any(port.op.bias is not bias for port in demand.ports)
        demand.bias = bias.tensor if alone and not shared else None
        return
    if not demand.foldable or any(port.op.bias is not None for port in demand.ports):
        return
    readers = users[demand.port.node]
    if len(nodes) == 1 and len(readers) == 1:
        kind = kind_of(readers[0], n.graph)
        if isinstance(kind, Normalize) and len(users[kind.mean]) == 1 and demand.port.op.layout.axis == 1:
            demand.mean = kind.mean.tensor
            return
    path = demand.port.name.rpartition(".")[0]
    if demand.port.name.endswith(".weight") and path in n.graph.bias_free:
        names = n.graph.aliases.get(demand.port.name, ())
        demand.new_bias = path if len(names) == 1 else None


def _hit_classes(chosen: Selection, demand: Demand) -> None:
    """Keep the earliest member of every live class that has no kept member yet."""
    n = len(demand.roots)
    some = ~demand.constant
    kept = chosen.kept[demand.roots] & some
    hit = torch.zeros(n, dtype=torch.bool)
    hit[demand.leader[kept]] = True
    missing = demand.live & ~hit
    first = torch.full((n,), n).scatter_reduce_(0, demand.leader[some], torch.arange(n)[some], "amin")
    chosen.keep(demand.roots[first[missing & (first < n)]], "distinct and read")


def _close(chosen: Selection) -> None:
    """Grow the selection until every constraint holds: equal counts, groups, at least one channel."""
    slots, roots = chosen.numbering.slots, chosen.roots
    while True:
        before = int(chosen.kept.sum())
        for bound in slots.bound.values():
            if not bool(chosen.kept[roots[bound]].any()):
                chosen.keep(roots[bound[:1]], "last of its layer")
        for demand in chosen.demands.values():
            if not bool(chosen.kept[demand.roots].any()):
                chosen.keep(demand.roots[:1], "last of its layer")
        for constraint in slots.constraints:
            if isinstance(constraint, Groups):
                _even_groups(chosen, roots[constraint.inputs], roots[constraint.outputs])
            elif isinstance(constraint, EqualCounts):
                _even_sections(chosen, [roots[section] for section in constraint.sections])
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
    stand_in = first[demand.leader]  # the kept member that represents the class, or n
    members = torch.zeros(n).index_add_(0, demand.leader[varies], torch.ones(int(varies.sum())))
    cancelled = varies & demand.net_zero[demand.leader] & (members[demand.leader] > 1) & demand.foldable
    merged = varies & ~kept & (stand_in < n) & ~cancelled
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

    if bool((t != 0).any()) and not _can_fold(demand, t):
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


def _can_fold(demand: Demand, t: Tensor) -> bool:
    """Whether what the constants send to live outputs is a constant, and has a bias to go to."""
    for port in demand.ports:
        groups, outputs = demand.live_out.shape
        terms = (port.weight * t.reshape(-1, 1, 1)).reshape(groups, -1, outputs, port.weight.shape[2])
        sent, size = terms.sum(1), terms.square().sum(1).sqrt()
        error = demand.port.x.rows.error.reshape(groups, -1, 1, 1)
        noise = (port.weight.reshape(terms.shape) * error).square().sum(1).sqrt()
        nonzero = (sent.abs() > MARGIN * (demand.eps * size + noise)) & demand.live_out.unsqueeze(2)
        edge = ~torch.tensor(port.op.layout.interior)
        if bool(nonzero[:, :, edge].any()) or (bool(nonzero.any()) and not demand.takes_constants):
            return False
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
        _make_rigid(chosen, demand)
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


def _make_rigid(chosen: Selection, demand: Demand) -> None:
    """Classes anew, with the offset as part of the direction; every constant but 0 becomes a class."""
    port = demand.port
    rows = port.x.rows
    n = len(rows)
    if demand.rigid or len(demand.ports) > 1 or not demand.foldable:
        # No merging at all: whatever is not zero stays.
        demand.leader, demand.scale = torch.arange(n), torch.ones(n, dtype=torch.float64)
    else:
        zero = rows.norm() == 0
        some = (~zero).nonzero().squeeze(1)
        group = some * port.groups // n if port.groups > 1 else None
        found = congruence(Sparse(rows[some], True), Freedom.SCALE, chosen.numbering.tolerance, group)
        demand.leader, demand.scale = torch.arange(n), torch.ones(n, dtype=torch.float64)
        demand.leader[some], demand.scale[some] = some[found.leader], found.scale
    present = torch.stack([p.x.rows.norm() for p in demand.ports]).amax(0) != 0
    demand.constant = ~present
    demand.offset = torch.zeros(n, dtype=torch.float64)
    live = _expand(demand.live_out, port)
    net = torch.zeros_like(port.weight)
    net.index_add_(0, demand.leader, port.weight * demand.scale.reshape(-1, 1, 1))
    size = torch.zeros_like(port.weight)
    size.index_add_(0, demand.leader, (port.weight * demand.scale.reshape(-1, 1, 1)).abs())
    demand.live = ((net.abs() > MARGIN * demand.eps * size).any(2) & live).any(1) & present
    demand.net_zero = ~demand.live
    demand.rigid = True


def to_round(chosen: Selection) -> Round:
    """The edits that a selection makes; what stays as it is has no edit."""
    n = chosen.numbering
    folds, cuts = [], []
    folded_axes: set[tuple[str, int]] = set()
    for name, demand in chosen.demands.items():
        layout, embedding = demand.port.op.layout, chosen.embeddings[name]
        out_axis = 1 if layout.inputs_first else 0
        out_slots = n.slots.bound[(name, -1 if layout.groups > 1 else out_axis)]
        kept_out = chosen.is_kept(out_slots).reshape(layout.groups, -1)
        kept_in = chosen.kept[demand.roots].reshape(layout.groups, -1)
        folded_axes |= {(name, 0), (name, 1), (name, -1)}
        groups = kept_in.any(1).nonzero().squeeze(1)
        outputs = kept_out[groups].nonzero()[:, 1].reshape(len(groups), -1)
        if embedding.is_identity() and bool(kept_out.all()) and not bool((embedding.t != 0).any()):
            continue
        room = (demand.bias, demand.mean, demand.new_bias) if bool((embedding.t != 0).any()) else (None,) * 3
        folds.append(Fold(name, layout, embedding, groups, outputs, *room))
    for (name, axis), slots in n.slots.bound.items():
        keep = chosen.is_kept(slots)
        if (name, axis) not in folded_axes and not bool(keep.all()):
            cuts.append(Cut(name, axis, keep.nonzero().squeeze(1)))
    return Round(tuple(folds), tuple(cuts))
