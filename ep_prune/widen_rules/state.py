"""What both walks share: the wide rows of every tensor, their scale variables, and the offsets that are needed.

Every wide channel j of a space has a share g_j of its narrow channel's outgoing weight: 1 in sum over the copies,
0 for nulls. With the scales d of a program point, B = diag(g / d) pulled back is the left inverse of T that the
backward condition needs: the gradient at the point is B times the narrow one's at every point of the space, since
an activation's derivative, batch norm and a sum hand on g_j = B_j d_j unchanged.

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
from ep_prune.embedding import ChannelEmbedding
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
    Standardize,
    Stencil,
    Sum,
    Symmetry,
)
from ep_prune.numbering import Known, Numbering
from ep_prune.slots import Slots
from ep_prune.widen_rules.draws import Draws


class Stuck(Exception):
    """These spaces admit no such embedding, for `reason`; `may_calm`: perhaps one without signs and offsets."""

    def __init__(self, spaces: frozenset[str], may_calm: bool, reason: str) -> None:
        super().__init__(f"no embedding of {', '.join(sorted(spaces))}: {reason}")
        self.spaces = spaces
        self.may_calm = may_calm
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Pull:
    """The pull-back map of a space: wide channel j is made of slot root members[pi[j]], or is a null (-1).

    `plain` (n,): one copy of every channel, which keeps its sign where a flip would carry an offset.
    `share` (n,): about which each copy's share of the outgoing weight is drawn; 1 in sum over the copies of a
    channel. `varied`: whether shares are drawn at all.
    """

    name: str
    members: Tensor
    pi: Tensor
    plain: Tensor
    share: Tensor
    varied: bool = True

    @property
    def k(self) -> int:
        return len(self.members)


@dataclass(eq=False)
class Wide:
    """The wide rows of one tensor: row i is made of narrow row source[i], or is a constant (-1).

    slot (N,): which wide channel it is. sign, size: its variables. share (N,): of its channel. Settled: d (0 for
    constants) and e; e is NaN for a row that is anything at all, which batch norm is going to multiply by 0.
    """

    source: Tensor
    slot: Tensor
    sign: Tensor
    size: Tensor
    share: Tensor
    d: Tensor = field(default_factory=lambda: torch.empty(0))
    e: Tensor | None = None

    @property
    def null(self) -> Tensor:
        return self.source < 0

    @property
    def offset(self) -> Tensor:
        assert self.e is not None
        return self.e

    def size_of_copies(self) -> Tensor:
        """|d| (N,) of a copy, 1 of a null."""
        return torch.where(self.null, 1.0, self.d.abs())

    def embedding(self, k: int) -> ChannelEmbedding:
        """x' = T x + t for these rows; k: the number of narrow rows."""
        real = (~self.null).nonzero().squeeze(1)
        return ChannelEmbedding(len(self.d), k, real, self.source[real], self.d[real], self.offset)

    def gather(self, z: Tensor) -> Tensor:
        """z T' for z (..., k): (..., N). As every row of T has one entry at most, no matrix is needed."""
        return z[..., self.source.clamp_min(0)] * self.d

    def add_up(self, x: Tensor, weight: Tensor, k: int) -> Tensor:
        """x diag(weight) S for x (..., N), S the pattern of T: (..., k), the copies of each channel added up."""
        weight = torch.where(self.null, 0.0, weight)
        total = torch.zeros(*x.shape[:-1], k, dtype=torch.float64)
        return total.index_add_(-1, self.source.clamp_min(0), x * weight)

    def times(self, x: Tensor, k: int) -> Tensor:
        """x T for x (..., N): (..., k)."""
        return self.add_up(x, self.d, k)

    def shares_over_scales(self) -> Tensor:
        """The entries (N,) of B', one for each row of T: what the backward condition needs, with B' T = I."""
        return torch.where(self.null, 0.0, self.share / torch.where(self.null, 1.0, self.d))

    def squares(self, k: int) -> Tensor:
        """(k,) the diagonal of T' T, which has nothing else."""
        return self.add_up(self.d, self.d, k)


@dataclass(frozen=True)
class Mode:
    """What an embedding may be. general: scales, signs and offsets at random, else copies and nulls alone.
    critical: the backward condition too. mixed: outgoing weights at random, as far as the conditions leave it."""

    general: bool
    critical: bool
    mixed: bool


class Widening:
    """One attempt: the state that both walks share."""

    def __init__(
        self,
        n: Numbering,
        kinds: Mapping[Node, Operation],
        pulls: list[Pull],
        calm: frozenset[str],
        mode: Mode,
        draws: Draws,
        given: Mapping[Node, tuple[Tensor, Tensor]] | None = None,
        untrained: frozenset[str] = frozenset(),
    ) -> None:
        self.untrained = untrained
        self.n, self.kinds, self.pulls, self.mode = n, kinds, pulls, mode
        self.general, self.critical = mode.general, mode.critical
        self.given = given or {}
        """For a weight's node, d (N,) and t (N,) that its input must have; NaN where that is open."""
        self.draws, self.calm_names = draws, calm
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
        self.shares = torch.cat([torch.ones(n.slots.count, dtype=torch.float64), *map(self._shares_of, pulls)])
        self.silent = torch.zeros_like(self.calm)
        """Wide channels whose constant, if they are nulls, must be 0 where they are read."""
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

    def _shares_of(self, pull: Pull) -> Tensor:
        """Shares about their centre, with the sum over the copies of a channel kept."""
        real = pull.pi >= 0
        step = self.draws.normal(f"{pull.name} shares", len(pull.pi), vary=pull.varied)
        members, into = step[real], pull.pi[real]
        total = torch.zeros(pull.k, dtype=torch.float64).index_add_(0, into, members)
        count = torch.zeros(pull.k, dtype=torch.float64).index_add_(0, into, torch.ones_like(members))
        shares = torch.zeros(len(pull.pi), dtype=torch.float64)
        shares[real] = pull.share[real] + members - (total / count)[into]
        return shares

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
        wide = Wide(source, slot, self.signs.fresh(len(slot)), self.sizes.fresh(len(slot)), self.shares[slot])
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

    def stuck(self, roots: Tensor) -> Stuck:
        found = torch.unique(self.home[roots]).tolist()
        names = frozenset(self.pulls[k].name for k in found if k >= 0)
        return Stuck(names, False, "its channels do not lie side by side")

    def stuck_at(self, *nodes: Node, reason: str, may_calm: bool = False) -> Stuck:
        """`Stuck` for all spaces of some nodes, the first of which is named."""
        first = torch.tensor(self.first)
        slots = torch.cat([self.wide[node].slot for node in nodes if node in self.wide])
        found = torch.unique(torch.searchsorted(first, slots, right=True) - 1).tolist()
        names = frozenset(self.pulls[k].name for k in found if k >= 0)
        return Stuck(names, may_calm, f"{reason}, {nodes[0].where}")

    # ---- variables ------------------------------------------------------------------------------------

    def same(self, x: Node, node: Node) -> None:
        """One variable, row by row, before and after."""
        a, b = self.pair(x, node)
        self.signs.unify(a.sign, b.sign)
        self.sizes.unify(a.size, b.size)

    def pair(self, x: Node, node: Node) -> tuple[Wide, Wide]:
        if x not in self.wide or node not in self.wide or not torch.equal(self.wide[x].slot, self.wide[node].slot):
            raise self.stuck_at(node, x, reason="its channels are rearranged here")
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
        flipped = self.draws.chance("signs", self.signs.count, 0.5 if self.general else 0.0)
        sign = torch.where(flipped, -1.0, 1.0).double()
        sign[self.signs.pinned(roots) | (marks[0] & marks[1])] = 1
        size = 2 ** self.draws.uniform("sizes", self.sizes.count, vary=self.general)
        size_roots = self.sizes.roots()
        size[self.sizes.pinned(size_roots)] = 1
        wanted = [(node, self.wide[op.x], self.given[node][0]) for node, op in self._given_inputs()]
        for _, rows, d in wanted:
            some = d.isfinite() & ~rows.null
            sign[roots[rows.sign[some]]] = d[some].sign()
            size[size_roots[rows.size[some]]] = d[some].abs()
        for rows in self.wide.values():
            rows.d = torch.where(rows.null, 0.0, sign[roots[rows.sign]] * size[size_roots[rows.size]])
        for node, rows, d in wanted:
            off = (rows.d - d).abs()[d.isfinite() & ~rows.null]
            if bool((off > 1e-9).any()):
                raise self.stuck_at(node, self._input(node), reason="the scales of its copies do not agree")

    def _given_inputs(self) -> list[tuple[Node, Contract]]:
        found = [(node, self.kinds[node]) for node in self.given]
        return [(node, op) for node, op in found if isinstance(op, Contract) and op.x in self.wide]

    def _input(self, node: Node) -> Node:
        op = self.kinds[node]
        assert isinstance(op, Contract)
        return op.x

    # ---- offsets --------------------------------------------------------------------------------------

    def produce(self, node: Node) -> Tensor:
        """(N,) offsets for a producer: random constants for nulls; what is needed, or free, for the others."""
        rows = self.wide[node]
        goal = self.goal(node)
        if goal is None:
            free = self.draws.normal(f"{node.name} offsets", len(rows.slot), vary=self.general)
            goal = torch.where(self.calm[rows.slot], 0.0, free)
        constants = self.draws.normal(f"{node.name} constants", len(rows.slot))
        constants = torch.where(self.silent[rows.slot], 0.0, constants + 0.3 * constants.sign())
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
        if isinstance(op, Standardize):
            return torch.zeros_like(rows.d)
        if isinstance(op, Contract) and user in self.given:
            return self.given[user][1].nan_to_num(0.0)
        if isinstance(op, Contract):
            padded = op.layout.groups > 1 and not all(op.layout.interior)
            closed = self.critical and not self.passes_constants(op, user)
            return torch.zeros_like(rows.d) if padded or closed else None
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
            raise self.stuck_at(node, reason="an offset would not get through what reads it", may_calm=True)

    def passes_constants(self, op: Contract, node: Node) -> bool:
        """Whether what constants send through a weight is a constant, and has a bias to go to."""
        return all(op.layout.interior) and self.has_room(op, node)

    def has_room(self, op: Contract, node: Node) -> bool:
        """Whether a constant that a weight sends can go into its bias, or into the widened batch norm behind.

        In critical mode the weight's gradient gains the bias's, which vanishes only if the bias is trained.
        """
        bias = op.bias
        if bias is None and node in self.wide and self.before_norm(node):
            behind = self.kinds[self.users[node][0]]
            bias = behind.bias if isinstance(behind, Normalize) else None
        if bias is None:
            return False
        return not self.critical or bias.tensor not in self.untrained or op.weight.tensor in self.untrained

    def tensor(self, node: Node) -> Tensor:
        return self.n.tensor(node)

    def before_norm(self, node: Node) -> bool:
        """Whether a batch norm with a shift alone reads this tensor."""
        behind = [self.kinds[user] for user in self.users[node]]
        return len(behind) == 1 and isinstance(behind[0], Normalize) and behind[0].bias is not None


def required(op: Operation, rows: Wide) -> Tensor:
    """The offset that an activation needs at its input."""
    center = op.symmetry.center if isinstance(op, Pointwise) else None
    return (center or (0.0, 0.0))[0] * (1 - rows.d)
