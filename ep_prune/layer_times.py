"""What layers take here, measured: milliseconds of one call, by the widths that a layer reads and writes.

A layer is a weight's own operator and what follows it alone, as batch norm and activation. It is run on random
numbers, at the batch of the example, with a quarter, a half, ... of its inputs and outputs; between these,
times are linear in both. Layers that are alike are measured once. Convolutions in groups, and what does not run at
other widths, are measured as they are, and taken to shrink with their multiply-accumulates. What stands between
layers (sums of two branches, pooling) is not in the table: the model is timed as a whole in the end (`latency`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_prune.calibrate import Program
from ep_prune.errors import InputError
from ep_prune.graph import Node, Normalize, Pointwise
from ep_prune.readers import Reader
from ep_prune.rules import kind_of

SHARES = (0.25, 0.5, 0.75, 1.0)
CALLS, SECONDS = 5, 0.004
"""Of one layer at one pair of widths, at least; the median counts."""
Clock = Callable[[], float]


@dataclass(frozen=True, eq=False)
class LayerTimes:
    """Of R layers: inputs, outputs (R, 4): the widths measured at; milliseconds (R, 4, 4)."""

    inputs: Tensor
    outputs: Tensor
    milliseconds: Tensor

    def at(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """(...,) milliseconds of all layers together, reading and writing widths (..., R); what reads or writes
        nothing is not there."""
        i, x = _between(self.inputs, inputs)
        o, y = _between(self.outputs, outputs)
        each = torch.arange(len(self.inputs)).expand_as(i)
        low = self.milliseconds[each, i, o] * (1 - y) + self.milliseconds[each, i, o + 1] * y
        high = self.milliseconds[each, i + 1, o] * (1 - y) + self.milliseconds[each, i + 1, o + 1] * y
        there = (inputs > 0) & (outputs > 0)
        return ((low * (1 - x) + high * x).clamp_min(0) * there).sum(-1)


def _between(grid: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """The last of the grid's widths but one that is not above `width` (the first below it), and how far it is."""
    width = width.double()
    place = (width.unsqueeze(-1) >= grid[:, 1:-1]).sum(-1)
    each = torch.arange(len(grid)).expand_as(place)
    start, end = grid[each, place], grid[each, place + 1]
    return place, (width - start) / (end - start).clamp_min(1e-9)


def layer_times(
    program: Program,
    readers: Sequence[Reader],
    batch: float,
    channels_last: bool = False,
    clock: Clock = time.perf_counter,
) -> LayerTimes:
    """The table of all `readers`, in their order. batch: the example's samples over those of the trace;
    channels_last: whether images lie in memory with their channels last."""
    known: dict[Hashable, Tensor] = {}
    users = program.graph.users()
    inputs, outputs, found = [], [], []
    for reader in readers:
        layer = _Layer.of(program, reader, batch, users, channels_last)
        if layer.key not in known:
            known[layer.key] = layer.measured(clock)
        n, m = len(reader.roots), reader.outputs.numel()
        inputs.append([max(share * n, share) for share in SHARES])
        outputs.append([max(share * m, share) for share in SHARES])
        found.append(known[layer.key] * reader.uses)
    if not found:
        return LayerTimes(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, 4, 4))
    read, written = (torch.tensor(widths, dtype=torch.float64) for widths in (inputs, outputs))
    return LayerTimes(read, written, torch.stack(found))


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer, to be run at any widths. shape: what it reads, at the example's batch."""

    program: Program
    reader: Reader
    nodes: tuple[Node, ...]
    shape: tuple[int, ...]
    channels_last: bool

    @staticmethod
    def of(
        program: Program, reader: Reader, batch: float, users: Mapping[Node, list[Node]], channels_last: bool
    ) -> _Layer:
        nodes = [reader.node]
        while len(users[nodes[-1]]) == 1 and nodes[-1] not in program.graph.outputs:
            user = users[nodes[-1]][0]
            others = [o for o in user.operands() if o.tensor is None and o is not nodes[-1]]
            if others or not isinstance(kind_of(user, program.graph), Normalize | Pointwise):
                break
            nodes.append(user)
        shape = list(reader.op.x.shape or ())
        if shape and reader.op.layout.axis:
            shape[0] = max(round(shape[0] * batch), 1)
        return _Layer(program, reader, tuple(nodes), tuple(shape), channels_last and len(shape) == 4)

    @property
    def key(self) -> Hashable:
        """The same for layers that take the same time."""

        def plain(value: Any) -> str:
            return repr(value.shape) if isinstance(value, Node) else repr(value)

        calls = tuple(
            (n.op, *map(plain, n.args), *(f"{k}={plain(v)}" for k, v in n.kwargs.items())) for n in self.nodes
        )
        return self.shape, calls

    def measured(self, clock: Clock) -> Tensor:
        """(4, 4) milliseconds, by inputs and outputs."""
        whole = self._timed(1.0, 1.0, clock)
        shares = torch.tensor(SHARES, dtype=torch.float64)
        in_proportion = whole * (shares if self.reader.depthwise else torch.outer(shares, shares))
        if self.reader.op.layout.groups > 1:
            return in_proportion.expand(len(SHARES), -1).clone() if self.reader.depthwise else in_proportion
        try:
            return torch.tensor(
                [[self._timed(a, b, clock) if a * b < 1 else whole for b in SHARES] for a in SHARES],
                dtype=torch.float64,
            )
        except InputError:  # a size that stands in the call itself
            return in_proportion

    def _timed(self, inputs: float, outputs: float, clock: Clock) -> float:
        values = self._values(inputs, outputs)
        on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in values.values())

        def call() -> None:
            made = dict(values)
            for node in self.nodes:
                made[node] = self.program.call(node, made)
            if on_gpu:
                torch.cuda.synchronize()

        call()
        times: list[float] = []
        started = clock()
        while len(times) < CALLS or clock() - started < SECONDS:
            begin = clock()
            call()
            times.append(1e3 * (clock() - begin))
            if len(times) >= 20 * CALLS:
                break
        return statistics.median(times)

    def _values(self, inputs: float, outputs: float) -> dict[Node | str, Any]:
        """Random numbers for all that the nodes read, with these shares of the channels."""
        op, graph = self.reader.op, self.program.graph
        n, m = len(self.reader.roots), self.reader.outputs.numel()
        narrow, written = max(round(inputs * n), 1), max(round(outputs * m), 1)
        shape = list(self.shape)
        shape[op.layout.axis] = shape[op.layout.axis] * narrow // n
        weight = graph.tensors[self.reader.name]
        wide = op.layout.canonical(weight)
        if op.layout.groups == 1:
            wide = wide[:, :written, :narrow]
        x = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        values: dict[Node | str, Any] = {
            op.x: x.contiguous(memory_format=torch.channels_last) if self.channels_last else x,
            op.weight: op.layout.original(wide, self.reader.kernel).contiguous(),
        }
        for operand in (o for node in self.nodes for o in node.operands() if o.tensor is not None):
            tensor = graph.tensors[str(operand.tensor)]
            cut = tensor.ndim == 1 and len(tensor) == m and op.layout.groups == 1
            values.setdefault(operand, tensor[:written] if cut else tensor)
        return values
