"""Which activations never bend on a box: bounds of all that they read, tightened where it pays.

    intervals -> backward linear bounds for every ReLU input that intervals leave open -> pieces of the box

Boxes of few dimensions are halved along their longest side (relative to the whole box), and a claim on the box is
one that holds on every piece. Points that show a unit on both sides of zero settle it before anything is proved.
Everything stops at a budget of rows, which does not depend on the clock.

Sound: a claim is made only where bounds with outward rounding prove it. Sizes are those of the traced example.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ep_prune.bounds.backward import RELU, Rows, are_rows_apart, lower_bounds
from ep_prune.bounds.interval import Bounds, Found, bounds_of
from ep_prune.errors import EpPruneError
from ep_prune.evaluate import evaluate
from ep_prune.graph import Graph, Node, Operation, Pointwise, Recurrent
from ep_prune.rules import kind_of
from ep_prune.trace import as_arguments, trace

Box = tuple[Tensor, Tensor]
"""(low, high) of one input, of the shape of one sample (or one that broadcasts to it)."""


@dataclass(frozen=True)
class Budget:
    """rows: functionals bounded in all. pieces: of the box, at most; dimensions: more are not split."""

    rows: int = 2**20
    pieces: int = 2**15
    dimensions: int = 4
    elements: int = 2**21
    points: int = 2**13


@dataclass(frozen=True, eq=False)
class Proof:
    """Bounds of the graph's nodes on the whole box, with one row (1, ...); None where there are none.

    pieces: how many pieces of the box it took. open: claims that no point refutes and no bound proves.
    """

    bounds: Mapping[Node, Found]
    pieces: int = 1
    open: int = 0


def prove(
    model: nn.Module, graph: Graph, example_inputs: Any, boxes: Sequence[Box | None], budget: Budget | None = None
) -> Proof:
    """Bounds on a box. boxes: one for each tensor among the inputs, in the order of the graph's placeholders."""
    return _Prover(model, graph, example_inputs, boxes, budget or Budget()).run()


class _Prover:
    def __init__(
        self, model: nn.Module, graph: Graph, example: Any, boxes: Sequence[Box | None], budget: Budget
    ) -> None:
        self.budget, self.own, self.spent = budget, graph, 0
        largest = max((_sample(node) for node in graph.nodes if node.tensor is None), default=1)
        self.count = int(min(max(budget.elements // max(largest, 1), 16), 4096))
        # A recurrent layer is traced step by step, and has no bounds anyway.
        recurrent = any(isinstance(op, Recurrent) for op in _kinds(graph).values())
        rowwise = None if recurrent else _at(model, graph, example, self.count)
        self.graph = rowwise or graph
        self.kinds = _kinds(self.graph)
        self.rowwise = rowwise is not None and are_rows_apart(self.graph, self.kinds, self.count)
        inputs = _inputs(self.graph)
        self.boxes = {
            node: (box[0].double().expand((node.shape or ())[1:]), box[1].double().expand((node.shape or ())[1:]))
            for node, box in zip(inputs, boxes, strict=True)
            if box is not None and node.shape
        }
        self.bending = [n for n, op in self.kinds.items() if isinstance(op, Pointwise) and n.op == RELU]

    def run(self) -> Proof:
        if not self.rowwise:  # whatever the rows do to each other, every one has the whole box
            found = self._forward(self.boxes, None, whole=True)
            return Proof(self._named(found))
        pieces = {node: (low[None], high[None]) for node, (low, high) in self.boxes.items()}
        found = self._forward(pieces, None)
        dimensions = sum(int((low < high).sum()) for low, high in self.boxes.values())
        count, left = 1, 0
        if 0 < dimensions <= self.budget.dimensions and len(self.boxes) == len(_inputs(self.graph)):
            found, count, left = self._split(pieces, found)
        return Proof(self._named(found), count, left)

    def _named(self, found: Mapping[Node, Found]) -> dict[Node, Found]:
        """The same bounds, in one row, for the graph that was given, whose nodes stand in the same order."""
        rows = [found.get(n) if n.tensor is not None else _joined(found.get(n)) for n in self.graph.nodes]
        return dict(zip(self.own.nodes, rows, strict=True))

    # ---- one pass over all pieces ---------------------------------------------------------------------

    def _forward(
        self, pieces: Mapping[Node, Box], wanted: Mapping[Node, Tensor] | None, whole: bool = False
    ) -> dict[Node, Found]:
        """Bounds of all nodes on P <= R pieces, (P, ...). wanted: ReLU node -> (P, ...) what to tighten."""
        size = len(next(iter(pieces.values()))[0]) if pieces and not whole else 1
        found: dict[Node, Found] = {}
        rows = Rows(self.graph, self.kinds, found, self.count)
        used = {op.x: node for node in self.bending if isinstance(op := self.kinds[node], Pointwise)}
        for node in self.graph.nodes:
            if node in pieces:
                low, high = pieces[node]
                if whole:
                    found[node] = Bounds.of(low.expand(node.shape or ()), high.expand(node.shape or ()))
                else:
                    found[node] = Bounds.of(low, high)
            elif node.target is not None or node.tensor is not None:
                found[node] = self._one(node, found, size, whole)
            value = found.get(node)
            if node in used and isinstance(value, Bounds) and not whole:
                found[node] = self._tightened(rows, node, value, None if wanted is None else wanted[used[node]])
        return found

    def _one(self, node: Node, found: Mapping[Node, Found], size: int, whole: bool) -> Found:
        """A node on R rows; P of them are pieces, the others repeat the first."""
        if whole or node.tensor is not None:
            return bounds_of(node, self.graph, found)
        padded = {
            x: _padded(found.get(x), self.count) if x.tensor is None else found.get(x) for x in node.operands()
        }
        return _cut(bounds_of(node, self.graph, padded), size)

    def _tightened(self, rows: Rows, node: Node, value: Bounds, wanted: Tensor | None) -> Bounds:
        """Backward bounds for the elements that intervals leave open."""
        across = (value.low < 0) & (value.high > 0)
        if wanted is not None:
            across &= wanted
        place = across.reshape(len(across), -1).nonzero()
        if not len(place) or self._is_direct(node) or self.spent + 2 * len(place) > self.budget.rows:
            return value
        self.spent += 2 * len(place)
        low, high = value.low.reshape(len(across), -1).clone(), value.high.reshape(len(across), -1).clone()
        for sign, ends in ((1.0, low), (-1.0, high)):
            for part in place.split(self.count):  # type: ignore[no-untyped-call]
                piece, element = part[:, 0], part[:, 1]
                functional = torch.zeros(self.count, low.shape[1], dtype=torch.float64)
                functional[torch.arange(len(part)), element] = sign
                index = torch.zeros(self.count, dtype=torch.int64)
                index[: len(part)] = piece
                bound = lower_bounds(rows, node, functional.reshape(self.count, *value.low.shape[1:]), index)
                ends[piece, element] = sign * bound[: len(part)]
        return value.meet(low.reshape(value.low.shape), high.reshape(value.high.shape))

    def _is_direct(self, node: Node) -> bool:
        """Whether intervals are exact there already: one linear step from the inputs."""
        sources, steps = {node}, 0
        for back in reversed(self.graph.nodes[: self.graph.nodes.index(node) + 1]):
            if back in sources and back.target is not None:
                steps += 1
                sources.update(x for x in back.operands() if x.tensor is None)
        inner = [x for x in sources if x.target is not None]
        kinds = {type(self.kinds[x]).__name__ for x in inner}
        return sum(type(self.kinds[x]).__name__ == "Contract" for x in inner) <= 1 and kinds <= {
            "Contract", "Move", "Pass", "Normalize", "Pad",
        }  # fmt: skip

    # ---- pieces ---------------------------------------------------------------------------------------

    def _split(self, pieces: dict[Node, Box], found: dict[Node, Found]) -> tuple[dict[Node, Found], int, int]:
        """Halve the box until each claim that the points allow is proved on each piece, or the budget is spent."""
        inputs = {node: op.x for node in self.bending if isinstance(op := self.kinds[node], Pointwise)}
        inputs = {node: x for node, x in inputs.items() if isinstance(found.get(x), Bounds)}
        claims = {node: self._claims(found[x]) for node, x in inputs.items()}
        self._refute(claims, inputs, self._points(pieces))
        # `done`: for each piece, the claims that are proved there: (P, 2, elements)
        done = {node: claim.new_zeros(1, *claim.shape) for node, claim in claims.items()}
        total, last = 1, max(inputs, key=self.graph.nodes.index, default=None)
        flat = dict(pieces)
        while claims and any(bool(c.any()) for c in claims.values()):
            spread = self._halved(flat)
            done = {node: part.repeat_interleave(2, 0) for node, part in done.items()}
            total += len(next(iter(spread.values()))[0]) // 2
            if total > self.budget.pieces or self.spent > self.budget.rows:
                break
            self._refute(claims, inputs, self._corners(spread))
            open_ = self._open(claims, done)
            size = len(next(iter(spread.values()))[0])
            for part in torch.arange(size).split(self.count):  # type: ignore[no-untyped-call]
                own = {node: (low[part], high[part]) for node, (low, high) in spread.items()}
                wanted = {}
                for node, x in inputs.items():
                    shape = (len(part), *(x.shape or ())[1:])
                    everything = torch.ones(shape, dtype=torch.bool)
                    needed = (claims[node] & ~done[node][part]).any(1).reshape(shape)
                    wanted[node] = needed if node is last else everything
                here = self._forward(own, {**{n: torch.ones(1, dtype=torch.bool) for n in self.bending}, **wanted})
                for node, x in inputs.items():
                    value = here[x]
                    assert isinstance(value, Bounds)
                    done[node][part] |= self._holds(value)
            open_ = self._open(claims, done)
            keep = open_.nonzero().squeeze(1)
            flat = {node: (low[keep], high[keep]) for node, (low, high) in spread.items()}
            done = {node: part[keep] for node, part in done.items()}
            if not len(keep):
                break
        left = 0
        result = dict(found)
        for node, x in inputs.items():
            proved = claims[node] & done[node].all(0) if len(done[node]) else claims[node]
            left += int((claims[node] & ~proved).sum())
            value = found[x]
            assert isinstance(value, Bounds)
            off, on = (side.reshape(value.low.shape) for side in proved)
            zero = torch.zeros_like(value.low)
            low, high = torch.where(on, value.low.clamp_min(0), value.low), torch.where(off, zero, value.high)
            result[x] = Bounds(
                torch.minimum(low, high), torch.where(off, torch.minimum(value.high, zero), high), value.size
            )
        return result, total, left

    def _claims(self, value: Found) -> Tensor:
        """(2, elements): may be always off, always on; not where it is proved already."""
        assert isinstance(value, Bounds)
        across = ((value.low < 0) & (value.high > 0)).reshape(-1)
        return torch.stack([across, across])

    def _holds(self, value: Bounds) -> Tensor:
        size = len(value.low)
        return torch.stack([(value.high <= 0).reshape(size, -1), (value.low >= 0).reshape(size, -1)], 1)

    def _open(self, claims: Mapping[Node, Tensor], done: Mapping[Node, Tensor]) -> Tensor:
        """(P,) whether some claim is not proved on the piece."""
        return torch.stack([(claim & ~done[node]).flatten(1).any(1) for node, claim in claims.items()]).any(0)

    def _refute(
        self, claims: dict[Node, Tensor], inputs: Mapping[Node, Node], points: Mapping[Node, Tensor]
    ) -> None:
        """Drop the claims that a point contradicts."""
        size = len(next(iter(points.values())))
        for part in torch.arange(size).split(self.count):  # type: ignore[no-untyped-call]
            index = part.new_zeros(self.count)
            index[: len(part)] = part
            given = {node: value[index] for node, value in points.items()}
            found = evaluate(self.graph, given, list(inputs.values()))
            for node, x in inputs.items():
                value = found[x].reshape(self.count, -1)
                claims[node] &= torch.stack([(value <= 0).all(0), (value >= 0).all(0)])

    def _points(self, pieces: Mapping[Node, Box]) -> dict[Node, Tensor]:
        generator = torch.Generator().manual_seed(0)
        found = {}
        for node, (low, high) in pieces.items():
            share = torch.rand(self.budget.points, *low.shape[1:], generator=generator, dtype=torch.float64)
            found[node] = low + share * (high - low)
        corners = self._corners(pieces)
        return {node: torch.cat([found[node], corners[node]]) for node in found}

    def _corners(self, pieces: Mapping[Node, Box]) -> dict[Node, Tensor]:
        """The corners and the middle of every piece."""
        nodes = list(pieces)
        moving = [
            (node, int(k))
            for node in nodes
            for k in (pieces[node][0][0] < pieces[node][1][0]).reshape(-1).nonzero()
        ]
        found = {node: [(low + high) / 2] for node, (low, high) in pieces.items()}
        for choice in itertools.product((0, 1), repeat=len(moving)):
            corner = {node: pieces[node][0].clone() for node in nodes}
            for (node, k), end in zip(moving, choice, strict=True):
                corner[node].reshape(len(corner[node]), -1)[:, k] = pieces[node][end].reshape(
                    len(corner[node]), -1
                )[:, k]
            for node in nodes:
                found[node].append(corner[node])
        return {node: torch.cat(parts) for node, parts in found.items()}

    def _halved(self, pieces: Mapping[Node, Box]) -> dict[Node, Box]:
        """Every piece in two, across its longest side relative to the whole box."""
        nodes = list(pieces)
        widths = [
            ((high - low) / (self.boxes[node][1] - self.boxes[node][0]).clamp_min(1e-300)).reshape(len(low), -1)
            for node, (low, high) in pieces.items()
        ]
        longest = torch.cat(widths, 1).argmax(1)
        start = 0
        halves: dict[Node, Box] = {}
        for node, width in zip(nodes, widths, strict=True):
            low, high = (end.reshape(len(end), -1) for end in pieces[node])
            here = torch.arange(width.shape[1]) + start == longest.unsqueeze(1)
            middle = (low + high) / 2
            lows = torch.stack([low, torch.where(here, middle, low)], 1).flatten(0, 1)
            highs = torch.stack([torch.where(here, middle, high), high], 1).flatten(0, 1)
            shape = (-1, *pieces[node][0].shape[1:])
            halves[node] = lows.reshape(shape), highs.reshape(shape)
            start += width.shape[1]
        return halves


def _kinds(graph: Graph) -> dict[Node, Operation]:
    return {node: kind_of(node, graph) for node in graph.nodes if node.target is not None and node.tensor is None}


def _inputs(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "placeholder" and n.tensor is None and n.shape is not None]


def _sample(node: Node) -> int:
    size = 1
    for length in (node.shape or ())[1:]:
        size *= length
    return size


def _at(model: nn.Module, graph: Graph, example: Any, count: int) -> Graph | None:
    """The model traced at `count` rows; None where that is another program."""
    args, kwargs = as_arguments(example)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(leaf.ndim == 0 or leaf.shape[0] != tensors[0].shape[0] for leaf in tensors):
        return None

    def repeat(leaf: Any) -> Any:
        return leaf[:1].expand(count, *leaf.shape[1:]).contiguous() if isinstance(leaf, Tensor) else leaf

    args, kwargs = pytree.tree_map(repeat, (args, kwargs))
    try:
        found = trace(model, kwargs if kwargs else args)
    except EpPruneError:
        return None
    same = [n.op for n in found.nodes] == [n.op for n in graph.nodes]
    same = same and [(n.shape or ())[1:] for n in found.nodes if n.tensor is None] == [
        (n.shape or ())[1:] for n in graph.nodes if n.tensor is None
    ]
    return found if same else None


def _padded(value: Found, count: int) -> Found:
    if isinstance(value, tuple):
        return tuple(None if part is None else _padded(part, count) for part in value)  # type: ignore[misc]
    if value is None:
        return None

    def rows(part: Tensor) -> Tensor:
        if len(part) == count:
            return part
        return torch.cat([part, part[:1].expand(count - len(part), *part.shape[1:])])

    return Bounds(rows(value.low), rows(value.high), rows(value.size))


def _cut(value: Found, size: int) -> Found:
    if isinstance(value, tuple):
        return tuple(None if part is None else _cut(part, size) for part in value)  # type: ignore[misc]
    return None if value is None else Bounds(value.low[:size], value.high[:size], value.size[:size])


def _joined(value: Found) -> Found:
    """One row that holds all."""
    if not isinstance(value, Bounds) or not value.low.ndim:
        return value
    return Bounds(value.low.amin(0, True), value.high.amax(0, True), value.size.amax(0, True))
