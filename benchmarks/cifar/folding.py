"""k-means folding with REPAIR, after model folding (Wang et al., ICLR 2025).

The channels of a chain are clustered by k-means on [filter, bias or batch-norm gain and shift, outgoing
weights], one ratio for all layers; a cluster's members are averaged on the way in and summed on the way out:

    A = (U^T U)^-1 U^T,   T = U,     U (C, K) the clusters' indicators.

Averages of members that do not agree have too small a variance. REPAIR gives every merged channel, in front
of its activation, the average of its members' means and standard deviations back, measured on the calibration
images. With batch norm that is re-estimation, since gain and shift are averaged; without, the layer's weights
and bias are rescaled, front to back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cifar.batch_norm import has_batch_norm, reestimated
from benchmarks.cifar.chains import Chain, Chunks, Walk, blocks, narrow_, shared_widths

RESTARTS = 5
ROUNDS = 100


def k_means(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Labels (n,) of the best of some runs of Lloyd's algorithm from k-means++ starts; no cluster is empty."""
    best, least = None, torch.inf
    for _ in range(RESTARTS):
        labels = _lloyd(points, _spread_start(points, clusters, generator))
        inertia = float((points - _centres(points, labels, clusters)[labels]).square().sum())
        if best is None or inertia < least:
            best, least = labels, inertia
    assert best is not None
    return best


def _spread_start(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre drawn by its squared distance from those that are there."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    for _ in range(clusters - 1):
        weight = nearest.clone()
        weight[chosen] = 0
        if not bool(weight.sum() > 0):  # only copies of centres are left
            weight = torch.ones_like(nearest)
            weight[chosen] = 0
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen]


def _centres(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    members = nn.functional.one_hot(labels, clusters).to(points.dtype)
    return (members.T @ points) / members.sum(0).unsqueeze(1)


def _lloyd(points: Tensor, centres: Tensor) -> Tensor:
    labels = None
    for _ in range(ROUNDS):
        distances = torch.cdist(points, centres)
        new = distances.argmin(1)
        for empty in (torch.bincount(new, minlength=len(centres)) == 0).nonzero().flatten().tolist():
            crowded = torch.bincount(new, minlength=len(centres))[new] > 1
            new[torch.where(crowded, distances.gather(1, new.unsqueeze(1)).squeeze(1), -1.0).argmax()] = empty
        if labels is not None and torch.equal(new, labels):
            break
        labels, centres = new, _centres(points, new, len(centres))
    assert labels is not None
    return labels


def features(model: nn.Module, chain: Chain) -> Tensor:
    """One row for each channel (C, features), of all that belongs to it."""
    producer, consumer = model.get_submodule(chain.producer), model.get_submodule(chain.consumer)
    own: list[Tensor | None] = [producer.weight.flatten(1), producer.bias]
    if chain.norm is not None:
        norm = model.get_submodule(chain.norm)
        own += [norm.weight, norm.bias]
    own.append(blocks(consumer.weight, chain.width).transpose(0, 1).flatten(1))
    rows = [part if part.ndim > 1 else part.unsqueeze(1) for part in own if part is not None]
    return torch.cat([part.detach().double() for part in rows], dim=1)


def folded(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> tuple[nn.Module, dict[Chain, Tensor]]:
    """The folded copy, and the averaging matrix A (K, C) of every chain that was narrowed."""
    narrow, averages = copy.deepcopy(model), {}
    generator = torch.Generator().manual_seed(seed)
    for chain, width in shared_widths(model, images, keep_macs).items():
        if width < chain.width:
            labels = k_means(features(model, chain), width, generator)
            members = nn.functional.one_hot(labels, width).double()
            averages[chain] = (members / members.sum(0)).T
            narrow_(narrow, chain, averages[chain], members)
    return narrow, averages


def run(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
    """Folding alone."""
    return folded(model, images, keep_macs, seed)[0]


def run_repaired(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
    """Folding, then REPAIR."""
    narrow, averages = folded(model, images, keep_macs, seed)
    if not averages:
        return narrow
    plain = {chain: average for chain, average in averages.items() if chain.norm is None}
    repair_(narrow, model, images, plain)
    return reestimated(narrow, images) if has_batch_norm(narrow) else narrow


def repair_(narrow: nn.Module, wide: nn.Module, images: Tensor, averages: dict[Chain, Tensor]) -> None:
    """Give the outputs of every chain's producer, in place, the mean and the deviation that their members have on
    average in the wide network."""
    if not averages:
        return
    goals: dict[str, tuple[Tensor, Tensor]] = {}
    walk = Walk(copy.deepcopy(wide), images)

    def note(name: str) -> Callable[[Chunks], Chunks]:
        def keep(chunks: Chunks) -> Chunks:
            goals[name] = moments(chunks)
            return chunks

        return keep

    for chain in averages:
        walk.after[chain.producer] = note(chain.producer)
    walk.run()

    def correct(chain: Chain, average: Tensor) -> Callable[[Chunks], Chunks]:
        def rescale(chunks: Chunks) -> Chunks:
            mean, deviation = moments(chunks)
            goal_mean, goal_deviation = (average @ goal for goal in goals[chain.producer])
            # a channel that never varies is shifted alone
            slope = torch.where(deviation > 0, goal_deviation / deviation, torch.ones_like(deviation))
            shift = goal_mean - slope * mean
            _rescale_(narrow.get_submodule(chain.producer), slope, shift)
            shape = (1, -1) + (1,) * (chunks[0].ndim - 2)
            return [x * slope.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape) for x in chunks]

        return rescale

    walk = Walk(narrow, images)
    for chain, average in averages.items():
        walk.after[chain.producer] = correct(chain, average)
    walk.run()


def moments(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel (axis 1), in float64."""
    rows = [x.transpose(0, 1).flatten(1) for x in chunks]
    count = sum(part.shape[1] for part in rows)
    mean = torch.stack([part.double().sum(1) for part in rows]).sum(0) / count
    squares = torch.stack([(part.double() - mean.unsqueeze(1)).square().sum(1) for part in rows]).sum(0)
    return mean, (squares / count).sqrt()


@torch.no_grad()
def _rescale_(layer: nn.Module, slope: Tensor, shift: Tensor) -> None:
    weight = layer.weight.double() * slope.view(-1, *(1,) * (layer.weight.ndim - 1))
    bias = shift + (slope * layer.bias.double() if layer.bias is not None else 0)
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)


RUNS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "after Model Folding": (run, "k-means folding without REPAIR; inner channels"),
    "after Model Folding + REPAIR": (
        run_repaired,
        "k-means folding, REPAIR on the calibration images; inner channels",
    ),
}
