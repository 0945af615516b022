"""Where the channels of each space are consumed: what is needed to narrow one space with all others as they are.

A space is a set of channels that are kept or dropped together (`slots`), through batch norms, streams and joins;
here the two sides of a depthwise convolution are tied as well. Its *consumers* are the weights that mix its
channels. To drop channels is to set their columns in every consumer to zero, after adding to the kept columns
what they stood for.

All of this is structure: it is read off a graph once, and holds for any values of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.demand import Demand
from ep_prune.graph import Graph, Layout, Node
from ep_prune.numbering import Numbering, number_channels
from ep_prune.selection import select
from ep_prune.slots import EqualCounts, Groups
from ep_prune.spaces import spaces

RECURRENT = "read by a recurrent layer, whose weights are not fitted"


@dataclass(frozen=True, eq=False)
class Consumer:
    """One weight that reads a space of n channels.

    uses: (the node, the node that it reads) for each call. place (n, q): where channel c stands among the weight's
    inputs; q > 1 where one channel has several positions there (a flattened map). interior (taps,): taps that
    never read zero padding. takes_constants: whether a constant has a bias or a batch norm's mean to go to.
    """

    name: str
    layout: Layout
    uses: tuple[tuple[Node, Node], ...]
    place: Tensor
    interior: Tensor
    takes_constants: bool

    def by_tap(self, weight: Tensor) -> Tensor:
        """(n, q, O, taps) the weight's columns of this space's channels, float64."""
        columns = self.layout.canonical(weight.double())[0].transpose(0, 1)
        return columns[self.place.to(weight.device)]

    def with_columns(self, weight: Tensor, columns: Tensor) -> Tensor:
        """The weight with other columns (n, q, O, taps) for this space's channels."""
        whole = self.layout.canonical(weight.double())[0].transpose(0, 1).clone()
        whole[self.place.to(weight.device)] = columns.to(whole)
        return self.layout.original(whole.transpose(0, 1).unsqueeze(0), tuple(weight.shape[2:])).contiguous()


@dataclass(frozen=True, eq=False)
class ConsumedSpace:
    """A space of n channels. pinned (n,): channels that always stay. fixed: why all of them do, or "".

    axes: the parameter axes along which the channels lie -> which channel stands at each place, or -1.
    """

    name: str
    producers: tuple[str, ...]
    pinned: Tensor
    fixed: str
    consumers: tuple[Consumer, ...]
    axes: dict[tuple[str, int], Tensor]

    @property
    def width(self) -> int:
        return len(self.pinned)


def consumed_spaces(graph: Graph) -> tuple[ConsumedSpace, ...]:
    """All spaces of a graph, in the order of their first layers."""
    n = number_channels(graph)
    _tie_groups(n)
    everything = select(
        n, torch.arange(n.slots.count)
    )  # nothing is merged: only what is tied to what is asked for
    roots, pinned = everything.roots, n.slots.pinned(everything.roots)
    uneven = _unevenly_cut(n, roots)
    found = []
    for space in spaces(everything):
        members = torch.unique(torch.cat([roots[n.slots.bound[axis]] for axis in space.axes]), sorted=True)
        number = torch.full((n.slots.count,), -1)
        number[members] = torch.arange(len(members))
        held = pinned[members]
        fixed = "; ".join(why for why in space.stayed if why != "rolled back or protected") if held.all() else ""
        if bool(uneven[members].any()):
            fixed = fixed or "its parts must stay equally wide"
        consumers = []
        for demand in everything.demands.values():
            if demand.port.groups == 1 and bool((number[demand.roots] >= 0).any()):
                recurrent = demand.port.name in n.gates
                consumer = RECURRENT if recurrent else _consumer(demand, number[demand.roots], len(members))
                if isinstance(consumer, Consumer):
                    consumers.append(consumer)
                else:
                    fixed = fixed or consumer
        axes = {
            axis: number[roots[slots]]
            for axis, slots in n.slots.bound.items()
            if bool((number[roots[slots]] >= 0).any())
        }
        found.append(ConsumedSpace(space.name, space.producers, held, fixed, tuple(consumers), axes))
    return tuple(found)


def _tie_groups(n: Numbering) -> None:
    """A depthwise convolution's channels go with its filters; other grouped convolutions, and attention's heads,
    stay as they are."""
    n.slots.pin_heads()
    for constraint in n.slots.constraints:
        if isinstance(constraint, Groups):
            if constraint.inputs.shape[1] == 1:
                n.slots.unify(constraint.inputs.expand_as(constraint.outputs), constraint.outputs)
            else:
                n.slots.pin(constraint.inputs, "read by a grouped convolution")
                n.slots.pin(constraint.outputs, "written by a grouped convolution")


def _unevenly_cut(n: Numbering, roots: Tensor) -> Tensor:
    """(slots,) by root: channels cut into equal parts that are not tied one to one."""
    marked = torch.zeros(n.slots.count, dtype=torch.bool)
    for constraint in n.slots.constraints:
        if isinstance(constraint, EqualCounts):
            parts = [roots[section] for section in constraint.sections]
            if any(not torch.equal(part, parts[0]) for part in parts):
                marked[torch.cat(parts)] = True
    return marked


def _consumer(demand: Demand, member: Tensor, n: int) -> Consumer | str:
    """One weight's view of a space, or why the space cannot be narrowed there. member (inputs,): channel or -1."""
    layer = demand.port.node.layer or demand.port.name
    if not demand.foldable:
        return f"the weight of {layer} has another use"
    order = member.argsort(stable=True)
    order = order[member[order] >= 0]
    counts = torch.bincount(member[order], minlength=n)
    if bool((counts != counts[0]).any()):
        return (
            f"{layer} reads only some of its channels" if bool((counts == 0).any()) else f"{layer} reads unevenly"
        )
    return Consumer(
        demand.port.name,
        demand.port.op.layout,
        tuple((port.node, port.op.x) for port in demand.ports),
        order.reshape(n, -1),
        torch.tensor(demand.port.op.layout.interior),
        demand.takes_constants,
    )
