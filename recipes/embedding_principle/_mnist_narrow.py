"""Our narrowing of relu(x W') A, from unlabelled inputs and without retraining on the loss.

With H = relu(x W') (n, m) on the inputs and S the k neurons kept, least squares gives the channel embedding of
the hidden layer, and with it the narrow network:

    H  ~  H_S T'        T (m, k)                f  =  H A  ~  H_S B        B = T' A,

which is also the least-squares fit of f itself, since both are the projection on the columns of H_S.

* `collinear` merges what is equal up to a positive scale: exact, no data.
* `narrow` is closed-form. S is found by backward elimination: the neuron goes whose loss costs least once all the
  others have been refitted (optimal brain surgeon on the Gram matrix, for f in place of the loss),

      cost_j  =  |B_j|^2 / P_jj,    P = (H_S' H_S)^-1;      B <- B - P_:j B_j / P_jj,   P <- P - P_:j P_j: / P_jj.

* `fit_incoming` also moves the incoming weights of the narrow network: damped Gauss-Newton steps on the same
  distance to the wide network's outputs. No label and no training loss enters, but it is iterative, and who likes
  may call it training; it is reported apart.

All are *fitted* but the first: what they cost is measured, on held-out images too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ep_prune.find import Dense, Freedom, congruence
from recipes.embedding_principle._mnist_network import Network

RIDGE = 1e-10
"""Added to the Gram matrix, relative to its mean diagonal, so that dependent neurons have an inverse."""

DAMPING, STEPS, INNER = 0.1, 10, 15
"""Gauss-Newton: damping relative to the mean diagonal, steps, conjugate-gradient iterations in each. Chosen on the
training inputs' residual."""


def collinear(network: Network, rounding: float) -> Network:
    """Neurons with incoming weights equal up to a positive scale become one; outgoing weights sum up at it.

    `rounding`: relative rounding error of the stored weights.
    """
    network = network.take(network.incoming.norm(dim=1) > 0)
    rows = network.incoming
    classes = congruence(Dense(rows, torch.arange(rows.shape[1]), rounding * rows.norm(dim=1)), Freedom.POSITIVE)
    scaled = network.outgoing * classes.scale.unsqueeze(1)
    outgoing = torch.zeros_like(scaled).index_add_(0, classes.leader, scaled)
    keep = classes.leader.unique()
    return Network(rows[keep], outgoing[keep], network.head)


def elimination_order(hidden: Tensor, outgoing: Tensor) -> Tensor:
    """All neurons in the order in which backward elimination drops them: the last k are the k to keep.

    hidden (n, m), outgoing (m, c), in float64.
    """
    gram = hidden.T @ hidden
    m = len(gram)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    inverse = torch.linalg.inv(gram)
    weights = outgoing.clone()
    kept = torch.ones(m, dtype=torch.bool)
    order = []
    for _ in range(m):
        cost = weights.square().sum(1) / inverse.diagonal().clamp_min(1e-300)
        j = int(cost.masked_fill(~kept, torch.inf).argmin())
        column = inverse[:, j] / inverse[j, j]
        weights -= torch.outer(column, weights[j])
        inverse -= torch.outer(column, inverse[j].clone())
        inverse[j], inverse[:, j], weights[j] = 0, 0, 0
        kept[j] = False
        order.append(j)
    return torch.tensor(order)


def refit(network: Network, x: Tensor, wide: Tensor) -> Network:
    """Outgoing weights by least squares on the wide network's outputs `wide` (n, c); of least norm where free."""
    solved = torch.linalg.lstsq(network.hidden(x), wide, driver="gelsd").solution
    return Network(network.incoming, solved, network.head)


def narrow(network: Network, x: Tensor, widths: Sequence[int]) -> dict[int, Network]:
    """The narrow networks of these widths, in closed form. Widths above the network's own are left out."""
    hidden = network.hidden(x)
    wide = hidden @ network.outgoing
    order = elimination_order(hidden, network.outgoing)
    found = {}
    for width in sorted(set(widths)):
        if width <= network.width:
            keep = order[network.width - width :].sort().values
            found[width] = refit(network.take(keep), x, wide)
    return found


def fit_incoming(network: Network, x: Tensor, wide: Tensor) -> Network:
    """Damped Gauss-Newton steps on |f(x) - wide|^2 over incoming and outgoing weights; never ends worse.

    With the mask M = [x W' > 0], the change of f is ((x dW') * M) B + H dB. The damped normal equations are solved
    by preconditioned conjugate gradients; outgoing weights are refitted after every step, which is halved as long
    as the distance does not fall.
    """
    network = refit(network, x, wide)
    for _ in range(STEPS):
        residual = wide - network(x)
        distance = float(residual.square().sum())
        change = _gauss_newton(network, x, residual)
        for halving in range(10):
            moved = Network(network.incoming + change * 0.5**halving, network.outgoing, network.head)
            moved = refit(moved, x, wide)
            if float((wide - moved(x)).square().sum()) < distance:
                break
        else:
            return network
        network = moved
    return network


def _gauss_newton(network: Network, x: Tensor, residual: Tensor) -> Tensor:
    """The step's change of the incoming weights."""
    hidden = network.hidden(x)
    mask = (hidden > 0).to(x)
    b = network.outgoing
    diagonal = b.square().sum(1, keepdim=True) * (mask.T @ x.square())
    damping = DAMPING * diagonal.mean()
    scale = (diagonal + damping, hidden.square().sum(0).unsqueeze(1).clamp_min(1e-12).expand_as(b))

    def forward(w: Tensor, v: Tensor) -> Tensor:
        return ((x @ w.T) * mask) @ b + hidden @ v

    def adjoint(r: Tensor) -> tuple[Tensor, Tensor]:
        return ((r @ b.T) * mask).T @ x, hidden.T @ r

    left = adjoint(residual)
    solution = (torch.zeros_like(network.incoming), torch.zeros_like(b))
    towards = tuple(g / s for g, s in zip(left, scale, strict=True))
    square = _inner(left, towards)
    for _ in range(INNER):
        if float(square) <= 1e-24 * float(residual.square().sum()):
            break
        image = adjoint(forward(*towards))
        image = (image[0] + damping * towards[0], image[1])
        step = square / _inner(towards, image)
        solution = tuple(s + step * t for s, t in zip(solution, towards, strict=True))
        left = tuple(g - step * i for g, i in zip(left, image, strict=True))
        scaled = tuple(g / s for g, s in zip(left, scale, strict=True))
        fresh = _inner(left, scaled)
        towards = tuple(z + fresh / square * t for z, t in zip(scaled, towards, strict=True))
        square = fresh
    return solution[0]


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()
