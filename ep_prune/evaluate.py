"""A small interpreter of `Graph`: the values of named nodes, in float64, with tensors exchanged on the way.

    evaluate(graph, bind(graph, inputs), graph.outputs)                      the traced model itself
    evaluate(graph, ..., replace={"2.weight": W}, shift={node: b})           with another weight, and y_node + b

Only what the wanted nodes need is run, back to the nodes whose values are given; so a change late in the network
is measured without running its beginning (`boundary` says which values that takes).

Sizes in a graph are those of the traced example: inputs must have its shapes. Every floating tensor is float64,
whatever types the model asks for. Gradients are recorded if autograd is on. Nothing is ever written in place: a
graph is functional. Left out: control flow and other calls that hold graphs of their own (`InputError`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ep_prune.errors import InputError
from ep_prune.graph import Graph, Node
from ep_prune.trace import as_arguments

_LOW = (torch.float32, torch.float16, torch.bfloat16)
CHECKS = ("aten._assert_tensor_metadata", "aten._assert_scalar", "aten._assert_async.msg")
"""Operators that only check what they read: its type is another one here."""


def bind(graph: Graph, inputs: Any) -> dict[Node, Tensor]:
    """The values of a graph's inputs, floating ones in float64. Raises `InputError` where shapes differ."""
    args, kwargs = as_arguments(inputs)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    nodes = [n for n in graph.nodes if n.op == "placeholder" and n.tensor is None and n.shape is not None]
    if kwargs and not args and all(node.name in kwargs for node in nodes):
        leaves = [kwargs[node.name] for node in nodes]  # the trace orders them by the model's signature
    shapes = [tuple(leaf.shape) for leaf in leaves]
    if shapes != [node.shape for node in nodes]:
        raise InputError(
            f"the inputs have shapes {shapes}, the traced example {[node.shape for node in nodes]}: "
            "pass batches of one size"
        )
    return {node: _in_float64(leaf.detach()) for node, leaf in zip(nodes, leaves, strict=True)}


def evaluate(
    graph: Graph,
    given: Mapping[Node, Tensor],
    wanted: Iterable[Node],
    *,
    replace: Mapping[str, Tensor] | None = None,
    shift: Mapping[Node, tuple[Tensor, int]] | None = None,
) -> dict[Node, Any]:
    """The values of the wanted nodes, float64, on the device of the given ones.

    Args:
        given: values of nodes that are not run: the inputs (`bind`), or any others.
        replace: tensors by name, in place of the graph's own.
        shift: node -> (vector, axis), added to what the node gives, along its axis.

    Raises `InputError`, naming the layer, where a node cannot be run.
    """
    replace, shift = replace or {}, shift or {}
    device = next(iter(given.values())).device if given else torch.device("cpu")
    wanted = list(wanted)
    needed = set(wanted)
    for node in reversed(graph.nodes):
        if node in needed and node not in given:
            needed.update(node.operands())
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in needed and node not in given:
            last.update(dict.fromkeys(node.operands(), node))
    kept = set(wanted)
    values: dict[Node, Any] = {node: value for node, value in given.items() if node in needed}
    for node in graph.nodes:
        if node not in needed or node in values:
            continue
        if node.tensor is not None:
            tensor = replace.get(node.tensor)
            values[node] = _in_float64(graph.tensors[node.tensor] if tensor is None else tensor, device)
            continue
        values[node] = call(node, values, device)
        if node in shift:
            vector, axis = shift[node]
            values[node] = values[node] + vector.reshape(
                [-1 if a == axis else 1 for a in range(values[node].ndim)]
            )
        for operand in node.operands():
            if last[operand] is node and operand not in kept:
                values.pop(operand, None)
    return {node: values[node] for node in wanted}


def boundary(graph: Graph, changed: Iterable[Node], replaced: Iterable[str] = ()) -> tuple[Node, ...]:
    """The nodes just before everything that depends on the changed nodes or the replaced tensors."""
    moved, names = set(changed), set(replaced)
    edge: dict[Node, None] = {}
    for node in graph.nodes:
        if node.tensor in names if node.tensor is not None else any(x in moved for x in node.operands()):
            moved.add(node)
    for node in graph.nodes:
        if node in moved and node.tensor is None:
            edge.update(dict.fromkeys(x for x in node.operands() if x not in moved and x.tensor is None))
    return tuple(edge)


def call(node: Node, values: Mapping[Node, Any], device: torch.device) -> Any:
    """One node's operator on the values of its operands, in float64. Raises `InputError` where it does not run."""
    if node.op in CHECKS:
        return None
    if node.target is None:
        raise InputError(f"{node.where} cannot be evaluated by itself: leave out the layers that hold it")

    def filled(value: Any) -> Any:
        if isinstance(value, Node):
            return values[value]
        if isinstance(value, tuple | list):
            return type(value)(filled(item) for item in value)
        if isinstance(value, torch.dtype) and value in _LOW:
            return torch.float64
        return device if isinstance(value, torch.device) else value

    try:
        result = node.target(*filled(node.args), **{key: filled(value) for key, value in node.kwargs.items()})
    except Exception as error:
        raise InputError(f"{node.where} does not run in float64: {str(error).splitlines()[0][:200]}") from error
    return pytree.tree_map(_in_float64, result)


def _in_float64(value: Any, device: torch.device | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(device) if device is not None else value
    return value.double() if value.dtype in _LOW else value
