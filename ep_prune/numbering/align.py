"""Tensors brought to one channel axis, and to each other: lifting, placing, broadcasting."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ep_prune.channels import ONE, Channels, Edge, Rows, mix, number
from ep_prune.find import Dense, Freedom
from ep_prune.graph import Node
from ep_prune.numbering.state import Known, Numbering, Refused, Unknown, Value
from ep_prune.slots import Whole


def index_along(x: Channels, axis: int) -> Tensor:
    """(n,) at which index along `axis` each row stands."""
    size = x.labels.shape[axis]
    if size == 1 and x.shape[axis] != 1:
        raise Refused("channels that do not lie along the expected axis")
    shape = [1] * x.labels.ndim
    shape[axis] = size
    place = torch.empty(len(x.rows), dtype=torch.int64)
    place[x.labels.reshape(-1)] = torch.arange(size).reshape(shape).expand(x.labels.shape).reshape(-1)
    return place


def on_axis(n: Numbering, node: Node, axis: int) -> Channels:
    """The value of a node with channels along `axis` and no other, row i at index i."""
    value = n.values[node]
    if axis >= len(node.shape or ()):
        raise Refused("a tensor without an axis of channels")
    if isinstance(value, Unknown):
        return n.of_unknown(value, (axis,))
    if not isinstance(value, Channels):
        raise Refused("channels of a known tensor")
    size = value.shape[axis]
    if value.axes() in ((axis,), ()) and (value.labels.shape[axis] == size):
        order = value.labels.reshape(-1)
        if torch.equal(order, torch.arange(len(value.rows))):
            return value
    key = (id(value), axis)
    if key not in n._on_axis:
        elements = int(torch.tensor(value.shape).prod())
        if elements > 2**24:
            raise Refused("channels along several axes of a large tensor")
        labels, places = materialize(value)
        n._on_axis[key] = regroup(n, value, labels, places, (axis,))
    return n._on_axis[key]


def materialize(x: Channels) -> tuple[Tensor, Tensor]:
    """Label and position number of every element, at the example's sizes."""
    sizes = [1 if labels > 1 else size for size, labels in zip(x.shape, x.labels.shape, strict=True)]
    places = torch.arange(x.positions()).reshape(sizes)
    return x.labels.expand(x.shape), places.expand(x.shape)


def regroup(
    n: Numbering, x: Channels, labels: Tensor, places: Tensor, axes: tuple[int, ...] | None = None
) -> Channels:
    """The channels of a tensor whose element e is row labels[e] of `x` at position places[e].

    The channel axes of the result are `axes`, or those along which the labels change. Where a channel of the
    result is one row at all of its own positions in order, it is that row; at rearranged positions, the row
    of mapped atoms; where it gathers several rows (pixel shuffle), the sum of each placed where it stands.
    """
    rank = labels.ndim
    if axes is None:
        axes = tuple(
            a for a in range(rank) if labels.shape[a] > 1 and bool((labels != labels.narrow(a, 0, 1)).any())
        )
    rest = [a for a in range(rank) if a not in axes]
    channel_shape = [labels.shape[a] if a in axes else 1 for a in range(rank)]
    count = 1
    for size in channel_shape:
        count *= size
    own = labels.permute([*axes, *rest]).reshape(count, -1)
    seat = places.permute([*axes, *rest]).reshape(count, -1)
    width = own.shape[1]
    here = torch.arange(width)
    single = bool((own == own[:, :1]).all())
    if single and id(x) in n.gathers:  # one rearrangement after another is one (keys repeated for several heads)
        x, source, seats = n.gathers[id(x)]
        seat, own = seats[own[:, :1], seat], source[own]
    if single:
        rows, slots = x.rows[own[:, 0]], x.slots[own[:, 0]]
        signature = mix(number("places"), width, _fold(mix(seat, here)))
        moved = rows.mapped(signature)
        untouched = (seat == here).all(1) if width == x.positions() else torch.zeros(count, dtype=torch.bool)
        if bool(untouched.all()):
            moved = rows
        elif bool(untouched.any()):
            raise Refused("some channels rearranged and some not")
        out = torch.arange(count)
        edges: tuple[Edge, ...] = (Edge(x, out, own[:, 0]),)
        mean, deviation = x.mean[own[:, 0]], x.deviation[own[:, 0]]
    else:
        moved, slots, edges = _placed(n, x, own, seat)
        mean = deviation = torch.empty(0)
    result = torch.arange(count).reshape(channel_shape)
    if sum(size > 1 for size in channel_shape) > 1:
        grid = slots.reshape(channel_shape)
        if in_order(x, own[:, 0].reshape([size for size in channel_shape if size > 1])):
            n.slots.grids.append(grid.squeeze())
        else:
            n.slots.keep_rectangular(grid)
    made = n.record(Channels(tuple(labels.shape), result, moved, slots, edges, mean, deviation))
    if single and moved is not rows:
        n.gathers[id(made)] = x, own[:, 0], seat
    return made


def in_order(x: Channels, picked: Tensor) -> bool:
    """Whether the rows `picked` (n_1, ..., n_m) stand in the order in which they stand in `x`, whole parts
    repeated at most."""
    place = torch.empty(len(x.rows), dtype=torch.int64)
    place[x.labels.reshape(-1)] = torch.arange(x.labels.numel())
    order = place[picked].flatten(0, -2)
    parts = (order[1:, 0] > order[:-1, -1]) | (order[1:] == order[:-1]).all(1)
    return bool((order[:, 1:] > order[:, :-1]).all() and parts.all())


def _fold(codes: Tensor) -> Tensor:
    """Hash rows of codes to one number each: a sum of codes that already name their place."""
    return codes.sum(1) & 0x7FFFFFFFFFFFFFFF


def _placed(n: Numbering, x: Channels, own: Tensor, seat: Tensor) -> tuple[Rows, Tensor, tuple[Edge, ...]]:
    count, width = own.shape
    channel = torch.arange(count).unsqueeze(1).expand(count, width)
    pairs, pair = torch.unique(torch.stack([channel, own], -1).reshape(-1, 2), dim=0, return_inverse=True)
    code = mix(seat, torch.arange(width)).reshape(-1)
    where = torch.zeros(len(pairs), dtype=torch.int64).scatter_add_(0, pair, code) & 0x7FFFFFFFFFFFFFFF
    into, source = pairs[:, 0], pairs[:, 1]
    parts = x.rows[source]
    first = torch.full((count,), len(pairs)).scatter_reduce_(0, into, torch.arange(len(pairs)), "amin")
    base = parts.offset[first]
    parts = parts.shifted(-base[into]).mapped(mix(number("placed"), width, where), keeps_constants=False)
    # All parts of a channel side by side: part k of channel c goes to columns k * r ... k * r + r - 1.
    rank = torch.arange(len(pairs)) - first[into]
    most, r = int(rank.max()) + 1, parts.atoms.shape[1]
    atoms = torch.zeros(count, most, r, dtype=torch.int64)
    coef = torch.zeros(count, most, r, dtype=torch.float64)
    atoms[into, rank], coef[into, rank] = parts.atoms, parts.coef
    error = torch.zeros(count, dtype=torch.float64).scatter_add_(0, into, parts.error.square()).sqrt()
    rows = Rows(atoms.reshape(count, -1), coef.reshape(count, -1), base, error).sorted().merged()
    slots = x.slots[source[first]]
    n.slots.unify(slots[into], x.slots[source])
    return rows, slots, (Edge(x, into, source),)


def known_on(n: Numbering, value: Known, like: Channels, shape: tuple[int, ...]) -> Channels:
    """A known tensor as the channels of a tensor like `like`: constants, or patterns over the positions."""
    tensor = value.value.reshape([1] * (len(shape) - value.value.ndim) + list(value.value.shape)).double()
    computed = value.name is None and tensor.numel() > 1
    axes = tuple(axis for axis in like.axes() if tensor.shape[axis] > 1 or not computed)
    if any(tensor.shape[a] > 1 and like.shape[a] == 1 and a in axes for a in range(len(shape))):
        raise Refused("a known tensor with more channels than what it meets")
    sizes = [like.labels.shape[a] if a in axes else tensor.shape[a] for a in range(len(shape))]
    spread = tensor.expand(sizes)
    rest = [a for a in range(len(shape)) if a not in axes]
    count = math.prod(sizes[a] for a in axes)
    values = spread.permute([*axes, *rest]).reshape(count, -1)
    slots = _known_slots(n, value, spread, tensor.shape, axes, rest, count)
    values = torch.cat([values, _rest_of_table(n, value, spread, tensor.shape, axes, rest, count)], 1)
    if computed and axes:
        n.slots.pin(slots, "meets a tensor of fixed size that the code computes")
    error = torch.zeros(count, dtype=torch.float64)
    if bool((values == values[:, :1]).all()):
        rows = Rows.constants(values[:, 0].clone(), error)
    else:
        rows = Rows.of_atoms(torch.full((count,), ONE)).scaled(torch.zeros(count, dtype=torch.float64))
        some = (values != 0).any(1).nonzero().squeeze(1)
        keys = mix(torch.arange(values.shape[1]), number(str([sizes[a] for a in rest])))
        stored = None if value.name is None else n.graph.tensors[value.name]
        if stored is not None and stored.is_floating_point():  # so rounded
            error[some] = torch.finfo(stored.dtype).eps * values[some].norm(dim=1)
        atoms, scale, error[some] = n.intern("pattern", Dense(values[some], keys, error[some]), Freedom.SCALE)
        full = torch.zeros(count, 1, dtype=torch.int64)
        coef = torch.zeros(count, 1, dtype=torch.float64)
        full[some, 0], coef[some, 0] = atoms, scale
        rows = Rows(full, coef, rows.offset, error)
    labels = torch.arange(count).reshape([sizes[a] if a in axes else 1 for a in range(len(shape))])
    fixed = torch.zeros(count, dtype=torch.float64)
    mean = rows.offset if bool(rows.is_constant().all()) else fixed / 0
    return n.record(Channels(shape, labels, rows, slots, (), mean, fixed))


def _rest_of_table(
    n: Numbering,
    value: Known,
    spread: Tensor,
    shape: torch.Size,
    axes: tuple[int, ...],
    rest: list[int],
    count: int,
) -> Tensor:
    """(count, m) what a table that is cut along positions holds for each channel in all of its places: at other
    lengths other ones are read."""
    if value.name is None or value.index is None or value.index.numel() == n.graph.tensors[value.name].numel():
        return torch.empty(count, 0, dtype=torch.float64)
    parameter = n.graph.tensors[value.name].detach().to("cpu", torch.float64)
    places = value.index.reshape(shape).expand(spread.shape).permute([*axes, *rest]).reshape(count, -1)
    whole, stride, cut = places[:, :1], 1, False
    for axis in reversed(range(parameter.ndim)):
        size = parameter.shape[axis]
        at = places // stride % size
        if not bool((at == at[:, :1]).all()) and bool((at == at[:1]).all()):
            along = torch.arange(size) * stride
            whole = (whole.unsqueeze(2) - at[:, :1, None] * stride + along).reshape(count, -1)
            cut = cut or len(torch.unique(at)) < size
        stride *= size
    return parameter.reshape(-1)[whole] if cut else torch.empty(count, 0, dtype=torch.float64)


def _known_slots(
    n: Numbering,
    value: Known,
    spread: Tensor,
    shape: torch.Size,
    axes: tuple[int, ...],
    rest: list[int],
    count: int,
) -> Tensor:
    """Slots for a lifted tensor: free ones, tied to the axes of the parameter that runs along the channels."""
    slots = n.slots.fresh(count)
    if value.name is None or value.value.numel() == 1:
        return slots
    parameter = n.graph.tensors[value.name]
    index = torch.arange(parameter.numel()) if value.index is None else value.index
    places = index.reshape(shape).expand(spread.shape).permute([*axes, *rest]).reshape(count, -1)
    stride = 1
    for axis in reversed(range(parameter.ndim)):
        size = parameter.shape[axis]
        at = places // stride % size
        stride *= size
        if size == 1 or bool((at == at[:1]).all()):
            continue
        if not bool((at == at[:, :1]).all()):
            raise Refused("a parameter whose axis runs along channels and positions at once")
        n.slots.unify(n.slots.of(value.name, axis, size)[at[:, 0]], slots)
    return slots


def align(
    n: Numbering, values: list[Value | float], node: Node
) -> tuple[Channels, Channels, Tensor, Tensor, tuple[Edge, ...]]:
    """Two operands row by row: (x, y, labels, slots, edges) of the broadcast result."""
    shape = node.shape or ()
    values = [_ranked(n, value, len(shape)) if isinstance(value, Channels) else value for value in values]
    sides: list[Channels] = []
    like = max((value for value in values if isinstance(value, Channels)), key=lambda c: len(c.rows))
    for value in values:
        if isinstance(value, float):
            value = Known(torch.tensor(value, dtype=torch.float64))
        if isinstance(value, Known) and not bool((value.value.double().abs() < HUGE).all()):
            value = _mask(n, value, node)
        if isinstance(value, Unknown):
            value = _ranked_unknown(n, value, like, len(shape))
        if isinstance(value, Known):
            value = known_on(n, value, like, shape)
        assert isinstance(value, Channels)
        sides.append(_broadcast(n, value, like, shape))
    x, y = sides
    axes = [a for a in range(len(shape)) if max(x.labels.shape[a], y.labels.shape[a]) > 1]
    full = [max(x.labels.shape[a], y.labels.shape[a]) for a in range(len(shape))]
    count = 1
    for a in axes:
        count *= full[a]
    picks = [side.labels.expand(full).reshape(-1) for side in sides]
    partial = [side.axes() for side in sides]
    within = next((s for k, s in enumerate(sides) if _fixed_within(values[k], partial[k], partial[1 - k])), None)
    if partial[0] and partial[1] and partial[0] != partial[1] and within is None:
        raise Refused("channels along different axes of the two operands")
    if within is not None:
        other = sides[1 - sides.index(within)]
        inner = [a for a in other.axes() if a in within.axes()]
        outer = [a for a in other.axes() if a not in inner]
        grid = other.slots[other.labels].permute(
            *outer, *inner, *(a for a in range(len(shape)) if a not in other.axes())
        )
        n.slots.constraints.append(Whole(grid.reshape(-1, math.prod(other.labels.shape[a] for a in inner))))
    slots: Tensor | None = None
    for side, pick, own in zip(sides, picks, partial, strict=True):
        if axes and not own:
            n.slots.pin(side.slots, f"one channel that serves all in {node.where}")
            continue
        if side is within:
            continue
        if slots is not None:
            n.slots.unify(slots, side.slots[pick])
        slots = side.slots[pick] if slots is None else slots
    assert slots is not None
    out = torch.arange(count)
    edges = tuple(Edge(side, out, pick) for side, pick in zip(sides, picks, strict=True))
    x, y = (
        replace(side, rows=side.rows[pick], slots=side.slots[pick], mean=side.mean[pick],
                deviation=side.deviation[pick])
        for side, pick in zip(sides, picks, strict=True)
    )  # fmt: skip
    return x, y, out.reshape(full), slots, edges


HUGE = 1e30
"""Numbers above it are not calculated with: what a mask hides."""


def _mask(n: Numbering, value: Known, node: Node) -> Unknown:
    n.sink(value, f"a mask in {node.where}")
    code = number(f"mask {value.name} {value.value.double().tolist()}")
    return Unknown(code, tuple(value.value.shape), f"a mask in {node.where}")


def _fixed_within(value: Value | float, own: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether an operand is of fixed size along some, but not all, of the other's channel axes: positions that
    every head turns by alike. The parts of the other one stay whole, or go."""
    computed = isinstance(value, Unknown) or (isinstance(value, Known) and value.name is None)
    return computed and bool(own) and set(own) < set(other)


def _ranked(n: Numbering, x: Channels, rank: int) -> Channels:
    """`x` with axes of size 1 in front, as broadcasting puts them there."""
    extra = rank - len(x.shape)
    if extra == 0:
        return x
    rows = torch.arange(len(x.rows))
    labels = x.labels.reshape([1] * extra + list(x.labels.shape))
    return n.record(replace(x, shape=(1,) * extra + x.shape, labels=labels, edges=(Edge(x, rows, rows),)))


def _ranked_unknown(n: Numbering, value: Unknown, like: Channels, rank: int) -> Channels:
    shape = (1,) * (rank - len(value.shape)) + value.shape
    if shape != value.shape:
        value = Unknown(int(mix(value.number, rank)), shape, value.origin)  # its axes have other numbers now
    return n.of_unknown(value, tuple(axis for axis in like.axes() if shape[axis] > 1))


def _broadcast(n: Numbering, x: Channels, like: Channels, shape: tuple[int, ...]) -> Channels:
    """`x` expanded to `shape` over positions; atoms that are repeated there become new ones."""
    free = [a for a in range(len(shape)) if x.labels.shape[a] == 1 and like.labels.shape[a] == 1]
    old, new = [x.shape[a] for a in free], [shape[a] for a in free]
    rows = x.rows if old == new else x.rows.mapped(number(f"expand {old} to {new}"))
    if rows is x.rows and n.is_recorded(x):
        return x
    if not n.is_recorded(x):  # given axes in front: its edges lead to what is on the tape
        return n.record(replace(x, rows=rows))
    index = torch.arange(len(x.rows))
    return n.record(replace(x, rows=rows, edges=(Edge(x, index, index),)))
