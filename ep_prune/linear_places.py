"""What stands between a weight that writes channels and the weights that read them: places where nothing bends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.demand import Demand
from ep_prune.graph import (
    Cat,
    Contract,
    Graph,
    Move,
    Node,
    Normalize,
    Operation,
    Pad,
    Pass,
    Pointwise,
    Product,
    Split,
    Stencil,
)
from ep_prune.numbering import Numbering
from ep_prune.rules import kind_of

NEARLY = 1e-6
"""Singular values below this share of the largest count as near zero in `dependent`, which claims nothing."""


@dataclass(frozen=True, eq=False)
class Place:
    """A producer, what stands behind it (`act` or `norm`, or neither), and who reads that."""

    node: Node
    op: Contract
    act: Node | None
    norm: Normalize | None
    consumers: tuple[Demand, ...]


@dataclass(eq=False)
class _Behind:
    """act: the one activation, straight behind the weight, norm: the one batch norm there. readers: the weights at
    the ends. through: an operation that is linear, but that no fold goes through. bent: nothing is known."""

    act: Node | None = None
    norm: Normalize | None = None
    readers: list[Contract] = field(default_factory=list)
    through: Node | None = None
    bent: bool = False


def place_of(node: Node, n: Numbering, needs: Mapping[str, Demand]) -> Place | None:
    """A weight's use whose outputs go, bent at most by one activation, to weights and nowhere else."""
    op = _written(node, n.graph)
    if op is None or op.layout.groups != 1 or op.weight.tensor not in needs:
        return None
    producer = needs[str(op.weight.tensor)]
    if len(producer.ports) > 1 or not producer.foldable:
        return None
    behind = _behind(node, n.graph)
    if behind.bent or behind.through is not None or not behind.readers:
        return None
    consumers = {str(reader.weight.tensor): needs.get(str(reader.weight.tensor)) for reader in behind.readers}
    found = [demand for demand in consumers.values() if demand is not None]
    good = len(found) == len(consumers) and all(d.foldable and len(d.ports) == 1 for d in found)
    return Place(node, op, behind.act, behind.norm, tuple(found)) if good else None


def dependent(node: Node, graph: Graph) -> tuple[int, str] | None:
    """(k, operation): k of the channels that a weight writes are affine in the others, nothing bends before other
    weights read them, and no fold goes through the operation named. None elsewhere."""
    op = _written(node, graph)
    if op is None or op.layout.groups != 1:
        return None
    behind = _behind(node, graph)
    if behind.bent or behind.act is not None or behind.through is None or not behind.readers:
        return None
    rows = op.layout.canonical(graph.tensors[str(op.weight.tensor)].detach().to("cpu", torch.float64))[0].flatten(
        1
    )
    value = torch.linalg.svdvals(rows)
    rank = int((value > NEARLY * value.max().clamp_min(1e-300)).sum())
    return (len(rows) - rank, behind.through.op) if rank < len(rows) else None


def gain_and_shift(norm: Normalize, n: Numbering) -> tuple[Tensor, Tensor]:
    """(n,), (n,): what a batch norm at inference multiplies each channel by, and adds."""
    gain = (n.tensor(norm.variance) + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * n.tensor(norm.weight)
    shift = -n.tensor(norm.mean) * gain
    return gain, shift if norm.bias is None else shift + n.tensor(norm.bias)


def _written(node: Node, graph: Graph) -> Contract | None:
    if node.target is None or node.tensor is not None:
        return None
    op = kind_of(node, graph)
    return op if isinstance(op, Contract) and op.weight.tensor is not None else None


def _behind(node: Node, graph: Graph) -> _Behind:
    """Walk from a weight's output to the weights that read it."""
    found, users, outputs = _Behind(), graph.users(), set(graph.outputs)
    waiting, seen = [node], {node}
    while waiting:
        at = waiting.pop()
        if at in outputs or not users[at]:
            found.bent = True
            return found
        for reader in users[at]:
            kind: Operation = kind_of(reader, graph)
            alone = len(seen) == 1 and len(users[at]) == 1
            if isinstance(kind, Contract) and kind.x is at and kind.layout.groups == 1 and kind.weight.tensor:
                found.readers.append(kind)
                continue
            if isinstance(kind, Pointwise) and alone:
                found.act = reader
            elif isinstance(kind, Normalize) and kind.x is at and alone:
                found.norm = kind
            elif _is_linear(kind, at):
                found.through = reader
            elif not (isinstance(kind, Pass | Move | Cat) or (isinstance(kind, Stencil) and kind.keeps_constants)):
                found.bent = True
                return found
            if reader not in seen:
                seen.add(reader)
                waiting.append(reader)
    return found


def _is_linear(kind: Operation, at: Node) -> bool:
    """Whether an operation that no fold goes through bends nothing either."""
    if isinstance(kind, Product):
        other = kind.y if kind.x is at else kind.x
        return not isinstance(other, Node) or other.tensor is not None
    if isinstance(kind, Contract):
        return kind.x is at and kind.weight.tensor is not None
    if isinstance(kind, Stencil):
        return not kind.keeps_constants
    return isinstance(kind, Normalize | Split | Pad) and kind.x is at
