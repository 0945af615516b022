"""The table of rules, and how a rule reads an ATen call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ep_prune.graph import Node, Operation

Tensors = Mapping[str, Tensor]
Rule = Callable[[Node, Tensors], Operation]

REGISTRY: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators, named as in a trace (``aten.conv2d``, ``aten.mean.dim``)."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator in REGISTRY:
                raise ValueError(f"duplicate rule for {operator}: {REGISTRY[operator]} and {function}")
            REGISTRY[operator] = function
        return function

    return register


def operators() -> dict[str, list[str]]:
    """Operators by family (file), for the table in the README."""
    families: dict[str, list[str]] = {}
    for operator, function in sorted(REGISTRY.items()):
        families.setdefault(inspect.getmodule(function).__name__.rsplit(".", 1)[1], []).append(operator)  # type: ignore[union-attr]
    return families


def arguments(node: Node) -> dict[str, Any]:
    """The call's arguments by name, defaults filled in, from the operator's own schema."""
    schema = node.target._schema  # type: ignore[union-attr]
    values: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value
    return values


def repeated(value: Any, count: int) -> tuple[int, ...]:
    """An int or a list of one or `count` ints, as a tuple of `count`."""
    items = list(value) if isinstance(value, tuple | list | torch.Size) else [value]
    return tuple(items * count if len(items) == 1 else items)
