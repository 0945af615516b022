"""Two weights moved together: features that the second can use, in place of those that the first happened to keep.

With weights W and B, what runs between (batch norm, activation, pooling) as phi, and the residual r of B's outputs
against what the wide network has there,

    minimize  |r(B phi(W x + c) + d)|^2     over W, c, B, d

by Gauss-Newton (Nocedal and Wright, Numerical Optimization, 10.3). The normal equations are solved by conjugate
gradients; preconditioner and damping are in the metric D (x) H of each weight, H the covariance of its inputs, D
how much of an output's square arrives at r (a Kronecker factorization: Martens and Grosse, 2015). The iterates are
a path from little to much change, and the one is taken that held-out samples like best; never one that they like
less than no change. No labels, and nothing behind B is looked at. Nothing here knows graphs or modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS, ITERATIONS, PATIENCE = 2, 4, 2
"""Of Gauss-Newton; of conjugate gradients in each, given up after so many that held-out samples dislike."""
DAMPING = 0.03
REGULAR = 1e-3
"""Added to a covariance, as a share of its mean diagonal."""


Residual = Callable[[Tensor], Tensor]
"""What is wrong with the second weight's outputs, each weighted by how much it counts."""
Block = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Inputs, and weight and constant of both parts -> outputs of the second."""
Vector = list[Tensor]


class Metric:
    """D (x) H on changes of one weight (o, p) and its constant (o,): what they do to the residual, in the main."""

    def __init__(self, covariance: Tensor, mean: Tensor, like: Tensor) -> None:
        regular = covariance + REGULAR * covariance.diagonal().mean().clamp_min(1e-30) * torch.eye(
            len(covariance), dtype=covariance.dtype, device=covariance.device
        )
        self.matrix, self.inverse = regular.to(like), torch.linalg.inv(regular).to(like)
        self.mean, self.shape = mean.to(like), like.shape
        self.sent = like.new_zeros(len(like))

    def add(self, gradient: Tensor) -> None:
        """Count J' e, e random signs: its expected square is the diagonal of J' J."""
        flat = gradient.flatten(1)
        self.sent = self.sent + ((flat @ self.inverse) * flat).sum(1) / flat.shape[1]

    def times(self, weight: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        flat, sent = weight.flatten(1), self._positive()
        shift = sent * (constant + flat @ self.mean)
        product = sent.unsqueeze(1) * (flat @ self.matrix) + torch.outer(shift, self.mean)
        return product.reshape(self.shape), shift

    def solve(self, weight: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `times`."""
        sent = self._positive()
        flat = (weight.flatten(1) - torch.outer(constant, self.mean)) @ self.inverse / sent.unsqueeze(1)
        return flat.reshape(self.shape), constant / sent - flat @ self.mean

    def _positive(self) -> Tensor:
        return self.sent.clamp_min(max(1e-6 * float(self.sent.max()), 1e-30))


@dataclass(eq=False)
class Linear:
    """The residual of one chunk around a point: J and its transpose, by differentiating twice."""

    variables: list[Tensor]
    residual: Tensor
    direction: Tensor
    gradient: Sequence[Tensor]

    @staticmethod
    def at(block: Block, x: Tensor, wrong: Residual, point: Sequence[Tensor]) -> Linear:
        variables = [p.detach().requires_grad_() for p in point]
        residual = wrong(block(x, variables))
        direction = torch.zeros_like(residual, requires_grad=True)
        gradient = torch.autograd.grad(residual, variables, direction, create_graph=True)
        return Linear(variables, residual, direction, gradient)

    def transposed(self, value: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(self.residual, self.variables, value.detach(), retain_graph=True)

    def normal(self, change: Sequence[Tensor]) -> Sequence[Tensor]:
        """J' J change."""
        (image,) = torch.autograd.grad(self.gradient, self.direction, list(change), retain_graph=True)
        return self.transposed(image)


def improved(
    block: Block,
    start: Vector,
    data: Sequence[tuple[Tensor, Residual]],
    held_out: Sequence[tuple[Tensor, Residual]],
    moments: Sequence[tuple[Tensor, Tensor]],
    generator: torch.Generator,
) -> Vector | None:
    """Weight and constant of both parts after the steps; None where held-out samples want no change.

    start: weight and constant of both. data, held_out: inputs and residuals of the outputs. moments: covariance
    (P, P) and mean (P,) of what each part reads.
    """

    def loss(point: Sequence[Tensor]) -> float:
        return sum(float(wrong(block(x, point)).square().sum()) for x, wrong in held_out)

    point = start
    before = now = loss(point)
    for _ in range(STEPS):
        with torch.enable_grad():
            chosen, found = _step(block, data, moments, generator, point, now, loss)
        if chosen is None:
            break
        point, now = chosen, found
    return point if now < before else None


def _step(
    block: Block,
    data: Sequence[tuple[Tensor, Residual]],
    moments: Sequence[tuple[Tensor, Tensor]],
    generator: torch.Generator,
    point: Sequence[Tensor],
    now: float,
    loss: Callable[[Sequence[Tensor]], float],
) -> tuple[list[Tensor] | None, float]:
    """The best place along one solution's path, and its loss; None if none is better than `now`."""
    linear = [Linear.at(block, x, wrong, point) for x, wrong in data]
    metrics = [Metric(*m, like=weight) for m, weight in zip(moments, point[::2], strict=True)]
    right = [torch.zeros_like(p) for p in point]
    for part in linear:
        signs = torch.randint(0, 2, part.residual.shape, generator=generator).to(part.residual) * 2 - 1
        for metric, gradient in zip(metrics, part.transposed(signs)[::2], strict=True):
            metric.add(gradient)
        right = [r - g for r, g in zip(right, part.transposed(part.residual), strict=True)]

    def both(name: str, change: Sequence[Tensor]) -> list[Tensor]:
        return [t for k, m in enumerate(metrics) for t in getattr(m, name)(change[2 * k], change[2 * k + 1])]

    def normal(change: Sequence[Tensor]) -> list[Tensor]:
        total = [DAMPING * t for t in both("times", change)]
        for part in linear:
            total = [a + b for a, b in zip(total, part.normal(change), strict=True)]
        return total

    chosen, patience = None, PATIENCE
    for change in _conjugate_gradients(normal, lambda v: both("solve", v), right):
        with torch.no_grad():
            moved = [p + c for p, c in zip(point, change, strict=True)]
            found = loss(moved)
        if found < now:
            chosen, now, patience = moved, found, PATIENCE
        else:
            patience -= 1
            if not patience:
                break
    return chosen, now


def _conjugate_gradients(
    matrix: Callable[[Vector], Vector], preconditioner: Callable[[Vector], Vector], right: Vector
) -> Iterator[Vector]:
    """The iterates from 0 towards the solution of matrix @ x = right."""
    solution, left = [torch.zeros_like(r) for r in right], right
    towards = preconditioner(left)
    square = _inner(left, towards)
    for _ in range(ITERATIONS):
        image = matrix(towards)
        curvature = _inner(towards, image)
        if not square > 0 or not curvature > 0:  # solved, or beyond what rounding lets through
            return
        step = square / curvature
        solution = [s + step * t for s, t in zip(solution, towards, strict=True)]
        left = [r - step * i for r, i in zip(left, image, strict=True)]
        yield solution
        scaled = preconditioner(left)
        fresh = _inner(left, scaled)
        towards = [z + fresh / square * t for z, t in zip(scaled, towards, strict=True)]
        square = fresh


def _inner(a: Vector, b: Vector) -> float:
    return sum(float((p.double() * q.double()).sum()) for p, q in zip(a, b, strict=True))
