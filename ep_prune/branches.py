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
    the sum with what it reads, too; rectified: and the ReLU behind; takes: names of all spaces inside."""

    module: str
    last: Reader
    summed: bool
    rectified: bool
    takes: tuple[str, ...]

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


def inside(branches: Sequence[Branch], name: str) -> bool:
    """Whether a tensor, or a layer, lies in the module of any of these."""
    return any(branch.holds(name) for branch in branches)


def branches_of(
    model: nn.Module, graph: Graph, readers: Sequence[Reader], spaces: Sequence[Free], slots: Slots, roots: Tensor
) -> dict[str, Branch]:
    """By the name of the space that it goes with, every branch that may go, as the trace has it."""
    modules, users, tied = dict(model.named_modules()), graph.users(), _tied(slots, roots)
    tensors = [_tensors(space, slots, roots) for space in spaces]
    found = {}
    for space, own in zip(spaces, tensors, strict=True):
        last = _last(readers, space)
        alone = sum(other.name == space.name for other in spaces) == 1
        if last is None or not alone or bool(torch.isin(space.roots, tied).any()):
            continue
        course = _course(last, graph, users)
        name = last.node.layer
        while name := name.rpartition(".")[0]:  # the outermost that will do
            made = _reads_and_makes(name, graph, users)
            if made is None or not _all_in(name, own):
                continue
            if name not in modules or any(map(_has_hooks, modules[name].modules())):
                continue
            given, end = made
            summed = end in course.sums and given is last.other
            if summed or (course.norm_before(end) and given.shape == end.shape):
                takes = (s.name for s, names in zip(spaces, tensors, strict=True) if _all_in(name, names))
                found[space.name] = Branch(name, last, summed, end in course.sums[1:], tuple(takes))
    return found


def _tensors(space: Free, slots: Slots, roots: Tensor) -> set[str]:
    """The names of all that has an axis of this space."""
    return {name for (name, _), own in slots.bound.items() if bool(torch.isin(roots[own], space.roots).any())}


def _all_in(module: str, tensors: Iterable[str]) -> bool:
    return all(tensor.startswith(f"{module}.") for tensor in tensors)


def _has_hooks(module: nn.Module) -> bool:
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def _tied(slots: Slots, roots: Tensor) -> Tensor:
    """The roots that equal groups, parts or heads hold together: one of them stays. Not those of depthwise
    layers."""
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


@dataclass
class _Course:
    """The nodes behind a weight, one after the other. own: its output, and what is made of that alone; norm: a
    batch norm among them; sums: the sum with what is there, and its ReLU."""

    own: list[Node]
    sums: list[Node]
    norm: Node | None = None

    def norm_before(self, end: Node) -> bool:
        """Whether `end` is made of the weight alone, and any batch norm is done by then."""
        return end in self.own and (self.norm is None or self.norm in self.own[: self.own.index(end) + 1])


def _course(last: Reader, graph: Graph, users: Mapping[Node, list[Node]]) -> _Course:
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
        elif isinstance(kind, Normalize) and kind == last.norm:
            course.own.append(user)
            course.norm = user
        elif isinstance(kind, Pass | Item):
            course.own.append(user)
        else:
            break
        at = user
    return course


def _reads_and_makes(module: str, graph: Graph, users: Mapping[Node, list[Node]]) -> tuple[Node, Node] | None:
    """The one tensor that a module reads, beside weights of its own that nothing else reads, and the one of its
    results that is read elsewhere; None where there are others, or weights that inference does not read."""
    prefix = f"{module}."
    nodes = {n for n in graph.nodes if n.tensor is None and f"{n.layer}.".startswith(prefix)}
    operands = {operand for node in nodes for operand in node.operands()} - nodes
    weights = {operand for operand in operands if operand.tensor is not None}
    given = operands - weights
    made = {n for n in nodes if n in graph.outputs or any(user not in nodes for user in users[n])}
    names = [str(weight.tensor) for weight in weights]
    own = all(_all_in(module, graph.aliases.get(name, (name,))) for name in names)
    named = (n for n in graph.nodes if n.tensor is not None and n.tensor.startswith(prefix))
    if not own or len(given) != 1 or len(made) != 1 or any(user not in nodes for n in named for user in users[n]):
        return None
    return None if any(name.startswith(prefix) for name in graph.untraced) else (given.pop(), made.pop())
