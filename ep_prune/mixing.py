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

Behind batch norm r of the channels themselves are chosen, where they span the others (`_choice`).

Left out, and left alone: producers or consumers in groups, channels that several
weights write, weights with another use, max pools; zero padding in front of a consumer where a constant t would
meet it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ep_prune.bounds.interval import Bounds, Found, contracted
from ep_prune.demand import demands
from ep_prune.embedding import Mix, Round
from ep_prune.find import MARGIN
from ep_prune.graph import Contract, Graph, Node, Pointwise
from ep_prune.linear_cases import (
    Case,
    Mixture,
    Ranked,
    case_of,
    consumer_folds,
    largest_along,
    least_rank,
    read_by,
    room_of,
    spots_of,
)
from ep_prune.linear_places import Place, dependent, place_of
from ep_prune.numbering import Numbering, number_channels
from ep_prune.numbering.straight import straight_parts
from ep_prune.reflections import reflected
from ep_prune.rules import kind_of

ROOM = 2.0**-10
"""How far above zero the new units are kept, relative to how far they range."""

NEAR = "near a linear mixture of others, but not to rounding"
SEEN = "linear in others as far as it is read, but no other channels could take its bias or its moments"
THROUGH = "linear in others, but no fold goes through "

Near = dict[tuple[str, int], tuple[int, str]]
"""(weight, axis) -> how many channels a lower rank would do without, and why they stay."""


def mixtures(
    graph: Graph, ranges: Mapping[Node, tuple[Tensor, Tensor]], frozen: Mapping[tuple[str, int], str]
) -> tuple[Mixture | None, Near]:
    """The last place of the graph where channels can be folded to a lower rank, or None; and what nearly can.

    ranges: bounds of the nodes on the declared domain (empty: none is declared). frozen: axes that stay.
    """
    n = number_channels(graph, ranges=ranges)
    roots = n.slots.roots()
    pinned = n.slots.pinned(roots, kept=frozen)
    needs = demands(n, roots)
    near: Near = {}
    for node in reversed(graph.nodes):
        place = place_of(node, n, needs)
        if place is not None:
            found = _fold(place, n, ranges, roots, pinned, near) or reflected(place, n, roots, pinned)
            if found is not None:
                return found, near
        elif (left := dependent(node, graph)) is not None:
            op = kind_of(node, graph)
            assert isinstance(op, Contract)
            near[str(op.weight.tensor), int(op.layout.inputs_first)] = left[0], THROUGH + left[1]
    return None, near


def _fold(
    place: Place,
    n: Numbering,
    ranges: Mapping[Node, tuple[Tensor, Tensor]],
    roots: Tensor,
    pinned: Tensor,
    near: Near,
) -> Mixture | None:
    name, axis = str(place.op.weight.tensor), int(place.op.layout.inputs_first)
    own = roots[n.slots.bound[(name, axis)]]
    free = ~pinned[own]
    if place.act is not None:
        act = kind_of(place.act, n.graph)
        x = n.values[place.node]
        assert isinstance(act, Pointwise)
        parts = straight_parts(act, place.act, n, x) if hasattr(x, "labels") else None  # type: ignore[arg-type]
        if parts is None or place.op.x not in ranges or place.act.op != "aten.relu":
            return None
        free &= parts[0] == 1
    rows = free.nonzero().squeeze(1)
    if len(rows) < 2 or len(torch.unique(own)) < len(own):
        return None
    room = room_of(place, n)
    by_choice = place.norm is not None or (room is None and place.op.bias is not None)
    spots = [spots_of(demand, own, rows) for demand in place.consumers]
    if (room is None and place.act is not None) or any(spot is None for spot in spots):
        return None
    case = case_of(place, n, ranges, rows, [spot for spot in spots if spot is not None])
    read, size = read_by(case, ranges)
    rounding = MARGIN * max(n.eps(d.port.op.weight) for d in place.consumers)
    for augmented in (False, True):  # with the bias as one more input no constant is left to meet the padding
        inner = (
            torch.cat([case.wide * case.reach, case.bias.unsqueeze(1)], 1) if augmented else case.wide * case.reach
        )
        product = read @ inner / size.unsqueeze(1)
        ranked = _choice(inner, read, size) if by_choice else least_rank(product, len(rows), rounding)
        if ranked is None or ranked.rank >= len(rows):
            if (
                by_choice
                and (seen := least_rank(product, len(rows), rounding)) is not None
                and seen.rank < len(rows)
            ):
                near[name, axis] = len(rows) - seen.rank, SEEN
            return None
        if ranked.lost > rounding:
            near[name, axis] = len(rows) - ranked.rank, NEAR
            return None
        if by_choice:
            found = _chosen(case, inner, ranked, augmented)
        else:
            mixing = ranked.left @ (read / size.unsqueeze(1))
            found = _mixed(case, n, ranges, inner, mixing, augmented, room)
        if found is not None:
            return found
        if place.act is not None or not bool(case.bias.any()):
            return None
    return None


def _mixed(
    case: Case,
    n: Numbering,
    ranges: Mapping[Node, tuple[Tensor, Tensor]],
    inner: Tensor,
    mixing: Tensor,
    augmented: bool,
    room: tuple[str | None, str | None] | None,
) -> Mixture | None:
    """The channels through `mixing` (r, s) of themselves."""
    place, rows, rank = case.place, case.rows, len(mixing)
    biased = place.op.bias is not None
    if room is None and biased:
        return None
    new = (mixing @ case.wide).to(case.stored).double()
    offset = torch.zeros(rank, dtype=torch.float64)
    if place.act is not None:
        offset = _shift(place, n, ranges, case.weight, rows[:rank], new).to(case.stored).double()
    elif augmented:
        offset = (mixing @ case.bias).to(case.stored).double()
    made = torch.cat([new * case.reach, offset.unsqueeze(1)], 1) if augmented else new * case.reach
    back = inner @ torch.linalg.pinv(made)
    if not bool(back.isfinite().all()):
        return None
    if place.act is None and not augmented and biased:
        offset = _balanced(case, back).to(case.stored).double()
    t = torch.zeros(len(rows), dtype=torch.float64) if augmented else case.bias - back @ offset
    folds = consumer_folds(case, back, t)
    if folds is None:
        return None
    target = room if room is not None and (biased or place.act is not None) else (None, None)
    name, layout = str(place.op.weight.tensor), place.op.layout
    mix = Mix(name, layout, rows, mixing, offset, *target)
    return Mixture(Round(folds, (), (mix,)), name, int(layout.inputs_first), rows[rank:])


def _chosen(case: Case, inner: Tensor, ranked: Ranked, augmented: bool) -> Mixture | None:
    """The channels through r of themselves, which stay what they are: batch norm knows the moments of these."""
    order, back = ranked.order, ranked.left
    case = replace(
        case,
        rows=case.rows[order],
        wide=case.wide[order],
        bias=case.bias[order],
        spots=[spot[order] for spot in case.spots],
    )
    t = case.bias - back @ case.bias[: ranked.rank]
    t = torch.zeros_like(t) if augmented else torch.where(torch.arange(len(t)) < ranked.rank, 0.0, t)
    folds = consumer_folds(case, back, t)
    name, layout = str(case.place.op.weight.tensor), case.place.op.layout
    if folds is None:
        return None
    return Mixture(Round(folds, ()), name, int(layout.inputs_first), case.rows[ranked.rank :])


def _balanced(case: Case, back: Tensor) -> Tensor:
    """(r,) biases of the mixtures with which t = bias - back c cancels wherever no bias of a consumer can take it:
    least squares, exact or of no use."""
    columns, targets = [], []
    for demand, spot in zip(case.place.consumers, case.spots, strict=True):
        edge = ~torch.tensor(demand.port.op.layout.interior) | (not demand.takes_constants)
        sent = demand.port.weight[spot][..., edge].sum(1).flatten(1)  # (s, outputs * taps)
        columns.append((back.T @ sent).T)
        targets.append(case.bias @ sent)
    matrix, target = torch.cat(columns), torch.cat(targets).unsqueeze(1)
    if not len(matrix):
        return torch.zeros(back.shape[1], dtype=torch.float64)
    found: Tensor = torch.linalg.lstsq(matrix, target, driver="gelsd").solution.squeeze(1)
    return found


def _choice(inner: Tensor, read: Tensor, size: Tensor) -> Ranked | None:
    """r rows of `inner` (s, inputs) that span all of them, chosen by the pivots of its left singular vectors."""
    left, value, _ = torch.linalg.svd(inner, full_matrices=False)
    rank = int((value > 1e-10 * value[0]).sum())
    if not 0 < rank < len(inner) or not len(read):
        return None
    swaps = torch.linalg.lu_factor(left[:, :rank])[1] - 1
    order = torch.arange(len(inner))
    for place, other in enumerate(swaps.tolist()):  # LAPACK's row exchanges, one after the other
        order[[place, other]] = order[[other, place]]
    back = torch.linalg.solve(left[order[:rank]].T[:rank], left[order][:, :rank].T).T
    back[:rank] = torch.eye(rank, dtype=torch.float64)
    lost = read[:, order] @ (inner[order] - back @ inner[order[:rank]]) / size.unsqueeze(1)
    return Ranked(rank, float(lost.abs().sum(1).max()), back, order)


def _shift(
    place: Place,
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
    low, high = -largest_along(-found.low, axis)[rows], largest_along(found.high, axis)[rows]
    margin = ROOM * (high - low + torch.maximum(low.abs(), high.abs())) + 1e-30
    return margin - low
