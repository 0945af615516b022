"""A gauge of effective width: set up once for a model, it measures any state of its weights.

For one space of n channels, all others as they are, width k is measured so:

    1. run the probes, and keep what each consumer of the space reads: x, (rows, n);
    2. order the channels (`elimination`), each consumer's outputs weighed by how much the network's outputs
       change with them (the gradient of a random projection);
    3. write all channels through the first k: x ~ T x_K + t, T by least squares, and fold: W' = W T in every
       consumer; the mean of what its outputs then lack goes into its bias, where there is room for one;
    4. run the network with these weights, and compare its outputs with the wide ones, float64, end to end.

T is fitted on every second piece of the probes, and outputs are compared on all of them, so that a fit to noise
shows. Taps that can read zero padding get no t: there a constant is not one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ep_prune.consumers import ConsumedSpace, Consumer, consumed_spaces
from ep_prune.elimination import Part, absorbed, elimination_order, fitted_embedding
from ep_prune.errors import InputError
from ep_prune.evaluate import bind, boundary, evaluate
from ep_prune.graph import Node
from ep_prune.probes import synthetic_probes
from ep_prune.trace import as_arguments, prepare, run, trace

PIECE = 256
"""The most samples that are run at once; fewer where they are large: up to `ELEMENTS` of input."""

ELEMENTS = 2**18

Values = dict[Node, Tensor]
Shift = dict[Node, tuple[Tensor, int]]


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A trial: tensors in place of the model's, and what is added to the consumers' outputs."""

    tensors: dict[str, Tensor]
    shift: Shift


class WidthGauge:
    """The graph, the spaces and the probes of one model.

    Raises `InputError` and `TraceError` as `effective_width` does.
    """

    def __init__(
        self, model: nn.Module, example_inputs: object, probes: Iterable[object] | None = None, seed: int = 0
    ) -> None:
        working, self.notes = prepare(model)
        run(working, example_inputs)
        self.synthetic = probes is None
        self.seed = seed
        calls = [_call(batch, example_inputs) for batch in probes] if probes is not None else []
        if probes is not None and not calls:
            raise InputError("probes is empty: give at least one batch of inputs, or None for synthetic probes")
        if not calls:
            calls = _enough_synthetic(working, example_inputs, seed)
        self.pieces = _pieces(calls)
        self.graph = trace(working, self.pieces[0])
        self.inputs = [bind(self.graph, piece) for piece in self.pieces]
        self.samples = sum(map(_batch, calls))
        self.spaces = consumed_spaces(self.graph)

    def follow(self, model: nn.Module) -> None:
        """Measure these weights from now on: `model` must be the one the gauge was set up for, in any state."""
        working, _ = prepare(model)
        new: dict[str, Tensor] = dict(working.named_parameters(remove_duplicate=False))
        new |= dict(working.named_buffers(remove_duplicate=False))
        tensors = {name: new[name].detach() if name in new else old for name, old in self.graph.tensors.items()}
        changed = [name for name, old in self.graph.tensors.items() if tensors[name].shape != old.shape]
        if changed:
            raise InputError(f"{changed[0]!r} has another shape than when the gauge was set up: set up a new one")
        self.graph = replace(self.graph, tensors=tensors)

    def measurements(self, names: Sequence[str] | None = None) -> Iterator[Measurement]:
        """The spaces to measure, in order; those that are fixed come too."""
        known = [space.name for space in self.spaces]
        for name in names or ():
            if name not in known:
                raise InputError(f"no space {name!r}: choose among {', '.join(known) or 'none'}")
        with torch.no_grad():
            wide = [self.outputs_of(values, None) for values in self.inputs]
        weights = self._sensitivities(wide)
        for space in self.spaces:
            if names is None or space.name in names:
                yield Measurement(self, space, wide, weights)

    def outputs_of(self, values: Values, trial: Narrowed | None) -> list[Tensor]:
        """The network's outputs, from given values on."""
        nodes = self.graph.outputs
        trial = trial or Narrowed({}, {})
        found = evaluate(self.graph, values, nodes, replace=trial.tensors, shift=trial.shift)
        return [found[node] for node in nodes]

    def _sensitivities(self, wide: Sequence[Sequence[Tensor]]) -> dict[Node, Tensor]:
        """Consumer's node -> (O,) root mean square gradient of the outputs, each relative to its size."""
        consumers = [consumer for space in self.spaces if not space.fixed for consumer in space.consumers]
        nodes = list(dict.fromkeys(node for consumer in consumers for node, _ in consumer.uses))
        axes = {node: consumer.layout.axis for consumer in consumers for node, _ in consumer.uses}
        draw = torch.Generator().manual_seed(self.seed)
        with torch.enable_grad():
            leaves = {c.name: self.graph.tensors[c.name].detach().double() for c in consumers}
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
            found = evaluate(self.graph, self.inputs[0], [*nodes, *self.graph.outputs], replace=leaves)
            total = torch.zeros((), dtype=torch.float64)
            for node, sizes in zip(self.graph.outputs, zip(*wide, strict=True), strict=True):
                out = found[node]
                size = max(float(tensor.abs().max()) for tensor in sizes) if out.is_floating_point() else 0.0
                if size > 0 and out.requires_grad:
                    sign = torch.randint(0, 2, out.shape, generator=draw) * 2.0 - 1
                    total = total + (out * sign.to(out) / size).sum().to(total.device)
            points = [found[node] for node in nodes]
            slopes: Sequence[Tensor | None] = [torch.ones_like(point) for point in points]
            if total.requires_grad and points:  # else all matter alike: the outputs are integers
                slopes = torch.autograd.grad(total, points, allow_unused=True)
        result = {}
        for node, point, slope in zip(nodes, points, slopes, strict=True):
            rest = [axis for axis in range(point.ndim) if axis != axes[node]]
            slope = torch.zeros_like(point) if slope is None else slope
            result[node] = slope.square().mean(rest).sqrt().detach().to("cpu", torch.float64)
        return result


class Measurement:
    """One space of a gauge's model: the order of its channels, and the change of the outputs at any width."""

    def __init__(
        self,
        gauge: WidthGauge,
        space: ConsumedSpace,
        wide: Sequence[Sequence[Tensor]],
        sensitivities: Mapping[Node, Tensor],
    ) -> None:
        self.gauge, self.space, self.wide = gauge, space, wide
        self.least = max(1, int(space.pinned.sum()))
        self.changes: dict[int, float] = {space.width: 0.0}
        if space.fixed:
            self.least = space.width
            return
        graph, names = gauge.graph, [consumer.name for consumer in space.consumers]
        ports = [use for consumer in space.consumers for use in consumer.uses]
        self.edge = boundary(graph, [node for node, _ in ports], names)
        self.before: list[Values] = []
        self.read: list[Values] = []
        self.factors: dict[str, Tensor] = {}
        with torch.no_grad():
            for number, values in enumerate(gauge.inputs):
                fits = number % 2 == 0
                wanted = [*self.edge, *(node for use in ports for node in use if fits)]
                found = evaluate(graph, values, wanted)
                self.before.append({node: found[node] for node in self.edge})
                if fits:
                    self.read.append({node: found[node] for use in ports for node in use})
                    self._absorb(self.read[-1])
            self.order = elimination_order(self._parts(sensitivities), space.pinned)

    def _absorb(self, values: Values) -> None:
        for consumer in self.space.consumers:
            for _, source in consumer.uses:
                x = values[source].movedim(consumer.layout.axis, -1).cpu()
                if not bool(torch.isfinite(x).all()):
                    raise InputError(
                        f"the probes make NaN or infinite values in front of {consumer.name!r}: leave these out"
                    )
                rows = x[..., consumer.place.T].reshape(-1, self.space.width)
                rows = torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), rows], 1)
                self.factors[consumer.name] = absorbed(self.factors.get(consumer.name), rows)

    def _parts(self, sensitivities: Mapping[Node, Tensor]) -> list[Part]:
        parts = []
        for consumer in self.space.consumers:
            factor = self.factors[consumer.name]
            weight = consumer.by_tap(self.gauge.graph.tensors[consumer.name].cpu())
            weigh = torch.stack([sensitivities[node].square() for node, _ in consumer.uses]).sum(0).sqrt()
            sent = weight * (weigh / math.sqrt(consumer.place.shape[1])).reshape(1, 1, -1, 1)
            for taps, centred in _tap_classes(consumer):
                flat = sent[..., taps].reshape(self.space.width, -1)
                parts.append(Part(factor[1:, 1:] if centred else factor[:, 1:], flat))
        return parts

    def narrowed(self, k: int) -> Narrowed:
        """The consumers' weights at width k, and their biases' changes."""
        keep = self.order[:k].sort().values
        graph = self.gauge.graph
        tensors: dict[str, Tensor] = {}
        for consumer in self.space.consumers:
            weight = graph.tensors[consumer.name].cpu()
            wide = consumer.by_tap(weight)
            columns = torch.zeros_like(wide)
            factor = self.factors[consumer.name]
            for taps, centred in _tap_classes(consumer):
                embedding = fitted_embedding(factor[1:, 1:] if centred else factor[:, 1:], keep)
                part = wide[..., taps]
                folded = (embedding.T @ part.reshape(self.space.width, -1)).reshape(-1, *part.shape[1:])
                columns[..., taps] = torch.zeros_like(part).index_copy(0, keep, folded)
            tensors[consumer.name] = consumer.with_columns(weight, columns)
        return Narrowed(tensors, self._missing(tensors))

    def _missing(self, tensors: Mapping[str, Tensor]) -> Shift:
        """The mean of what the consumers' outputs lack, where a bias can take it."""
        shift: Shift = {}
        for consumer in self.space.consumers:
            if not consumer.takes_constants:
                continue
            means = []
            for values in self.read:
                for node, source in consumer.uses:
                    narrow = evaluate(self.gauge.graph, {source: values[source]}, [node], replace=tensors)[node]
                    gap = values[node] - narrow
                    means.append(gap.mean([axis for axis in range(gap.ndim) if axis != consumer.layout.axis]))
            shift |= {node: (torch.stack(means).mean(0), consumer.layout.axis) for node, _ in consumer.uses}
        return shift

    def change(self, k: int) -> float:
        """The largest relative change of any output at width k."""
        if k not in self.changes:
            with torch.no_grad():
                self.changes[k] = self.change_of(self.narrowed(k))
        return self.changes[k]

    def change_of(self, trial: Narrowed, before: Sequence[Values] | None = None) -> float:
        """max |difference| / max |wide output|, of all outputs the largest. `before`: the values to go on from."""
        worst = [0.0] * len(self.gauge.graph.outputs)
        sizes = [0.0] * len(worst)
        for values, wide in zip(before or self.before, self.wide, strict=True):
            narrow = self.gauge.outputs_of(values, trial)
            for place, (a, b) in enumerate(zip(wide, narrow, strict=True)):
                gap = (a.double() - b.double()).abs().nan_to_num(nan=math.inf)
                worst[place] = max(worst[place], float(gap.max()) if gap.numel() else 0.0)
                sizes[place] = max(sizes[place], float(a.double().abs().max()) if a.numel() else 0.0)
        pairs = zip(worst, sizes, strict=True)
        return max((0.0 if not gap else gap / size if size else math.inf for gap, size in pairs), default=0.0)

    def narrowest(self, tol: float) -> int:
        """The smallest width found at which the measured change is at most `tol`: doubling, then bisection."""
        low, high = self.least, min(k for k, change in self.changes.items() if change <= tol)
        step = 1
        while low < high:
            middle = min(low + step - 1, (low + high) // 2) if step else (low + high) // 2
            if self.change(middle) <= tol:
                high, step = middle, 0
            else:
                low, step = middle + 1, 2 * step
        return high


def _tap_classes(consumer: Consumer) -> list[tuple[Tensor, bool]]:
    """Taps by whether a constant may come with the channels."""
    edge = ~consumer.interior | (not consumer.takes_constants)
    pairs = [((~edge).nonzero().squeeze(1), True), (edge.nonzero().squeeze(1), False)]
    return [(taps, centred) for taps, centred in pairs if len(taps)]


def _batch(call: object) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim]
    return leaves[0].shape[0] if leaves else 1


def _call(batch: object, example_inputs: object) -> object:
    """The model's arguments of one batch: labels beside a single input are dropped."""
    args, _ = as_arguments(example_inputs)
    paired = len(args) == 1 and isinstance(batch, tuple | list) and len(batch) == 2
    return batch[0] if paired and isinstance(batch, tuple | list) else batch


def _pieces(calls: Sequence[object]) -> list[object]:
    """All samples in at least two pieces of one size: piece j of J has samples j, J + j, ..., from the start again
    where they run out. Calls without a common batch axis stay as they are."""
    flat = [pytree.tree_flatten(as_arguments(call)) for call in calls]
    tensors = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves, _ in flat]
    sizes = [{leaf.shape[0] if leaf.ndim else 0 for leaf in own} for own in tensors]
    if any(len(own) != 1 or own == {0} for own in sizes):
        return list(calls)
    total = sum(own.pop() for own in sizes)
    each = max(leaf.numel() // leaf.shape[0] for own in tensors for leaf in own)
    count = max(2, math.ceil(total / max(2, min(PIECE, ELEMENTS // max(each, 1)))))
    size = max(2, math.ceil(total / count))
    joined = []
    for places in zip(*(leaves for leaves, _ in flat), strict=True):
        try:
            joined.append(torch.cat(places) if isinstance(places[0], Tensor) else places[0])
        except (RuntimeError, TypeError) as error:
            raise InputError("the probes differ in more than their number: pass batches of one shape") from error
    pieces = []
    for j in range(count):
        index = (torch.arange(size) * count + j) % total
        leaves = [leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) else leaf for leaf in joined]
        args, kwargs = pytree.tree_unflatten(leaves, flat[0][1])
        pieces.append(kwargs if kwargs and not args else args)
    return pieces


def _enough_synthetic(model: nn.Module, example_inputs: object, seed: int) -> list[object]:
    """Synthetic probes, four rows for each channel of the widest layer: positions count as rows."""
    widest = max((p.shape[0] for p in model.parameters() if p.ndim > 1), default=1)
    leaves = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    positions = max((math.prod(leaf.shape[2:]) for leaf in leaves), default=1)
    wanted = min(max(64, 4 * widest // max(positions, 1)), 4096)
    calls: list[object] = []
    while sum(map(_batch, calls)) < wanted and len(calls) < wanted:
        calls += synthetic_probes(model, example_inputs, seed + 1000 * len(calls))
    return calls
