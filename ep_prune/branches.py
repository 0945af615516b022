"""Residual branches that may go as a whole: x + branch(x), where all that the last weight of the branch reads is
one space of channels. Once none of these is left, the branch is a constant t. The module that holds the sum, too,
becomes a `Shift`, x + t or relu(x + t); where the branch alone is a module (the MLP of a transformer's block),
that becomes a `Constant`.

Such a module is found in the trace: what it computes reads one tensor and weights of its own, only its result is
read elsewhere. That it is called as `module(x)` and returns that result is left to a trial run.
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
    """What may go with the channels of one space. last: the weight that reads them; summed: whether `module` holds
    the sum with what it reads, too; rectified: and the ReLU behind."""

    module: str
    last: Reader
    summed: bool
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
        course = _course(last, graph)
        name = last.node.layer
        while name := name.rpartition(".")[0]:  # the outermost that will do
            module = modules.get(name)
            made = within.reads_and_makes(name)
            if module is None or made is None or module._forward_hooks or module._forward_pre_hooks:
                continue
            given, end = made
            if end in course.sums and given is last.other:
                found[space.name] = Branch(name, last, True, end is not course.sums[0])
            elif end in course.own and given.shape == end.shape:
                found[space.name] = Branch(name, last, False, False)
    return found


def tied_roots(slots: Slots, roots: Tensor) -> Tensor:
    """The roots that equal groups, parts or heads hold together; not those of depthwise layers."""
    found = [torch.empty(0, dtype=torch.int64)]
    for constraint in slots.constraints:
        if isinstance(constraint, Groups) and constraint.inputs.shape[1] > 1:
            found += [constraint.inputs, constraint.outputs]
        elif isinstance(constraint, EqualCounts):
            found += constraint.sections
        elif isinstance(constraint, Fewer):
            found += [constraint.few, constraint.many]
        elif isinstance(constraint, Blends):
            found += [constraint.out]
    return roots[torch.cat([part.reshape(-1) for part in found])]


def _last(readers: Sequence[Reader], space: Free) -> Reader | None:
    """The weight that alone, but for depthwise ones, reads the space, and nothing else, and whose output is added
    to what is there."""
    found = [reader for reader in reads(readers, space.roots) if not reader.depthwise]
    if len(found) != 1:
        return None
    (last,) = found
    whole = torch.equal(torch.unique(last.roots), torch.unique(space.roots))
    plain = not (last.kept_whole or last.by_channels) and last.op.layout.groups == 1
    return last if whole and plain and last.other is not None and space.sections is None else None


@dataclass(frozen=True)
class _Course:
    """The nodes behind a weight, one after the other. own: its output, and what norms make of it; sums: the sum
    with what is there, and its ReLU."""

    own: list[Node]
    sums: list[Node]


def _course(last: Reader, graph: Graph) -> _Course:
    users = graph.users()
    course = _Course([last.node], [])
    at = last.node
    while len(users[at]) == 1 and at not in graph.outputs:
        user = users[at][0]
        kind = kind_of(user, graph)
        if course.sums:
            if isinstance(kind, Pointwise) and user.op == "aten.relu":
                course.sums.append(user)
            break
        if isinstance(kind, Sum) and kind.alpha == 1 and last.other in (kind.x, kind.y):
            course.sums.append(user)
        elif isinstance(kind, Pass | Item) or (isinstance(kind, Normalize) and kind == last.norm):
            course.own.append(user)
        else:
            break
        at = user
    return course


class _Modules:
    """What the modules of a traced model compute."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.users = graph, graph.users()

    def reads_and_makes(self, module: str) -> tuple[Node, Node] | None:
        """The one tensor that a module reads, beside weights of its own that nothing else reads, and the one of
        its results that is read elsewhere; None where there are others."""
        graph, inside = self.graph, f"{module}."
        nodes = {n for n in graph.nodes if n.tensor is None and f"{n.layer}.".startswith(inside)}
        operands = {operand for node in nodes for operand in node.operands()} - nodes
        weights = {operand for operand in operands if operand.tensor is not None}
        given = operands - weights
        made = {n for n in nodes if n in graph.outputs or any(user not in nodes for user in self.users[n])}
        names = [str(weight.tensor) for weight in weights]
        own = all(name.startswith(inside) for n in names for name in graph.aliases.get(n, (n,)))
        named = (n for n in graph.nodes if n.tensor is not None and n.tensor.startswith(inside))
        if (
            not own
            or len(given) != 1
            or len(made) != 1
            or any(u not in nodes for n in named for u in self.users[n])
        ):
            return None
        return given.pop(), made.pop()
