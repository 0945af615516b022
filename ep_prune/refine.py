"""Kept neurons moved to where they stand best for many: Levenberg-Marquardt against the wide outputs.

Neurons of a condensed layer share a direction, but not its length: f = sum_k a_k s(c_k (w x + b)). No single one
of them, at any outgoing weight, is the function as well as one at a length in between may be. So where a plain
linear layer writes a space that plain linear layers read, the kept neurons' own weights are moved too:

    minimize over (W1, b1, W2, b2)    || f(W1, b1, W2, b2) - f_wide ||^2         on the pieces that are fitted to

from the least-squares fit of the selected neurons; the result is measured as every other (`gauge`). At k neurons
this has k (inputs + outputs + 1) + outputs unknowns, and is tried up to `UNKNOWNS` of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.consumers import ConsumedSpace, Consumer
from ep_prune.errors import InputError
from ep_prune.evaluate import boundary, evaluate
from ep_prune.gauge import Measurement, Narrowed, Values

UNKNOWNS = 512
STEPS = 40
STALLED = 0.01
"""A step that gains less than this share of the loss (squares) is the last one at its width."""


@dataclass(frozen=True)
class Layer:
    """A hidden layer: the weight that writes it, its bias if it has one, and the weight that reads it."""

    weight: str
    bias: str | None
    reader: Consumer


def refined_widths(measurement: Measurement, selected: Mapping[float, int]) -> dict[float, int]:
    """tol -> the smallest width found, up to the selected one, at which moved neurons keep the outputs within tol.

    As selected where the space is none of a plain hidden layer. The changes measured are noted with the others.
    """
    layer = plain_layer(measurement.space)
    if layer is None or measurement.gauge.graph.tensors[layer.weight].ndim != 2:
        return dict(selected)
    moving = _Moving(measurement, layer)
    found = {}
    for tol, width in selected.items():
        low, high = measurement.least, width
        while low < high:
            middle = (low + high) // 2
            if moving.change(middle, tol) <= tol:
                high = middle
            else:
                low = middle + 1
        found[tol] = high
    return found


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


@dataclass
class _Descent:
    """Where the neurons of one width stand: all weights in one vector, what they lack, the least change so far."""

    point: Tensor
    shapes: dict[str, torch.Size]
    missing: Tensor
    best: float
    damping: float = 1e-3
    steps: int = 0
    stalled: bool = False


class _Moving:
    """The neurons of one layer, moved at any width; what was reached at a width is where the next try goes on."""

    def __init__(self, measurement: Measurement, layer: Layer) -> None:
        self.measurement, self.layer = measurement, layer
        graph = measurement.gauge.graph
        names = [name for name in (layer.weight, layer.bias, layer.reader.name) if name is not None]
        self.tensors = {name: graph.tensors[name].double().cpu() for name in names[:-1]}
        edge = boundary(graph, [], names)
        with torch.no_grad():
            self.before: list[Values] = [evaluate(graph, values, edge) for values in measurement.gauge.inputs]
        pieces = zip(*measurement.wide, strict=True)
        self.sizes = [max(float(tensor.abs().max()) for tensor in piece) or 1.0 for piece in pieces]
        self.descents: dict[int, _Descent | None] = {}

    def change(self, k: int, tol: float) -> float:
        """The least change of the outputs at width k, once within `tol` or stalled; inf if it cannot be tried."""
        try:
            if k not in self.descents:
                self.descents[k] = self._start(k)
            descent = self.descents[k]
            if descent is None:
                return math.inf
            while descent.best > tol and not descent.stalled:
                self._step(descent)
        except InputError:  # a size in the user's code: this layer cannot be cut as a tensor alone
            self.descents[k] = None
            return math.inf
        self.measurement.changes[k] = min(descent.best, self.measurement.changes.get(k, math.inf))
        return descent.best

    def _start(self, k: int) -> _Descent | None:
        """The selected neurons, with their least-squares weights; None where there are too many unknowns."""
        measurement, reader = self.measurement, self.layer.reader
        keep = measurement.order[:k].sort().values
        rows = torch.argsort(measurement.space.axes[(self.layer.weight, 0)])[keep]
        with torch.no_grad():
            trial = measurement.narrowed(k)
        free = {name: tensor[rows] for name, tensor in self.tensors.items()}
        free[reader.name] = trial.tensors[reader.name][:, reader.place[keep, 0]]
        for node, (shift, _) in trial.shift.items():
            assert node is reader.uses[0][0]
            free["shift"] = shift.cpu()
        point = torch.cat([tensor.reshape(-1) for tensor in free.values()])
        if len(point) > UNKNOWNS:
            return None
        descent = _Descent(point, {name: tensor.shape for name, tensor in free.items()}, point, math.inf)
        with torch.no_grad():
            descent.missing = self._missing(descent, point)
            descent.best = measurement.change_of(self._trial(descent, point), self.before)
        return descent

    def _trial(self, descent: _Descent, point: Tensor) -> Narrowed:
        parts = torch.split(point, [shape.numel() for shape in descent.shapes.values()])
        pairs = zip(descent.shapes.items(), parts, strict=True)
        tensors = {name: part.reshape(shape) for (name, shape), part in pairs}
        shift = tensors.pop("shift", None)
        reader = self.layer.reader
        return Narrowed(tensors, {} if shift is None else {reader.uses[0][0]: (shift, reader.layout.axis)})

    def _missing(self, descent: _Descent, point: Tensor) -> Tensor:
        """What the outputs lack on the pieces that are fitted to, each output relative to its size."""
        gaps = []
        for piece in range(0, len(self.before), 2):
            narrow = self.measurement.gauge.outputs_of(self.before[piece], self._trial(descent, point))
            for a, b, size in zip(self.measurement.wide[piece], narrow, self.sizes, strict=True):
                gaps.append(((b - a) / size).reshape(-1).cpu())
        return torch.cat(gaps)

    def _step(self, descent: _Descent) -> None:
        """One step of Levenberg-Marquardt, with Marquardt's scaling."""
        slope = _jacobian(lambda point: self._missing(descent, point), descent.point)
        gram, down = slope.T @ slope, slope.T @ descent.missing
        scale = gram.diagonal().clamp_min(1e-12 * float(gram.diagonal().max()) + 1e-300)
        gained, lost = 0.0, float(descent.missing.square().sum())
        with torch.no_grad():
            for _ in range(8 if lost > 0 else 0):
                new = descent.point - torch.linalg.solve(gram + descent.damping * torch.diag(scale), down)
                missing = self._missing(descent, new)
                gained = 1.0 - float(missing.square().sum()) / lost
                if gained > 0:
                    descent.point, descent.missing, descent.damping = new, missing, descent.damping / 5
                    change = self.measurement.change_of(self._trial(descent, new), self.before)
                    descent.best = min(descent.best, change)
                    break
                descent.damping *= 5
        descent.steps += 1
        descent.stalled = not gained > STALLED or descent.steps >= STEPS


def _jacobian(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """(rows, unknowns), forward mode: there are fewer unknowns than rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's forward mode still scripts some of its own rules
        slope: Tensor = torch.func.jacfwd(function)(point)
    return slope.detach()


def warm_up() -> None:
    """Have torch load its rules of forward mode now: it takes half a second when they are first used."""
    _jacobian(torch.tanh, torch.zeros(1, dtype=torch.float64))
