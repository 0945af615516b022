"""Attention: what a head computes, made of the products of its queries and keys.

    score_h(p, p') = sum_d q_hd(p) k_hd(p')          one row a head: an entry for every product of two atoms
    P_h = softmax of scale * score_h + mask          a new atom a head; what does not depend on p' cancels
    out_he(p) = sum_p' P_h(p, p') v_he(p')           every atom of v_he mapped by P_h; constants stay constants

An offset of a key, and a key that is constant, add the same to all the scores of one query: they cancel in
the softmax, so a product with them is not needed. Heads whose rows of products are equal attend alike; if
their values are equal too, up to a scale, their channels are copies to whoever reads them.

Grouped queries: the keys and values of a head may be those of another one, and then have the same slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ep_prune.channels import Channels, Edge, Rows, mix, number
from ep_prune.find import Freedom, Sparse
from ep_prune.graph import Attention, Choice, Matmul, Node, Pass, Product, Softmax, Sum
from ep_prune.numbering.align import HUGE, align
from ep_prune.numbering.elementwise import _factors, _position_shape, identity_edge, transfer
from ep_prune.numbering.state import Known, Numbering, Refused, Unknown, Value
from ep_prune.rules import kind_of
from ep_prune.slots import Blends, Scores


@transfer.register(Matmul)
def _matmul(op: Matmul, node: Node, n: Numbering) -> Value:
    x, y = n.values[op.x], n.values[op.y]
    if isinstance(x, Unknown) and isinstance(y, Unknown):
        return Unknown(
            int(mix(number(f"product of two {op.transposed}"), x.number, y.number)), node.shape or (), node.where
        )
    if not (isinstance(x, Channels) and isinstance(y, Channels)):
        raise Refused("a product with unknown channels")
    if op.transposed:
        if not {len(y.shape) - 2, len(y.shape) - 1} & {*y.axes()}:
            raise Refused("a product with a transposed matrix of positions")
        y = _swapped(y)
    rows, columns = len(x.shape) - 2, len(y.shape) - 2
    along = [axis in side.axes() for side, axis in ((x, rows), (x, rows + 1), (y, columns), (y, columns + 1))]
    if along == [False, True, True, False]:
        return _scores(n, node, x, _swapped(y), _softmax_over_keys(n, node))
    if along[:3] == [False, False, False]:
        return _blend(n, node, x, y)
    raise Refused("a product of two tensors that is neither of channels nor of positions alone")


def _swapped(y: Channels) -> Channels:
    """The last two axes of `y` exchanged (labels and shape alone: the rows are those of `y`)."""
    shape = (*y.shape[:-2], y.shape[-1], y.shape[-2])
    return replace(y, shape=shape, labels=y.labels.transpose(-1, -2))


@transfer.register(Softmax)
def _softmax(op: Softmax, node: Node, n: Numbering) -> Value:
    x = n.values[op.x]
    if isinstance(x, Unknown):
        return Unknown(int(mix(number(f"softmax {op.axis}"), x.number)), x.shape, x.origin)
    if not isinstance(x, Channels):
        raise Refused("over a known tensor")
    if op.axis in x.axes():
        raise Refused("softmax over the channels themselves")
    safe = node.op == "aten._safe_softmax"  # zeros where all is hidden
    over_last = op.axis == len(x.shape) - 1
    return _normalized(n, x, f"softmax over axis {op.axis - len(x.shape)}", sums_to_one=over_last and not safe)


def _sees_something(n: Numbering, mask: Node) -> bool:
    """Whether a mask is known to leave every query a key: where none is left, the fused operator gives zeros.

    For other lengths than the example's, every query must see its own place, in all of a table that is cut. What
    is computed of a table (`table[:n, :n] == 1`) may do otherwise there, and is not known.
    """
    value = n.values[mask]
    if not isinstance(value, Known) or value.name is None:
        return False
    for table in (value.value, n.graph.tensors[value.name]):
        seen = table > (0 if mask.dtype == torch.bool else -torch.inf)
        if not bool(seen.any(-1).all()):
            return False
        if seen.ndim > 1 and seen.shape[-2] > 1 and not bool(seen.diagonal(dim1=-2, dim2=-1).all()):
            return False
    return True


def _normalized(n: Numbering, x: Channels, signature: str, sums_to_one: bool = True) -> Channels:
    """One atom for every class of equal rows; offsets cancel."""
    rows = replace(x.rows, offset=torch.zeros_like(x.rows.offset))
    found, _, spread = n.intern(f"{signature} at {_position_shape(x)}", Sparse(rows, False), Freedom.NONE)
    made = replace(Rows.of_atoms(found), error=spread)
    out = n.record(replace(x, rows=made, edges=identity_edge(x), mean=torch.empty(0), deviation=torch.empty(0)))
    if sums_to_one:
        n.sums_to_one.add(id(out))
    return out


@transfer.register(Attention)
def _attention(op: Attention, node: Node, n: Numbering) -> Value:
    query, key, value = (n.values[part] for part in (op.query, op.key, op.value))
    if all(isinstance(part, Unknown) for part in (query, key, value)) and op.mask is None:
        codes = [part.number for part in (query, key, value) if isinstance(part, Unknown)]
        code = number(f"attention {op.scale} {op.causal}")
        return Unknown(int(mix(code, *codes)), node.shape or (), node.where)
    if not all(isinstance(part, Channels) for part in (query, key, value)):
        raise Refused("attention to unknown channels")
    assert isinstance(query, Channels) and isinstance(key, Channels) and isinstance(value, Channels)
    if op.grouped:
        key, value = (_repeated(part, query.shape[-3]) for part in (key, value))
    for part in (query, key, value):
        if len(part.shape) - 2 in part.axes():
            raise Refused("attention whose channels lie along the positions")
    seen = replace(node, shape=(*query.shape[:-1], key.shape[-2]))
    if query.labels.shape[-1] == 1 or key.labels.shape[-1] == 1:
        raise Refused("attention by a single channel")
    scores = _scores(n, seen, query, key, cancels=True)
    scaled = n.record(
        replace(
            scores,
            rows=scores.rows.scaled(torch.full((len(scores.rows),), op.scale, dtype=torch.float64)),
            edges=identity_edge(scores),
        )
    )
    masked = scaled if op.mask is None else _masked(n, seen, scaled, op.mask)
    hidden = op.mask is not None and not _sees_something(n, op.mask)
    weights = _normalized(n, masked, f"attention, causal {op.causal}", sums_to_one=not hidden)
    return _blend(n, node, weights, value)


def _repeated(x: Channels, heads: int) -> Channels:
    """Keys or values that several query heads share, once for each (labels alone)."""
    if x.labels.shape[-3] == 1:
        return replace(x, shape=(*x.shape[:-3], heads, *x.shape[-2:]))
    labels = x.labels.repeat_interleave(heads // x.shape[-3], -3)
    return replace(x, shape=(*x.shape[:-3], heads, *x.shape[-2:]), labels=labels)


def _masked(n: Numbering, node: Node, scores: Channels, mask: Node) -> Channels:
    x, y, labels, slots, edges = align(n, [scores, n.values[mask]], node)
    added = y.rows.mapped(number("true where seen"), keeps_constants=False) if mask.dtype == torch.bool else y.rows
    return n.record(Channels(node.shape or (), labels, x.rows.plus(added), slots, edges))


def _heads(x: Channels, y: Channels) -> tuple[Tensor, Tensor, list[int]]:
    """Labels of two operands by head, (H, size) each, where the other may have one for all; and the axes that the
    heads lie on."""
    rank = max(x.labels.ndim, y.labels.ndim)
    sides = [side.labels.reshape((1,) * (rank - side.labels.ndim) + side.labels.shape) for side in (x, y)]
    lead = torch.broadcast_shapes(*(side.shape[:-2] for side in sides))  # type: ignore[no-untyped-call]
    a, b = (side.expand(*lead, *side.shape[-2:]).flatten(0, -3).squeeze(1) for side in sides)
    return a, b, list(lead)


def _scores(n: Numbering, node: Node, query: Channels, key: Channels, cancels: bool) -> Channels:
    """(..., H, 1, 1): the rows of the heads' scores. Labels of both operands end in (1, d).

    cancels: what is the same for all keys does not count, since a softmax over them follows.
    """
    if min(len(query.shape), len(key.shape)) < 3:
        raise Refused("scores of a single sample, without a batch")
    q, k, lead = _heads(query, key)
    if q.ndim != 2 or q.shape != k.shape:
        raise Refused("queries and keys whose channels do not match")
    heads, size = q.shape
    q_atom, q_scale = _factors(n, query.rows)
    rows = replace(key.rows, offset=torch.zeros_like(key.rows.offset)) if cancels else key.rows
    k_atom, k_scale = _factors(n, rows)  # without its offset a constant key is 0
    coef = q_scale[q] * k_scale[k]
    signature = f"inner product at {_position_shape(query)} and {_position_shape(key)}"
    atoms = mix(number(signature), q_atom[q], k_atom[k])
    length = (query.rows.norm().clamp_min(1e-300), rows.norm().clamp_min(1e-300))
    off = query.rows.error[q] / length[0][q] + key.rows.error[k] / length[1][k]
    error = (coef * off).square().sum(1).sqrt()
    zero = torch.zeros(heads, dtype=torch.float64)
    made = Rows(torch.where(coef == 0, 0, atoms), coef, zero, error).sorted().merged()
    needed = coef != 0
    head = torch.arange(heads).unsqueeze(1).expand(heads, size)[needed]
    slots = n.slots.fresh(heads)
    n.slots.constraints.append(Scores(slots, query.slots[q], key.slots[k], needed, cancels, node.layer, node.name))
    labels = torch.arange(heads).reshape([*lead, 1, 1])
    edges = (Edge(_taped(n, query), head, q[needed]), Edge(_taped(n, key), head, k[needed]))
    return n.record(Channels(node.shape or (), labels, made, slots, edges))


def _softmax_over_keys(n: Numbering, node: Node) -> bool:
    """Whether all that reads a product of queries and keys is a softmax over the last axis, behind factors, sums
    with what is known or a mask, and choices that hide with infinity."""
    users, waiting = n.graph.users(), [node]
    while waiting:
        at = waiting.pop()
        if at in n.graph.outputs or not users[at]:
            return False
        for reader in users[at]:
            kind = kind_of(reader, n.graph)
            if isinstance(kind, Softmax) and kind.axis == len(reader.shape or ()) - 1:
                continue
            scaled = isinstance(kind, Product) and isinstance(kind.y, float | int)
            if scaled or isinstance(kind, Sum | Pass) or (isinstance(kind, Choice) and _hides(n, kind, at)):
                waiting.append(reader)
            else:
                return False
    return True


def _hides(n: Numbering, op: Choice, scores: Node) -> bool:
    """Whether a choice takes the scores or a number that is as good as minus infinity."""
    other = op.y if op.x is scores else op.x
    value = n.values.get(other) if isinstance(other, Node) else Known(torch.tensor(float(other)))
    return op.condition is not scores and isinstance(value, Known) and bool((value.value.double() < -HUGE).all())


def _taped(n: Numbering, x: Channels) -> Channels:
    """`x` as liveness finds it: labels and shape may have been changed on the way here, its rows have not."""
    return x if n.is_recorded(x) else next(t for t in reversed(n.tape) if t.rows is x.rows and t.slots is x.slots)


def _blend(n: Numbering, node: Node, weights: Channels, value: Channels) -> Channels:
    """The mean of `value` over positions by `weights`, head by head."""
    if min(len(weights.shape), len(value.shape)) < 3:
        raise Refused("means of a single sample, without a batch")
    w, v, lead = _heads(weights, value)
    w = w.reshape(len(w), -1)
    heads, size = v.reshape(len(v), -1).shape
    v = v.reshape(heads, size)
    if w.shape != (heads, 1):
        raise Refused("weights whose channels do not match those of the values")
    atom, scale = _factors(n, weights.rows)
    head, own = w.expand(heads, size).reshape(-1), v.reshape(-1)
    keeps = id(weights) in n.sums_to_one
    shapes = f"{_position_shape(weights)} and {_position_shape(value)}"
    signature = mix(number(f"mean by, at {shapes}"), atom[head])
    rows = value.rows[own].mapped(signature, keeps_constants=keeps)
    if not keeps:
        rows = rows.scaled(scale[head])
    # w and v are labels: row r of the result is head r // size.
    slots = n.slots.fresh(heads * size)
    n.slots.constraints.append(
        Blends(weights.slots[w[:, 0]], value.slots[v], slots.reshape(heads, size), keeps, node.name)
    )
    out = torch.arange(heads * size)
    labels = out.reshape([*lead, 1, size])
    edges = (Edge(_taped(n, value), out, own), Edge(_taped(n, weights), out, head))
    return n.record(Channels(node.shape or (), labels, rows, slots, edges))
