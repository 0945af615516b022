"""The forward walk: every node's kind, every kind's algebra, everything else a barrier."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ep_prune.graph import Graph, Node
from ep_prune.numbering import attention, contraction, structure
from ep_prune.numbering.elementwise import transfer
from ep_prune.numbering.state import Known, Numbering, Refused, Unknown
from ep_prune.rules import kind_of
from ep_prune.slots import Slots

_HANDLERS = (attention, contraction, structure)


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
        n.barriers[node.where] = str(refusal)
        for operand in node.operands():
            n.sink(n.values[operand], f"read by {node.where}: {refusal}")
        n.values[node] = n.unknown(node)
