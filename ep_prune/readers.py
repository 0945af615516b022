"""The channels of a traced model as `compress` sees them: who reads them, what goes together, what they cost.

A `Reader` is one weight at the place where it consumes channels. Its input can be narrowed by least squares if the
weight is used once and a constant has a place to go to; what other weights read stays as it is, with the reason.
Two views of a weight (`Reader.view`), by what its fit is made on:

    taps       (G, O/G, C/G * taps): the patches that a linear layer or a convolution really reads
    channels   (1, O * taps * spots, R): channels alone, for transposed convolutions and where patches are too
               large; R channels, each at several spots (a flattened image)

`Structure` holds all readers of one graph, the spaces of channels that may be narrowed, and their costs, as
functions of `kept`: a bool for every slot root (`slots`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.calibrate import Program, Rows, positions
from ep_prune.demand import Demand, demands
from ep_prune.embedding import Cut, Refit, Round
from ep_prune.graph import Contract, Graph, Item, Node, Normalize, Pass, Pointwise, Sum
from ep_prune.heads import heads_of
from ep_prune.numbering import number_channels
from ep_prune.rules import kind_of
from ep_prune.selection import Selection, close, select
from ep_prune.slots import Blends, EqualCounts, Groups, Slots
from ep_prune.spaces import longest_axis, spaces, units_along

LARGEST = 4700
"""Inputs of one output in a patch, at most: a 3x3 convolution of 512 channels has 4,608."""
ROWS = 49152
"""Rows that a weight is fitted on, about."""


@dataclass(eq=False)
class Reader:
    """One weight: where it stands, what it reads (`roots` (n,)) and writes (`outputs` (G, O/G)), by slot root.

    bias, mean, new_bias: where its constant goes (`Demand`). norm: the batch norm that follows, with its node.
    other: what is added to the output further on, if it is there before this weight runs. rectified: a ReLU
    comes next, and nothing else reads what it reads. kept_whole: why its inputs
    cannot be narrowed, "" if they can. columns (G, P): the root of every column of the view.
    """

    name: str
    node: Node
    op: Contract
    roots: Tensor
    outputs: Tensor
    bias: str | None
    mean: str | None
    new_bias: str | None
    norm: Normalize | None = None
    other: Node | None = None
    rectified: bool = False
    kept_whole: str = ""
    by_channels: bool = False
    uses: int = 1
    columns: Tensor = field(default_factory=lambda: torch.empty(0))
    spots: Tensor = field(default_factory=lambda: torch.empty(0))
    """(R, q), by channels: where each channel stands among the inputs."""

    @property
    def constant(self) -> str | None:
        """The tensor that takes the constant; a bias to be made is named as it will be."""
        return self.bias or self.mean or (None if self.new_bias is None else _bias_of(self.new_bias))

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple((self.op.weight.shape or ())[2:])

    @property
    def depthwise(self) -> bool:
        """Groups of one input: what goes takes its outputs along, and nothing is to be made up for."""
        return self.op.layout.groups > 1 and self.roots.numel() == self.op.layout.groups

    def view(self, weight: Tensor) -> Tensor:
        """(G, O/G, P), or (1, O * taps * q, R) by channels."""
        wide = self.op.layout.canonical(weight)
        if not self.by_channels:
            return wide.flatten(2)
        picked = wide[0][:, self.spots.reshape(-1)].reshape(wide.shape[1], *self.spots.shape, -1)
        return picked.permute(0, 3, 2, 1).reshape(1, -1, len(self.spots))

    def restore(self, view: Tensor) -> Tensor:
        """The inverse of `view`, in the weight's own layout."""
        layout, taps = self.op.layout, math.prod(self.kernel)
        if not self.by_channels:
            return layout.original(view.reshape(*view.shape[:2], -1, taps), self.kernel)
        count, q = self.spots.shape
        parts = view.reshape(-1, taps, q, count).permute(0, 3, 2, 1)  # (O, R, q, taps)
        wide = torch.empty(parts.shape[0], count * q, taps, dtype=view.dtype, device=view.device)
        wide[:, self.spots.reshape(-1)] = parts.reshape(parts.shape[0], -1, taps)
        return layout.original(wide.unsqueeze(0), self.kernel)

    def rows_of(self, rows: Rows, value: Tensor) -> Tensor:
        """What the columns of the view read, (G, r, P)."""
        if not self.by_channels:
            return rows.input(value)
        flat = rows.channels(value)[0][:, self.spots.reshape(-1).to(value.device)]
        return flat.reshape(len(flat), *self.spots.shape).transpose(1, 2).reshape(1, -1, len(self.spots))

    def sampled(self, count: int, generator: torch.Generator) -> Rows:
        """Rows of this weight, about `ROWS` of them in all, over `count` samples."""
        return Rows(self.node, self.op, max(1, ROWS // max(count, 1)), generator)


def _bias_of(path: str) -> str:
    return f"{path}.bias" if path else "bias"


@dataclass(frozen=True, eq=False)
class Free:
    """A space and those of its channels (roots) that may go."""

    name: str
    roots: Tensor
    longest: Tensor
    """The roots along its longest axis, kept ones and all: what `min_width` counts."""
    widths: tuple[Tensor, ...]
    """The roots along every axis that these channels make up, each of which `round_to` counts: of heads, their
    queries, keys, values and outputs."""
    sections: Tensor | None = None
    """(len(roots),) which of several equal groups each channel belongs to: these keep equally many. None: no
    such."""


class Structure:
    """What may be narrowed in a graph. `frozen`: parameter axes that stay, as in `trial.State`."""

    def __init__(
        self, program: Program, frozen: Mapping[tuple[str, int], str], parameters: Collection[str]
    ) -> None:
        self.graph = graph = program.graph
        self.numbering = number_channels(graph)
        _join_depthwise(self.numbering.slots)
        self.roots = self.numbering.slots.roots()
        self.count = self.numbering.slots.count
        self.parameters = set(parameters)
        self.pinned = self.numbering.slots.pinned(self.roots)
        for axis in frozen:
            if axis in self.numbering.slots.bound:
                self.pinned[self.roots[self.numbering.slots.bound[axis]]] = True
        order = program.place
        needs = demands(self.numbering, self.roots)
        self.untouched = {}
        for name in needs.keys() & self.numbering.gates.keys():
            recurrent = needs.pop(name)
            self.untouched[recurrent.port.node.layer or name] = "a recurrent layer, which is not fitted"
            self.pinned[recurrent.roots] = True
        self.readers = sorted(
            (self._reader(name, demand, order) for name, demand in needs.items()), key=lambda r: order[r.node]
        )
        for reader in self.readers:
            if reader.kept_whole and not bool(self.pinned[reader.roots].all()):
                self.untouched[reader.node.layer or reader.name] = reader.kept_whole
                self.pinned[reader.roots] = True
        program.rooms |= {
            r.node: (str(r.constant), r.op.layout.axis) for r in self.readers if r.new_bias is not None
        }
        self._selection = select(self.numbering)
        self.spaces = self._spaces()

    def _reader(self, name: str, demand: Demand, order: Mapping[Node, int]) -> Reader:
        op, node = demand.port.op, demand.port.node
        reader = Reader(
            name, node, op, demand.roots, demand.out_roots, demand.bias, demand.mean, demand.new_bias,
            uses=len(demand.ports),
        )  # fmt: skip
        if len(demand.ports) > 1:
            reader.kept_whole = "its weight is used in several places"
        elif not demand.foldable:
            reader.kept_whole = "its weight is used otherwise, too"
        elif reader.constant is None:
            reader.kept_whole = "it has no bias, and there is no place for one"
        wide = op.layout.canonical(self.graph.tensors[name])
        reader.by_channels = wide.shape[2] * wide.shape[3] > LARGEST or op.layout.signature.startswith(
            "transposed"
        )
        columns = demand.roots.reshape(op.layout.groups, -1).repeat_interleave(wide.shape[3], 1)
        if reader.by_channels:
            unique, spots = _spots(demand.roots)
            if spots is None or op.layout.groups > 1 or len(unique) > LARGEST:
                reader.kept_whole = reader.kept_whole or "its inputs are too many, or in groups"
                reader.by_channels = False
            else:
                columns, reader.spots = unique.unsqueeze(0), spots
        reader.columns = columns
        _follow(reader, self.graph, order)
        return reader

    def _spaces(self) -> list[Free]:
        found = []
        for space in spaces(self._selection):
            axes = [self.roots[self.numbering.slots.bound[axis]] for axis in space.axes]
            own = torch.unique(torch.cat(axes))
            free = own[~self.pinned[own]]
            if len(free) > (0 if len(free) < len(own) else 1):
                longest = units_along(self._selection, longest_axis(self._selection, space.axes))
                found.append(Free(space.name, free, longest, self._widths(axes, longest), self._sections(free)))
        return found

    def _widths(self, axes: Sequence[Tensor], longest: Tensor) -> tuple[Tensor, ...]:
        own = torch.unique(longest)
        blends = (c for c in self.numbering.slots.constraints if isinstance(c, Blends))
        outputs = [self.roots[blend.out].reshape(-1) for blend in blends]
        return tuple(axis for axis in [*axes, *outputs] if torch.equal(torch.unique(axis), own))

    def _sections(self, free: Tensor) -> Tensor | None:
        for constraint in self.numbering.slots.constraints:
            sides: tuple[Tensor, ...] = ()
            if isinstance(constraint, Groups):
                sides = constraint.inputs, constraint.outputs
            elif isinstance(constraint, EqualCounts):
                sides = (torch.stack(constraint.sections),)
            for rows in (self.roots[side] for side in sides):
                number = torch.full((self.count,), -1)
                number[rows] = torch.arange(len(rows)).unsqueeze(1)
                own = number[free]
                equal = rows.shape[1] > 1 and len(torch.unique(rows)) == rows.numel() and bool((own >= 0).all())
                if equal and len(torch.unique(torch.bincount(own, minlength=len(rows)))) == 1:
                    return own
        return None

    def everything(self) -> Tensor:
        return torch.ones(self.count, dtype=torch.bool)

    def close(self, kept: Tensor) -> Tensor:
        """`kept` with whatever must stay with it: pinned channels, equal groups and parts, one of each layer."""
        chosen = Selection(
            self.numbering, self.roots, self.pinned, (kept | self.pinned)[self.roots], self._selection.demands,
            why=torch.zeros(self.count, dtype=torch.int64),
        )  # fmt: skip
        close(chosen)
        return chosen.kept

    # ---- costs ---------------------------------------------------------------------------------------

    def macs(self, kept: Tensor) -> int:
        """Multiply-accumulates of one sample in all weights' uses."""
        return sum(self._weight_size(r, kept) * positions(r.node, r.op) * r.uses for r in self.readers)

    def size(self, kept: Tensor) -> int:
        """Parameters, with the biases that a fit makes."""
        weights = {reader.name: reader for reader in self.readers}
        total = sum(self._weight_size(r, kept) for r in self.readers if r.name in self.parameters)
        fitted = False
        for reader in self.readers:  # from the first that loses inputs on, all weights are fitted
            fitted = fitted or not bool(kept[reader.roots].all())
            if fitted and reader.new_bias is not None and not reader.kept_whole:
                total += int(kept[reader.outputs].sum())
        bound: dict[str, dict[int, Tensor]] = {}
        for (name, axis), slots in self.numbering.slots.bound.items():
            bound.setdefault(name, {})[axis] = slots
        for name, tensor in self.graph.tensors.items():
            if name in weights or name not in self.parameters:
                continue
            sizes = list(tensor.shape)
            for axis, slots in bound.get(name, {}).items():
                sizes[axis] = int(kept[self.roots[slots]].sum())
            total += math.prod(sizes)
        return total

    @staticmethod
    def _weight_size(reader: Reader, kept: Tensor) -> int:
        groups = reader.op.layout.groups
        inputs = int(kept[reader.roots].sum())
        outputs = int(kept[reader.outputs].sum())
        active = int(kept[reader.roots].reshape(groups, -1).any(1).sum()) if groups > 1 else 1
        return inputs * outputs * math.prod(reader.kernel) // max(active, 1)

    def widths(self, kept: Tensor) -> dict[str, tuple[int, int]]:
        """Space -> channels before and after, along its longest axis."""
        return {s.name: (len(s.longest), int(kept[s.longest].sum())) for s in self.spaces}

    # ---- the edits -----------------------------------------------------------------------------------

    def round(self, kept: Tensor, own: Mapping[str, Tensor]) -> Round:
        """The edits that leave the kept channels, with the tensors of `own` (wide shapes) in place."""
        cuts, refits, done = [], [], set()
        for reader in self.readers:
            layout = reader.op.layout
            weight = own.get(reader.name, self.graph.tensors[reader.name])
            inputs = kept[reader.roots].reshape(layout.groups, -1)
            outputs = kept[reader.outputs]
            done |= {reader.name}
            if bool(inputs.all()) and bool(outputs.all()) and reader.name not in own:
                continue
            groups = inputs.any(1).nonzero().squeeze(1)
            wide = layout.canonical(weight)[groups]
            rows = outputs[groups].nonzero()[:, 1].reshape(len(groups), -1)
            columns = inputs[groups].nonzero()[:, 1].reshape(len(groups), -1)
            wide = wide.gather(1, rows[:, :, None, None].to(wide.device).expand(-1, -1, *wide.shape[2:]))
            wide = wide.gather(
                2, columns[:, None, :, None].to(wide.device).expand(-1, wide.shape[1], -1, wide.shape[3])
            )
            narrow = layout.original(wide, reader.kernel).contiguous()
            constant = own.get(reader.constant or "")
            if constant is not None:
                constant = constant[outputs.reshape(-1).to(constant.device)]
                done.add(str(reader.constant))
            places = (reader.bias, reader.mean, reader.new_bias) if constant is not None else (None,) * 3
            refits.append(
                Refit(
                    reader.name, narrow.cpu(), len(groups), None if constant is None else constant.cpu(), *places
                )
            )
        for (name, axis), slots in self.numbering.slots.bound.items():
            keep = kept[self.roots[slots]]
            if name not in done and not bool(keep.all()):
                cuts.append(Cut(name, axis, keep.nonzero().squeeze(1), len(keep)))
        heads = heads_of(self.numbering, self.roots, kept)
        return Round(cuts=tuple(cuts), refits=tuple(refits), heads=heads)


def _join_depthwise(slots: Slots) -> None:
    """A group of one input goes as a whole: its input and its outputs are one channel. So is a head."""
    slots.join_heads()
    for constraint in slots.constraints:
        if isinstance(constraint, Groups) and constraint.inputs.shape[1] == 1:
            slots.unify(constraint.inputs, constraint.outputs)


def _spots(roots: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct roots (R,), and (R, q) where each stands; None where they do not stand equally often."""
    unique, inverse, counts = torch.unique(roots, return_inverse=True, return_counts=True)
    if bool((counts != counts[0]).any()):
        return unique, None
    return unique, inverse.argsort(stable=True).reshape(len(unique), -1)


def _follow(reader: Reader, graph: Graph, order: Mapping[Node, int]) -> None:
    """Find the batch norm behind a weight, and what is added to its output if that is known by then."""
    users = graph.users()
    at = reader.node
    while len(users[at]) == 1 and at not in graph.outputs:
        reader_node = users[at][0]
        kind = kind_of(reader_node, graph)
        if isinstance(kind, Normalize) and reader.norm is None and kind.x is at:
            reader.norm = kind
        elif isinstance(kind, Sum) and kind.alpha == 1:
            others = [x for x in (kind.x, kind.y) if x is not at]
            if len(others) != 1 or reader.other is not None or not isinstance(others[0], Node):
                return
            if others[0].shape != at.shape or order.get(others[0], len(order)) > order[reader.node]:
                return
            reader.other = others[0]
        elif isinstance(kind, Pointwise) and reader_node.op == "aten.relu":
            reader.rectified = True
            return
        elif not isinstance(kind, Pass | Item):
            return
        at = reader_node


def reads(readers: Iterable[Reader], roots: Tensor) -> list[Reader]:
    """Those that read any of the roots."""
    return [r for r in readers if bool(torch.isin(r.roots, roots).any())]
