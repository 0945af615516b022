"""How each kind of operation carries x' = d x + e from one program point to the next.

Two walks over the graph. `link` says which scales are the same variable and which are fixed: sizes |d| and signs
are separate variables of every wide row, tied by unions, since

    positively homogeneous   |d| before = |d| after, sign +, e = 0
    odd about (c, l)         |d| = 1, one sign before and after, e = c (1 - d) before, l (1 - d) after
    even                     sign before, none after
    none                     d = 1, e = 0
    sum                      d equal on both sides, e adds up
    max pool                 sign +
    batch norm, weights      any d after any d before

Then all variables are drawn, and `settle` walks again, carries e, and writes the wide parameters. A producer whose
offset is free takes a random one, or the one that an activation behind it needs (`Widening.goal`). What cannot
be met raises `Stuck`: the space is tried again without signs and offsets, and left alone if that fails too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch

import torch
from torch import Tensor

from ep_prune.channels import Channels
from ep_prune.graph import (
    Barrier,
    Cat,
    Contract,
    Extreme,
    Item,
    Layout,
    Move,
    Node,
    Normalize,
    Operation,
    Pass,
    Pointwise,
    Product,
    Slope,
    Stencil,
    Sum,
    Symmetry,
)
from ep_prune.numbering import Known, Numbering
from ep_prune.slots import Slots

_HOMOGENEOUS = Symmetry(degree=1)


class Stuck(Exception):
    """These spaces admit no such embedding; `may_calm`: perhaps one without signs and offsets."""

    def __init__(self, spaces: frozenset[str], may_calm: bool) -> None:
        super().__init__(f"no embedding of {', '.join(sorted(spaces))}")
        self.spaces = spaces
        self.may_calm = may_calm


@dataclass(frozen=True, eq=False)
class Pull:
    """The pull-back map of a space: wide channel j is made of slot root members[pi[j]], or is a null (-1).

    `plain` (n,): one copy of every channel, which keeps its sign where a flip would carry an offset.
    """

    name: str
    members: Tensor
    pi: Tensor
    plain: Tensor


@dataclass(eq=False)
class Wide:
    """The wide rows of one tensor: row i is made of narrow row source[i], or is a constant (-1).

    slot (N,): which wide channel it is. sign, size: its variables. Settled: d (0 for constants) and e; e is NaN
    for a row that is anything at all, which batch norm is going to multiply by 0.
    """

    source: Tensor
    slot: Tensor
    sign: Tensor
    size: Tensor
    d: Tensor = field(default_factory=lambda: torch.empty(0))
    e: Tensor | None = None

    @property
    def null(self) -> Tensor:
        return self.source < 0

    @property
    def offset(self) -> Tensor:
        assert self.e is not None
        return self.e


class Widening:
    """One attempt: the state that both walks share."""

    def __init__(
        self,
        n: Numbering,
        kinds: Mapping[Node, Operation],
        pulls: list[Pull],
        calm: frozenset[str],
        general: bool,
        generator: torch.Generator,
    ) -> None:
        self.n, self.kinds, self.pulls, self.general = n, kinds, pulls, general
        self.generator = generator
        self.users = n.graph.users()
        self.roots = n.slots.roots()
        self.home = torch.full((n.slots.count,), -1, dtype=torch.int64)
        self.first = [n.slots.count]
        for k, pull in enumerate(pulls):
            self.home[pull.members] = k
            self.first.append(self.first[-1] + len(pull.pi))
        frozen = torch.zeros(n.slots.count, dtype=torch.bool)
        self.plain = torch.cat([~frozen, *(pull.plain for pull in pulls)])
        calmed = [torch.full((len(pull.pi),), pull.name in calm) for pull in pulls]
        self.calm = torch.cat([~frozen, *calmed])
        self.wide: dict[Node, Wide] = {}
        self.moved: dict[Node, list[tuple[Node, Tensor, Tensor]]] = {}
        """Move and Cat: out rows of the node that are rows of an operand."""
        self.signs, self.sizes = Slots(), Slots()
        self.carrying: list[Tensor] = []
        """Sign variables whose flip brings an offset along."""
        self.rigid: list[Tensor] = []
        """Sign variables of rows that must have none."""
        self.new: dict[str, Tensor] = {}
        self.groups: dict[str, int] = {}

    def run(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The wide parameters by name, and the groups of depthwise convolutions. Raises `Stuck`."""
        for node, op in self.kinds.items():
            made = self._rows(node)
            if made is not None:
                self.wide[node] = made
            if made is not None or any(operand in self.wide for operand in node.operands()):
                link(op, node, self)
        self._draw()
        for node, op in self.kinds.items():
            if node in self.wide or any(operand in self.wide for operand in node.operands()):
                settle(op, node, self)
        return self.new, self.groups

    # ---- rows -----------------------------------------------------------------------------------------

    def _rows(self, node: Node) -> Wide | None:
        """The wide rows of a node, in the order of its channel axis; None where none is widened."""
        value = self.n.values[node]
        if not isinstance(value, Channels):
            return None
        roots = self.roots[value.slots[value.labels.reshape(-1)]]
        if bool((self.home[roots] < 0).all()):
            return None
        if len(value.axes()) > 1:
            raise self.stuck(roots)
        source, slot = self._expand(roots)
        wide = Wide(source, slot, self.signs.fresh(len(slot), ""), self.sizes.fresh(len(slot), ""))
        still = self.calm[slot]
        self.signs.pin(wide.sign[still], "calm")
        self.sizes.pin(wide.size[slot < self.n.slots.count], "not widened")
        return wide

    def _expand(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """(source, slot) of the wide rows for narrow rows with these roots: run by run of one space each."""
        home = self.home[roots]
        cuts = (home[1:] != home[:-1]).nonzero().squeeze(1) + 1
        starts = [0, *cuts.tolist(), len(roots)]
        sources, slots = [], []
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            own = roots[start:stop]
            k = int(home[start])
            if k < 0:
                sources.append(torch.arange(start, stop))
                slots.append(own)
                continue
            members, pi = self.pulls[k].members, self.pulls[k].pi
            times, rest = divmod(len(own), len(members))
            slot = torch.arange(self.first[k], self.first[k + 1])
            tile = torch.arange(times)
            if not rest and torch.equal(own, members.repeat(times)):  # positions outside
                source = pi + len(members) * tile.unsqueeze(1)
                nulls, slot = (pi < 0).repeat(times), slot.repeat(times)
            elif not rest and torch.equal(own, members.repeat_interleave(times)):  # inside: flatten
                source = times * pi.unsqueeze(1) + tile
                nulls, slot = (pi < 0).repeat_interleave(times), slot.repeat_interleave(times)
            else:
                raise self.stuck(own)
            sources.append(torch.where(nulls, -1, source.reshape(-1) + start))
            slots.append(slot)
        return torch.cat(sources), torch.cat(slots)

    def stuck(self, roots: Tensor, may_calm: bool = False) -> Stuck:
        found = self.home[roots].unique().tolist()
        return Stuck(frozenset(self.pulls[k].name for k in found if k >= 0), may_calm)

    def stuck_at(self, *nodes: Node, may_calm: bool = False) -> Stuck:
        """`Stuck` for all spaces of some nodes."""
        first = torch.tensor(self.first)
        slots = torch.cat([self.wide[node].slot for node in nodes if node in self.wide])
        found = (torch.searchsorted(first, slots, right=True) - 1).unique().tolist()
        return Stuck(frozenset(self.pulls[k].name for k in found if k >= 0), may_calm)

    # ---- variables ------------------------------------------------------------------------------------

    def same(self, x: Node, node: Node) -> None:
        """One variable, row by row, before and after."""
        a, b = self._pair(x, node)
        self.signs.unify(a.sign, b.sign)
        self.sizes.unify(a.size, b.size)

    def _pair(self, x: Node, node: Node) -> tuple[Wide, Wide]:
        if x not in self.wide or node not in self.wide or not torch.equal(self.wide[x].slot, self.wide[node].slot):
            raise self.stuck_at(x, node)
        return self.wide[x], self.wide[node]

    def through(self, symmetry: Symmetry, x: Node, node: Node) -> None:
        """What an activation lets through."""
        a, b = self._pair(x, node)
        if symmetry.degree == 1:
            self.sizes.unify(a.size, b.size)
        else:
            self.sizes.pin(torch.cat([a.size, b.size]), "no scale goes through")
        if symmetry.even:
            self.signs.pin(b.sign, "even")
        elif symmetry.center is not None:
            self.signs.unify(a.sign, b.sign)
            for rows, carries in ((a, symmetry.center[0]), (b, symmetry.center[1])):
                if carries != 0:
                    self.carrying.append(rows.sign)
                    self.signs.pin(rows.sign[self.plain[rows.slot]], "one copy without offset")
        else:
            self.signs.pin(torch.cat([a.sign, b.sign]), "no sign goes through")

    def fix(self, node: Node) -> None:
        if node in self.wide:
            self.signs.pin(self.wide[node].sign, "fixed")
            self.sizes.pin(self.wide[node].size, "fixed")

    def _draw(self) -> None:
        """Random signs and sizes; d of every row."""
        roots = self.signs.roots()
        marks = []
        for parts in (self.carrying, self.rigid):
            mark = torch.zeros(self.signs.count, dtype=torch.bool)
            mark[roots[torch.cat([torch.empty(0, dtype=torch.int64), *parts])]] = True
            marks.append(mark)
        sign = self.uniform(self.signs.count, -1, 1).sign()
        sign[self.signs.pinned(roots) | (marks[0] & marks[1])] = 1
        size = 2 ** self.uniform(self.sizes.count, -1, 1)
        size_roots = self.sizes.roots()
        size[self.sizes.pinned(size_roots)] = 1
        for rows in self.wide.values():
            d = (
                sign[roots[rows.sign]] * size[size_roots[rows.size]]
                if self.general
                else torch.ones(len(rows.slot))
            )
            rows.d = torch.where(rows.null, 0.0, d.double())

    def uniform(self, count: int, low: float, high: float) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    # ---- offsets --------------------------------------------------------------------------------------

    def produce(self, node: Node) -> Tensor:
        """(N,) offsets for a producer: random constants for nulls; what is needed, or free, for the others."""
        rows = self.wide[node]
        goal = self.goal(node)
        free = self.general & ~self.calm[rows.slot]
        if goal is None:
            goal = torch.where(free, self.normal(len(rows.slot)), 0.0)
        constants = self.normal(len(rows.slot))
        constants = constants + 0.3 * constants.sign()
        return torch.where(rows.null, constants, goal)

    def goal(self, node: Node) -> Tensor | None:
        """The offset that a tensor must have for what reads it, as far as that is settled."""
        for user in self.users[node]:
            needed = self._goal_behind(self.kinds[user], user, node)
            if needed is not None:
                return needed
        return None

    def _goal_behind(self, op: Operation, user: Node, node: Node) -> Tensor | None:
        rows = self.wide[node]
        if isinstance(op, Pointwise | Slope):
            return required(op, rows)
        if isinstance(op, Contract):
            padded = op.layout.groups > 1 and not all(op.layout.interior)
            return torch.zeros_like(rows.d) if padded else None
        if user not in self.wide or not isinstance(
            op, Pass | Item | Stencil | Extreme | Move | Cat | Sum | Product
        ):
            return None
        behind = self.goal(user)
        if behind is None:
            return None
        if user in self.moved:
            back = torch.zeros_like(rows.d)
            for operand, out, into in self.moved[user]:
                if operand is node:
                    back[into] = behind[out]
            return back
        if isinstance(op, Sum):
            sides = [(op.x, 1.0), (op.y, op.alpha)]
            own = [alpha for side, alpha in sides if side is node]
            if len(own) != 1:
                return None
            for side, alpha in sides:
                if side is node:
                    continue
                constant = self.number(side)
                if constant is not None:
                    behind = behind - alpha * constant * (1 - rows.d)
                elif isinstance(side, Node) and side in self.wide and self.wide[side].e is not None:
                    behind = behind - alpha * self.wide[side].offset
                else:
                    return None
            return behind / own[0]
        if isinstance(op, Product):
            factor = self.factor(op)
            return torch.zeros_like(rows.d) if factor is None else behind / factor
        return behind

    def number(self, side: Node | float) -> float | None:
        """The value of an operand that is one number."""
        if not isinstance(side, Node):
            return float(side)
        value = self.n.values[side]
        return float(value.value) if isinstance(value, Known) and value.value.numel() == 1 else None

    def factor(self, op: Product) -> float | None:
        """The number that a product multiplies by, or None for two tensors."""
        x, y = self.number(op.x), self.number(op.y)
        if y is not None:
            return 1 / y if op.divide else y
        return x

    def need(self, node: Node, offsets: Tensor) -> None:
        """A tensor must have these offsets, nulls aside."""
        rows = self.wide[node]
        if bool(((rows.offset - offsets).abs() > 1e-9)[~rows.null].any()):
            raise self.stuck_at(node, may_calm=True)

    def tensor(self, node: Node) -> Tensor:
        return self.n.tensor(node)

    def before_norm(self, node: Node) -> bool:
        """Whether batch norm alone reads this tensor."""
        return [type(self.kinds[user]) for user in self.users[node]] == [Normalize]


def required(op: Operation, rows: Wide) -> Tensor:
    """The offset that an activation needs at its input."""
    center = op.symmetry.center if isinstance(op, Pointwise) else None
    return (center or (0.0, 0.0))[0] * (1 - rows.d)


# ---- link: which variables are one ------------------------------------------------------------------------


@singledispatch
def link(op: Operation, node: Node, w: Widening) -> None:
    """Tie the scale variables before and after an operation. Raises `Stuck`."""
    if isinstance(op, Barrier) and node.op == "aten._assert_tensor_metadata":
        return
    raise w.stuck_at(node, *node.operands())


@link.register(Pass)
@link.register(Item)
def _(op: Pass | Item, node: Node, w: Widening) -> None:
    w.same(op.x, node)


@link.register
def _(op: Stencil, node: Node, w: Widening) -> None:
    if not op.keeps_constants:
        raise w.stuck_at(op.x, node)
    w.same(op.x, node)


@link.register
def _(op: Extreme, node: Node, w: Widening) -> None:
    w.same(op.x, node)
    w.signs.pin(w.wide[node].sign, "an extreme")


@link.register
def _(op: Sum, node: Node, w: Widening) -> None:
    for side in (op.x, op.y):
        if isinstance(side, Node) and w.number(side) is None:
            w.same(side, node)


@link.register
def _(op: Product, node: Node, w: Widening) -> None:
    tensors = [side for side in (op.x, op.y) if isinstance(side, Node) and w.number(side) is None]
    if (op.divide and w.number(op.y) is None) or w.factor(op) == 0:
        raise w.stuck_at(node, *node.operands())
    for side in tensors:
        w.same(side, node)
    if len(tensors) == 2:
        w.fix(node)


@link.register
def _(op: Pointwise, node: Node, w: Widening) -> None:
    w.through(op.symmetry, op.x, node)


@link.register
def _(op: Slope, node: Node, w: Widening) -> None:
    w.through(_HOMOGENEOUS, op.x, node)


@link.register
def _(op: Normalize, node: Node, w: Widening) -> None:
    w._pair(op.x, node)


@link.register
def _(op: Contract, node: Node, w: Widening) -> None:
    groups, _, inputs, _ = op.layout.canonical(w.tensor(op.weight)).shape
    if op.x in w.wide:
        rows = int(w.wide[op.x].source.max()) + 1
        if rows != groups * inputs or (groups > 1 and inputs > 1):
            raise w.stuck_at(op.x, node)
    if groups > 1:
        if op.x not in w.wide or node not in w.wide:
            raise w.stuck_at(op.x, node)
        if not all(op.layout.interior):
            w.rigid.append(w.wide[op.x].sign)
    if node in w.wide and op.bias is None and not w.before_norm(node):
        w.rigid.append(w.wide[node].sign)


@link.register
def _(op: Move, node: Node, w: Widening) -> None:
    (x,) = op.inputs
    if x not in w.wide or node not in w.wide:
        raise w.stuck_at(x, node)
    before, after = w.wide[x].slot, w.wide[node].slot
    out = torch.arange(len(after))
    if torch.equal(before, after):
        into = out
    else:
        place = torch.full((w.first[-1],), -1)
        place[before] = torch.arange(len(before))
        into = place[after]
        if len(before.unique()) < len(before) or bool((into < 0).any()):
            raise w.stuck_at(x, node)
    _link_moved(w, node, [(x, out, into)])


@link.register
def _(op: Cat, node: Node, w: Widening) -> None:
    if node not in w.wide or op.stack:
        raise w.stuck_at(node, *op.inputs)
    slot = w.wide[node].slot
    parts, start = [], 0
    for x in op.inputs:
        size = len(w.wide[x].slot) if x in w.wide else (x.shape or ())[op.axis]
        out = torch.arange(start, start + size)
        start += size
        if x in w.wide:
            if start > len(slot) or not torch.equal(slot[out], w.wide[x].slot):
                raise w.stuck_at(node, *op.inputs)
            parts.append((x, out, torch.arange(size)))
    if start != len(slot):
        raise w.stuck_at(node, *op.inputs)
    _link_moved(w, node, parts)


def _link_moved(w: Widening, node: Node, parts: list[tuple[Node, Tensor, Tensor]]) -> None:
    w.moved[node] = parts
    rows = w.wide[node]
    for x, out, into in parts:
        w.signs.unify(rows.sign[out], w.wide[x].sign[into])
        w.sizes.unify(rows.size[out], w.wide[x].size[into])


# ---- settle: offsets and wide parameters ------------------------------------------------------------------


@singledispatch
def settle(op: Operation, node: Node, w: Widening) -> None:
    """Carry the offsets through an operation, and write its wide parameters. Raises `Stuck`."""


@settle.register(Pass)
@settle.register(Item)
@settle.register(Stencil)
@settle.register(Extreme)
def _(op: Pass | Item | Stencil | Extreme, node: Node, w: Widening) -> None:
    w.wide[node].e = w.wide[op.x].offset


@settle.register(Move)
@settle.register(Cat)
def _(op: Move | Cat, node: Node, w: Widening) -> None:
    e = torch.zeros_like(w.wide[node].d)
    for x, out, into in w.moved[node]:
        e[out] = w.wide[x].offset[into]
    w.wide[node].e = e


@settle.register
def _(op: Sum, node: Node, w: Widening) -> None:
    """(d x + e) + alpha (d y + f) = d (x + alpha y) + e + alpha f; a number c adds (1 - d) c."""
    rows = w.wide[node]
    e = torch.zeros_like(rows.d)
    for side, alpha in ((op.x, 1.0), (op.y, op.alpha)):
        constant = w.number(side)
        if constant is not None:
            e = e + alpha * constant * (1 - rows.d)
        elif isinstance(side, Node):
            e = e + alpha * w.wide[side].offset
    rows.e = e


@settle.register
def _(op: Product, node: Node, w: Widening) -> None:
    rows = w.wide[node]
    factor = w.factor(op)
    tensors = [side for side in (op.x, op.y) if isinstance(side, Node) and side in w.wide]
    if factor is not None:
        rows.e = w.wide[tensors[0]].offset * factor
        return
    for side in tensors:
        w.need(side, torch.zeros_like(rows.d))
    rows.e = torch.where(rows.null, w.wide[tensors[0]].offset * w.wide[tensors[1]].offset, 0.0)


@settle.register
def _(op: Pointwise, node: Node, w: Widening) -> None:
    x, rows = w.wide[op.x], w.wide[node]
    w.need(op.x, required(op, x))
    level = (op.symmetry.center or (0.0, 0.0))[1]
    rows.e = torch.where(rows.null, op.function(x.offset), level * (1 - rows.d))


@settle.register
def _(op: Slope, node: Node, w: Widening) -> None:
    x, rows = w.wide[op.x], w.wide[node]
    w.need(op.x, torch.zeros_like(x.d))
    slope = w.tensor(op.slope)
    if slope.numel() > 1:
        slope = _pulled(slope, rows, w.uniform(len(rows.d), 0, 1))
        w.new[str(op.slope.tensor)] = slope
    rows.e = x.offset.clamp_min(0) + slope * x.offset.clamp_max(0)


@settle.register
def _(op: Normalize, node: Node, w: Widening) -> None:
    """g' (x' - m') / s' + b' = d (g (x - m) / s + b) + e: s' and m' at random, g' and b' follow."""
    x, rows = w.wide[op.x], w.wide[node]
    assert op.weight is not None and op.bias is not None
    count = len(rows.d)
    gain, shift, mean, variance = (
        _pulled(w.tensor(part), rows, other)
        for part, other in (
            (op.weight, w.normal(count)),
            (op.bias, w.normal(count)),
            (op.mean, w.normal(count)),
            (op.variance, w.uniform(count, 0.5, 2)),
        )
    )
    e = w.produce(node)
    wide_variance = variance * 4 ** w.uniform(count, -1, 1) if w.general else variance
    deviation, wide_deviation = (variance + op.eps).sqrt(), (wide_variance + op.eps).sqrt()
    anything = x.offset.isnan()
    e_in = x.offset.nan_to_num(0.0)
    wide_mean = x.d * mean + e_in
    if w.general:
        wide_mean = wide_mean + 0.5 * w.normal(count) * wide_deviation
    into = torch.where(rows.null, 1.0, x.d)
    wide_gain = torch.where(rows.null, gain, rows.d * gain * wide_deviation / (deviation * into))
    wide_gain = torch.where(anything, 0.0, wide_gain)
    constant = torch.where(rows.null, e, rows.d * (shift - gain * mean / deviation) + e)
    wide_shift = constant - wide_gain * (e_in - wide_mean) / wide_deviation
    for part, value in zip(
        (op.weight, op.bias, op.mean, op.variance), (wide_gain, wide_shift, wide_mean, wide_variance), strict=True
    ):
        w.new[str(part.tensor)] = value
    rows.e = e


def _pulled(narrow: Tensor, rows: Wide, otherwise: Tensor) -> Tensor:
    return torch.where(rows.null, otherwise, narrow[rows.source.clamp_min(0)])


@settle.register
def _(op: Contract, node: Node, w: Widening) -> None:
    x, rows = w.wide.get(op.x), w.wide.get(node)
    weight = op.layout.canonical(w.tensor(op.weight))
    if op.layout.groups > 1:
        assert x is not None and rows is not None
        wide = _depthwise(op, node, w, weight, x, rows)
    else:
        wide = _dense(op, node, w, weight[0], x, rows).unsqueeze(0)
    kernel = tuple((op.weight.shape or ())[2:])
    w.new[str(op.weight.tensor)] = op.layout.original(wide, kernel).contiguous()


def _dense(op: Contract, node: Node, w: Widening, weight: Tensor, x: Wide | None, rows: Wide | None) -> Tensor:
    """A random W' (N_out, N_in, taps) with W' T = diag(r) W[pi] and, where constants may not pass, W' t = 0.

    With A = [T, t], or T alone: W' = W0 + (R - W0 A) A^+, W0 at random.
    """
    outputs, inputs, taps = weight.shape
    scale = torch.ones(outputs, dtype=torch.float64) if rows is None else rows.d
    target = weight if rows is None else weight[rows.source.clamp_min(0)] * scale.reshape(-1, 1, 1)
    anything = torch.zeros(len(scale), dtype=torch.bool)
    if rows is not None and w.general and w.before_norm(node):
        anything = rows.null & (w.uniform(len(scale), 0, 1) < 0.3)
    T, t = _matrix(x, inputs)
    passes = torch.tensor(op.layout.interior)
    if op.bias is None and not (rows is not None and w.before_norm(node)):
        passes = torch.zeros_like(passes)
    size = weight.square().mean().sqrt()
    draw = w.normal(len(scale), len(T), taps) * size
    wide = torch.empty_like(draw)
    for chosen, A, wanted in _systems(T, t, target, passes):
        if torch.linalg.cond(A) > 1e4:
            raise w.stuck_at(op.x, may_calm=True)
        inverse = torch.linalg.pinv(A)
        part = draw[:, :, chosen].transpose(1, 2)
        if x is None:
            part = wanted
        else:
            for _ in range(3):  # the second and third pass remove the rounding of the first
                part = part + (wanted - part @ A) @ inverse
        wide[:, :, chosen] = part.transpose(1, 2)
    wide[anything] = w.normal(*wide[anything].shape) * size
    sent = torch.einsum("oit,i->o", wide[:, :, passes], t)
    if rows is not None:
        rows.e = w.produce(node) if op.bias is not None else torch.where(passes.any(), sent, 0.0)
        rows.e[anything] = torch.nan
    if op.bias is not None:
        bias = w.tensor(op.bias)
        if rows is not None:
            bias = torch.where(rows.null, 0.0, bias[rows.source.clamp_min(0)] * scale) + rows.offset.nan_to_num(
                0.0
            )
        w.new[str(op.bias.tensor)] = bias - torch.where(anything, 0.0, sent)
    return wide


def _systems(T: Tensor, t: Tensor, target: Tensor, passes: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(taps, A, R) for the taps through which constants may pass, and for the others."""
    found = []
    wanted = target.transpose(1, 2)
    cancel = bool((t != 0).any())
    for some, A in ((passes, T), (~passes, torch.cat([T, (t / t.norm()).unsqueeze(1)], 1) if cancel else T)):
        if not bool(some.any()):
            continue
        R = wanted[:, some]
        if A.shape[1] > T.shape[1]:
            R = torch.cat([R, torch.zeros_like(R[:, :, :1])], 2)
        found.append((some, A, R))
    return found


def _matrix(x: Wide | None, inputs: int) -> tuple[Tensor, Tensor]:
    """T (N, K) and t (N,) of a weight's input."""
    if x is None:
        return torch.eye(inputs, dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64)
    T = torch.zeros(len(x.d), inputs, dtype=torch.float64)
    real = (~x.null).nonzero().squeeze(1)
    T[real, x.source[real]] = x.d[real]
    return T, x.offset


def _depthwise(op: Contract, node: Node, w: Widening, weight: Tensor, x: Wide, rows: Wide) -> Tensor:
    """(N, m, 1, taps): wide channel j reads wide channel j; a null's weights are zero behind padding."""
    layout: Layout = op.layout
    groups, each, _, taps = weight.shape
    padded = not all(layout.interior)
    if padded:
        w.need(op.x, torch.zeros_like(x.d))
    out_d, null = rows.d.reshape(-1, each), x.null
    ratio = out_d / torch.where(null, 1.0, x.d).unsqueeze(1)
    wide = weight[x.source.clamp_min(0)] * ratio.reshape(-1, each, 1, 1)
    junk = w.normal(*wide.shape) * weight.square().mean().sqrt()
    anything = torch.zeros_like(null)
    free = op.bias is not None or w.before_norm(node)
    if w.general and w.before_norm(node):
        anything = null & (w.uniform(len(null), 0, 1) < 0.3)
    keep = null & (not padded and free) | anything
    wide = torch.where(keep.reshape(-1, 1, 1, 1), junk, wide)
    sent = torch.where(null & padded, 0.0, 1.0).unsqueeze(1) * (wide.sum((2, 3)) * x.offset.unsqueeze(1))
    if not free and bool((sent != 0).any()):
        raise w.stuck_at(op.x, may_calm=True)
    sent = sent.reshape(-1)
    rows.e = w.produce(node) if op.bias is not None else sent.clone()
    if op.bias is not None:
        bias = torch.where(rows.null, 0.0, w.tensor(op.bias)[rows.source.clamp_min(0)] * rows.d)
        w.new[str(op.bias.tensor)] = bias + rows.offset - sent
    rows.e[anything.repeat_interleave(each)] = torch.nan
    w.groups[str(op.weight.tensor)] = len(wide)
    return wide
