"""The spaces that can be widened: sets of channels that run along the same axes of plainly used weights.

Left out are spaces with pinned channels (inputs, outputs, what a barrier reads, sizes written in code), channels
of grouped convolutions other than depthwise ones, and weights that are used twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.graph import Contract, Graph, Node, Normalize, Operation, Recurrent, Slope, Standardize
from ep_prune.numbering import Numbering, number_channels
from ep_prune.rules import kind_of
from ep_prune.slots import EqualCounts, Groups, Standardized


@dataclass(frozen=True)
class WideSpace:
    """A space that can be widened: `members` (k,) are its slots' roots, in order.

    whole: a layer norm reads it, so that every channel must be copied equally often.
    """

    name: str
    members: Tensor
    whole: bool = False


def numbered(graph: Graph) -> tuple[Numbering, dict[Node, Operation]]:
    """The numbering, with the two sides of every depthwise convolution tied: its channels widen together."""
    n = number_channels(graph)
    n.slots.pin_heads()
    for constraint in n.slots.constraints:
        if isinstance(constraint, Groups) and constraint.inputs.shape[1] == 1:
            n.slots.unify(constraint.inputs.expand_as(constraint.outputs), constraint.outputs)
    called = [node for node in graph.nodes if node.tensor is None and node.target is not None]
    return n, {node: kind_of(node, graph) for node in called}


def open_spaces(
    n: Numbering, kinds: Mapping[Node, Operation], kept: Collection[tuple[str, int]] = ()
) -> list[WideSpace]:
    """Sets of channels that run along the same parameter axes, and may all be widened; axes in `kept` may not."""
    roots = n.slots.roots()
    standardized = [c for c in n.slots.constraints if isinstance(c, Standardized)]
    fixed = n.slots.pinned(roots, {constraint.reason for constraint in standardized}, kept)
    whole = torch.zeros_like(fixed)
    plain = _plainly_used(n, kinds)
    code = torch.zeros(n.slots.count, dtype=torch.int64)
    draw = torch.Generator().manual_seed(0)
    for (name, _), slots in n.slots.bound.items():
        own = torch.unique(roots[slots])
        code[own] += torch.randint(2**62, (1,), generator=draw)  # a hash of the set of axes
        if name not in plain:
            fixed[own] = True
    for constraint in n.slots.constraints:
        if isinstance(constraint, EqualCounts):
            for section in constraint.sections:
                fixed[roots[section]] = True
        elif isinstance(constraint, Groups) and constraint.inputs.shape[1] > 1:
            fixed[roots[constraint.inputs]] = True
            fixed[roots[constraint.outputs]] = True
    for constraint in standardized:
        whole[roots[constraint.slots]] = True
    rows = {tuple(roots[constraint.slots].tolist()) for constraint in standardized}
    found: dict[str, WideSpace] = {}
    taken: set[int] = set()
    for op in kinds.values():
        if not isinstance(op, Contract):
            continue
        name = str(op.weight.tensor)
        axis = -1 if op.layout.groups > 1 else int(op.layout.inputs_first)
        if (name, axis) not in n.slots.bound:
            continue
        own = torch.unique(roots[n.slots.bound[(name, axis)]])
        for key in torch.unique(code[own]).tolist():
            members = own[code[own] == key]
            seen = bool(whole[members].any())
            if key in taken or bool(fixed[members].any()) or (seen and tuple(members.tolist()) not in rows):
                continue
            taken.add(key)
            base = name.rpartition(".")[0] or name
            labels = itertools.chain([base], (f"{base}:{k}" for k in itertools.count(1)))
            label = next(label for label in labels if label not in found)
            found[label] = WideSpace(label, members, seen)
    return list(found.values())


def closed_layers(kinds: Mapping[Node, Operation]) -> dict[str, str]:
    """Layers that no embedding widens, with the reason: what they read and write stays as it is."""
    recurrent = (node for node, op in kinds.items() if isinstance(op, Recurrent))
    return {node.layer or node.name: "no rule to widen a recurrent layer" for node in recurrent}


def _plainly_used(n: Numbering, kinds: Mapping[Node, Operation]) -> set[str]:
    """Tensors that exactly one operation reads, under one name, in a role whose algebra is known here."""
    reads: dict[str, int] = {}
    roles: set[str] = set()
    for node, op in kinds.items():
        for operand in node.operands():
            if operand.tensor is not None:
                reads[operand.tensor] = reads.get(operand.tensor, 0) + 1
        if isinstance(op, Contract):
            parts: Iterable[Node | None] = (op.weight, op.bias)
        elif isinstance(op, Normalize) and op.weight is not None and op.bias is not None:
            parts = (op.weight, op.bias, op.mean, op.variance)
        elif isinstance(op, Standardize) and op.weight is not None and op.bias is not None:
            parts = (op.weight, op.bias)
        elif isinstance(op, Slope):
            parts = (op.slope,)
        else:
            continue
        roles |= {part.tensor for part in parts if part is not None and part.tensor is not None}
    return {name for name in roles if reads[name] == 1 and len(n.graph.aliases.get(name, (name,))) == 1}
