"""One family of operators a file. A rule reads a node and says which kind of operation it is.

    @rule("aten.relu")
    def relu(node: Node, tensors: Tensors) -> Operation: ...

A rule that is not sure returns a `Barrier` with its reason. `kind_of` is the only door to all of them.
"""

from __future__ import annotations

from ep_prune.graph import Barrier, Graph, Node, Operation
from ep_prune.rules import (
    activation,
    arithmetic,
    attention,
    contraction,
    movement,
    normalization,
    passing,
    recurrent,
    space,
)
from ep_prune.rules.registry import REGISTRY, operators

__all__ = ["REGISTRY", "kind_of", "operators"]

_FAMILIES = (activation, arithmetic, attention, contraction, movement, normalization, passing, recurrent, space)


def kind_of(node: Node, graph: Graph) -> Operation:
    """The kind of a node; a `Barrier` for operators without a rule."""
    found = REGISTRY.get(node.op)
    return Barrier("no rule for this operator") if found is None else found(node, graph.tensors)
