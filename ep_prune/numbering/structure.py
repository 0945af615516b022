"""Data movement: labels, and with them rows and slots, are moved as the data is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ep_prune.channels import Channels, Edge, Rows, along, mix, number
from ep_prune.evaluate import call
from ep_prune.graph import Cat, Create, Move, Node, Pad, Split
from ep_prune.numbering.align import known_on, materialize, on_axis, regroup
from ep_prune.numbering.elementwise import identity_edge, transfer
from ep_prune.numbering.state import Known, Numbering, Refused, Unknown, Value
from ep_prune.slots import EqualCounts


@transfer.register(Move)
def _move(op: Move, node: Node, n: Numbering) -> Value:
    (source,) = op.inputs
    x = n.values[source]
    if isinstance(x, Unknown):
        return Unknown(int(mix(number(f"{node.op} {node.args[1:]}"), x.number)), node.shape or (), x.origin)
    if isinstance(x, Known):
        index = torch.arange(x.stored.numel()).reshape(x.stored.shape) if x.index is None else x.index
        return Known(op.act(x.stored), x.name, op.act(index.reshape(x.stored.shape)))
    if not isinstance(x, Channels):
        raise Refused("several tensors at once")
    labels, places = materialize(x)
    return regroup(n, x, op.act(labels.contiguous()), op.act(places.contiguous()), op.regroup)


@transfer.register(Create)
def _create(op: Create, node: Node, n: Numbering) -> Value:
    made = call(node, {}, torch.device("cpu"))
    if int(made.numel()) > 2**24:
        raise Refused("a large tensor of constants")
    return Known(made)


@transfer.register(Split)
def _split(op: Split, node: Node, n: Numbering) -> Value:
    x = n.values[op.x]
    starts = torch.tensor((0, *op.sections)).cumsum(0).tolist()
    wanted = range(len(op.sections)) if op.take is None else [op.take]

    def cut(tensor: Tensor, k: int) -> Tensor:
        part = tensor.narrow(op.axis, starts[k], op.sections[k])
        return part.squeeze(op.axis) if op.squeeze else part

    if isinstance(x, Channels) and x.axes() == (op.axis,):
        x = on_axis(n, op.x, op.axis)
        parts = [torch.arange(start, start + size) for start, size in zip(starts, op.sections, strict=False)]
        if len({size for size in op.sections if size}) == 1 and not op.squeeze:
            n.slots.constraints.append(EqualCounts(tuple(x.slots[part] for part in parts if len(part))))
        else:
            n.slots.pin(x.slots, f"cut at sizes written in the code, {node.where}")
        results: list[Channels | Known | Unknown] = []
        for k in wanted:
            part = parts[k]
            shape = tuple(len(part) if a == op.axis else size for a, size in enumerate(x.shape))
            labels = along(op.axis, len(shape), torch.arange(len(part)))
            if op.squeeze:
                shape = shape[: op.axis] + shape[op.axis + 1 :]
                labels = labels.squeeze(op.axis)
            edges = (Edge(x, torch.arange(len(part)), part),)
            made = Channels(shape, labels, x.rows[part], x.slots[part], edges, x.mean[part], x.deviation[part])
            results.append(n.record(made))
    elif isinstance(x, Channels):
        labels, places = materialize(x)
        results = [regroup(n, x, cut(labels, k), cut(places, k)) for k in wanted]
    elif isinstance(x, Unknown):
        code = number(f"cut {op.axis} {op.sections} {op.squeeze}")
        results = [
            Unknown(int(mix(code, k, x.number)), tuple(cut(torch.empty(x.shape), k).shape), x.origin)
            for k in wanted
        ]
    elif isinstance(x, Known):
        index = torch.arange(x.stored.numel()).reshape(x.stored.shape) if x.index is None else x.index
        results = [Known(cut(x.stored, k), x.name, cut(index.reshape(x.stored.shape), k)) for k in wanted]
    else:
        raise Refused("several tensors at once")
    return tuple(results) if op.take is None else results[0]


@transfer.register(Cat)
def _cat(op: Cat, node: Node, n: Numbering) -> Value:
    values = [n.values[part] for part in op.inputs]
    if any(isinstance(value, tuple) for value in values):
        raise Refused("several tensors at once")
    known = [value for value in values if isinstance(value, Channels)]
    if not known:
        return _cat_unknown(op, node, n, values)
    if op.stack:
        return _stack(op, node, n, values)
    axes = {value.axes() for value in known} - {()}
    if axes <= {(op.axis,)} and (axes or all(value.shape[op.axis] == 1 for value in known)):
        return _cat_channels(op, node, n)
    if len(axes) == 1 and op.axis in next(iter(axes)) and all(isinstance(value, Channels) for value in values):
        return _cat_grids(op, node, n, [value for value in values if isinstance(value, Channels)])
    if any(op.axis in own for own in axes):
        raise Refused("parts whose channels lie along several axes")
    if len(axes) > 1 or any(not isinstance(value, Channels | Known) for value in values):
        raise Refused("parts whose channels lie along different axes")
    return _cat_positions(op, node, n, values)


def _cat_unknown(op: Cat, node: Node, n: Numbering, values: list[Value]) -> Value:
    parts = []
    for value in values:
        if isinstance(value, Known):
            n.sink(value, f"joined with unknown channels in {node.where}")
            parts.append(number(f"{node.name} known"))
        elif isinstance(value, Unknown):
            parts.append(value.number)
    if all(isinstance(value, Known) for value in values):
        tensors = [value.value for value in values if isinstance(value, Known)]
        return Known((torch.stack if op.stack else torch.cat)(tensors, op.axis))
    code = number(f"join {op.axis} {op.stack} {node.shape}")
    return Unknown(int(mix(code, *parts)), node.shape or (), node.where)


def _cat_channels(op: Cat, node: Node, n: Numbering) -> Value:
    parts: list[Channels] = []
    for source in op.inputs:
        value = n.values[source]
        if isinstance(value, Known):
            size = value.value.shape[op.axis]
            labels = along(op.axis, value.value.ndim, torch.arange(size))
            shape = tuple(value.value.shape)
            blank = Channels(shape, labels, Rows.constants(torch.zeros(size, dtype=torch.float64)), labels)
            lifted = known_on(n, value, blank, shape)
            n.slots.pin(lifted.slots, f"a constant of fixed size joined in {node.where}")
            parts.append(lifted)
        else:
            parts.append(on_axis(n, source, op.axis))
    edges, start = [], 0
    for part in parts:
        rows = torch.arange(len(part.rows))
        edges.append(Edge(part, rows + start, rows))
        start += len(rows)
    return n.record(
        Channels(
            node.shape or (),
            along(op.axis, len(node.shape or ()), torch.arange(start)),
            Rows.cat([part.rows for part in parts]),
            torch.cat([part.slots for part in parts]),
            tuple(edges),
            torch.cat([part.mean for part in parts]),
            torch.cat([part.deviation for part in parts]),
        )
    )


def _cat_grids(op: Cat, node: Node, n: Numbering, parts: list[Channels]) -> Value:
    """Joined along one of several channel axes."""
    starts = torch.tensor([0, *(len(part.rows) for part in parts)]).cumsum(0).tolist()
    full = torch.cat([part.labels + start for part, start in zip(parts, starts, strict=False)], op.axis)
    own = [torch.arange(len(part.rows)) for part in parts]
    edges = tuple(Edge(p, rows + start, rows) for p, rows, start in zip(parts, own, starts, strict=False))
    slots = torch.cat([part.slots for part in parts])
    rows = Rows.cat([part.rows for part in parts])
    n.slots.grids.append(slots[full].squeeze())
    return n.record(Channels(node.shape or (), full, rows, slots, edges))


def _stack(op: Cat, node: Node, n: Numbering, values: list[Value]) -> Value:
    parts = [value for value in values if isinstance(value, Channels)]
    if len(parts) < len(values) or len({part.axes() for part in parts}) > 1:
        raise Refused("stacked parts whose channels lie along different axes")
    rank, count = len(node.shape or ()), len(parts)
    full = torch.stack([part.labels + k * len(part.rows) for k, part in enumerate(parts)], op.axis)
    rows = Rows.cat([part.rows for part in parts])
    slots = torch.cat([part.slots for part in parts])
    edges, start = [], 0
    for part in parts:
        own = torch.arange(len(part.rows))
        edges.append(Edge(part, own + start, own))
        start += len(own)
    made = n.record(Channels(node.shape or (), full, rows, slots, tuple(edges)))
    if count > 1 and rank:
        lined = slots[full]
        others = [a for a in made.axes() if a != op.axis]
        if others:
            n.slots.unify(lined, lined.narrow(op.axis, 0, 1))
        else:
            n.slots.pin(slots, f"stacked in {node.where}")
    return made


def _cat_positions(op: Cat, node: Node, n: Numbering, values: list[Value]) -> Value:
    """Joined along space: every part's rows placed at its positions, and added up."""
    like = next(value for value in values if isinstance(value, Channels))
    total: Channels | None = None
    parts: list[Channels] = []
    for value in values:
        if isinstance(value, Known):
            value = known_on(n, value, like, tuple(value.value.shape))
        assert isinstance(value, Channels)
        if value.labels.shape != like.labels.shape:
            raise Refused("parts with different numbers of channels")
        parts.append(replace(value, rows=value.rows[value.labels.reshape(-1)]))
    base = parts[0].rows.offset
    rows = Rows.constants(torch.zeros_like(base))
    out = torch.arange(len(base))
    edges = []
    for k, (part, value) in enumerate(zip(parts, values, strict=True)):
        placed = number(f"placed {k} of {[p.shape for p in parts]} along {op.axis}")
        rows = rows.plus(part.rows.shifted(-base).mapped(placed, keeps_constants=False))
        order = part.labels.reshape(-1)
        n.slots.unify(part.slots[order], parts[0].slots[parts[0].labels.reshape(-1)])
        if isinstance(value, Channels):
            edges.append(Edge(value, out, order))
    labels = out.reshape(like.labels.shape)
    slots = parts[0].slots[parts[0].labels.reshape(-1)]
    total = Channels(node.shape or (), labels, rows.shifted(base), slots, tuple(edges))
    return n.record(total)


@transfer.register(Pad)
def _pad(op: Pad, node: Node, n: Numbering) -> Value:
    x = n.values[op.x]
    if isinstance(x, Unknown):
        code = number(f"pad {op.before} {op.after} {op.value}")
        return Unknown(int(mix(code, x.number)), node.shape or (), x.origin)
    if not isinstance(x, Channels):
        raise Refused("padding of a known tensor")
    padded = {a for a in range(len(op.before)) if op.before[a] or op.after[a]}
    channel = padded & set(x.axes())
    if padded - channel:
        spatial = [(op.before[a], op.after[a]) if a in padded - channel else (0, 0) for a in range(len(x.shape))]
        code = number(f"pad {spatial} of {x.shape}")
        rows = x.rows.shifted(torch.tensor(-op.value)).mapped(code, keeps_constants=False)
        shape = tuple(size + sum(extra) for size, extra in zip(x.shape, spatial, strict=True))
        x = n.record(replace(x, shape=shape, rows=rows.shifted(torch.tensor(op.value)), edges=identity_edge(x)))
    for axis in channel:
        if x.axes() != (axis,):
            raise Refused("padding of one of several channel axes")
        order = x.labels.reshape(-1)
        ends = []
        for size in (op.before[axis], op.after[axis]):
            slots = n.slots.fresh(size)
            n.slots.pin(slots, f"channels padded in by a size written in the code, {node.where}")
            ends.append((Rows.constants(torch.full((size,), op.value, dtype=torch.float64)), slots))
        (head, head_slots), (tail, tail_slots) = ends
        start, count = op.before[axis], len(order)
        rows = Rows.cat([head, x.rows[order], tail])
        rest = [torch.full((len(end),), op.value, dtype=torch.float64) for end in (head, tail)]
        x = n.record(
            Channels(
                node.shape or (),
                along(axis, len(x.shape), torch.arange(len(rows))),
                rows,
                torch.cat([head_slots, x.slots[order], tail_slots]),
                (Edge(x, torch.arange(start, start + count), order),),
                torch.cat([rest[0], x.mean[order], rest[1]]),
                torch.cat([rest[0] * 0, x.deviation[order], rest[1] * 0]),
            )
        )
    return x
