"""Who reads the channels of a traced model, as `compress` sees it.

A `Reader` is one weight at the place where it consumes channels. Its input can be narrowed by least squares if the
weight is used once and a constant has a place to go to; what other weights read stays as it is, with the reason.
Two views of a weight (`Reader.view`), by what its fit is made on:

    taps       (G, O/G, C/G * taps): the patches that a linear layer or a convolution really reads
    channels   (1, O * taps * spots, R): channels alone, for transposed convolutions and where patches are too
               large; R channels, each at several spots (a flattened image)

Channels are named by slot root (`slots`); those that may go together are a `Free` space.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.calibrate import Rows
from ep_prune.demand import Demand
from ep_prune.graph import Contract, Graph, Item, Node, Normalize, Pass, Pointwise, Sum
from ep_prune.rules import kind_of

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


def reader_of(graph: Graph, name: str, demand: Demand, order: Mapping[Node, int]) -> Reader:
    """The reader of a weight. order: in which the nodes run."""
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
    wide = op.layout.canonical(graph.tensors[name])
    reader.by_channels = wide.shape[2] * wide.shape[3] > LARGEST or op.layout.signature.startswith("transposed")
    columns = demand.roots.reshape(op.layout.groups, -1).repeat_interleave(wide.shape[3], 1)
    if reader.by_channels:
        unique, spots = _spots(demand.roots)
        if spots is None or op.layout.groups > 1 or len(unique) > LARGEST:
            reader.kept_whole = reader.kept_whole or "its inputs are too many, or in groups"
            reader.by_channels = False
        else:
            columns, reader.spots = unique.unsqueeze(0), spots
    reader.columns = columns
    _follow(reader, graph, order)
    return reader


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
        if isinstance(kind, Normalize) and reader.norm is None and reader.other is None and kind.x is at:
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
