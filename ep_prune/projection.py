"""Least squares on second moments: which inputs of a weight to keep, and the weight that reads them alone.

A weight W (o, p) reads x (p,); on data x has mean m and covariance H = E[(x - m)(x - m)']. Of x only a part K
is to be kept. The weight that then comes nearest to y, which need not be W x, and its intercept:

    min E |W' x_K + b - y|^2 + ridge |W' - W_K|^2      W' = (C + ridge W_K)(H_KK + ridge)^-1
    C = E[(y - E y)(x_K - m_K)']

`eliminate` orders the inputs by how little is lost without them (optimal brain surgeon: Hassibi and Stork, 1993;
blocks of inputs, since a channel is read at several taps). With A = H^-1 over what is left and block c:

    cost of c = tr(G W_c (A_cc)^-1 W_c'),    then   W -= W_c (A_cc)^-1 A_c:,   A -= A_:c (A_cc)^-1 A_c:

where G (o, o) weighs the outputs. Several weights that read the same channels count together. All in float64.
Nothing here knows graphs or modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Tried for `ridge`, as shares of the mean variance of the inputs."""
RIDGE = 1e-3
"""Of the covariance in `eliminate`."""
ROUNDING = 1e-12
"""Of a mean square: a smaller variance is none."""


@dataclass
class Moments:
    """Sums over rows of x (p,) and y (o,), in groups: g of them side by side, each with inputs of its own.

    xx (g, p, p), xy (g, p, o), x (g, p), y (g, o), yy (g, o): sums of products and of values; rows: how many.
    Each batch is summed up in its own type, with its means taken off, and added in float64: the variance of what
    hardly varies would drown in the rounding of its square.
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    yy: Tensor
    rows: int = 0

    @staticmethod
    def empty(groups: int, inputs: int, outputs: int, device: torch.device) -> Moments:
        sizes = ((inputs, inputs), (inputs, outputs), (inputs,), (outputs,), (outputs,))
        xx, xy, x, y, yy = (torch.zeros(groups, *s, dtype=torch.float64, device=device) for s in sizes)
        return Moments(xx, xy, x, y, yy)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count rows: x (g, r, p), y (g, r, o)."""
        x, mean = _parted(x)
        rows = x.shape[1]
        self.xx += x.transpose(1, 2) @ x
        self.xx += rows * mean.unsqueeze(2) * mean.unsqueeze(1)
        self.x += rows * mean
        self.rows += rows
        self._add_targets(x, mean, y)

    def forget_targets(self) -> None:
        for part in (self.xy, self.y, self.yy):
            part.zero_()

    def add_targets(self, x: Tensor, y: Tensor) -> None:
        self._add_targets(*_parted(x), y)

    def _add_targets(self, x: Tensor, mean: Tensor, y: Tensor) -> None:
        y, target = _parted(y)
        rows = y.shape[1]
        self.xy += x.transpose(1, 2) @ y
        self.xy += rows * mean.unsqueeze(2) * target.unsqueeze(1)
        self.y += rows * target
        self.yy += y.square().sum(1) + rows * target.square()

    def __add__(self, other: Moments) -> Moments:
        xx, xy, x, y, yy = (getattr(self, n) + getattr(other, n) for n in ("xx", "xy", "x", "y", "yy"))
        return Moments(xx, xy, x, y, yy, self.rows + other.rows)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """H (g, p, p), C (g, p, o), the means of x and y, and the variance of y (g, o).

        The variance of an input that is a constant comes out as rounding, of either sign: it is made positive, so
        that H can be inverted."""
        n = max(self.rows, 1)
        x, y = self.x / n, self.y / n
        inputs = self.xx / n - x.unsqueeze(2) * x.unsqueeze(1)
        least = ROUNDING * self.xx.diagonal(dim1=1, dim2=2) / n
        inputs += torch.where(inputs.diagonal(dim1=1, dim2=2) < least, least, 0.0).diag_embed()
        return (
            inputs,
            self.xy / n - x.unsqueeze(2) * y.unsqueeze(1),
            x,
            y,
            (self.yy / n - y.square()).clamp_min(0),
        )


def _parted(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (g, r, p) less its means over the rows, and these, float64: with what rounding has left of them."""
    mean = x.mean(1, keepdim=True)
    rest = x - mean
    return rest, mean.squeeze(1).double() + rest.mean(1).double()


@dataclass(frozen=True)
class Fit:
    """weight (g, o, p), intercept (g, o), the ridge taken, and the error on held-out rows (share of y's
    variance)."""

    weight: Tensor
    intercept: Tensor
    ridge: float
    error: float


def fit(train: Moments, held_out: Moments, original: Tensor, importance: Tensor | None = None) -> Fit:
    """The weight that comes nearest to y, its ridge chosen on held-out rows and used on all rows.

    original (g, o, p): what the ridge draws towards. importance (g, o): of the outputs, for the choice.
    """
    weigh = torch.ones_like(train.y) if importance is None else importance.to(train.y)
    towards = original.double().transpose(1, 2)
    covariance, cross, mean, target, _ = train.centred()
    tested = held_out.centred()
    total = float((weigh * tested[4]).sum())
    best, ridge = float("inf"), RIDGES[0]
    for share in RIDGES if held_out.rows else RIDGES[:1]:
        weight = _solve(covariance, cross, towards, share)
        error = float((weigh * _errors(weight, target - _times(mean, weight), tested)).sum())
        if error < best:
            best, ridge = error, share
    covariance, cross, mean, target, _ = (train + held_out).centred()
    weight = _solve(covariance, cross, towards, ridge)
    intercept = target - _times(mean, weight)
    return Fit(weight.transpose(1, 2), intercept, ridge, best / total if total > 0 else 0.0)


def _solve(covariance: Tensor, cross: Tensor, towards: Tensor, share: float) -> Tensor:
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    ridge = share * diagonal.mean(1).clamp_min(1e-30).reshape(-1, 1, 1)
    eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    solution: Tensor = torch.linalg.solve(covariance + ridge * eye, cross + ridge * towards)
    return solution


def _times(mean: Tensor, weight: Tensor) -> Tensor:
    return (mean.unsqueeze(1) @ weight).squeeze(1)


def _errors(weight: Tensor, intercept: Tensor, moments: tuple[Tensor, ...]) -> Tensor:
    """(g, o) E (W' x + b - y)^2."""
    covariance, cross, mean, target, variance = moments
    explained = 2 * (weight * cross).sum(1) - (weight * (covariance @ weight)).sum(1)
    return variance - explained + (target - _times(mean, weight) - intercept).square()


def through(weight: Tensor, covariance: Tensor, kept: Tensor, share: float = RIDGE) -> Tensor:
    """The weight (g, o, p) that reads only the kept inputs (g, p) bool, zero elsewhere, nearest to `weight`
    itself."""
    size = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30).reshape(-1, 1, 1)
    ridge = share * size
    eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    regular = covariance + ridge * eye
    both = kept.unsqueeze(1) & kept.unsqueeze(2)
    inner = torch.where(both, regular, size * eye)  # dropped inputs stand apart, and get 0
    asked = torch.where(kept.unsqueeze(1), weight.double() @ regular, 0.0)
    solution: Tensor = torch.linalg.solve(inner, asked.transpose(1, 2))
    return solution.transpose(1, 2)


@dataclass
class Reading:
    """One weight, as `eliminate` sees it: R channels, each read at up to q of p inputs of one of g groups.

    covariance (g, p, p); weight (g, o, p), outputs already weighted by the root of G; blocks (R, q) inputs, -1
    where there are fewer; group (R,); reads (R,) bool: whether the weight reads the channel at all.
    """

    covariance: Tensor
    weight: Tensor
    blocks: Tensor
    group: Tensor
    reads: Tensor


def weighted(weight: Tensor, metric: Tensor) -> Tensor:
    """The root of `metric` (g, o, o) times a weight (g, o, p): |.|^2 then counts as tr(G W .. W')."""
    values, vectors = torch.linalg.eigh(metric.double())
    root: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
    return root.transpose(1, 2) @ weight.double()


def eliminate(readings: Sequence[Reading], at_least: int = 1, at_once: int = 64) -> tuple[Tensor, Tensor]:
    """(R - at_least,) channels in the order in which they go, and what their going has cost up to there.

    Of more than `at_once` channels several go at a time, each costed as if it went alone.
    """
    count = len(readings[0].reads)
    device = readings[0].covariance.device
    states = [_State.of(reading) for reading in readings]
    left = torch.ones(count, dtype=torch.bool, device=device)
    order, costs, total = [], [], 0.0
    while (n := int(left.sum())) > at_least:
        cost = torch.zeros(count, dtype=torch.float64, device=device)
        for state in states:
            cost += state.costs(left)
        cost[~left] = torch.inf
        going = cost.argsort()[: max(1, min(n // at_once, n - at_least))]
        left[going] = False
        for channel in going.tolist():
            total += float(cost[channel])
            order.append(channel)
            costs.append(total)
        for state in states:
            state.drop(going)
            state.compact(left)
    return torch.tensor(order, dtype=torch.int64), torch.tensor(costs, dtype=torch.float64)


@dataclass
class _State:
    inverse: Tensor
    weight: Tensor
    blocks: Tensor
    group: Tensor
    reads: Tensor

    @staticmethod
    def of(reading: Reading) -> _State:
        """With q more inputs, which nothing reads, to fill up short blocks."""
        g, p, _ = reading.covariance.shape
        q = reading.blocks.shape[1]
        size = reading.covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30).reshape(-1, 1, 1)
        eye = torch.eye(p, dtype=torch.float64, device=reading.covariance.device)
        inverse = torch.zeros(g, p + q, p + q, dtype=torch.float64, device=eye.device)
        inverse[:, :p, :p] = torch.linalg.inv(reading.covariance / size + RIDGE * eye)
        inverse[:, p:, p:] = torch.eye(q, dtype=torch.float64, device=eye.device)
        weight = torch.nn.functional.pad(reading.weight.double() * size.sqrt(), (0, q))
        fill = torch.arange(p, p + q, device=eye.device).expand_as(reading.blocks)
        blocks = torch.where(reading.blocks < 0, fill, reading.blocks)
        return _State(inverse, weight, blocks, reading.group, reading.reads)

    def costs(self, left: Tensor) -> Tensor:
        """(R,) what each channel's going would cost here."""
        some = left & self.reads
        rows, group = self.blocks[some], self.group[some]
        inner = self.inverse[group[:, None, None], rows[:, :, None], rows[:, None, :]]
        weight = self.weight[group[:, None], :, rows]  # (R', q, o)
        lower = torch.linalg.cholesky_ex(inner)[0]
        found = torch.linalg.solve_triangular(lower, weight, upper=False).square().sum((1, 2))
        cost = torch.zeros(len(left), dtype=torch.float64, device=left.device)
        cost[some] = found.nan_to_num(0.0)
        return cost

    def drop(self, channels: Tensor) -> None:
        """Take channels out, all at once: what is left is the same as one after the other."""
        channels = channels[self.reads[channels]]
        for g in torch.unique(self.group[channels]).tolist():
            rows = torch.unique(self.blocks[channels[self.group[channels] == g]])
            inverse, weight = self.inverse[g], self.weight[g]
            gain = torch.linalg.solve(inverse[rows][:, rows], inverse[rows])
            weight -= weight[:, rows] @ gain
            inverse -= inverse[:, rows] @ gain
            weight[:, rows] = 0
            inverse[rows] = 0
            inverse[:, rows] = 0
            inverse[rows, rows] = 1.0

    def compact(self, left: Tensor) -> None:
        """Forget the rows of what has gone, once they are half of all."""
        if len(self.inverse) > 1:  # groups have rows of their own in the same places
            return
        rows = torch.unique(self.blocks[left & self.reads])
        if 2 * len(rows) > self.inverse.shape[1]:
            return
        place = torch.zeros(self.inverse.shape[1], dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        self.blocks = place[self.blocks]  # of channels that have gone: never looked at again
        self.inverse = self.inverse[:, rows][:, :, rows]
        self.weight = self.weight[:, :, rows]
