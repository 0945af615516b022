"""Inside attention's heads nothing bends between two weights: queries with keys, and values with outputs.

    score_h = x' (W_q' W_k) x'              out = sum_h W_o,h P_h W_v,h x

Of a head, only the products W_q' W_k (with the bias of the queries; that of the keys cancels) and W_o W_v count.
With their thin singular value decompositions, P S Q' of rank r < d,

    W_q <- S^-1/2 Q' R_k W_q     W_k <- S^-1/2 P' R_q W_k        R_q, R_k: triangular factors of W_q', W_k'

and likewise for values and outputs. The first r channels of every head then do, and the next selection takes the
others: their queries and keys are zero, and nobody reads their values. Heads that share keys count together, and r
is that of the head that needs most, since all keep equally many. Exact at rounding: what is dropped is below
MARGIN roundings of the two factors. Queries that are turned by their position (rotary) have no such product.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.demand import Demand, demands
from ep_prune.embedding import ChannelEmbedding, Fold, Mix, Round
from ep_prune.find import MARGIN
from ep_prune.graph import Attention, Contract, Graph, Item, Matmul, Move, Node, Pass, Product, Split
from ep_prune.numbering import Numbering, number_channels
from ep_prune.rules import kind_of
from ep_prune.slots import Blends, Scores

Axis = tuple[str, int]


@dataclass(frozen=True, eq=False)
class HeadMixture:
    """The edits of one attention, and by axis the channels that they leave unread."""

    layer: str
    step: Round
    left: Mapping[Axis, Tensor]


@dataclass(frozen=True, eq=False)
class _Writer:
    """A weight whose outputs go to attention alone; place (slots,): root -> its row, or -1."""

    demand: Demand
    axis: int
    place: Tensor


def head_mixtures(graph: Graph, frozen: Collection[Axis]) -> list[HeadMixture]:
    """Every attention whose heads can be folded to a lower rank."""
    if not any(isinstance(kind_of(node, graph), Attention | Matmul) for node in graph.nodes if node.target):
        return []
    n = number_channels(graph)
    scores = [c for c in n.slots.constraints if isinstance(c, Scores)]
    roots = n.slots.roots()
    pinned = n.slots.pinned(roots, kept=frozen)
    needs = demands(n, roots)
    blends = [c for c in n.slots.constraints if isinstance(c, Blends)]
    users = graph.users()
    found = []
    for one in scores:
        mine = [b for b in blends if torch.equal(roots[b.score], roots[one.score])]
        if len(mine) != 1:
            continue
        ends = {one.node, mine[0].node}
        writers = _writers(n, needs, roots, users, ends)
        rows = [_rows(part, writers, roots, pinned) for part in (one.query, one.key, mine[0].value)]
        mixes: list[Mix] = []
        left: dict[Axis, Tensor] = {}
        if rows[0] is not None and rows[1] is not None:
            _fold_scores(n, rows[0], rows[1], one.cancels, mixes, left)
        fold = None
        reader = _reader(n, needs, roots, users, mine[0])
        if rows[2] is not None and reader is not None:
            fold = _fold_values(n, rows[2], reader, roots[mine[0].out], mine[0].keeps_constants, mixes, left)
        if mixes:
            found.append(HeadMixture(one.layer, Round(() if fold is None else (fold,), (), tuple(mixes)), left))
    return found


def _writers(
    n: Numbering,
    needs: Mapping[str, Demand],
    roots: Tensor,
    users: Mapping[Node, list[Node]],
    ends: Collection[str],
) -> list[_Writer]:
    found = []
    for demand in needs.values():
        port = demand.port
        if port.groups > 1 or len(demand.ports) > 1 or not demand.foldable:
            continue
        if not _ends_in(port.node, n.graph, users, ends):
            continue
        place = torch.full((n.slots.count,), -1)
        place[roots[port.out.slots]] = torch.arange(len(port.out.slots))
        found.append(_Writer(demand, int(port.op.layout.inputs_first), place))
    return found


def _ends_in(start: Node, graph: Graph, users: Mapping[Node, list[Node]], ends: Collection[str]) -> bool:
    """Whether all that is made of a node are the named products, and on the way to them nothing but moves and
    factors."""
    waiting, reached = [start], False
    while waiting:
        at = waiting.pop()
        if at in graph.outputs:
            return False
        for reader in users[at]:
            kind = kind_of(reader, graph)
            if isinstance(kind, Attention | Matmul) and reader.name in ends:
                reached = True
            elif isinstance(kind, Move | Pass | Split | Item) or (
                isinstance(kind, Product) and isinstance(kind.y, float | int)
            ):
                waiting.append(reader)
            else:
                return False
    return reached


def _rows(part: Tensor, writers: list[_Writer], roots: Tensor, pinned: Tensor) -> tuple[_Writer, Tensor] | None:
    """The weight that writes channels (H, d), and at which of its rows."""
    own = roots[part]
    for writer in writers:
        rows = writer.place[own]
        if bool((rows >= 0).all()):
            return None if bool(pinned[own].any()) else (writer, rows)
    return None


def _weight_of(n: Numbering, writer: _Writer) -> tuple[Tensor, Tensor]:
    """(rows, inputs) and (rows,): a weight and its bias."""
    op = writer.demand.port.op
    weight = op.layout.canonical(n.tensor(op.weight))[0].flatten(1)
    bias = torch.zeros(len(weight), dtype=torch.float64) if op.bias is None else n.tensor(op.bias)
    return weight, bias


def _shares(rows: Tensor) -> list[Tensor]:
    """The heads of every set that shares its rows (H, d)."""
    _, share = torch.unique(rows[:, 0], return_inverse=True)
    return [(share == k).nonzero().squeeze(1) for k in range(int(share.max()) + 1)]


def _thin(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, int]:
    """L_a, L_b (d, d) and r with (L_a a)' (L_b b) = a' b up to rounding, only their first r rows not zero.
    a (d, p), b (d, q)."""
    r_a, r_b = (torch.linalg.qr(side.T, mode="r").R for side in (a, b))
    left, value, right = torch.linalg.svd(r_a @ r_b.T)
    lost = value.square().flip(0).cumsum(0).sqrt().flip(0)
    rank = int((lost > MARGIN * eps * a.norm() * b.norm()).sum())
    root = value[:rank].sqrt().unsqueeze(1)
    size = len(a)
    l_a, l_b = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    l_a[:rank], l_b[:rank] = (right[:rank] @ r_b) / root, (left[:, :rank].T @ r_a) / root
    return l_a, l_b, rank


def _mix(writer: _Writer, bias: Tensor, rows: Tensor, mixing: Tensor) -> Mix:
    op = writer.demand.port.op
    named = None if op.bias is None else str(op.bias.tensor)
    return Mix(str(op.weight.tensor), op.layout, rows, mixing, mixing @ bias[rows], named)


def _fold_scores(
    n: Numbering,
    query: tuple[_Writer, Tensor],
    key: tuple[_Writer, Tensor],
    cancels: bool,
    mixes: list[Mix],
    left: dict[Axis, Tensor],
) -> None:
    (q_writer, q), (k_writer, k) = query, key
    (w_q, b_q), (w_k, b_k) = _weight_of(n, q_writer), _weight_of(n, k_writer)
    full_q = torch.cat([w_q, b_q.unsqueeze(1)], 1)
    full_k = w_k if cancels else torch.cat([w_k, b_k.unsqueeze(1)], 1)
    eps = max(n.eps(writer.demand.port.op.weight) for writer in (q_writer, k_writer))
    found = []
    for heads in _shares(k):
        a = torch.cat([full_q[rows] for rows in q[heads]], 1)
        found.append((heads, *_thin(a, full_k[k[heads[0]]], eps)))
    most = max(rank for *_, rank in found)
    if most >= q.shape[1]:
        return
    for heads, l_q, l_k, _ in found:
        mixes += [_mix(q_writer, b_q, q[head], l_q) for head in heads.tolist()]
        mixes.append(_mix(k_writer, b_k, k[heads[0]], l_k))
    for writer, rows in (query, key):
        axis = str(writer.demand.port.op.weight.tensor), writer.axis
        left[axis] = torch.cat([left.get(axis, torch.empty(0, dtype=torch.int64)), rows[:, most:].reshape(-1)])


def _reader(
    n: Numbering, needs: Mapping[str, Demand], roots: Tensor, users: Mapping[Node, list[Node]], blend: Blends
) -> Demand | None:
    """The one weight that reads the heads' outputs, with nothing but moves between."""
    at = next(node for node in n.graph.nodes if node.name == blend.node)
    while True:
        if at in n.graph.outputs or len(users[at]) != 1:
            return None
        at = users[at][0]
        kind = kind_of(at, n.graph)
        if isinstance(kind, Contract):
            break
        if not isinstance(kind, Move | Pass):
            return None
    demand = needs.get(str(kind.weight.tensor))
    if demand is None or len(demand.ports) > 1 or not demand.foldable or demand.port.groups > 1:
        return None
    out = roots[blend.out].reshape(-1)
    plain = len(demand.roots) == len(out) and demand.port.shape[2] == 1
    return demand if plain and bool(torch.isin(out, demand.roots).all()) else None


def _fold_values(
    n: Numbering,
    value: tuple[_Writer, Tensor],
    reader: Demand,
    out: Tensor,
    keeps: bool,
    mixes: list[Mix],
    left: dict[Axis, Tensor],
) -> Fold | None:
    writer, v = value
    w_v, b_v = _weight_of(n, writer)
    width = len(reader.roots)
    spot = torch.empty(n.slots.count, dtype=torch.int64)
    spot[reader.roots] = torch.arange(width)
    at = spot[out]
    columns = reader.port.weight[:, :, 0]
    eps = max(n.eps(writer.demand.port.op.weight), n.eps(reader.port.op.weight))
    loose = reader.takes_constants and keeps
    full = w_v if loose else torch.cat([w_v, b_v.unsqueeze(1)], 1)
    found = []
    for heads in _shares(v):
        a = torch.cat([columns[at[head]] for head in heads.tolist()], 1)
        found.append((heads, *_thin(a, full[v[heads[0]]], eps)))
    most = max(rank for *_, rank in found)
    if most >= v.shape[1]:
        return None
    back = torch.zeros(width, width, dtype=torch.float64)
    offset = torch.zeros(width, dtype=torch.float64)
    for heads, l_o, l_v, _ in found:
        rows = v[heads[0]]
        mixes.append(_mix(writer, b_v, rows, l_v))
        for head in heads.tolist():  # o h = o (l_o' l_v) h: the heads' outputs through the new values
            back[at[head].unsqueeze(1), at[head]] = l_o.T
            offset[at[head]] = b_v[rows] - l_o.T @ (l_v @ b_v[rows])
    if not loose:
        offset.zero_()
    elif bool((offset != 0).any()) and not reader.can_fold(offset):
        return None
    axis = str(writer.demand.port.op.weight.tensor), writer.axis
    left[axis] = torch.cat([left.get(axis, torch.empty(0, dtype=torch.int64)), v[:, most:].reshape(-1)])
    wide, narrow = back.nonzero(as_tuple=True)
    room = (reader.bias, reader.mean, reader.new_bias) if bool((offset != 0).any()) else (None,) * 3
    count = columns.shape[1]
    return Fold(
        reader.port.name,
        reader.port.op.layout,
        ChannelEmbedding(width, width, wide, narrow, back[wide, narrow], offset),
        torch.zeros(1, dtype=torch.int64),
        torch.arange(count).unsqueeze(0),
        count,
        *room,
    )
