"""One model on its way to being narrow: trials of a round, and what is rolled back when one fails.

What the algebra cannot know is whether sizes written in the user's code (`view(-1, 512)`, `C // 4`) follow the
narrow widths: every round is a hypothesis, tested by running and re-exporting the narrow copy. If it fails, the
spaces at fault are found by bisection, left alone and named with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ep_prune.bounds import Bounds, prove
from ep_prune.embedding import Round, Scale
from ep_prune.errors import EpPruneError, InputError
from ep_prune.graph import Attention, Graph, Node, Product
from ep_prune.numbering import Numbering, number_channels
from ep_prune.rewrite import apply_round_
from ep_prune.rules import kind_of
from ep_prune.selection import Selection, select, to_round
from ep_prune.sharing import copy_of
from ep_prune.spaces import Space, spaces
from ep_prune.trace import as_arguments, run, trace
from ep_prune.verification import Box, InFloat64, widened

Axis = tuple[str, int]
T = TypeVar("T")


@dataclass
class State:
    """One model on its way to being narrow."""

    model: nn.Module
    graph: Graph
    reference: list[tuple[Any, list[Tensor]]]
    """Inputs in float64 and the wide model's outputs on them."""
    limit: float
    probes_given: bool
    promised: list[Any]
    """The probes that `tol` is a promise about: the user's, or synthetic ones."""
    frozen: dict[Axis, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    example: Any = None
    boxes: list[Box | None] | None = None
    """The declared box of every tensor among the inputs; None: no domain is declared."""
    shares: bool = False
    """Whether copies of the model may share its parameters: no forward pass writes into one."""
    _ranges: dict[int, tuple[Graph, dict[Node, tuple[Tensor, Tensor]]]] = field(default_factory=dict)

    def ranges(self) -> dict[Node, tuple[Tensor, Tensor]]:
        """Between what the elements of each node lie on the declared domain; empty without one."""
        if self.boxes is None:
            return {}
        known = self._ranges.get(0)
        if known is None or known[0] is not self.graph:
            found = ranges_of(self.model, self.graph, self.example, self.boxes)
            known = self._ranges[0] = self.graph, found
        return known[1]

    def number(self, tolerance: float = 0.0) -> Numbering:
        """The numbering of the model as it is, on the declared domain."""
        return number_channels(self.graph, tolerance, ranges=self.ranges())


def ranges_of(
    model: nn.Module, graph: Graph, inputs: Any, boxes: Sequence[Box | None] | None
) -> dict[Node, tuple[Tensor, Tensor]]:
    """Between what the elements of each computed node lie on a declared domain; empty without one (None)."""
    if boxes is None:
        return {}
    proof = prove(model, graph, inputs, placed(graph, inputs, boxes))
    return {n: (b.low, b.high) for n, b in proof.bounds.items() if isinstance(b, Bounds) and n.tensor is None}


def placed(graph: Graph, inputs: Any, boxes: Sequence[Box | None]) -> list[Box | None]:
    """Boxes of the inputs' tensors, in the order of the graph's placeholders."""
    args, kwargs = as_arguments(inputs)
    nodes = [n for n in graph.nodes if n.op == "placeholder" and n.tensor is None and n.shape is not None]
    if kwargs and not args and all(node.name in kwargs for node in nodes):
        by_name = dict(zip(kwargs, boxes, strict=False))
        return [by_name[node.name] for node in nodes]
    return list(boxes)


def as_double(inputs: Any) -> Any:
    """The inputs with floating tensors in float64."""

    def cast(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, inputs)


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a model returns, in order, computed in float64."""
    with InFloat64():  # a cast inside the model is no rounding of ours
        found = run(model, inputs)
    return [leaf for leaf in pytree.tree_leaves(_plain(found)) if isinstance(leaf, Tensor)]


def _plain(output: Any) -> Any:
    """Dataclasses as dicts of their fields."""
    fields = getattr(output, "__dataclass_fields__", None)
    return {key: getattr(output, key) for key in fields} if fields and not isinstance(output, dict) else output


def difference(model: nn.Module, reference: Sequence[tuple[Any, list[Tensor]]], share: bool = False) -> float:
    """Largest relative change of any output tensor over the reference inputs, in float64.

    inf where shapes differ. Raises `InputError` where the model does not run. share: as in `State.shares`.
    """
    double = widened(model, share)
    worst: dict[int, tuple[float, float]] = {}
    for inputs, expected in reference:
        found = outputs_of(double, inputs)
        if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
            return float("inf")
        for place, (a, b) in enumerate(zip(expected, found, strict=True)):
            if a.numel() == 0:
                continue
            change, size = worst.get(place, (0.0, 0.0))
            new = float(
                (a.double() - b.double()).abs().nan_to_num(0.0 if not a.isfinite().all() else torch.inf).max()
            )
            worst[place] = max(change, new), max(size, float(a.double().abs().nan_to_num(0.0, 0.0, 0.0).max()))
    return max((change / size if size else change for change, size in worst.values()), default=0.0)


def read_in_training(model: nn.Module, graph: Graph, example_inputs: Any, share: bool = False) -> dict[Axis, str]:
    """The axes that layers outside the inference trace read (auxiliary heads), with the reason to keep them."""
    unseen = set(graph.untraced)
    if not unseen:
        return {}
    try:
        numbering = number_channels(trace(copy_of(model, share).train(), example_inputs))
    except EpPruneError:
        return {}
    found: dict[Axis, str] = {}
    roots = numbering.slots.roots()
    for port in numbering.ports:
        if port.name in unseen:
            read = roots[port.x.slots]
            for axis, slots in numbering.slots.bound.items():
                if axis[0] not in unseen and bool(torch.isin(roots[slots], read).any()):
                    found[axis] = f"read in training mode by {port.node.layer}"
    return found


def frozen_slots(n: Numbering, frozen: Iterable[Axis]) -> Tensor | None:
    """The slots of the named parameter axes, as far as this numbering has them."""
    found = [n.slots.bound[axis] for axis in frozen if axis in n.slots.bound]
    return torch.cat(found) if found else None


def attempt_round(
    state: State, step: Round, example_inputs: Any, mend: bool = True
) -> tuple[nn.Module, Graph, Round] | str:
    """The narrow model, its graph and the round as it was taken, or why not: it does not run, differs, or exports
    to something else. mend: once more with attention's scales made up for, where they follow from head sizes."""
    narrow = copy_of(state.model, state.shares)
    apply_round_(narrow, step)
    try:
        change = difference(narrow, state.reference, state.shares)
    except InputError as error:
        cause = error.__cause__ or error
        return f"a size written in the code does not follow ({' '.join(str(cause).split())[:120]})"
    different = f"the output would change by {change:.1e} (relative, float64)" if change > state.limit else ""
    if different and not (step.heads and mend):
        return different
    try:
        graph = trace(narrow, example_inputs)
    except EpPruneError as error:
        return different or f"the narrow model does not export ({error})"
    if step.heads and mend:  # even where the example's outputs are the same: a softmax may be saturated there
        scaled = with_scales(state, graph, step)
        if scaled.scales != step.scales:
            return attempt_round(state, scaled, example_inputs, mend=False)
    if different:
        return different
    calls, before = ([n.op for n in _calls(g)] for g in (graph, state.graph))
    return (narrow, graph, step) if calls == before else "the narrow model would run other operators"


def _calls(graph: Graph) -> list[Node]:
    """The operators that compute or choose; how memory is laid out may follow the widths (an axis of size 1)."""
    return [n for n in graph.nodes if n.target is not None and n.op not in _LAYOUT]


_LAYOUT = ("aten.clone", "aten.contiguous", "aten.view", "aten._unsafe_view", "aten.reshape")


def with_scales(state: State, graph: Graph, step: Round) -> Round:
    """The round, with queries that make up for scales which the code takes from the size of a head.

    Only the narrow model's own trace, `graph`, tells them: numbers that are not what they were, in its layer.
    """
    calls, before = (_calls(g) for g in (graph, state.graph))
    if [n.op for n in calls] != [n.op for n in before]:
        return step
    change: dict[str, float] = {}
    for old, new in zip(before, calls, strict=True):
        ratio = _scale_of(new, graph) / _scale_of(old, state.graph)
        change[old.layer] = change.get(old.layer, 1.0) * ratio
    scales = [
        Scale(tensor, axis, places, torch.full((len(places),), 1 / change[heads.layer], dtype=torch.float64))
        for heads in step.heads
        if change.get(heads.layer, 1.0) not in (0.0, 1.0)
        for tensor, axis, places in heads.queries
    ]
    return replace(step, scales=(*step.scales, *scales))


def _scale_of(node: Node, graph: Graph) -> float:
    """The number by which a node multiplies what it reads; 1 where it is no such node."""
    kind = kind_of(node, graph)
    if isinstance(kind, Attention):
        return kind.scale
    if isinstance(kind, Product):
        numbers = [float(side) for side in (kind.x, kind.y) if not isinstance(side, Node)]
        if len(numbers) == 1 and numbers[0] != 0:
            return 1 / numbers[0] if kind.divide else numbers[0]
    return 1.0


def roll_back(
    state: State, numbering: Numbering, chosen: Selection, example_inputs: Any
) -> tuple[Selection, Round]:
    """Find, by bisection, the spaces whose narrowing is at fault; freeze and name them."""
    changed = [space for space in spaces(chosen) if space.after < space.before]
    reasons: dict[str, str] = {}

    def attempt(free: Sequence[Space]) -> tuple[Selection, Round] | None:
        names = {space.name for space in free}
        held = [axis for space in changed if space.name not in names for axis in space.axes]
        trial = select(numbering, frozen_slots(numbering, [*state.frozen, *held]))
        step = to_round(trial)
        outcome = attempt_round(state, step, example_inputs) if step else None
        if isinstance(outcome, str):
            reasons[free[-1].name if free else ""] = outcome
            return None
        return trial, step

    good, bad = largest_good(changed, lambda free: attempt(free) is not None)
    for space in bad:
        for axis in space.axes:
            state.frozen[axis] = f"rolled back: {reasons[space.name]}"
    final = attempt(good) if good else attempt([])
    if final is not None:
        return final
    # What is folded without narrowing anything spoils it: nothing of this round can be taken.
    reason = f"rolled back, as all of its round: {reasons['' if not good else good[-1].name]}"
    state.frozen |= {axis: reason for axis in numbering.slots.bound if axis not in state.frozen}
    return select(numbering, frozen_slots(numbering, state.frozen)), Round()


def largest_good(items: Sequence[T], good: Callable[[Sequence[T]], bool]) -> tuple[list[T], list[T]]:
    """Split items into those that can go together and those that spoil it: group testing, O(bad * log n) calls."""
    accepted: list[T] = []
    refused: list[T] = []

    def add(part: Sequence[T]) -> None:
        if not part:
            return
        if good([*accepted, *part]):
            accepted.extend(part)
        elif len(part) == 1:
            refused.extend(part)
        else:
            add(part[: len(part) // 2])
            add(part[len(part) // 2 :])

    add(list(items))
    return accepted, refused
