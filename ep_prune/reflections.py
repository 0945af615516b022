"""Pairs of units s(z), s(-z) of an activation that is even plus linear, s(-z) = s(z) + p z: ReLU, GELU, SiLU, ...

The second of a pair is the first and a linear part. With all second units i of a layer, y_i = -c_i z_mate what
they read, W their outgoing weights, c a positive factor (1 unless the activation is homogeneous):

    sum W_i s(y_i) = sum W_i c_i s(z_mate) - p sum W_i y_i          the residue R = W Y, of rank r

so that m pairs become m units and 2 r more, which carry the residue: q = L Y, q = (s(-q) - s(q)) / p. Where R is
zero nothing more is needed; with one output, 2 m units become m + 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ep_prune.demand import Demand
from ep_prune.embedding import ChannelEmbedding, Fold, Mix, Round
from ep_prune.find import MARGIN, Dense, Freedom, congruence
from ep_prune.graph import Pointwise
from ep_prune.linear_cases import Case, Mixture, case_of, least_rank, read_by, room_of, spots_of, whole_fold
from ep_prune.linear_places import Place
from ep_prune.numbering import Numbering
from ep_prune.rules import kind_of

FAR = 60.0
"""How far out an activation must be even plus linear: torch's softplus, which turns linear at 20, is not."""


def reflected(place: Place, n: Numbering, roots: Tensor, pinned: Tensor) -> Mixture | None:
    """The pairs of a layer through one unit each and the rank of their residue, where that takes fewer units."""
    act = None if place.act is None else kind_of(place.act, n.graph)
    if not isinstance(act, Pointwise) or not _is_even_plus_linear(act):
        return None
    name, layout = str(place.op.weight.tensor), place.op.layout
    axis = int(layout.inputs_first)
    own = roots[n.slots.bound[name, axis]]
    room = room_of(place, n)
    if len(torch.unique(own)) < len(own) or (room is None and place.op.bias is not None):
        return None
    rows = _rows_of(place, n)
    some = (rows.error > 0).nonzero().squeeze(1)
    freedom = Freedom.SCALE if act.symmetry.degree == 1 else Freedom.SIGN
    found = congruence(rows.taken(some), freedom)
    second = (found.scale < 0) & ~pinned[own[some]]
    seconds, mates, ratio = some[second], some[found.leader[second]], -found.scale[second]
    if not len(seconds):
        return None
    pairs = torch.cat([seconds, torch.unique(mates)])
    spots = [spots_of(demand, own, pairs) for demand in place.consumers]
    if any(spot is None for spot in spots):
        return None
    where = [torch.full((len(own), spot.shape[1]), -1) for spot in spots if spot is not None]
    for at, spot in zip(where, spots, strict=True):
        assert spot is not None
        at[pairs] = spot
    case = case_of(place, n, {}, seconds, [places[seconds] for places in where])
    return _with_rank(case, n, where, mates, ratio, room)


def _rows_of(place: Place, n: Numbering) -> Dense:
    """The layer's weights and biases, a row for each unit, cast when they are looked at: it may be large."""
    stored = n.graph.tensors[str(place.op.weight.tensor)].detach()
    weight = place.op.layout.canonical(stored)[0].flatten(1)
    bias = torch.zeros(len(weight), dtype=torch.float64) if place.op.bias is None else n.tensor(place.op.bias)

    def rows(index: Tensor) -> Tensor:
        return torch.cat([weight[index.to(weight.device)].to("cpu", torch.float64), bias[index].unsqueeze(1)], 1)

    keys = torch.arange(weight.shape[1] + 1)
    plain = Dense(rows, keys, torch.zeros(len(weight), dtype=torch.float64))
    norm = plain.norm()
    return Dense(rows, keys, n.eps(place.op.weight) * norm, (norm, plain.project()))


def _with_rank(
    case: Case,
    n: Numbering,
    where: list[Tensor],
    mates: Tensor,
    ratio: Tensor,
    room: tuple[str | None, str | None] | None,
) -> Mixture | None:
    place, rows = case.place, case.rows
    read, size = read_by(case, {})
    inner = torch.cat([case.wide, case.bias.unsqueeze(1)], 1)
    product = read @ inner / size.unsqueeze(1)
    rounding = MARGIN * max(n.eps(demand.port.op.weight) for demand in place.consumers)
    rank = 0
    mixing = back = torch.zeros(0, len(rows), dtype=torch.float64)
    if len(product) and float(product.abs().sum(1).max()) > rounding:
        ranked = least_rank(product, len(rows), rounding)
        if ranked is None or ranked.lost > rounding:
            return None
        rank, mixing = ranked.rank, ranked.left @ (read / size.unsqueeze(1))
    if 2 * rank >= len(rows):
        return None
    new = (mixing @ inner).to(case.stored).double()
    back = inner @ torch.linalg.pinv(new) if rank else back.T
    if not bool(back.isfinite().all()):
        return None
    folds = tuple(
        _fold(demand, places, rows, mates, ratio, back)
        for demand, places in zip(place.consumers, where, strict=True)
    )
    both = torch.cat([mixing, -mixing])
    mixes: tuple[Mix, ...] = ()
    name, layout = str(place.op.weight.tensor), place.op.layout
    if rank:
        mixes = (Mix(name, layout, rows, both, both @ case.bias, *(room or (None, None))),)
        if room is None and bool(case.bias.any()):
            return None
    return Mixture(Round(folds, (), mixes), name, int(layout.inputs_first), rows[2 * rank :])


def _fold(demand: Demand, places: Tensor, rows: Tensor, mates: Tensor, ratio: Tensor, back: Tensor) -> Fold:
    """A consumer that reads every second unit as its mate and what the new units say of the residue."""
    count, (m, rank) = len(demand.roots), back.shape
    others = torch.ones(count, dtype=torch.bool)
    others[places[rows].reshape(-1)] = False
    rest = others.nonzero().squeeze(1)
    shape = (m, rank, places.shape[1])
    wide = [rest, places[rows].reshape(-1)]
    narrow = [rest, places[mates].reshape(-1)]
    values = [torch.ones(len(rest), dtype=torch.float64), ratio.repeat_interleave(places.shape[1])]
    for first, sign in ((0, 1.0), (rank, -1.0)):
        wide.append(places[rows].unsqueeze(1).expand(shape).reshape(-1))
        narrow.append(places[rows[first : first + rank]].unsqueeze(0).expand(shape).reshape(-1))
        values.append(sign * back.unsqueeze(2).expand(shape).reshape(-1))
    zero = torch.zeros(count, dtype=torch.float64)
    parts = torch.cat(wide), torch.cat(narrow), torch.cat(values)
    return whole_fold(demand, ChannelEmbedding(count, count, *parts, zero))


def _is_even_plus_linear(act: Pointwise) -> bool:
    """Whether s(-z) - s(z) = p z, p not 0, as far as float64 can tell."""
    z = torch.linspace(0, FAR, 4001, dtype=torch.float64)[1:]
    odd = act.function(-z) - act.function(z)
    slope = odd[-1] / z[-1]
    return bool(slope != 0) and bool(((odd - slope * z).abs() <= 1e-13 * (1 + z)).all())
