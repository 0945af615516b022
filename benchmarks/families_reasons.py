"""Why `embed` does not open a space, and why `reduce` does not bring one back: for `benchmarks.families`."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ep_prune as ep
from ep_prune.graph import Contract
from ep_prune.slots import EqualCounts, Groups
from ep_prune.trace import trace
from ep_prune.widen_spaces import numbered

OUTPUT = "an output of the model"
GENERIC = ("distinct and read", "kept for equal parts", "last of its layer", "leads the constants")
"""What the report says of a channel that stays for what it is, and not for who reads it."""


def missed(before: int, wide: int, after: int | None, stayed: Mapping[str, int]) -> str:
    """`64 -> 96 -> 80: why`."""
    special = [why for why in stayed if why not in GENERIC]
    why = "; ".join(short(reason) for reason in special) or ", ".join(stayed)
    return f"{before} -> {wide} -> {'not there' if after is None else after}: {why or 'no reason is given'}"


def closed(
    base: ep.Result, wide: nn.Module, example: Any, opened: set[str], left_alone: Mapping[str, str]
) -> dict[str, list[str]]:
    """Reason -> the spaces that `embed` has not widened for it; outputs of the model apart.

    For `reduce` the two sides of a depthwise convolution are two spaces, for `embed` one, which goes by its first
    layer: the other side is wider too, and is not counted twice.
    """
    found: dict[str, list[str]] = {}
    left: set[str] = set()
    for name, reason in left_alone.items():
        layers = [space.name for space in base.report.spaces if space.name.startswith(f"{name}.l")]
        own = [name] if name in {space.name for space in base.report.spaces} else layers  # a recurrent module's
        found.setdefault(f"embed gave it up: {short(reason)}", []).extend(own)
        left |= set(own)
    structure = Structure(base.model, example)
    for space in base.report.spaces:
        if space.name in opened or space.name in left or set(space.stayed) == {OUTPUT}:
            continue
        if structure.width(wide, space.producers[0]) > structure.width(base.model, space.producers[0]):
            continue
        special = {why: count for why, count in space.stayed.items() if why not in GENERIC}
        why = short(max(special, key=lambda w: special[w])) if special else structure.reason(space.producers)
        found.setdefault(why, []).append(space.name)
    return found


class Structure:
    """Why `embed` does not open spaces that nothing pins: the conditions of `widen_spaces.open_spaces`."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.graph = trace(copy.deepcopy(model), example)
        self.n, self.kinds = numbered(self.graph)
        self.roots = self.n.slots.roots()
        self.layouts = {str(op.weight.tensor): op.layout for op in self.kinds.values() if isinstance(op, Contract)}

    def width(self, model: nn.Module, producer: str) -> int:
        """How many channels a weight writes in `model`."""
        layout = self.layouts.get(producer)
        axis = 1 if layout is None or (layout.inputs_first and layout.groups == 1) else 0
        return model.state_dict()[producer].shape[axis]

    def reason(self, producers: tuple[str, ...]) -> str:
        roots = self._of(producers)
        for constraint in self.n.slots.constraints:
            if isinstance(constraint, Groups) and constraint.inputs.shape[1] > 1:
                if any(self._meets(part, roots) for part in (constraint.inputs, constraint.outputs)):
                    return "read or written by a convolution in groups"
            elif isinstance(constraint, EqualCounts) and any(self._meets(s, roots) for s in constraint.sections):
                return "split into equal parts"
        axes = {name for (name, _), slots in self.n.slots.bound.items() if self._meets(slots, roots)}
        reads: dict[str, list[str]] = {name: [] for name in axes}
        for node in self.graph.nodes:
            for operand in node.operands():
                if operand.tensor in axes:
                    reads[str(operand.tensor)].append(node.op.removeprefix("aten."))
        several = [name for name in axes if len(reads[name]) > 1 or len(self.graph.aliases.get(name, ())) > 1]
        if several:
            return "a parameter is used in several places"
        plain = ("linear", "addmm", "mm", "matmul", "conv", "batch_norm", "layer_norm", "prelu")
        odd = sorted({op for ops in reads.values() for op in ops if not any(word in op for word in plain)})
        if odd:
            return f"a parameter is read by {', '.join(odd)}"
        return "no reason is given: its channels do not run along the same axes, or are read in training alone"

    def _of(self, producers: tuple[str, ...]) -> Tensor:
        own = []
        for name in producers:
            layout = self.layouts.get(name)
            axis = 1 if layout is None else -1 if layout.groups > 1 else int(layout.inputs_first)
            if (name, axis) in self.n.slots.bound:
                own.append(self.roots[self.n.slots.bound[(name, axis)]])
        return torch.cat(own) if own else torch.empty(0, dtype=torch.int64)

    def _meets(self, slots: Tensor, roots: Tensor) -> bool:
        return bool(torch.isin(self.roots[slots.reshape(-1)], roots).any())


def short(reason: str) -> str:
    """A reason without the layer and the line of source, so that equal ones are counted together."""
    text = re.sub(r"(?:\(top level\)|\S+) \(([\w.:]+)(?:, [^()]*)?\)", r"\1", line(reason))
    return re.sub(r"\d\.\d+e[-+]\d+", "x", text.replace("aten.", ""))


def line(text: str) -> str:
    return " ".join(text.split())[:400]
