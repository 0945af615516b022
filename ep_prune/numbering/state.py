"""Global value numbering over channels: a forward walk that says what every channel is, made of what.

    value of a node =  Channels   rows of affine combinations of atoms (see `channels`)
                    |  Known      a parameter, buffer or what is computed of these alone
                    |  Unknown    one function of the input, nothing known about its channels

`elementwise`, `structure` and `contraction` have the algebra of each kind of operation; here is the state that
all share: the interned leaders (equal rows get one atom, also across layers), the slots, the *ports* where
weights consume channels, the sinks that keep channels alive, and liveness (dead-code elimination, back to front).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.channels import Channels, Rows, along, mix, number
from ep_prune.find import Classes, Dense, Freedom, Sparse, congruence, stacked
from ep_prune.graph import Contract, Graph, Layout, Node
from ep_prune.numbering import uses
from ep_prune.numbering.uses import Net, Use
from ep_prune.slots import Slots


@dataclass(frozen=True, eq=False)
class Unknown:
    """A function of the input; equal numbers are equal functions."""

    number: int
    shape: tuple[int, ...]
    origin: str


@dataclass(frozen=True, eq=False)
class Known:
    """`index`: for every element, its flat place in the parameter `name`; None where it is no plain copy."""

    stored: Tensor
    name: str | None = None
    index: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The values, those of a parameter in float64: cast when they are asked for."""
        return self.stored if self.name is None else self.stored.to("cpu", torch.float64)


Value = Channels | Known | Unknown | tuple["Channels | Known | Unknown", ...]


class Refused(Exception):
    """A rule's algebra does not cover this case: the node becomes a barrier with this reason."""


@dataclass(frozen=True, eq=False)
class Port:
    """One use of a weight: where channels are consumed.

    `x`: the input, row i at input position i; `classes`: equal directions among these rows, `constant` those
    without any; `net` (n, O/G, taps): what each class, at its leader's place, sends to each output; `weight`
    (n, O/G, taps): what each position sends; `pattern` (G, O/G, taps): what the constants send; `size` (G, O/G):
    the length of what each output is made of. A large `net` or `weight` is made anew each time it is asked for.
    """

    node: Node
    op: Contract
    x: Channels
    out: Channels
    classes: Classes
    constant: Tensor
    use: Use
    sends: Net
    pattern: Tensor
    size: Tensor

    @property
    def net(self) -> Tensor:
        return self.sends.values()

    @property
    def weight(self) -> Tensor:
        return self.use.weight()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, O/G, taps) of `net` and `weight`."""
        groups, outputs, inputs, taps = self.use.shape
        return groups * inputs, outputs, taps

    @property
    def groups(self) -> int:
        return self.op.layout.groups

    @property
    def name(self) -> str:
        assert self.op.weight.tensor is not None
        return self.op.weight.tensor

    def below(self, net: Tensor, tolerance: float) -> Tensor:
        """(n, O/G): whether a class's share of an output's size is below `tolerance`.

        Sizes are root mean squares as far as batch norm recorded them; what is unknown is not below.
        """
        size = net.abs().sum(2) * self.x.root_mean_square().unsqueeze(1)
        total = size.nan_to_num(0.0).square().reshape(self.groups, -1, net.shape[1]).sum(1).sqrt()
        share = size.reshape(self.groups, -1, net.shape[1]) / total.unsqueeze(1).clamp_min(1e-300)
        return (share <= tolerance).reshape(size.shape)

    def live_classes(self, live_out: Tensor, tolerance: float) -> Tensor:
        """(n,) at leaders: whether some live output (G * O/G,) reads the class."""
        groups, (n, outputs, _) = self.groups, self.shape
        live = live_out.reshape(groups, 1, -1).expand(groups, n // groups, -1).reshape(n, outputs)
        read = self.sends.sent & live
        if tolerance > 0:
            read &= ~self.below(self.net, tolerance)
        return read.any(dim=1)


@dataclass
class Numbering:
    """The walk's state. `tolerance`: relative distance below which rows count as equal (0: exact).

    `ranges`: node -> (low, high) of its elements on a declared domain, (1, ...).
    """

    graph: Graph
    tolerance: float = 0.0
    slots: Slots = field(default_factory=Slots)
    ranges: Mapping[Node, tuple[Tensor, Tensor]] = field(default_factory=dict)
    values: dict[Node, Value] = field(default_factory=dict)
    tape: list[Channels] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    sinks: list[tuple[Channels, str]] = field(default_factory=list)
    loops: list[tuple[Channels, Channels]] = field(default_factory=list)
    """A recurrent layer's states as it reads them, and as it writes them: row i is row i, one step earlier."""
    gates: dict[str, int] = field(default_factory=dict)
    """Recurrent weights -> how many rows of theirs belong to one unit: output g * n + i is gate g of unit i."""
    barriers: dict[str, str] = field(default_factory=dict)
    pinned_tensors: dict[str, str] = field(default_factory=dict)
    sums_to_one: set[int] = field(default_factory=set)
    """ids of Channels that sum up to 1 over their last axis (softmax)."""
    gathers: dict[int, tuple[Channels, Tensor, Tensor]] = field(default_factory=dict)
    """id of a Channels whose positions are rearranged -> the Channels, rows and positions that they are of."""
    _room: int = field(default_factory=lambda: uses.ROOM)
    _recorded: set[int] = field(default_factory=set)
    _leaders: dict[tuple[object, ...], list[tuple[Dense | Sparse, Tensor, Tensor]]] = field(default_factory=dict)
    _on_axis: dict[tuple[object, ...], Channels] = field(default_factory=dict)
    _classes: dict[tuple[int, int], tuple[Classes, Tensor]] = field(default_factory=dict)

    # ---- values -------------------------------------------------------------------------------------

    def tensor(self, node: Node) -> Tensor:
        """The parameter that a node reads, in float64."""
        assert node.tensor is not None
        return self.graph.tensors[node.tensor].detach().to("cpu", torch.float64)

    def use(self, node: Node, layout: Layout) -> Use:
        """One use of the parameter that a node reads."""
        assert node.tensor is not None
        stored = self.graph.tensors[node.tensor].detach()
        return Use(stored, layout, self.has_room(stored.numel()))

    def has_room(self, size: int) -> bool:
        """Whether so many numbers more may be kept in float64; if so, they are counted."""
        fits = size <= self._room
        self._room -= size if fits else 0
        return fits

    def eps(self, node: Node | None) -> float:
        """The rounding unit of the type in which a parameter is stored."""
        tensor = None if node is None or node.tensor is None else self.graph.tensors[node.tensor]
        return torch.finfo(tensor.dtype).eps if tensor is not None and tensor.is_floating_point() else 2.2e-16

    def record(self, channels: Channels) -> Channels:
        """Put a new tensor on the tape (once), where liveness finds it."""
        if id(channels) not in self._recorded:
            self._recorded.add(id(channels))
            self.tape.append(channels)
        return channels

    def is_recorded(self, channels: Channels) -> bool:
        return id(channels) in self._recorded

    def unknown(self, node: Node, *parts: int) -> Unknown:
        code = mix(number(node.name), *parts) if parts else torch.tensor(number("node " + node.name))
        return Unknown(int(code), node.shape or (), node.where)

    def sink(self, value: Value, reason: str) -> None:
        """Keep a value as it is: every channel live, none dropped."""
        if isinstance(value, tuple):
            for part in value:
                self.sink(part, reason)
        elif isinstance(value, Channels):
            self.sinks.append((value, reason))
            self.slots.pin(value.slots, reason)
        elif isinstance(value, Known) and value.name is not None:
            self.pinned_tensors.setdefault(value.name, reason)

    def of_unknown(self, value: Unknown, axes: tuple[int, ...]) -> Channels:
        """The channels of an unknown tensor along at most one axis: one atom each, pinned."""
        key = (value.number, value.shape, axes)
        if key not in self._on_axis:
            if len(axes) > 1:
                raise Refused("unknown channels along two axes")
            rank = len(value.shape)
            if not axes or value.shape[axes[0]] == 1:
                labels, atoms = torch.zeros([1] * rank, dtype=torch.int64), torch.tensor([value.number])
            else:
                places = torch.arange(value.shape[axes[0]])
                labels, atoms = along(axes[0], rank, places), mix(value.number, axes[0], places)
            slots = self.slots.fresh(len(atoms))
            self.slots.pin(slots, f"comes from {value.origin}")
            self._on_axis[key] = self.record(Channels(value.shape, labels, Rows.of_atoms(atoms), slots))
        return self._on_axis[key]

    # ---- equal rows ---------------------------------------------------------------------------------

    def intern(
        self, signature: str, vectors: Dense | Sparse, freedom: Freedom, tag: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give equal rows one atom, within this call and with earlier calls of the same signature.

        Returns (atoms, scale, error): row i is scale[i] times the row that atom[i] stands for; `error` is the
        error of the scale (relative to the leader's length where the scale is free). `tag` (n,): rows with
        different tags are never equal.
        """
        count = len(vectors.error)
        basis = int(mix(vectors.keys).sum()) if isinstance(vectors, Dense) else 0
        earlier = self._leaders.setdefault((signature, freedom, basis), [])
        tag = torch.zeros(count, dtype=torch.int64) if tag is None else tag
        parts = [*earlier, (vectors, torch.empty(0, dtype=torch.int64), tag)]
        joined = _join([part for part, _, _ in parts])
        known = torch.cat([atoms for _, atoms, _ in parts])
        classes = congruence(joined, freedom, self.tolerance, torch.cat([tags for _, _, tags in parts]))
        start = len(known)
        leader, scale = classes.leader[start:], classes.scale[start:]
        own = mix(number(signature), number(freedom.name), len(earlier), basis, torch.arange(count))
        atoms = torch.cat([known, own])[leader]
        first = (leader == torch.arange(start, start + count)).nonzero().squeeze(1)
        earlier.append((_take(vectors, first), own[first], tag[first]))
        norm = joined.norm()[leader].clamp_min(1e-300)
        spread = (joined.error[start:] + scale.abs() * joined.error[leader] + classes.residual[start:]) / (
            norm if freedom in (Freedom.POSITIVE, Freedom.SCALE) else torch.ones_like(norm)
        )
        is_leader = leader == torch.arange(start, start + count)
        return atoms, scale, torch.where(is_leader, 0.0, spread)

    def classes_of(self, x: Channels, group: int) -> tuple[Classes, Tensor]:
        """Equal directions among the rows of `x`, never across runs of `group` positions; and the constants."""
        key = (id(x), group)
        if key not in self._classes:
            self._classes[key] = equal_directions(x.rows, group, self.tolerance)
        return self._classes[key]

    # ---- liveness -----------------------------------------------------------------------------------

    def liveness(self) -> dict[int, Tensor]:
        """id of a Channels -> (n,) whether a row matters to an output: backwards along edges and ports.

        Where states are read one step later, again until nothing changes.
        """
        live = {id(value): torch.zeros(len(value.rows), dtype=torch.bool) for value in self.tape}
        for value, _ in self.sinks:
            live[id(value)][:] = True
        ports: dict[int, list[Port]] = {}
        for port in self.ports:
            ports.setdefault(id(port.out), []).append(port)
        while True:
            for value in reversed(self.tape):
                mine = live[id(value)] & ~value.rows.is_constant()
                for edge in value.edges:
                    live[id(edge.source)][edge.into[mine[edge.out]]] = True
                for port in ports.get(id(value), []):
                    read = port.live_classes(mine, self.tolerance)
                    live[id(port.x)] |= read[port.classes.leader] & ~port.constant
            grown = False
            for read_next, written in self.loops:
                grown |= bool((live[id(read_next)] & ~live[id(written)]).any())
                live[id(written)] |= live[id(read_next)]
            if not grown:
                return live


def equal_directions(rows: Rows, group: int, tolerance: float) -> tuple[Classes, Tensor]:
    """Classes of equal directions, never across runs of `group` rows; and (n,) which rows are constants."""
    n = len(rows)
    constant = rows.is_constant()
    leader = torch.arange(n)
    scale = torch.ones(n, dtype=torch.float64)
    residual = torch.zeros(n, dtype=torch.float64)
    some = (~constant).nonzero().squeeze(1)
    if len(some):
        apart = some // group if group < n else None
        found = congruence(Sparse(rows[some], False), Freedom.SCALE, tolerance, apart)
        leader[some], scale[some], residual[some] = some[found.leader], found.scale, found.residual
    return Classes(leader, scale, residual), constant


def _join(parts: list[Dense | Sparse]) -> Dense | Sparse:
    if len(parts) == 1:
        return parts[0]
    dense = [part for part in parts if isinstance(part, Dense)]
    if dense:
        return stacked(dense)
    sparse = [part for part in parts if isinstance(part, Sparse)]
    return Sparse(Rows.cat([part.rows for part in sparse]), sparse[0].offset)


def _take(vectors: Dense | Sparse, index: Tensor) -> Dense | Sparse:
    if isinstance(vectors, Dense):
        return vectors.taken(index)
    return Sparse(vectors.rows[index], vectors.offset)
