"""Channels that nothing bends between the weight that writes them and those that read them: their rank.

    h = W_in x + b,   y = W_out h + ...        M = W_out W_in, of rank r < s = the number of such channels

are replaced by r mixtures of themselves: with the singular value decomposition M = P S Q',

    v = L (W_in x) + c,   L = S_r^-1 P_r' W_out          h = R v + t as far as W_out sees it,
    R = W_in V^+ (V = L W_in as it was rounded),         t = b - R c

Two cases. *No activation* between: all channels, c = 0. *Always on* ReLUs on a declared domain: those channels,
and c so large that bounds prove v > 0 on the whole domain; the new units are always on as well. (Serra et al.,
Lossless compression of deep neural networks, 2020, fold to the rank of W_in; the product's is lower.)

Exact at rounding: what is dropped changes no output, anywhere on the domain, by more than MARGIN roundings of the
terms that the output sums up there (without a domain: of its weights, at inputs of size 1).

The edit keeps all shapes. Nobody reads the s - r channels left over then, and the next selection takes them.

Behind zero padding a constant t would be none: c then is what makes it cancel there, if anything does.

Left out, and left alone: batch norm between the two, producers or consumers in groups, channels that several
weights write, weights with another use, max pools; zero padding in front of a consumer where a constant t would
meet it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.bounds.interval import Bounds, Found, contracted
from ep_prune.demand import Demand, demands
from ep_prune.embedding import ChannelEmbedding, Fold, Mix, Round
from ep_prune.find import MARGIN
from ep_prune.graph import Contract, Graph, Move, Node, Operation, Pass, Pointwise, Stencil
from ep_prune.numbering import Numbering, number_channels
from ep_prune.numbering.straight import straight_parts
from ep_prune.rules import kind_of

ROOM = 2.0**-10
"""How far above zero the new units are kept, relative to how far they range."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """One fold to the rank: the edits, and which channels of `weight` are left unread by it."""

    step: Round
    weight: str
    axis: int
    left: Tensor


@dataclass(frozen=True, eq=False)
class _Place:
    """A producer, what stands behind it, and who reads that. `act` is None where there is no activation."""

    node: Node
    op: Contract
    act: Node | None
    consumers: tuple[Demand, ...]


def mixtures(
    graph: Graph, ranges: Mapping[Node, tuple[Tensor, Tensor]], frozen: Mapping[tuple[str, int], str]
) -> Mixture | None:
    """The last place of the graph where channels can be folded to a lower rank, or None.

    ranges: bounds of the nodes on the declared domain (empty: none is declared). frozen: axes that stay.
    """
    n = number_channels(graph, ranges=ranges)
    roots = n.slots.roots()
    pinned = n.slots.pinned(roots, kept=frozen)
    needs = demands(n, roots)
    for node in reversed(graph.nodes):
        place = _place(node, n, needs)
        if place is not None:
            found = _fold(place, n, ranges, roots, pinned)
            if found is not None:
                return found
    return None


def _place(node: Node, n: Numbering, needs: Mapping[str, Demand]) -> _Place | None:
    """A weight's use whose outputs go, bent at most by one ReLU, to weights and nowhere else."""
    if node.target is None or node.tensor is not None:
        return None
    op = kind_of(node, n.graph)
    if not isinstance(op, Contract) or op.layout.groups != 1 or op.weight.tensor not in needs:
        return None
    producer = needs[str(op.weight.tensor)]
    if len(producer.ports) > 1 or not producer.foldable:
        return None
    users, act = n.graph.users(), None
    consumers: dict[str, Demand] = {}
    waiting, seen = [node], {node}
    outputs = set(n.graph.outputs)
    while waiting:
        at = waiting.pop()
        if at in outputs or not users[at]:
            return None
        for reader in users[at]:
            kind: Operation = kind_of(reader, n.graph)
            if isinstance(kind, Contract):
                name = str(kind.weight.tensor)
                if kind.x is not at or kind.layout.groups != 1 or name not in needs or len(needs[name].ports) > 1:
                    return None
                consumers[name] = needs[name]
            elif isinstance(kind, Pointwise) and reader.op == "aten.relu" and act is None and len(seen) == 1:
                if len(users[at]) > 1:
                    return None
                act = reader
                waiting.append(reader)
            elif isinstance(kind, Pass | Move) or (isinstance(kind, Stencil) and kind.keeps_constants):
                if reader not in seen:
                    seen.add(reader)
                    waiting.append(reader)
            else:
                return None
    good = consumers and all(demand.foldable for demand in consumers.values())
    return _Place(node, op, act, tuple(consumers.values())) if good else None


def _fold(
    place: _Place,
    n: Numbering,
    ranges: Mapping[Node, tuple[Tensor, Tensor]],
    roots: Tensor,
    pinned: Tensor,
) -> Mixture | None:
    layout, name = place.op.layout, str(place.op.weight.tensor)
    axis = int(layout.inputs_first)
    own = roots[n.slots.bound[(name, axis)]]
    free = ~pinned[own]
    if place.act is not None:
        act = kind_of(place.act, n.graph)
        x = n.values[place.node]
        assert isinstance(act, Pointwise)
        parts = straight_parts(act, place.act, n, x) if hasattr(x, "labels") else None  # type: ignore[arg-type]
        if parts is None or place.op.x not in ranges:
            return None
        free &= parts[0] == 1
    rows = free.nonzero().squeeze(1)
    if len(rows) < 2 or len(torch.unique(own)) < len(own):
        return None
    weight = layout.canonical(n.tensor(place.op.weight))[0]
    wide = weight[rows].flatten(1)
    bias = torch.zeros(len(weight), dtype=torch.float64) if place.op.bias is None else n.tensor(place.op.bias)
    room = _room(place, n)
    if room is None and (place.act is not None or place.op.bias is not None):
        return None
    spots = [_spots(demand, own, rows) for demand in place.consumers]
    if any(spot is None for spot in spots):
        return None
    reach = _reach(place, ranges, weight)
    terms = (wide.abs() * reach).sum(1) + bias[rows].abs()
    read, size = _read(place, [spot for spot in spots if spot is not None], ranges, terms)
    eps = max(n.eps(d.port.op.weight) for d in place.consumers)
    stored = n.graph.tensors[name].dtype
    for augmented in (False, True):  # with the bias as one more input no constant is left to meet the padding
        inner = torch.cat([wide * reach, bias[rows].unsqueeze(1)], 1) if augmented else wide * reach
        found = _rank(read, inner, size, MARGIN * eps)
        if found is None:
            return None
        mixing, rank = found
        new = (mixing @ wide).to(stored).double()
        offset = torch.zeros(rank, dtype=torch.float64)
        if place.act is not None:
            shift = _shift(place, n, ranges, weight, rows[:rank], new)
            offset = shift.to(stored).double()
        elif augmented:
            offset = (mixing @ bias[rows]).to(stored).double()
        made = torch.cat([new * reach, offset.unsqueeze(1)], 1) if augmented else new * reach
        back = inner @ torch.linalg.pinv(made)
        if not bool(back.isfinite().all()):
            return None
        if place.act is None and not augmented and place.op.bias is not None:
            offset = _balanced(place, spots, back, bias[rows]).to(stored).double()
        t = torch.zeros(len(rows), dtype=torch.float64) if augmented else bias[rows] - back @ offset
        folds = _consumer_folds(place, spots, back, t)
        if folds is not None:
            keeps = place.op.bias is not None or place.act is not None
            mix = Mix(name, layout, rows, mixing, offset, *(room or (None, None)) if keeps else (None, None))
            return Mixture(Round(folds, (), (mix,)), name, axis, rows[rank:])
        if place.act is not None or place.op.bias is None:
            return None
    return None


def _balanced(place: _Place, spots: Sequence[Tensor | None], back: Tensor, bias: Tensor) -> Tensor:
    """(r,) biases of the mixtures with which t = bias - back c cancels wherever no bias of a consumer can take it:
    least squares, exact or of no use."""
    columns, targets = [], []
    for demand, spot in zip(place.consumers, spots, strict=True):
        edge = ~torch.tensor(demand.port.op.layout.interior) | (not demand.takes_constants)
        sent = demand.port.weight[spot][..., edge].sum(1).flatten(1)  # (s, outputs * taps)
        columns.append((back.T @ sent).T)
        targets.append(bias @ sent)
    matrix, target = torch.cat(columns), torch.cat(targets).unsqueeze(1)
    if not len(matrix):
        return torch.zeros(back.shape[1], dtype=torch.float64)
    found: Tensor = torch.linalg.lstsq(matrix, target, driver="gelsd").solution.squeeze(1)
    return found


def _consumer_folds(
    place: _Place, spots: Sequence[Tensor | None], back: Tensor, t: Tensor
) -> tuple[Fold, ...] | None:
    folds = []
    for demand, spot in zip(place.consumers, spots, strict=True):
        assert spot is not None
        fold = _consumer_fold(demand, spot, back, t)
        if fold is None:
            return None
        folds.append(fold)
    return tuple(folds)


def _read(
    place: _Place, spots: Sequence[Tensor], ranges: Mapping[Node, tuple[Tensor, Tensor]], terms: Tensor
) -> tuple[Tensor, Tensor]:
    """(outputs, s) what the consumers make of each channel, at every spot and tap, and (outputs,) the size of the
    terms that each of these may be off by a rounding of. terms (s,): how large the channels are by their
    weights."""
    parts, sizes = [], []
    for demand, spot in zip(place.consumers, spots, strict=True):
        port = demand.port
        columns = port.weight[spot].permute(1, 2, 3, 0)  # (q, O, taps, s)
        parts.append(columns.flatten(0, 2))
        ends = ranges.get(port.op.x)
        if ends is None:
            large = torch.zeros(port.shape[0], dtype=torch.float64)
            large[spot] = terms.unsqueeze(1).expand_as(spot)
        else:
            large = _along(torch.maximum(ends[0].abs(), ends[1].abs()), port.op.layout.axis)
        total = (port.weight.abs().sum(2) * large.unsqueeze(1)).sum(0)
        spread = total.reshape(1, -1, 1) / (columns.shape[0] * columns.shape[2])
        sizes.append(spread.expand(columns.shape[:3]).reshape(-1))
    return torch.cat(parts), torch.cat(sizes)


def _room(place: _Place, n: Numbering) -> tuple[str | None, str | None] | None:
    """Where the new units' biases go: the layer's bias, a new one, or nowhere (None)."""
    if place.op.bias is not None:
        name = str(place.op.bias.tensor)
        readers = [r for node, users in n.graph.users().items() if node.tensor == name for r in users]
        return (name, None) if readers == [place.node] and name not in n.pinned_tensors else None
    weight = str(place.op.weight.tensor)
    path = weight.rpartition(".")[0]
    alone = len(n.graph.aliases.get(weight, ())) == 1
    return (None, path) if weight.endswith(".weight") and path in n.graph.bias_free and alone else None


def _spots(demand: Demand, own: Tensor, rows: Tensor) -> Tensor | None:
    """(s, q) where each channel stands among a consumer's inputs; None where they do not stand equally often."""
    number = torch.full((int(max(own.max(), demand.roots.max())) + 1,), -1)
    number[own[rows]] = torch.arange(len(rows))
    member = number[demand.roots]
    order = member.argsort(stable=True)
    order = order[member[order] >= 0]
    counts = torch.bincount(member[order], minlength=len(rows))
    return None if bool((counts != counts[0]).any()) or not len(order) else order.reshape(len(rows), -1)


def _reach(place: _Place, ranges: Mapping[Node, tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """(inputs * taps,) how large each input of the producer gets; 1 where no domain is declared."""
    taps = weight.shape[2]
    ends = ranges.get(place.op.x)
    if ends is None:
        return torch.ones(weight.shape[1] * taps, dtype=torch.float64)
    size = _along(torch.maximum(ends[0].abs(), ends[1].abs()), place.op.layout.axis)
    return size.repeat_interleave(taps)


def _along(value: Tensor, axis: int) -> Tensor:
    """The largest value of each channel."""
    rest = [a for a in range(value.ndim) if a != axis]
    return value.amax(rest)


def _rank(read: Tensor, wide: Tensor, size: Tensor, rounding: float) -> tuple[Tensor, int] | None:
    """(L, r) for the least r at which nothing above rounding is lost; None where that is no less than s."""
    some = size > 0
    if not bool(some.any()):
        return None
    read, size = read[some], size[some]
    product = (read @ wide) / size.unsqueeze(1)
    left, value, right = torch.linalg.svd(product, full_matrices=False)
    limit = min(len(value), wide.shape[0])

    def lost(rank: int) -> float:
        return float((product - (left[:, :rank] * value[:rank]) @ right[:rank]).abs().sum(1).max())

    low, high = 0, limit
    while low < high:  # the least rank that keeps all but rounding
        middle = (low + high) // 2
        low, high = (low, middle) if lost(middle) <= rounding else (middle + 1, high)
    rank = max(low, 1)
    if rank >= wide.shape[0] or lost(rank) > rounding or float(value[rank - 1]) <= 0:
        return None
    mixing = (left[:, :rank] / value[:rank]).T @ (read / size.unsqueeze(1))
    return mixing, rank


def _shift(
    place: _Place,
    n: Numbering,
    ranges: Mapping[Node, tuple[Tensor, Tensor]],
    weight: Tensor,
    rows: Tensor,
    new: Tensor,
) -> Tensor:
    """(r,) biases with which the new units are above zero on the whole domain, by their own bounds."""
    trial = weight.clone()
    trial[rows] = new.reshape(len(rows), *weight.shape[1:])
    kernel = tuple((place.op.weight.shape or ())[2:])
    x = Bounds.of(*ranges[place.op.x])
    batch = (place.op.x.shape or (1,))[0]
    x = Bounds(*(part.expand(batch, *part.shape[1:]) for part in (x.low, x.high, x.size)))
    found: Found = contracted(
        place.op, place.node, n.graph, x, place.op.layout.original(trial.unsqueeze(0), kernel), None
    )
    assert isinstance(found, Bounds)
    axis = place.op.layout.axis
    low, high = -_along(-found.low, axis)[rows], _along(found.high, axis)[rows]
    margin = ROOM * (high - low + torch.maximum(low.abs(), high.abs())) + 1e-30
    return margin - low


def _consumer_fold(demand: Demand, spot: Tensor, back: Tensor, t: Tensor) -> Fold | None:
    """The consumer through h = R v + t at all the places where the channels stand."""
    port, n = demand.port, len(demand.roots)
    layout, (count, rank) = port.op.layout, back.shape
    offset = torch.zeros(n, dtype=torch.float64)
    offset[spot] = t.unsqueeze(1).expand_as(spot)
    if bool((t != 0).any()) and not demand.can_fold(offset):
        return None
    others = torch.ones(n, dtype=torch.bool)
    others[spot.reshape(-1)] = False
    rest = others.nonzero().squeeze(1)
    shape = (count, rank, spot.shape[1])
    wide = torch.cat([rest, spot.unsqueeze(1).expand(shape).reshape(-1)])
    narrow = torch.cat([rest, spot[:rank].unsqueeze(0).expand(shape).reshape(-1)])
    values = torch.cat([torch.ones(len(rest), dtype=torch.float64), back.unsqueeze(2).expand(shape).reshape(-1)])
    room = (demand.bias, demand.mean, demand.new_bias) if bool((offset != 0).any()) else (None,) * 3
    outputs = port.shape[1]
    return Fold(
        port.name,
        layout,
        ChannelEmbedding(n, n, wide, narrow, values, offset),
        torch.zeros(1, dtype=torch.int64),
        torch.arange(outputs).unsqueeze(0),
        outputs,
        *room,
    )
