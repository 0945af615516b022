"""Pairs of weights: the outputs of the first are read by the second alone.

Fitted by itself, a weight makes every channel that stays as much like itself as it can. Where nothing but the next
weight reads these channels, that is more than is asked for: they may become any others, as long as the next weight
can make its outputs of them. A `Block` is such a pair as a function of both weights, in narrow shapes, so that
`gauss_newton.improved` can move them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.calibrate import Program, Values, bytes_of, positions
from ep_prune.graph import Extreme, Item, Node, Normalize, Pass, Pointwise, Stencil
from ep_prune.readers import Reader
from ep_prune.rules import kind_of
from ep_prune.structure import Structure

ROWS = 2**17
"""Outputs of the second weight, about, that steps are made of: at fewer places of an image, more images."""
MEMORY = 2**30
"""Bytes that steps may hold, about; beyond, they are made of fewer images."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two weights, the outputs of the first read by the second alone, through the nodes `between`."""

    first: Reader
    second: Reader
    between: tuple[Node, ...]

    def chunks(self, size: int) -> int:
        """Of how many chunks of `size` samples steps are made."""
        places = positions(self.second.node, self.second.op)
        each = 8 * sum(bytes_of(node) for node in (self.first.node, *self.between, self.second.node))
        traced = max((self.first.node.shape or (1,))[0], 1)
        most = min(ROWS // places, MEMORY * traced // max(each, 1))
        return max(most // size, 1)


def pairs_of(program: Program, readers: Sequence[Reader]) -> dict[Node, Pair]:
    """All pairs, by the second weight's node."""
    graph, users = program.graph, program.graph.users()
    by_node = {reader.node: reader for reader in readers if _plain(reader)}
    found = {}
    for first in by_node.values():
        at = first.node
        between: list[Node] = []
        while len(users[at]) == 1 and at not in graph.outputs:
            user = users[at][0]
            if user in by_node:
                second = by_node[user]
                if between and second.op.x is at and not bool(torch.isin(first.roots, second.roots).any()):
                    found[user] = Pair(first, second, tuple(between))
                break
            same = isinstance(kind_of(user, graph), Normalize | Pointwise | Pass | Item | Extreme | Stencil)
            if not same or any(o.tensor is None and o is not at for o in user.operands()):
                break
            between.append(user)
            at = user
    return found


def _plain(reader: Reader) -> bool:
    """Whether the weight can be cut to narrow shapes by its rows and columns alone."""
    layout = reader.op.layout
    return not (reader.kept_whole or reader.by_channels or layout.inputs_first or layout.groups > 1) and (
        reader.op.weight.tensor == reader.name and reader.constant is not None
    )


@dataclass(frozen=True, eq=False)
class Part:
    """One weight of a pair, in narrow shapes. rows, columns: which outputs and inputs are left of the wide one."""

    reader: Reader
    rows: Tensor
    columns: Tensor
    weight: Tensor

    @staticmethod
    def of(reader: Reader, kept: Tensor, wide: Tensor) -> Part:
        rows = kept[reader.outputs.reshape(-1)].nonzero().squeeze(1).to(wide.device)
        columns = kept[reader.roots].nonzero().squeeze(1).to(wide.device)
        return Part(reader, rows, columns, wide[rows.unsqueeze(1), columns])

    def write(self, own: dict[str, Tensor], weight: Tensor, constant: Tensor) -> None:
        """Put a narrow weight, and what its outputs gain, into the tensors in wide shapes."""
        wide = torch.zeros_like(own[self.reader.name])
        wide[self.rows.unsqueeze(1), self.columns] = weight
        own[self.reader.name] = wide
        name = str(self.reader.constant)
        gained = torch.zeros_like(own[name]).index_copy_(0, self.rows, constant.to(own[name]))
        own[name] = own[name] + (gained if self.reader.mean is None else -gained)


class Block:
    """A pair in narrow shapes, as a function of its two weights and of what is added to their outputs."""

    def __init__(
        self, program: Program, structure: Structure, pair: Pair, kept: Tensor, own: Mapping[str, Tensor]
    ) -> None:
        self.program, self.pair = program, pair
        self.nodes = (pair.first.node, *pair.between, pair.second.node)
        self.parts = tuple(
            Part.of(reader, kept, own.get(reader.name, program.graph.tensors[reader.name]))
            for reader in (pair.first, pair.second)
        )
        self.base: Values = {}
        bound = structure.numbering.slots.bound
        for operand in (o for node in self.nodes for o in node.operands() if o.tensor is not None):
            tensor = own.get(str(operand.tensor), program.graph.tensors[str(operand.tensor)]).detach()
            for (name, axis), slots in bound.items():
                if name == operand.tensor:
                    keep = kept[structure.roots[slots]].nonzero().squeeze(1)
                    tensor = tensor.index_select(axis, keep.to(tensor.device))
            self.base[operand] = tensor
        for part in self.parts:
            name = str(part.reader.constant)
            if part.reader.new_bias is not None and name in own:
                self.base[name] = own[name][part.rows]

    def input(self, wide: Tensor) -> Tensor:
        return wide.index_select(self.pair.first.op.layout.axis, self.parts[0].columns)

    def start(self) -> list[Tensor]:
        """Weight and (zero) constant of both parts."""
        return [t for part in self.parts for t in (part.weight, part.weight.new_zeros(len(part.weight)))]

    def write(self, own: dict[str, Tensor], at: Sequence[Tensor]) -> None:
        for part, weight, constant in zip(self.parts, at[::2], at[1::2], strict=True):
            part.write(own, weight, constant)

    def __call__(self, x: Tensor, at: Sequence[Tensor]) -> Tensor:
        values = dict(self.base)
        values[self.pair.first.op.x] = x
        added = {}
        for part, weight, constant in zip(self.parts, at[::2], at[1::2], strict=True):
            values[part.reader.op.weight] = weight
            added[part.reader.node] = part.reader.op.layout.axis, constant
        for node in self.nodes:
            value = self.program.call(node, values)
            if node in added:
                axis, constant = added[node]
                value = value + constant.reshape([-1 if a == axis else 1 for a in range(value.ndim)])
            values[node] = value
        result: Tensor = values[self.pair.second.node]
        return result
