"""Streams under norms that see all channels: what a selection may take of them all the same.

    layer norm   mean and variance are those of the classes of equal channels, as long as all classes have as many
                 members each: of k copies of every channel, one of each stays
    RMS norm     sum of x_i^2 / n: what is zero goes, and copies x_i = c_i x_j go into the one that stays, which is
                 made larger, x'_j = a_j x_j with a_j^2 = (n' / n) sum c_i^2, so that the mean of the squares is
                 what it was, and eps with it

The narrow stream is then x' = a x: what writes to it is multiplied by a, and what reads it, the norms' gains among
them, divided. That is possible where all that is made of it is sums, norms and weights of its own (`_Walk`);
elsewhere the stream stays as it is, with the norm's reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.embedding import Scale
from ep_prune.graph import (
    Contract,
    Graph,
    Lookup,
    MeanSquare,
    Move,
    Node,
    Pass,
    Product,
    RootMeanSquare,
    Sum,
)
from ep_prune.numbering import Numbering
from ep_prune.rules import kind_of
from ep_prune.slots import Isometric, Standardized

AGREE = 1e-12
"""How far apart, relatively, two norms may want one channel to be scaled."""

Norms = Sequence[Standardized | Isometric]


def streams_of(n: Numbering, roots: Tensor) -> list[list[Standardized | Isometric]]:
    """The norms over all channels under which something could go, by their rows alone; those of one stream, that
    is, of tied channels, together."""
    streams: list[tuple[Tensor, list[Standardized | Isometric]]] = []
    for norm in _redundant_norms(n):
        own = torch.unique(roots[norm.slots])
        touched = [stream for stream in streams if bool(torch.isin(stream[0], own).any())]
        apart = [stream for stream in streams if not bool(torch.isin(stream[0], own).any())]
        members = [norm for _, norms in touched for norm in norms]
        streams = [*apart, (torch.cat([own, *(part for part, _ in touched)]), [*members, norm])]
    return [norms for _, norms in streams]


def _redundant_norms(n: Numbering) -> list[Standardized | Isometric]:
    found: list[Standardized | Isometric] = []
    for c in n.slots.constraints:
        if isinstance(c, Standardized):
            members = torch.bincount(c.leader, minlength=len(c.leader))
            if int(members.max()) > 1 and bool((members[members > 0] == members.max()).all()):
                found.append(c)
        elif isinstance(c, Isometric) and (bool(c.zero.any()) or len(torch.unique(c.leader)) < len(c.leader)):
            found.append(c)
    return found


def needed_by(norm: Standardized | Isometric, roots: Tensor, kept: Tensor) -> Tensor:
    """Roots that a norm needs beyond the kept ones (by root): a member of each class; equally many of all."""
    own = roots[norm.slots]
    have = kept[own].long()
    counts = torch.zeros_like(have).index_add_(0, norm.leader, have)
    heads = torch.zeros_like(counts, dtype=torch.bool)
    heads[norm.leader] = True
    if isinstance(norm, Isometric):
        missing = heads & (counts == 0) & ~norm.zero
        return own[missing]
    target = int(counts.max().clamp_min(1))
    order = norm.leader.argsort(stable=True)
    spare = (1 - have)[order]
    rank = spare.cumsum(0)
    first = torch.zeros_like(counts).scatter_reduce_(
        0, norm.leader[order], rank - spare, "amin", include_self=False
    )
    place = rank - first[norm.leader[order]]  # the how-manieth of its class that is not kept yet
    more = (spare > 0) & (place <= target - counts[norm.leader[order]])
    return own[order[more]]


def scales_of(n: Numbering, norms: Norms, roots: Tensor, kept: Tensor) -> tuple[Scale, ...] | None:
    """What makes up for the squares that are gone; None where nothing can."""
    factor = torch.ones(len(roots), dtype=torch.float64)
    known = torch.zeros(len(roots), dtype=torch.bool)
    reading = [norm for norm in norms if isinstance(norm, Isometric) and not bool(kept[roots[norm.slots]].all())]
    for norm in reading:
        own = roots[norm.slots]
        stays = kept[own] & ~norm.zero
        count = len(own)
        here = torch.arange(count)
        first = torch.full((count,), count).scatter_reduce_(0, norm.leader[stays], here[stays], "amin")
        target = torch.where(stays, here, first[norm.leader])
        counts = ~norm.zero
        ratio = (norm.scale / norm.scale[target.clamp_max(count - 1)])[counts]
        energy = torch.zeros(count, dtype=torch.float64).index_add_(0, target[counts], ratio.square())
        wanted = (energy * int(kept[own].sum()) / count).sqrt()[stays]
        old = torch.where(known[own[stays]], factor[own[stays]], wanted)
        if bool(((wanted - old).abs() > AGREE * old).any()):
            return None
        factor[own[stays]], known[own[stays]] = wanted, True
        if bool(((wanted - factor[own[stays]]).abs() > AGREE * wanted).any()):  # tied channels, not alike
            return None
    if not reading:
        return ()
    walk = _Walk(n)
    for norm in reading:
        reader = next(node for node in n.graph.nodes if node.name == norm.node)
        operation = kind_of(reader, n.graph)
        assert isinstance(operation, RootMeanSquare | MeanSquare)
        if not walk.covers(operation.x):
            return None
    return walk.scales(roots, kept, factor) if walk.owned() else None


@dataclass
class _Walk:
    """The values that are scaled along, and the tensors that make up for it: (tensor, axis) -> +1 or -1, the power
    of the factor that it is multiplied by."""

    n: Numbering
    seen: set[Node] = field(default_factory=set)
    edits: dict[tuple[str, int], int] = field(default_factory=dict)
    uses: dict[str, set[Node]] = field(default_factory=dict)
    """By tensor, the nodes at which its edit is what is needed."""
    _users: dict[Node, list[Node]] = field(default_factory=dict)

    def covers(self, start: Node) -> bool:
        """Walk from a value to all that it is made of and all that is made of it; False where that cannot be."""
        self._users = self._users or self.n.graph.users()
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node in self.seen:
                continue
            self.seen.add(node)
            more = None if node in self.n.graph.outputs else self._made_of(node)
            for user in self._users[node] if more is not None else ():
                read = self._read_by(user, node)
                more = None if more is None or read is None else more + read
            if more is None:
                return False
            waiting += more
        return True

    def owned(self) -> bool:
        """Whether no tensor that is edited is read anywhere else."""
        readers: dict[str, set[Node]] = {}
        for node, users in self._users.items():
            if node.tensor is not None:
                readers.setdefault(node.tensor, set()).update(users)
        return not any(readers[name] - self.uses[name] or name in self.n.pinned_tensors for name in self.uses)

    def scales(self, roots: Tensor, kept: Tensor, factor: Tensor) -> tuple[Scale, ...]:
        """The edits, at the places that stay."""
        found = []
        for (name, axis), power in self.edits.items():
            own = roots[self.n.slots.bound[name, axis]]
            by = factor[own[kept[own]]] ** power
            found.append(Scale(name, axis, torch.arange(len(by)), by))
        return tuple(found)

    def _edit(self, tensor: Node, axis: int, power: int, at: Node) -> bool:
        key = str(tensor.tensor), axis
        if tensor.tensor is None or key not in self.n.slots.bound or self.edits.get(key, power) != power:
            return False
        self.edits[key] = power
        self.uses.setdefault(key[0], set()).add(at)
        return True

    def _made_of(self, node: Node) -> list[Node] | None:
        """The values that `node` is the sum of, once what writes it is edited; None: it cannot be."""
        if node.target is None or node.tensor is not None:
            return None
        kind = kind_of(node, self.n.graph)
        if isinstance(kind, Contract):
            fits = kind.layout.groups == 1 and self._edit(kind.weight, int(kind.layout.inputs_first), 1, node)
            return [] if fits and (kind.bias is None or self._edit(kind.bias, 0, 1, node)) else None
        if isinstance(kind, Lookup):
            return [] if self._edit(kind.table, 1, 1, node) else None
        if isinstance(kind, Sum):
            sides = [side for side in (kind.x, kind.y) if isinstance(side, Node)]
            tables = [side for side in sides if side.tensor is not None]
            shape = len(node.shape or ())
            fits = len(sides) == 2 and all(
                self._edit(side, len(side.shape or ()) - 1, 1, node) and 0 < len(side.shape or ()) <= shape
                for side in tables
            )
            return [side for side in sides if side.tensor is None] if fits else None
        if isinstance(kind, Pass):
            return [kind.x]
        if isinstance(kind, Move) and len(kind.inputs) == 1:
            return list(kind.inputs)
        if isinstance(kind, Product):
            return self._stretched(kind)
        return None

    def _stretched(self, kind: Product) -> list[Node] | None:
        """The side of a product that has the channels, where the other has one number a position."""
        sides = [side for side in (kind.x, kind.y) if isinstance(side, Node) and side.tensor is None]
        if len(sides) != 2 or (kind.divide and sides[1].shape != (*(sides[1].shape or ())[:-1], 1)):
            return None
        one = [side for side in sides if side.shape and side.shape[-1] == 1]
        return [side for side in sides if side not in one] if len(one) == 1 else None

    def _read_by(self, user: Node, node: Node) -> list[Node] | None:
        """The values that are scaled because `node` is; None: something would see that it is."""
        graph: Graph = self.n.graph
        if not self._users[user] and user not in graph.outputs:  # assertions on shapes and types
            return []
        kind = kind_of(user, graph)
        if isinstance(kind, Contract):
            fits = kind.x is node and kind.layout.groups == 1
            return [] if fits and self._edit(kind.weight, int(not kind.layout.inputs_first), -1, user) else None
        if isinstance(kind, RootMeanSquare):
            gain = kind.weight
            return [] if gain is not None and self._edit(gain, 0, -1, user) else None
        if isinstance(kind, MeanSquare):
            return []
        if all(isinstance(kind_of(after, graph), MeanSquare) for after in self._users[user]):
            return []  # the square itself
        if isinstance(kind, Product) and not kind.divide:
            other = kind.y if kind.x is node else kind.x
            if isinstance(other, Node) and other.tensor is not None:
                return [] if self._edit(other, len(other.shape or ()) - 1, -1, user) else None
        if isinstance(kind, Product):
            stretched = self._stretched(kind)
            return [user] if stretched == [node] else None
        return [user] if isinstance(kind, Sum | Pass | Move) else None
