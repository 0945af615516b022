"""The forward walk: every node's kind, every kind's algebra, everything else a barrier."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ep_prune.errors import InputError
from ep_prune.evaluate import call
from ep_prune.graph import Graph, Node
from ep_prune.numbering import attention, contraction, norms, recurrent, structure
from ep_prune.numbering.elementwise import transfer
from ep_prune.numbering.state import Known, Numbering, Refused, Unknown
from ep_prune.rules import kind_of
from ep_prune.slots import Slots

_HANDLERS = (attention, contraction, norms, recurrent, structure)


def number_channels(
    graph: Graph,
    tolerance: float = 0.0,
    slots: Slots | None = None,
    ranges: Mapping[Node, tuple[Tensor, Tensor]] | None = None,
) -> Numbering:
    """Walk a graph and say of every channel what it is made of. `tolerance` 0: exact.

    ranges: node -> (low, high) of its elements, (1, ...), on a declared domain: what is claimed then holds there.
    """
    n = Numbering(graph, tolerance, slots or Slots(), ranges or {})
    for node in graph.nodes:
        if node.tensor is not None:
            n.values[node] = Known(graph.tensors[node.tensor].detach(), node.tensor)
            if node.tensor not in graph.aliases:
                n.pinned_tensors.setdefault(node.tensor, "tied to a tensor that is no parameter or buffer")
        elif node.target is None:
            n.values[node] = Unknown(n.unknown(node).number, node.shape or (), f"the input {node.name}")
        else:
            _visit(n, node)
    for node in graph.outputs:
        n.sink(n.values[node], "an output of the model")
    for name, reason in n.pinned_tensors.items():
        for axis, size in enumerate(graph.tensors[name].shape):
            n.slots.pin(n.slots.of(name, axis, size), reason)
    n.slots.settle_grids()
    return n


def _visit(n: Numbering, node: Node) -> None:
    try:
        n.values[node] = transfer(kind_of(node, n.graph), node, n)
    except Refused as refusal:
        if node.op == "aten._assert_tensor_metadata":
            n.values[node] = n.unknown(node)
            return
        folded = _folded(n, node)
        if folded is not None:
            n.values[node] = folded
            return
        n.barriers[node.where] = str(refusal)
        for operand in node.operands():
            n.sink(n.values[operand], f"read by {node.where}: {refusal}")
        n.values[node] = n.unknown(node)


def _folded(n: Numbering, node: Node) -> Known | None:
    """What a node without an algebra of its own makes of known tensors alone; None where it is not that."""
    operands = list(dict.fromkeys(node.operands()))
    values = {operand: n.values[operand] for operand in operands}
    known = {operand: value for operand, value in values.items() if isinstance(value, Known)}
    tags = getattr(node.target, "tags", ())
    if not operands or len(known) < len(operands) or node.sized or node.shape is None:
        return None
    if torch.Tag.nondeterministic_seeded in tags:
        return None
    given = {operand: value.value.to(_dtype(operand)) for operand, value in known.items()}
    try:
        made = call(node, given, torch.device("cpu"))
    except InputError:
        return None
    for value in known.values():
        n.sink(value, f"goes through {node.where}")
    return Known(made)


def _dtype(node: Node) -> torch.dtype:
    """Float64 for all floating types, and otherwise the node's own."""
    plain = node.dtype is None or node.dtype.is_floating_point
    return torch.float64 if plain or node.dtype is None else node.dtype
