"""What channels are like when there is no data: Gaussian, with the moments that weights record.

The channels z of a group are written by a convolution or linear layer W, b, often with a batch norm behind:

    with a norm         z ~ N(beta, gamma^2)            what it has recorded says that its output is like this
    without             z ~ N(b, |W_row|^2)             inputs of unit covariance: the scale is a guess
    corr(z_i, z_j)      = <W_i, W_j> / |W_i| |W_j|      the same; where one layer alone writes, else independent

Through an activation f, with the coefficients c_k of f(mu + sigma t) in Hermite polynomials He_k / sqrt(k!),

    E f = c_0        cov(f_i, f_j) = sum_k r^k c_ik c_jk        (Mehler)

where the remainder after `DEGREE` terms counts as one more: a covariance for sure, and exact for copies (r = 1).
Where the scale is a guess, the mean is f(b): what is constant for sure goes into a bias, and nothing else. Where
several branches are summed up, means and variances add, and nothing else is known. Behind a product (gates,
attention) nothing is known at all: independent, mean 0, variance 1. Nothing is said about how places in an image
go together: taps count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_prune.integrations.pruning_host import WRITE, Consumer, Group
from ep_prune.integrations.pruning_sites import Site, outgoing

DEGREE = 12
NODES = 96
Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "leakyrelu": F.leaky_relu,
    "relu": F.relu,
    "hardtanh": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "elu": F.elu,
    "softplus": F.softplus,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
}
"""By what the gradient function's name holds, which is how torch-pruning knows an operator; the first one wins."""
PRODUCTS = ("mulbackward", "divbackward", "bmmbackward", "attention", "softmax")
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def prior(group: Group, consumer: Consumer, count: int) -> tuple[Tensor, Tensor]:
    """Mean (count,) and covariance (count, count) of the group's channels, where the consumer reads them."""
    places = _places(group)
    mean, variance = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    found, activation, known = _sources(group._DG, consumer.module)
    if not known:
        return torch.zeros(count, dtype=torch.float64), torch.eye(count, dtype=torch.float64)
    writers = [(module, writer) for module, writer in found if module in places and len(places[module][0])]
    written, measured = torch.zeros(2, count, dtype=torch.bool)
    similar = torch.eye(count, dtype=torch.float64)
    for module, writer in writers:
        rows, channels = places[module]
        shift, spread = _moments(module, writer, rows)
        mean[channels] += shift
        variance[channels] += spread
        written[channels] = True
        measured[channels] |= _has_recorded(module)
        if len(writers) == 1 and writer is not None:
            unit = F.normalize(outgoing(writer)[rows], dim=1)
            similar[channels.unsqueeze(1), channels] = (unit @ unit.T).clamp(-1, 1) * _read_alike(writer, rows)
    variance[~written] = 1.0
    similar.fill_diagonal_(1.0)
    first, covariance = through_activation(mean, variance.sqrt(), similar, activation)
    return torch.where(measured, first, mean if activation is None else activation(mean)), covariance


def spread_of(group: Group, consumer: Consumer, site: Site, count: int) -> tuple[Tensor, Tensor]:
    """Mean (g, c) and covariance (g, c, c) of all channels of a site by channels.

    Those that are not of this group are taken as independent, of unit variance.
    """
    mean, covariance = prior(group, consumer, count)
    weight = consumer.module.weight
    inputs = site.view(weight).shape[2]
    index = torch.full((site.groups * inputs,), -1, dtype=torch.int64)
    index[consumer.columns // site.stride] = consumer.channels
    index = index.reshape(site.groups, inputs)
    known = index >= 0
    spread = covariance[index.unsqueeze(2), index.unsqueeze(1)]
    spread = torch.where(known.unsqueeze(2) & known.unsqueeze(1), spread, 0.0)
    spread = spread + torch.diag_embed((~known).double())
    return torch.where(known, mean[index], 0.0).to(weight.device), spread.to(weight.device)


def through_activation(
    mean: Tensor, deviation: Tensor, similar: Tensor, activation: Activation | None
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of f(mean + deviation t), t standard normal with correlations `similar`."""
    if activation is None:
        return mean, similar * deviation.unsqueeze(1) * deviation
    # Golub and Welsch: nodes and weights of Gauss-Hermite quadrature
    beside = torch.arange(1, NODES, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    weights = vectors[0].square()
    values = activation(mean.unsqueeze(1) + deviation.unsqueeze(1) * nodes)
    first = (values * weights).sum(1)
    left = (values.square() * weights).sum(1) - first.square()
    covariance = torch.zeros_like(similar)
    power = similar.clone()
    before, polynomial = torch.ones_like(nodes), nodes
    for k in range(1, DEGREE + 1):
        coefficient = (values * polynomial * weights).sum(1)
        covariance += power * coefficient.unsqueeze(1) * coefficient
        left = left - coefficient.square()
        power = power * similar
        # normalised: sqrt(k + 1) h_(k+1) = t h_k - sqrt(k) h_(k-1)
        before, polynomial = polynomial, (nodes * polynomial - math.sqrt(k) * before) / math.sqrt(k + 1)
    rest = left.clamp_min(0).sqrt()
    return first, covariance + power * rest.unsqueeze(1) * rest


def _places(group: Group) -> dict[Any, tuple[Tensor, Tensor]]:
    """Module -> which of its outputs belong to the group, and which of the group's channels each is."""
    place = {root: k for k, root in enumerate(group[0].idxs)}
    found = {}
    for item in group:
        module = item[0].target.module
        if isinstance(module, NORMS) or item[0].handler in WRITE:
            pairs = [(i, place[r]) for i, r in zip(item[1], item.root_idxs, strict=True) if r in place]
            found[module] = (torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs]))
    return found


def _sources(graph: Any, module: nn.Module) -> tuple[list[tuple[Any, Any]], Activation | None, bool]:
    """What a module reads, as (norm, the layer before it) or (layer, itself); the activation; is that all."""
    waiting = list(graph.module2node[module].inputs)
    seen = set()
    found: list[tuple[Any, Any]] = []
    activation, known = None, True
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        depthwise = (
            isinstance(node.module, nn.modules.conv._ConvNd) and node.module.groups == node.module.out_channels > 1
        )
        if isinstance(node.module, NORMS):
            before = [n.module for n in node.inputs]
            plain = len(before) == 1 and isinstance(before[0], nn.Linear | nn.modules.conv._ConvNd)
            found.append((node.module, before[0] if plain else None))
        elif isinstance(node.module, nn.Linear | nn.modules.conv._ConvNd) and not depthwise:
            found.append((node.module, node.module))
        else:
            name = str(node.module).lower()
            kinds = [f for key, f in ACTIVATIONS.items() if key in name] if "elementwise" in name else []
            activation = activation or (kinds[0] if kinds else None)
            known &= not any(product in name for product in PRODUCTS)
            waiting += node.inputs
    return found, activation, known


def _read_alike(layer: Any, rows: Tensor) -> Tensor:
    """Whether two outputs read the same inputs: those of one group of a convolution do."""
    part = rows // (len(outgoing(layer)) // getattr(layer, "groups", 1))
    return (part.unsqueeze(1) == part).double()


def _has_recorded(module: Any) -> bool:
    """Whether outputs have the mean and variance that a module's parameters say: a norm that has seen data."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        assert module.running_var is not None
        return bool((module.running_mean != 0).any() or (module.running_var != 1).any())
    return isinstance(module, NORMS)


def _moments(module: Any, writer: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of some outputs of a norm, or of a layer that reads inputs of unit covariance."""
    shift, spread = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.float64)
    if writer is not None and not _has_recorded(module):
        spread = outgoing(writer)[rows].square().sum(1)
        shift = shift if writer.bias is None else writer.bias.detach().double().cpu()[rows]
    if isinstance(module, NORMS):
        gain = 1.0 if module.weight is None else module.weight.detach().double().cpu()[rows]
        shift, spread = shift * gain, spread * gain**2
        if module.bias is not None:
            shift = shift + module.bias.detach().double().cpu()[rows]
    return shift, spread
