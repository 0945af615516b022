"""Kept neurons moved to where they stand best for many: Levenberg-Marquardt against the wide outputs.

Neurons of a condensed layer share a direction, but not its length: f = sum_k a_k s(c_k (w x + b)). No single one
of them, at any outgoing weight, is the function as well as one at a length in between may be. So where a plain
linear layer writes a space that plain linear layers read, the kept neurons' own weights are moved too:

    minimize over (W1, b1, W2, b2)    || f(W1, b1, W2, b2) - f_wide ||^2         on the pieces that are fitted to

from the least-squares fit of the selected neurons; the result is measured as every other (`gauge`). At k neurons
this has k (inputs + outputs + 1) + outputs unknowns, and is tried up to `UNKNOWNS` of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.consumers import ConsumedSpace, Consumer
from ep_prune.errors import InputError
from ep_prune.evaluate import boundary, evaluate
from ep_prune.gauge import Measurement, Narrowed

UNKNOWNS = 512
STEPS = 40
STALLED = 1e-4
"""A step that gains less than this share of the loss is the last one."""


@dataclass(frozen=True)
class Layer:
    """A hidden layer: the weight that writes it, its bias if it has one, and the weight that reads it."""

    weight: str
    bias: str | None
    reader: Consumer


def refined_width(measurement: Measurement, width: int, tol: float) -> int:
    """The smallest width found below `width` at which the moved neurons keep the outputs within `tol`.

    `width` itself where the space is none of a plain hidden layer. The changes measured are noted with the others.
    """
    layer = plain_layer(measurement.space)
    if layer is None:
        return width
    low, high = measurement.least, width
    while low < high:
        middle = (low + high) // 2
        change = _refined_change(measurement, layer, middle, tol)
        if change is not None and change <= tol:
            high = middle
        else:
            low = middle + 1
    return high


def plain_layer(space: ConsumedSpace) -> Layer | None:
    """The space as a hidden layer between two plain linear ones, if it is one."""
    if space.fixed or bool(space.pinned.any()) or len(space.producers) != 1 or len(space.consumers) != 1:
        return None
    (reader,) = space.consumers
    (writer,) = space.producers
    others = [axis for axis in space.axes if axis not in ((writer, 0), (reader.name, 1))]
    bias = next((name for name, axis in others if axis == 0), None)
    plain = len(others) <= 1 and (writer, 0) in space.axes and (reader.name, 1) in space.axes
    covers = reader.layout.signature == "linear" and not reader.layout.inputs_first and reader.place.shape[1] == 1
    whole = all(bool((number >= 0).all()) for number in space.axes.values())
    return Layer(writer, bias, reader) if plain and covers and whole and len(reader.uses) == 1 else None


def _refined_change(measurement: Measurement, layer: Layer, k: int, tol: float) -> float | None:
    """The change of the outputs at width k after moving; None where it cannot be tried."""
    graph = measurement.gauge.graph
    tensors = {name: graph.tensors[name].double().cpu() for name in (layer.weight, layer.bias) if name is not None}
    if tensors[layer.weight].ndim != 2:
        return None
    keep = measurement.order[:k].sort().values
    place = measurement.space.axes[(layer.weight, 0)]
    rows = torch.argsort(place)[keep]
    columns = layer.reader.place[keep, 0]
    with torch.no_grad():
        start = measurement.narrowed(k)
    reader = start.tensors[layer.reader.name][:, columns]
    (node, _), shift = layer.reader.uses[0], start.shift
    free = {name: tensor[rows] for name, tensor in tensors.items()} | {layer.reader.name: reader}
    if node in shift:
        free["shift"] = shift[node][0].cpu()
    if sum(tensor.numel() for tensor in free.values()) > UNKNOWNS:
        return None

    def trial(values: Mapping[str, Tensor]) -> Narrowed:
        moved = {name: value for name, value in values.items() if name != "shift"}
        axis = layer.reader.layout.axis
        return Narrowed(moved, {node: (values["shift"], axis)} if "shift" in values else {})

    edge = boundary(graph, [], [name for name in free if name != "shift"])
    with torch.no_grad():
        before = [evaluate(graph, values, edge) for values in measurement.gauge.inputs]
    sizes = [max(float(t.abs().max()) for t in pieces) or 1.0 for pieces in zip(*measurement.wide, strict=True)]

    def residual(values: Mapping[str, Tensor]) -> Tensor:
        """What the fitted pieces' outputs lack, each output relative to its size."""
        gaps = []
        for piece in range(0, len(before), 2):
            narrow = measurement.gauge.outputs_of(before[piece], trial(values))
            for a, b, size in zip(measurement.wide[piece], narrow, sizes, strict=True):
                gaps.append(((b - a) / size).reshape(-1))
        return torch.cat(gaps)

    def change(values: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return measurement.change_of(trial(values), before)

    try:
        best = _descend(free, residual, change, tol)
    except InputError:  # a size in the user's code: this layer cannot be cut as a tensor alone
        return None
    measurement.changes[k] = min(best, measurement.changes.get(k, best))
    return best


def _descend(
    free: Mapping[str, Tensor],
    residual: Callable[[Mapping[str, Tensor]], Tensor],
    change: Callable[[Mapping[str, Tensor]], float],
    tol: float,
) -> float:
    """Levenberg-Marquardt with Marquardt's scaling, until the change is within `tol`. The least change seen."""
    names, shapes = list(free), [tensor.shape for tensor in free.values()]
    point = torch.cat([tensor.reshape(-1) for tensor in free.values()])

    def named(flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        return {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def of(flat: Tensor) -> Tensor:
        return residual(named(flat))

    best, damping = change(named(point)), 1e-3
    with torch.no_grad():
        missing = of(point)
    for _ in range(STEPS):
        if best <= tol:
            break
        slope = _jacobian(of, point)
        gram, down = slope.T @ slope, slope.T @ missing
        scale = gram.diagonal().clamp_min(1e-12 * float(gram.diagonal().max()) + 1e-300)
        gained = 0.0
        for _ in range(8):
            step = torch.linalg.solve(gram + damping * torch.diag(scale), down)
            with torch.no_grad():
                new = of(point - step)
            gained = 1.0 - float(new.square().sum() / missing.square().sum())
            if gained > 0:
                point, missing, damping = point - step, new, damping / 5
                break
            damping *= 5
        if gained <= 0:
            break
        best = min(best, change(named(point)))
        if gained < STALLED:
            break
    return best


def _jacobian(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """(rows, unknowns), forward mode: there are fewer unknowns than rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's forward mode still scripts some of its own rules
        slope: Tensor = torch.func.jacfwd(function)(point)
    return slope.detach()
