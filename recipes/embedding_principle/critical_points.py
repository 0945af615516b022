"""Two-layer networks as points of parameter space, many at once: training, and the way to a critical point.

A network is a vector of p parameters, a set of networks of one architecture a tensor (trials, p), so that two
hundred of them are trained by one tensor computation. `polish` solves grad L = 0 from a point nearby by the method
of Levenberg and Marquardt on the gradient itself. With H = V diag(lambda) V^T, its step

    -(H^2 + mu I)^-1 H g = -V diag(lambda / (lambda^2 + mu)) V^T g

does not ask for the sign of lambda, so that saddles attract as minima do, and leaves the null space of H alone, as
degenerate critical points need. A local minimum of |g| other than 0 may attract too: the norm is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ep_prune.widen import embed
from recipes.embedding_principle.common import progress

Value = Callable[[Tensor], Tensor]
"""Points (trials, p) -> the loss of each, (trials,), independent of one another."""


def two_layer(inputs: int, width: int, outputs: int, activation: nn.Module, bias: bool = True) -> nn.Sequential:
    """sum_k a_k s(w_k x + b_k), in float64, without an output bias; `bias` says whether there is b."""
    first, last = nn.Linear(inputs, width, bias=bias), nn.Linear(width, outputs, bias=False)
    return nn.Sequential(first, activation, last).double()


def sample_1d() -> tuple[Tensor, Tensor]:
    """The 1-D data of arXiv 2105.14573, read off its figure 1: (50, 1) points in [-15, 15], (50, 1) targets."""
    x = torch.linspace(-15, 15, 50, dtype=torch.float64)[:, None]
    return x, torch.tanh(x + 7) + torch.tanh(x) + torch.tanh(x - 7)


def outputs(model: nn.Sequential, points: Tensor, x: Tensor) -> Tensor:
    """What networks of the architecture of `model` give for x (n, d), with parameters `points` (trials, p):
    (trials, n, outputs)."""
    shapes = [parameter.shape for parameter in model.parameters()]
    parts = torch.split(points, [shape.numel() for shape in shapes], dim=1)
    weight, *bias, out = (part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True))
    before = x @ weight.mT + bias[0][:, None] if bias else x @ weight.mT
    return model[1](before) @ out.mT


def mean_square(model: nn.Sequential, x: Tensor, y: Tensor) -> Value:
    """The mean squared error over samples and outputs, as a function of the parameters."""
    return lambda points: (outputs(model, points, x) - y).square().mean(dim=(1, 2))


def slopes(value: Value, points: Tensor) -> Tensor:
    """The gradient of every trial's loss, (trials, p): the sum of the losses keeps them apart."""
    points = points.detach().requires_grad_()
    return torch.autograd.grad(value(points).sum(), points)[0]


def curvatures(value: Value, points: Tensor) -> Tensor:
    """The Hessian of every trial's loss, (trials, p, p)."""
    points = points.detach().requires_grad_()
    (slope,) = torch.autograd.grad(value(points).sum(), points, create_graph=True)
    unit = torch.eye(points.shape[1], dtype=points.dtype)[:, None].expand(-1, *points.shape)
    (rows,) = torch.autograd.grad(slope, points, unit, is_grads_batched=True)
    full = rows.movedim(0, 1)
    return (full + full.mT) / 2


def at(model: nn.Module, point: Tensor) -> nn.Module:
    """`model` with the parameters `point` (p,), in place."""
    nn.utils.vector_to_parameters(point, model.parameters())
    return model


def draw(model: nn.Module, trials: int, deviation: float, seed: int) -> Tensor:
    """(trials, p) normal parameters of mean 0; a trial is the same however many there are."""
    p = sum(parameter.numel() for parameter in model.parameters())
    whole = 16 * math.ceil(trials / 16)  # torch draws normal numbers in sixteens, and the rest in another way
    generator = torch.Generator().manual_seed(seed)
    return deviation * torch.randn(whole, p, generator=generator, dtype=torch.float64)[:trials]


def train(value: Value, points: Tensor, marks: list[int], rate: float, text: str) -> list[Tensor]:
    """Full-batch Adam, all points (trials, p) at once; the points after each number of steps in `marks`."""
    points = points.clone().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=rate)
    taken = []
    with progress(max(marks), text) as bar:
        for step in range(1, max(marks) + 1):
            points.grad = slopes(value, points)
            optimizer.step()
            if step in marks:
                taken.append(points.detach().clone())
            bar.update()
    return taken


def polish(value: Value, points: Tensor, steps: int, target: float, text: str) -> tuple[Tensor, Tensor]:
    """Points (trials, p) moved to where the gradient is smallest nearby, and its norms (trials,) there.

    A point is left alone once its norm is `target` or less, or after `steps`.
    """
    points = points.clone()
    gradients = slopes(value, points)
    norms = gradients.norm(dim=1)
    damping = torch.full_like(norms, 1e-2)
    with progress(steps, text) as bar:
        for _ in range(steps):
            open_ = (norms > target).nonzero()[:, 0]
            if not len(open_):
                break
            lambdas, vectors = torch.linalg.eigh(curvatures(value, points[open_]))
            # damping in proportion to |g|: fast convergence onto manifolds of critical points too
            scale = lambdas / (lambdas.square() + (damping[open_] * norms[open_])[:, None])
            inner = torch.einsum("bij,bi->bj", vectors, gradients[open_]) * scale
            tried = points[open_] - torch.einsum("bij,bj->bi", vectors, inner)
            new = slopes(value, tried)
            better = new.norm(dim=1) < norms[open_]
            moved = open_[better]
            points[moved], gradients[moved] = tried[better], new[better]
            norms[moved] = new[better].norm(dim=1)
            damping[open_] = torch.where(better, damping[open_] / 5, damping[open_] * 4).clamp(1e-14, 1e6)
            bar.update()
    return points, norms


def split(narrow: nn.Sequential, neuron: int, share: float = 0.5) -> nn.Module:
    """The splitting embedding of one neuron: its copy comes last and takes 1 - share of its outgoing weight."""
    shares = torch.eye(narrow[0].out_features, dtype=torch.float64)
    shares = torch.cat([shares, (1 - share) * shares[neuron : neuron + 1]])
    shares[neuron] *= share
    inputs = torch.zeros(2, narrow[0].in_features, dtype=torch.float64)
    return embed(narrow, inputs, kind="splitting", coefficients={"0": shares})
