"""What both walks share: the wide rows of every tensor, their scale variables, and the offsets that are needed.

A producer (a weight with a bias, or batch norm) whose offset is free takes a random one, or the one that an
activation behind it needs (`Widening.goal`): the last producer of a sum makes up for the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.channels import Channels
from ep_prune.graph import (
    Cat,
    Contract,
    Extreme,
    Item,
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

    # ---- rows -----------------------------------------------------------------------------------------

    def rows_of(self, node: Node) -> Wide | None:
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
        wide = Wide(source, slot, self.signs.fresh(len(slot)), self.sizes.fresh(len(slot)))
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
        for start, stop in itertools.pairwise(starts):
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
        found = torch.unique(self.home[roots]).tolist()
        return Stuck(frozenset(self.pulls[k].name for k in found if k >= 0), may_calm)

    def stuck_at(self, *nodes: Node, may_calm: bool = False) -> Stuck:
        """`Stuck` for all spaces of some nodes."""
        first = torch.tensor(self.first)
        slots = torch.cat([self.wide[node].slot for node in nodes if node in self.wide])
        found = torch.unique(torch.searchsorted(first, slots, right=True) - 1).tolist()
        return Stuck(frozenset(self.pulls[k].name for k in found if k >= 0), may_calm)

    # ---- variables ------------------------------------------------------------------------------------

    def same(self, x: Node, node: Node) -> None:
        """One variable, row by row, before and after."""
        a, b = self.pair(x, node)
        self.signs.unify(a.sign, b.sign)
        self.sizes.unify(a.size, b.size)

    def pair(self, x: Node, node: Node) -> tuple[Wide, Wide]:
        if x not in self.wide or node not in self.wide or not torch.equal(self.wide[x].slot, self.wide[node].slot):
            raise self.stuck_at(x, node)
        return self.wide[x], self.wide[node]

    def through(self, symmetry: Symmetry, x: Node, node: Node) -> None:
        """What an activation lets through."""
        a, b = self.pair(x, node)
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
        else:
            self.signs.pin(torch.cat([a.sign, b.sign]), "no sign goes through")

    def fix(self, node: Node) -> None:
        if node in self.wide:
            self.signs.pin(self.wide[node].sign, "fixed")
            self.sizes.pin(self.wide[node].size, "fixed")

    def draw(self) -> None:
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
