"""Recurrent units that are equal at all times: the coarsest partition that is stable, by refinement.

A unit's state follows from its rows of W_ih, over the atoms of the input, its biases, and its rows of W_hh, over
the states one step before. All units start from zero; so if the states of a class are multiples s_j of their
leader's before a step, and the rows of j are what the cell asks for that of the rows of its leader, with W_hh
summed over classes, then they are so after it. Refinement begins with the rows of W_ih and the biases alone, as if
all states agreed, and divides classes by their rows of W_hh until no class falls apart: bisimulation.

    zero     units that never leave zero: their odd row is nothing, counting on others that never do either
    flat     units of a plain layer whose row is a constant: f(b) from the first step on; what W_hh reads of them
             is f(b) times one and the same step function of time

A layer is recorded as two ports, W_ih on its input and W_hh on the states before, which write the same gates. The
slots of gate g of unit j, and of what comes of them, are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep_prune.channels import Channels, Edge, Rows, along, mix, number
from ep_prune.find import MARGIN, Classes, Dense, Freedom, congruence
from ep_prune.graph import Cell, Contract, Direction, Layout, Node, Recurrent, Zeros
from ep_prune.numbering.align import on_axis
from ep_prune.numbering.contraction import _constants, _net, _size, _slots, over_atoms, without_negligible
from ep_prune.numbering.elementwise import transfer
from ep_prune.numbering.state import Numbering, Port, Refused, Value, equal_directions
from ep_prune.numbering.uses import Net, Use
from ep_prune.slots import EqualCounts, Fewer

_LAYOUT = Layout(axis=2)


@transfer.register(Zeros)
def _zeros(op: Zeros, node: Node, n: Numbering) -> Value:
    return n.unknown(node)


@transfer.register(Recurrent)
def _recurrent(op: Recurrent, node: Node, n: Numbering) -> Value:
    x, source = on_axis(n, op.x, 2), op.x
    if len(x.rows) != (op.layers[0][0].weight_ih.shape or (0, 0))[1]:
        raise Refused("inputs that do not match the weight")
    units: list[Channels] = []
    states: list[Channels] = []
    for depth, layer in enumerate(op.layers):
        for side, direction in enumerate(layer):
            layered = _Layer(op.cell, direction, node, n, number(f"{node.name} {depth} {side}"))
            made = layered.run(source, x)
            units.append(made[0])
            states.append(made[1])
        x, source = _side_by_side(n, states[-len(layer) :]), node
    for parts in (units, states) if states[0] is not units[0] else (states,):
        if len(parts) > 1:
            n.slots.constraints.append(EqualCounts(tuple(part.slots for part in parts)))
    batch = x.shape[op.batch_axis]
    last = [_last(n, states, batch, "state")]
    if op.cell.name == "lstm":
        last.append(_last(n, units, batch, "cell"))
    return (x, *last)


def _sends(n: Numbering, op: Contract, net: Tensor) -> tuple[Use, Net]:
    """A weight as a port has it, and what its classes send, (n, O, 1)."""
    use = n.use(op.weight, op.layout)
    return use, Net(use, lambda outputs: net[:, outputs])


def _dense(net: Tensor, noise: Tensor, leaders: Tensor, rows: Rows) -> Dense:
    """What classes send, as rows over their leaders' atoms; noise (n, O): its squared error."""
    square = (noise[leaders] * rows.coef[leaders].square().sum(1).unsqueeze(1)).sum(0)
    nothing = torch.zeros(net.shape[1], 1, dtype=torch.float64)
    return over_atoms(lambda outputs: net[:, outputs], True, square, leaders, rows, nothing, nothing)


def _matrix(vectors: Dense) -> Tensor:
    assert isinstance(vectors.values, Tensor)
    return vectors.values


def _side_by_side(n: Numbering, parts: Sequence[Channels]) -> Channels:
    """The states of a layer's directions, joined along the last axis."""
    if len(parts) == 1:
        return parts[0]
    total = sum(len(part.rows) for part in parts)
    rows, slots, edges = _stacked(parts)
    labels = along(2, 3, torch.arange(total))
    return n.record(Channels((*parts[0].shape[:2], total), labels, rows, slots, edges))


def _last(n: Numbering, parts: Sequence[Channels], batch: int, what: str) -> Channels:
    """What all layers and directions end with, (layers * directions, batch, units)."""
    rows, slots, edges = _stacked(parts)
    width = len(parts[0].rows)
    labels = torch.arange(len(rows)).reshape(len(parts), 1, width)
    return n.record(
        Channels((len(parts), batch, width), labels, rows.mapped(number(f"last {what}")), slots, edges)
    )


def _stacked(parts: Sequence[Channels]) -> tuple[Rows, Tensor, tuple[Edge, ...]]:
    edges, start = [], 0
    for part in parts:
        own = torch.arange(len(part.rows))
        edges.append(Edge(part, own + start, own))
        start += len(own)
    return Rows.cat([part.rows for part in parts]), torch.cat([part.slots for part in parts]), tuple(edges)


@dataclass(frozen=True, eq=False)
class _Units:
    """What is claimed of H units: state j is scale[j] times state leader[j]; or zero; or value[j] once begun.

    error (H,): how far the rows of a unit may be off those of its leader.
    """

    leader: Tensor
    scale: Tensor
    zero: Tensor
    flat: Tensor
    value: Tensor
    error: Tensor

    def same(self, other: _Units) -> bool:
        parts = ((self.leader, other.leader), (self.zero, other.zero), (self.flat, other.flat))
        return all(torch.equal(a, b) for a, b in parts) and torch.allclose(self.scale, other.scale, 1e-6, 0.0)

    def rows(self, code: int, before: bool) -> Rows:
        """The states: as the next step reads them (`before`), or as they are written."""
        still = torch.where(self.flat, self.value, 0.0)
        coef = torch.where(self.zero, 0.0, torch.where(self.flat, still if before else 0.0 * still, self.scale))
        atoms = mix(code, int(before), self.leader)
        rows = Rows.of_atoms(torch.where(coef == 0, 0, atoms)).scaled(coef)
        return replace(rows, offset=rows.offset if before else still, error=self.error)


class _Layer:
    """One layer in one direction."""

    def __init__(self, cell: Cell, w: Direction, node: Node, n: Numbering, code: int) -> None:
        self.cell, self.w, self.node, self.n, self.code = cell, w, node, n, code
        self.hh = n.tensor(w.weight_hh).T.unsqueeze(2)
        """(state, gates * units, 1), as ports have weights."""
        self.size = self.hh.shape[1] // cell.gates

    def run(self, source: Node, x: Channels) -> tuple[Channels, Channels]:
        """The units, and the states that are written: the units themselves, or their projections."""
        n, w, cell, size = self.n, self.w, self.cell, self.size
        reading = Contract(source, w.weight_ih, w.bias_ih, _LAYOUT)
        back = Contract(self.node, w.weight_hh, None, _LAYOUT)
        ih = n.tensor(w.weight_ih).T.unsqueeze(2)
        classes, constant = n.classes_of(x, len(x.rows))
        eps = n.eps(w.weight_ih)
        net, noise = _net(ih, classes.leader, classes.scale, constant, x.rows, eps)
        pattern, fuzz = _constants(ih, x.rows, 1, eps)
        leaders = (classes.leader == torch.arange(len(x.rows))) & ~constant
        read = _dense(net, noise, leaders, x.rows)
        offsets = [pattern.reshape(-1), torch.zeros(ih.shape[1], dtype=torch.float64)]
        errors = [fuzz.reshape(-1).sqrt(), torch.zeros_like(offsets[1])]
        for k, bias in enumerate((w.bias_ih, w.bias_hh)):
            if bias is not None:
                own = n.tensor(bias)
                offsets[k] = offsets[k] + own
                errors[k] = (errors[k].square() + (n.eps(bias) * own).square()).sqrt()

        found = self._settled(read, offsets, errors)
        shape = x.shape[:2]
        gate_slots = _slots(reading, n, x, 1, len(x.rows), cell.gates * size)
        for bias in (w.bias_ih, w.bias_hh):
            if bias is not None:
                n.slots.unify(n.slots.of(str(bias.tensor), 0, len(gate_slots)), gate_slots)
        slots = gate_slots.reshape(cell.gates, size)[0]
        n.slots.unify(gate_slots.reshape(cell.gates, size), slots)
        states = len(self.hh)
        state_slots = slots if w.project is None else n.slots.of(str(w.project.tensor), 0, states)
        before = self._channels(shape, self._states(found, True), state_slots)
        n.slots.unify(_slots(back, n, before, 1, states, cell.gates * size), gate_slots)
        atoms = mix(self.code, number("gates"), torch.arange(cell.gates * size))
        gates = self._channels(shape, Rows.of_atoms(atoms), gate_slots)

        again, none = n.classes_of(before, states)
        recurrent, _ = _net(self.hh, again.leader, again.scale, none, before.rows, n.eps(w.weight_hh))
        sizes = [
            _size(net, x.rows, pattern, offsets[0].unsqueeze(0)),
            _size(recurrent, before.rows, torch.zeros_like(pattern), offsets[1].unsqueeze(0)),
        ]
        total = (sizes[0].square() + sizes[1].square()).sqrt()
        alone = torch.zeros(cell.gates, size, dtype=torch.bool)
        alone[cell.odd] = cell.split  # what comes back is multiplied by another gate, which may be small
        sizes = [torch.where(alone.reshape(1, -1), sizes[0], total), total]
        net = without_negligible(net, x.rows.linear_norm(), sizes[0], eps)
        norm = before.rows.linear_norm()
        recurrent = without_negligible(recurrent, norm, sizes[1], n.eps(w.weight_hh))
        ports = (
            (reading, x, classes, constant, net, pattern, sizes[0]),
            (back, before, again, none, recurrent, torch.zeros_like(pattern), sizes[1]),
        )
        for op, value, equal, fixed, sent, constants, length in ports:
            use, sends = _sends(n, op, sent)
            n.ports.append(Port(self.node, op, value, gates, equal, fixed, use, sends, constants, length))
            n.gates[str(op.weight.tensor)] = cell.gates

        here = torch.arange(size)
        edges = tuple(Edge(gates, here, here + g * size) for g in range(cell.gates))
        units = self._channels(shape, found.rows(self.code, False), slots, edges)
        written = units if w.project is None else self._projected(found, units, state_slots)
        n.loops.append((before, written))
        return units, written

    def _channels(
        self, shape: tuple[int, ...], rows: Rows, slots: Tensor, edges: tuple[Edge, ...] = ()
    ) -> Channels:
        labels = along(2, 3, torch.arange(len(rows)))
        return self.n.record(Channels((*shape, len(rows)), labels, rows, slots, edges))

    def _projected(self, found: _Units, units: Channels, slots: Tensor) -> Channels:
        """The states that a projection writes, and its port."""
        n, w = self.n, self.w
        assert w.project is not None
        op = Contract(self.node, w.project, None, _LAYOUT)
        weight = n.tensor(w.project).T.unsqueeze(2)
        eps = n.eps(w.project)
        classes, constant = n.classes_of(units, len(units.rows))
        net, _ = _net(weight, classes.leader, classes.scale, constant, units.rows, eps)
        nothing = torch.zeros(1, len(slots), 1, dtype=torch.float64)
        size = _size(net, units.rows, nothing, nothing[:, :, 0])
        net = without_negligible(net, units.rows.linear_norm(), size, eps)
        _slots(op, n, units, 1, len(units.rows), len(slots))
        states = self._channels(units.shape[:2], self._states(found, False), slots)
        use, sends = _sends(n, op, net)
        n.ports.append(Port(self.node, op, units, states, classes, constant, use, sends, nothing, size))
        n.slots.constraints.append(Fewer(slots, units.slots))
        n.gates[str(w.project.tensor)] = 1
        return states

    def _states(self, found: _Units, before: bool) -> Rows:
        """What the units write as states: themselves, or the directions of their projections."""
        rows = found.rows(self.code, before)
        if self.w.project is None:
            return rows
        eps = self.n.eps(self.w.project)
        classes, constant = equal_directions(rows, len(rows), self.n.tolerance)
        weight = self.n.tensor(self.w.project).T.unsqueeze(2)
        net, noise = _net(weight, classes.leader, classes.scale, constant, rows, eps)
        leaders = (classes.leader == torch.arange(len(rows))) & ~constant
        vectors = _dense(net, noise, leaders, rows)
        return _directions(vectors, mix(self.code, number("projected"), int(before)), self.n.tolerance)

    # ---- refinement ---------------------------------------------------------------------------------

    def _settled(self, read: Dense, offsets: Sequence[Tensor], errors: Sequence[Tensor]) -> _Units:
        """Refine until nothing changes. Every round divides a class, or takes units out of `zero` or `flat`."""
        size = self.size
        none, all_ = torch.zeros(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool)
        zeros, here = torch.zeros(size, dtype=torch.float64), torch.arange(size)
        flat = none if self.cell.function is None else all_
        found = _Units(torch.zeros_like(here), zeros + 1, all_, flat, zeros, zeros)
        back = torch.zeros(self.hh.shape[1], 0, dtype=torch.float64), torch.zeros(self.hh.shape[1])
        for _ in range(2 * size + 8):
            new = self._refined(found, read, offsets, errors, back)
            if back[0].shape[1] and new.same(found):
                return new
            found = new
            rows = self._states(found, True)
            classes, constant = equal_directions(rows, len(rows), self.n.tolerance)
            net, noise = _net(self.hh, classes.leader, classes.scale, constant, rows, self.n.eps(self.w.weight_hh))
            coef = torch.where(classes.leader == torch.arange(len(rows)), rows.coef.sum(1), 0.0)
            square = (noise * coef.square().unsqueeze(1)).sum(0)
            back = (net[:, :, 0] * coef.unsqueeze(1)).T, square.sqrt()
        return _Units(here, zeros + 1, none, none, zeros, zeros)

    def _refined(
        self,
        old: _Units,
        read: Dense,
        offsets: Sequence[Tensor],
        errors: Sequence[Tensor],
        back: tuple[Tensor, Tensor],
    ) -> _Units:
        """One round: the classes of `old`, divided by rows in which W_hh is summed over these classes."""
        cell, size, tolerance = self.cell, self.size, self.n.tolerance
        gates = []
        for g in range(cell.gates):
            own = slice(g * size, (g + 1) * size)
            sides = [offset[own].unsqueeze(1) for offset in offsets]
            constants = sides if cell.split and g == cell.odd else [sides[0] + sides[1]]
            square = read.error[own].square() + back[1][own].square()
            square = square + errors[0][own].square() + errors[1][own].square()
            values = torch.cat([_matrix(read)[own], back[0][own], *constants], 1)
            gates.append(Dense(values, torch.arange(values.shape[1]), square.sqrt()))
        odd = gates.pop(cell.odd)
        gone = odd.error * MARGIN * 1e-3
        linear = torch.linalg.vector_norm(_matrix(odd)[:, :-1], dim=1) > gone
        bias = torch.where(_matrix(odd)[:, -1].abs() > gone, _matrix(odd)[:, -1], 0.0)
        value = torch.zeros_like(bias) if cell.function is None else cell.function(bias)
        nothing = ~linear & ((value if cell.function is not None else bias) == 0)
        zero = old.zero & nothing
        flat = old.flat & ~linear & ~zero

        label = old.leader
        for gate in gates:
            label = congruence(gate, Freedom.NONE, tolerance, label).leader
        leader, here = torch.arange(size), torch.arange(size)
        scale = torch.ones(size, dtype=torch.float64)
        some = (~zero & ~flat & (odd.norm() > 0)).nonzero().squeeze(1)
        if len(some):
            vectors = Dense(_matrix(odd)[some], odd.keys, odd.error[some])
            freedom = Freedom.POSITIVE if cell.positive else Freedom.SIGN
            classes = congruence(vectors, freedom, tolerance, label[some])
            leader[some], scale[some] = some[classes.leader], classes.scale
        for mask in (zero, flat):
            if bool(mask.any()):
                leader[mask] = here[mask][0]
        error = self._away([*gates, odd], leader, scale)
        return _Units(leader, scale, zero, flat, value, torch.where(zero | flat, 0.0, error))

    def _away(self, gates: Sequence[Dense], leader: Tensor, scale: Tensor) -> Tensor:
        """(H,) how far a unit's rows may be off its leader's, 0 for leaders. The odd gate comes last."""
        here = torch.arange(len(leader))
        square = torch.zeros(len(leader), dtype=torch.float64)
        for place, gate in enumerate(gates):
            factor = scale if place == len(gates) - 1 else torch.ones_like(scale)
            off = gate.distance(here, leader, factor) + gate.error + factor.abs() * gate.error[leader]
            length = gate.norm()[leader].clamp_min(1e-300) if self.cell.positive else 1.0
            square = square + (off / length).square()
        return torch.where(leader == here, 0.0, square.sqrt())


def _directions(vectors: Dense, code: Tensor, tolerance: float) -> Rows:
    """One atom for every class of collinear rows, `code` and its leader's place; rows of length zero are zero."""
    count = len(_matrix(vectors))
    some = (vectors.norm() > MARGIN * vectors.error * 1e-3).nonzero().squeeze(1)
    atoms = torch.zeros(count, dtype=torch.int64)
    coef, error = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    if len(some):
        own = Dense(_matrix(vectors)[some], vectors.keys, vectors.error[some])
        classes: Classes = congruence(own, Freedom.SCALE, tolerance)
        atoms[some], coef[some] = mix(code, some[classes.leader]), classes.scale
        spread = own.error + classes.scale.abs() * own.error[classes.leader] + classes.residual
        spread = spread / own.norm()[classes.leader]
        error[some] = torch.where(classes.leader == torch.arange(len(some)), 0.0, spread)
    return replace(Rows.of_atoms(atoms).scaled(coef), error=error)
