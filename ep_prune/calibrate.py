"""Calibration inputs, and runs of a traced model on them, node by node.

    program = Program(graph)                       the model as `trace` sees it, with tensors exchanged by name
    values = program.begin(chunk, own)
    for node in program.nodes: ...                 values[node] = program.call(node, values)

Inputs are cut into chunks of one size, since sizes in a graph are those of its example. All chunks go through a
node before the next node runs, so that a weight can be fitted where it stands, with what came before it fitted
already; only what a later node still reads is kept (`Program.release`). Weights and activations stay in the
model's type, float32 for half precision; second moments are summed up in float64 (`projection.Moments`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ep_prune.errors import InputError
from ep_prune.evaluate import CHECKS
from ep_prune.graph import Contract, Graph, Node
from ep_prune.rules.registry import arguments, repeated
from ep_prune.trace import as_arguments

Values = dict[Node | str, Any]
"""By node; and by name the biases that are yet to be made (`Program.rooms`)."""
CHUNK = 64
"""Samples in a chunk, at most."""
CHUNKS = 8
"""Chunks, where samples are few: some are to be fitted on, some choose the ridge, some are held out."""
LEAST = 4
"""Calibration samples, at least: two to fit on and two to measure on."""
SAMPLES = 1024
"""Calibration samples used, at most, unless the caller says otherwise."""


@dataclass(frozen=True)
class Samples:
    """Calibration inputs. chunks: each the tensors of one call, `size` samples long; given, used: samples."""

    chunks: tuple[tuple[Tensor, ...], ...]
    size: int
    given: int
    used: int
    example: Any

    def call(self, chunk: Sequence[Tensor]) -> Any:
        """A chunk in the form of the example: a tuple of positional or a dict of keyword arguments."""
        args, kwargs = as_arguments(self.example)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        left = iter(chunk)
        filled = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, tree)
        return kwargs if kwargs else args


def samples_of(
    calibration: Iterable[Any], example: Any, model: nn.Module, limit: int = SAMPLES, largest: int = CHUNK
) -> Samples:
    """Read a loader of inputs, or of (inputs, labels) whose labels are dropped, into chunks of one size.

    Raises `InputError`, naming the batch: too few samples, other shapes or types than the example's, NaN or
    infinite values, samples that are all the same.
    """
    args, kwargs = as_arguments(example)
    wanted = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not wanted:
        raise InputError("example_inputs holds no tensor: pass the inputs that the model takes")
    if limit < LEAST:
        raise InputError(f"samples={limit} is too few: use at least {LEAST}, some hundreds are good")
    if not isinstance(calibration, Iterable) or isinstance(calibration, Mapping):
        kind = type(calibration).__name__
        raise InputError(f"calibration is of type {kind}: pass a list of batches, or a loader")
    at = next(model.parameters(), torch.empty(0))
    parts: list[list[Tensor]] = [[] for _ in wanted]
    count = 0
    for number, batch in enumerate([calibration] if isinstance(calibration, Tensor) else calibration):
        where = f"batch {number} of the calibration data"
        leaves = _leaves(batch, args, kwargs, len(wanted), where)
        if len(leaves) != len(wanted) or any(
            leaf.ndim == 0 or leaf.shape[1:] != like.shape[1:] for leaf, like in zip(leaves, wanted, strict=False)
        ):
            found = [tuple(leaf.shape) for leaf in leaves]
            raise InputError(f"{where} has shapes {found}: pass batches like example_inputs, of any length")
        if len({len(leaf) for leaf in leaves}) > 1:
            raise InputError(f"{where} has tensors of different lengths: the first axis is the batch")
        for part, leaf, like in zip(parts, leaves, wanted, strict=True):
            if leaf.is_floating_point() != like.is_floating_point():
                raise InputError(
                    f"{where} has type {leaf.dtype}, the example {like.dtype}: convert it as for a call"
                )
            if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise InputError(f"{where} holds NaN or infinite values: leave it out")
            part.append(leaf.detach().to(at.device, at.dtype if leaf.is_floating_point() else leaf.dtype))
        count += len(leaves[0])
        if count >= limit:
            break
    used = min(count, limit)
    if used < LEAST:
        raise InputError(f"calibration holds {count} samples: pass at least {LEAST}, some hundreds are good")
    if all(bool((torch.cat(part)[:used] == part[0][:1]).all()) for part in parts):
        raise InputError(f"all {used} samples of the calibration data are the same: pass inputs that differ")
    chunks = max(math.ceil(used / largest), min(CHUNKS, used // 2))
    size = used // chunks
    joined = [torch.cat(part)[: size * chunks].split(size) for part in parts]  # type: ignore[no-untyped-call]
    return Samples(tuple(zip(*joined, strict=True)), size, count, size * chunks, example)


def _leaves(
    batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], expected: int, where: str
) -> list[Tensor]:
    """The tensors of a batch in the order of the example's: keywords by name, without labels beside the inputs."""
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        nested = isinstance(batch[0], tuple | list | Mapping)
        if nested or (len(args) == 1 and expected == 1):
            batch = batch[0]
    if kwargs and isinstance(batch, Mapping):
        if missing := [name for name in kwargs if name not in batch]:
            raise InputError(f"{where} has no {missing[0]!r}, which example_inputs has: pass batches like it")
        batch = {name: batch[name] for name in kwargs}
    return [leaf for leaf in pytree.tree_leaves(as_arguments(batch)) if isinstance(leaf, Tensor)]


class Program:
    """A graph to be run a node at a time, with the tensors of `own` in place of the graph's."""

    def __init__(self, graph: Graph, rooms: Mapping[Node, tuple[str, int]] | None = None) -> None:
        """rooms: nodes whose layer may gain a bias -> the name that it will have, and the axis of its outputs."""
        self.graph = graph
        self.rooms = dict(rooms or {})
        self.nodes = [n for n in _short_branches_first(graph) if n.target is not None and n.op not in CHECKS]
        self.place = {node: k for k, node in enumerate(self.nodes)}
        self.parameters = [n for n in graph.nodes if n.tensor is not None]
        self.inputs = [
            n for n in graph.nodes if n.op == "placeholder" and n.tensor is None and n.shape is not None
        ]
        self.last: dict[Node, Node] = {}
        for node in self.nodes:
            self.last.update(dict.fromkeys(node.operands(), node))
        for node in graph.outputs:
            self.last.pop(node, None)

    def begin(self, chunk: Sequence[Tensor], own: Mapping[str, Tensor]) -> Values:
        """The values before the first node: inputs and tensors."""
        values: Values = {node: tensor for node, tensor in zip(self.inputs, chunk, strict=True)}
        self.exchange(values, own)
        return values

    def exchange(self, values: Values, own: Mapping[str, Tensor], names: Iterable[str] | None = None) -> None:
        """Put the tensors of `own`, else the graph's, at the nodes that read them."""
        wanted = None if names is None else set(names)
        for node in self.parameters:
            name = str(node.tensor)
            if wanted is None or name in wanted:
                values[node] = own[name] if name in own else self.graph.tensors[name]
        for name, _ in self.rooms.values():
            if name in own and (wanted is None or name in wanted):
                values[name] = own[name]

    def call(self, node: Node, values: Mapping[Node | str, Any]) -> Any:
        """One operator. Raises `InputError`, naming the layer."""
        assert node.target is not None
        try:
            result = node.target(
                *_filled(node.args, values), **{k: _filled(v, values) for k, v in node.kwargs.items()}
            )
        except Exception as error:
            raise InputError(
                f"{node.where} does not run by itself ({str(error).splitlines()[0][:160]}): leave out the layer "
                "that holds it, or compress a submodule"
            ) from error
        name, axis = self.rooms.get(node, ("", 0))
        if name in values:
            result = result + values[name].to(result).reshape([-1 if a == axis else 1 for a in range(result.ndim)])
        return result

    def release(self, node: Node, values: Values) -> None:
        """Forget what `node` was the last to read."""
        for operand in node.operands():
            if self.last.get(operand) is node and operand.tensor is None:
                values.pop(operand, None)

    def finish(self, values: Values, own: Mapping[str, Tensor] | None = None, start: int = 0) -> list[Tensor]:
        """The outputs, from the values before node number `start`; `values` itself is left as it is."""
        values = dict(values)
        if own:
            self.exchange(values, own, own)
        for node in self.nodes[start:]:
            values[node] = self.call(node, values)
            self.release(node, values)
        return [values[node] for node in self.graph.outputs]

    def bytes_a_sample(self, batch: int) -> int:
        """Of activations, the most that stand at one time, counted on the traced shapes of `batch` samples."""
        standing, most = 0, 0
        for node in self.nodes:
            standing += bytes_of(node)
            most = max(most, standing)
            standing -= sum(
                bytes_of(o) for o in set(node.operands()) if self.last.get(o) is node and o.tensor is None
            )
        return max(most, 1) // max(batch, 1)


def _short_branches_first(graph: Graph) -> list[Node]:
    """The graph's nodes in an order in which, where branches meet, the one through fewer weights has run before
    the other: a shortcut is known by the time that the weights are fitted whose output is added to it."""
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        own = int(any(o.tensor is not None for o in node.operands()))
        depth[node] = max((depth[o] for o in node.operands()), default=0) + own
    done: set[Node] = set()
    order: list[Node] = []
    waiting = [(node, False) for node in reversed(graph.nodes)]
    waiting += [(node, False) for node in reversed(graph.outputs)]
    while waiting:
        node, ready = waiting.pop()
        if node in done:
            continue
        if ready:
            done.add(node)
            order.append(node)
            continue
        waiting.append((node, True))
        waiting += [(o, False) for o in sorted(set(node.operands()), key=lambda o: -depth[o])]
    return order


def bytes_of(node: Node) -> int:
    """Of what a node makes, at the traced size."""
    return 0 if node.shape is None or node.dtype is None else math.prod(node.shape) * node.dtype.itemsize


def _filled(value: Any, values: Mapping[Node | str, Any]) -> Any:
    if isinstance(value, Node):
        return values[value]
    if isinstance(value, tuple | list):
        return type(value)(_filled(item, values) for item in value)
    return value


# ---- what a weight reads and writes, as rows ------------------------------------------------------------


def positions(node: Node, op: Contract) -> int:
    """At how many places of one sample the weight is applied."""
    shape = (op.x if op.layout.signature.startswith("transposed") else node).shape or ()
    axis = op.layout.axis
    return math.prod(size for k, size in enumerate(shape) if k not in (0, axis)) if axis else 1


class Rows:
    """Rows of a weight's input and output, at the same random places of each sample.

    input (G, r, C/G * taps) in the order of `Layout.canonical`; output (G, r, O/G). `wide`: the input without
    taps, (1, r, C), which is all that there is to a transposed convolution.
    """

    def __init__(self, node: Node, op: Contract, most: int, generator: torch.Generator) -> None:
        self.node, self.op, self.groups = node, op, op.layout.groups
        self.call = arguments(node)
        self.kernel = tuple((op.weight.shape or ())[2:])
        self.convolution = bool(self.kernel) or node.op.startswith("aten.conv")
        self.output_places = self._places(node, most, generator)
        self.input_places = self._places(op.x, most, generator)

    def _places(self, node: Node, most: int, generator: torch.Generator) -> tuple[Tensor, ...] | None:
        """Indices along each axis of space, or None for all places."""
        axis, shape = self.op.layout.axis, node.shape or ()
        space = [size for k, size in enumerate(shape) if k not in (0, axis)]
        if axis == 0 or math.prod(space) <= most:
            return None
        chosen = torch.randperm(math.prod(space), generator=generator)[: max(most, 1)]
        return torch.unravel_index(chosen, space)

    def _flat(self, value: Tensor, places: tuple[Tensor, ...] | None) -> Tensor:
        """(rows, channels)."""
        last = value.movedim(self.op.layout.axis, -1)
        if places is not None:
            at: list[Any] = [slice(None), *(p.to(value.device) for p in places)]
            last = last[tuple(at)]
        return last.reshape(-1, last.shape[-1])

    def output(self, value: Tensor) -> Tensor:
        flat = self._flat(value, self.output_places)
        return flat.reshape(len(flat), self.groups, -1).transpose(0, 1)

    def channels(self, value: Tensor) -> Tensor:
        return self._flat(value, self.input_places).unsqueeze(0)

    def input(self, value: Tensor) -> Tensor:
        if not self.convolution:
            flat = self._flat(value, self.output_places)
            return flat.reshape(len(flat), self.groups, -1).transpose(0, 1)
        count = len(self.kernel)
        stride, dilation = (repeated(self.call[key], count) for key in ("stride", "dilation"))
        padding = self.call["padding"]
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, self.kernel, strict=True)]
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(p, p) for p in repeated(padding, count)]
        if self.op.layout.axis == 0:  # no batch
            value = value.unsqueeze(0)
        value = nn.functional.pad(value, [p for side in reversed(sides) for p in side])
        for axis in range(count):
            value = value.unfold(2 + axis, dilation[axis] * (self.kernel[axis] - 1) + 1, stride[axis])
            value = value[..., :: dilation[axis]]
        value = value.movedim(1, 1 + count)  # (N, *space, C, *kernel)
        if self.output_places is not None:
            at: list[Any] = [slice(None), *(p.to(value.device) for p in self.output_places)]
            value = value[tuple(at)]
        taps = math.prod(self.kernel)
        rows = value.reshape(-1, self.groups, value.shape[-count - 1] // self.groups * taps)
        return rows.transpose(0, 1)
