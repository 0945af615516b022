"""What folds of straight channels are made of: the channels, who reads them, ranks, and the consumers' edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.demand import Demand
from ep_prune.embedding import ChannelEmbedding, Fold, Round
from ep_prune.graph import Node
from ep_prune.linear_places import Place, gain_and_shift
from ep_prune.numbering import Numbering

NEARLY = 1e5
"""Up to how many times the rounding allowed a lower rank counts as near."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """One fold to the rank: the edits, and which channels of `weight` are left unread by it."""

    step: Round
    weight: str
    axis: int
    left: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """s channels of a place. rows (s,): which; spots: where each consumer reads them, (s, q); wide (s, inputs),
    bias (s,): what they compute, batch norm included; reach (inputs,): how large the inputs get; weight: the
    producer's, canonical; stored: its type."""

    place: Place
    rows: Tensor
    spots: list[Tensor]
    weight: Tensor
    wide: Tensor
    bias: Tensor
    reach: Tensor
    stored: torch.dtype


@dataclass(frozen=True, eq=False)
class Ranked:
    """A rank, and what is lost there. left: (r, outputs) what mixes the outputs; or, where r channels are chosen,
    (s, r) every channel by these, in the order of `order` (s,), which has the chosen ones first."""

    rank: int
    lost: float
    left: Tensor
    order: Tensor = field(default_factory=lambda: torch.empty(0))


def case_of(
    place: Place,
    n: Numbering,
    ranges: Mapping[Node, tuple[Tensor, Tensor]],
    rows: Tensor,
    spots: list[Tensor],
) -> Case:
    """The channels `rows` of a place."""
    weight = place.op.layout.canonical(n.tensor(place.op.weight))[0]
    bias = torch.zeros(len(weight), dtype=torch.float64) if place.op.bias is None else n.tensor(place.op.bias)
    wide = weight.flatten(1)
    if place.norm is not None:
        gain, shift = gain_and_shift(place.norm, n)
        wide, bias = wide * gain.unsqueeze(1), bias * gain + shift
    stored = n.graph.tensors[str(place.op.weight.tensor)].dtype
    return Case(place, rows, spots, weight, wide[rows], bias[rows], reach_of(place, ranges, weight), stored)


def consumer_folds(case: Case, back: Tensor, t: Tensor) -> tuple[Fold, ...] | None:
    """The consumers through back (s, r) times the first r channels, plus t (s,); None where t cannot be."""
    folds = []
    for demand, spot in zip(case.place.consumers, case.spots, strict=True):
        fold = _consumer_fold(demand, spot, back, t)
        if fold is None:
            return None
        folds.append(fold)
    return tuple(folds)


def read_by(case: Case, ranges: Mapping[Node, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(outputs, s) what the consumers make of each channel, at every spot and tap, and (outputs,) the size of the
    terms that each of these may be off by a rounding of."""
    terms = (case.wide.abs() * case.reach).sum(1) + case.bias.abs()  # how large the channels are by their weights
    parts, sizes = [], []
    for demand, spot in zip(case.place.consumers, case.spots, strict=True):
        port = demand.port
        columns = port.weight[spot].permute(1, 2, 3, 0)  # (q, O, taps, s)
        parts.append(columns.flatten(0, 2))
        ends = ranges.get(port.op.x)
        if ends is None:
            large = torch.zeros(port.shape[0], dtype=torch.float64)
            large[spot] = terms.unsqueeze(1).expand_as(spot)
        else:
            large = largest_along(torch.maximum(ends[0].abs(), ends[1].abs()), port.op.layout.axis)
        total = (port.weight.abs().sum(2) * large.unsqueeze(1)).sum(0)
        spread = total.reshape(1, -1, 1) / (columns.shape[0] * columns.shape[2])
        sizes.append(spread.expand(columns.shape[:3]).reshape(-1))
    read, size = torch.cat(parts), torch.cat(sizes)
    some = size > 0
    return read[some], size[some]


def room_of(place: Place, n: Numbering) -> tuple[str | None, str | None] | None:
    """Where the new units' biases go: the layer's bias, a new one, or nowhere (None)."""
    if place.op.bias is not None:
        name = str(place.op.bias.tensor)
        readers = [r for node, users in n.graph.users().items() if node.tensor == name for r in users]
        return (name, None) if readers == [place.node] and name not in n.pinned_tensors else None
    weight = str(place.op.weight.tensor)
    path = weight.rpartition(".")[0]
    alone = len(n.graph.aliases.get(weight, ())) == 1
    return (None, path) if weight.endswith(".weight") and path in n.graph.bias_free and alone else None


def spots_of(demand: Demand, own: Tensor, rows: Tensor) -> Tensor | None:
    """(s, q) where each channel stands among a consumer's inputs; None where they do not stand equally often."""
    number = torch.full((int(max(own.max(), demand.roots.max())) + 1,), -1)
    number[own[rows]] = torch.arange(len(rows))
    member = number[demand.roots]
    order = member.argsort(stable=True)
    order = order[member[order] >= 0]
    counts = torch.bincount(member[order], minlength=len(rows))
    return None if bool((counts != counts[0]).any()) or not len(order) else order.reshape(len(rows), -1)


def reach_of(place: Place, ranges: Mapping[Node, tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """(inputs * taps,) how large each input of the producer gets; 1 where no domain is declared."""
    taps = weight.shape[2]
    ends = ranges.get(place.op.x)
    if ends is None:
        return torch.ones(weight.shape[1] * taps, dtype=torch.float64)
    size = largest_along(torch.maximum(ends[0].abs(), ends[1].abs()), place.op.layout.axis)
    return size.repeat_interleave(taps)


def largest_along(value: Tensor, axis: int) -> Tensor:
    """The largest value of each channel."""
    rest = [a for a in range(value.ndim) if a != axis]
    return value.amax(rest)


def least_rank(product: Tensor, count: int, rounding: float) -> Ranked | None:
    """The least rank of `product` (outputs, inputs) at which nothing above rounding is lost; if that is not below
    `count`, the least at which little is."""
    if not len(product):
        return None
    left, value, right = torch.linalg.svd(product, full_matrices=False)

    def lost(rank: int) -> float:
        # The part that is dropped: of a full rank nothing is, whatever the rounding here.
        return float(((left[:, rank:] * value[rank:]) @ right[rank:]).abs().sum(1).max())

    def least(enough: float) -> int:
        low, high = 1, len(value)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if lost(middle) <= enough else (middle + 1, high)
        return low

    rank = least(rounding)
    if rank >= count:
        rank = least(NEARLY * rounding)
    if float(value[rank - 1]) <= 0:
        return None
    return Ranked(rank, lost(rank), (left[:, :rank] / value[:rank]).T)


def _consumer_fold(demand: Demand, spot: Tensor, back: Tensor, t: Tensor) -> Fold | None:
    """The consumer through h = R v + t at all the places where the channels stand."""
    n, (count, rank) = len(demand.roots), back.shape
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
    return whole_fold(demand, ChannelEmbedding(n, n, wide, narrow, values, offset))


def whole_fold(demand: Demand, embedding: ChannelEmbedding) -> Fold:
    """A consumer without groups through `embedding`; all of its outputs stay."""
    room = (demand.bias, demand.mean, demand.new_bias) if bool((embedding.t != 0).any()) else (None,) * 3
    outputs, group = demand.port.shape[1], torch.zeros(1, dtype=torch.int64)
    layout = demand.port.op.layout
    return Fold(demand.port.name, layout, embedding, group, torch.arange(outputs).unsqueeze(0), outputs, *room)
