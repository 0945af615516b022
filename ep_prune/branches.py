"""Residual branches that may go as a whole: y = relu(x + branch(x)), or x + branch(x), where all that the last
weight of the branch reads is one space of channels. Once none of these is left, the branch is a constant, and the
module that holds it, and computes nothing else, becomes a `Shift`.

Such a module is found in the trace: what it computes reads one tensor and weights of its own, only its sum (or the
ReLU behind) is read elsewhere. That it is called as `module(x)` and returns y is left to a trial run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ep_prune.graph import Graph, Item, Node, Normalize, Pass, Pointwise, Sum
from ep_prune.readers import Free, Reader, reads
from ep_prune.rules import kind_of
from ep_prune.slots import Blends, EqualCounts, Fewer, Groups, Slots


@dataclass(frozen=True, eq=False)
class Branch:
    """What may go with the channels of one space. last: the weight that reads them; rectified: whether a ReLU
    follows the sum, inside of `module`."""

    module: str
    last: Reader
    rectified: bool

    def holds(self, name: str) -> bool:
        """Whether this is the name of a layer, or of a tensor, inside."""
        return name.startswith(f"{self.module}.")

    def constant(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(O,) float64: what the branch adds to every channel once its last weight reads nothing."""
        last, norm = self.last, self.last.norm
        name = last.constant if last.mean is None else last.bias
        found = tensors.get(name or "")
        outputs = last.outputs.numel()
        value = torch.zeros(outputs, dtype=torch.float64) if found is None else found.detach().cpu().double()
        if norm is None:
            return value
        weight, bias, mean, variance = (
            None if node is None else tensors[str(node.tensor)].detach().cpu().double()
            for node in (norm.weight, norm.bias, norm.mean, norm.variance)
        )
        assert variance is not None
        slope = (variance + norm.eps).rsqrt() * (1.0 if weight is None else weight)
        return slope * (value - (0.0 if mean is None else mean)) + (0.0 if bias is None else bias)


def branches_of(
    model: nn.Module, graph: Graph, readers: Sequence[Reader], spaces: Iterable[Free], tied: Tensor
) -> dict[str, Branch]:
    """By the name of the space that it goes with, every branch that may go, as the trace has it. tied: roots of
    which one stays (`tied_roots`)."""
    modules = dict(model.named_modules())
    within = _Modules(graph)
    found = {}
    for space in spaces:
        last = _last(readers, space)
        if last is None or bool(torch.isin(space.roots, tied).any()):
            continue
        end, rectified = _end(last, graph)
        name = last.node.layer if end is not None else ""
        while end is not None and (name := name.rpartition(".")[0]):
            module = modules.get(name)
            if module is None or not within.is_alone(name, end, last.other):
                continue
            if not (module._forward_hooks or module._forward_pre_hooks):
                found[space.name] = Branch(name, last, rectified)
            break
    return found


def tied_roots(slots: Slots, roots: Tensor) -> Tensor:
    """The roots that equal groups, parts or heads hold together."""
    found = [torch.empty(0, dtype=torch.int64)]
    for constraint in slots.constraints:
        if isinstance(constraint, Groups):
            found += [constraint.inputs, constraint.outputs]
        elif isinstance(constraint, EqualCounts):
            found += constraint.sections
        elif isinstance(constraint, Fewer):
            found += [constraint.few, constraint.many]
        elif isinstance(constraint, Blends):
            found += [constraint.out]
    return roots[torch.cat([part.reshape(-1) for part in found])]


def _last(readers: Sequence[Reader], space: Free) -> Reader | None:
    """The weight that alone reads the space, and nothing else, and whose output is added to what is there."""
    found = reads(readers, space.roots)
    if len(found) != 1:
        return None
    (last,) = found
    whole = torch.equal(torch.unique(last.roots), torch.unique(space.roots))
    plain = not (last.kept_whole or last.by_channels) and last.op.layout.groups == 1
    return last if whole and plain and last.other is not None and space.sections is None else None


def _end(last: Reader, graph: Graph) -> tuple[Node | None, bool]:
    """The sum with what `last` makes, or the ReLU that alone reads it; and which of the two."""
    users = graph.users()
    at, summed = last.node, False
    while len(users[at]) == 1 and at not in graph.outputs:
        user = users[at][0]
        kind = kind_of(user, graph)
        if isinstance(kind, Pointwise) and summed and user.op == "aten.relu":
            return user, True
        if summed:
            break
        if isinstance(kind, Sum):
            summed = kind.alpha == 1 and last.other in (kind.x, kind.y)
            if not summed:
                return None, False
        elif not (isinstance(kind, Pass | Item) or (isinstance(kind, Normalize) and kind == last.norm)):
            return None, False
        at = user
    return (at, False) if summed else (None, False)


class _Modules:
    """What the modules of a traced model compute."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.users = graph, graph.users()

    def is_alone(self, module: str, end: Node, given: Node | None) -> bool:
        """Whether a module reads `given` and weights of its own, and only `end` is read elsewhere."""
        graph, inside = self.graph, f"{module}."
        nodes = {n for n in graph.nodes if n.tensor is None and f"{n.layer}.".startswith(inside)}
        if end not in nodes or given in nodes or any(n in graph.outputs for n in nodes - {end}):
            return False
        if any(user not in nodes for node in nodes - {end} for user in self.users[node]):
            return False
        operands = {operand for node in nodes for operand in node.operands()} - nodes
        weights = {operand for operand in operands if operand.tensor is not None}
        own = all(
            name.startswith(inside)
            for weight in weights
            for name in graph.aliases.get(str(weight.tensor), (str(weight.tensor),))
        )
        named = {n for n in graph.nodes if n.tensor is not None and n.tensor.startswith(inside)}
        return own and operands - weights == {given} and all(u in nodes for n in named for u in self.users[n])
