"""What channels are like when there is no data: Gaussian, with the moments that weights record.

The channels z of a group are written by a convolution or linear layer W, b, often with a batch norm behind:

    with batch norm     z ~ N(beta, gamma^2)            what it has recorded says that its output is like this
    without             z ~ N(b, |W_row|^2)             inputs of unit covariance
    corr(z_i, z_j)      = <W_i, W_j> / |W_i| |W_j|      the same; where one layer alone writes, else independent

Through an activation f, with the coefficients c_k of f(mu + sigma t) in Hermite polynomials He_k / sqrt(k!),

    E f = c_0        cov(f_i, f_j) = sum_k r^k c_ik c_jk        (Mehler)

where the remainder after `DEGREE` terms counts as one more: a covariance for sure, and exact for copies (r = 1).
Where several branches are summed up, means and variances add, and nothing else is known. Nothing is said about how
places in an image go together: taps count as independent.
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
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def prior(group: Group, consumer: Consumer, count: int) -> tuple[Tensor, Tensor]:
    """Mean (count,) and covariance (count, count) of the group's channels, where the consumer reads them."""
    places = _places(group)
    mean, variance = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    found, activation = _sources(group._DG, consumer.module)
    writers = [(module, writer) for module, writer in found if module in places and len(places[module][0])]
    known = torch.zeros(count, dtype=torch.bool)
    similar = torch.eye(count, dtype=torch.float64)
    for module, writer in writers:
        rows, channels = places[module]
        shift, spread = _moments(module, rows)
        mean[channels] += shift
        variance[channels] += spread
        known[channels] = True
        if len(writers) == 1 and writer is not None:
            unit = F.normalize(outgoing(writer)[rows], dim=1)
            similar[channels.unsqueeze(1), channels] = (unit @ unit.T).clamp(-1, 1) * _read_alike(writer, rows)
    variance[~known] = 1.0
    similar.fill_diagonal_(1.0)
    return through_activation(mean, variance.sqrt(), similar, activation)


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
    mean: Tensor, deviation: Tensor, similar: Tensor, activation: Callable[[Tensor], Tensor] | None
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


def _sources(graph: Any, module: nn.Module) -> tuple[list[tuple[Any, Any]], Callable[[Tensor], Tensor] | None]:
    """What a module reads, as (norm, the layer before it) or (layer, itself), and the activation between."""
    waiting = list(graph.module2node[module].inputs)
    seen = set()
    found: list[tuple[Any, Any]] = []
    activation = None
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
            waiting += node.inputs
    return found, activation


def _read_alike(layer: Any, rows: Tensor) -> Tensor:
    """Whether two outputs read the same inputs: those of one group of a convolution do."""
    part = rows // (len(outgoing(layer)) // getattr(layer, "groups", 1))
    return (part.unsqueeze(1) == part).double()


def _moments(module: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of some outputs of a norm, or of a layer that reads inputs of unit covariance."""
    if isinstance(module, NORMS):
        spread = torch.ones(len(rows), dtype=torch.float64)
        weight = None if module.weight is None else module.weight.detach().double().cpu()[rows]
        spread = spread if weight is None else weight.square()
    else:
        spread = outgoing(module)[rows].square().sum(1)
    bias = module.bias
    shift = torch.zeros(len(rows), dtype=torch.float64) if bias is None else bias.detach().double().cpu()[rows]
    return shift, spread
