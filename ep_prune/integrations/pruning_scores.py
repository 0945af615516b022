"""What a channel of a group is worth: what its consumers lose without it, once those kept have taken over.

Channels go one after the other, the cheapest first (`projection.eliminate`); a channel's score is what its own
going costs, as a share of the variance of what its consumers write, summed up over consumers: comparable over
groups. Of two copies one costs nothing, and the other one what both do. Scores grow strictly in the order of
going, so that the n lowest of a group are the n that go well together. The last has nothing left to merge into.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ep_prune.integrations.pruning_host import WRITE, Consumer, Group
from ep_prune.integrations.pruning_sites import Site, outgoing
from ep_prune.projection import Reading, eliminate

STEP = 1e-5
"""By which share a score is above the one before it, at least."""
FLOOR = 1e-9
"""And by how much, at least: less than any loss that can be seen."""


def items_of(count: int, parts: int, contiguous: bool = False) -> Tensor:
    """(count,) which channels go together: the same place in each of `parts` equal parts, or whole parts."""
    if parts <= 1 or count % parts:
        return torch.arange(count)
    each = count // parts
    return torch.arange(count) // each if contiguous else torch.arange(count) % each


def readings(consumer: Consumer, site: Site, covariance: Tensor, weight: Tensor, items: Tensor) -> list[Reading]:
    """A consumer as `eliminate` sees it, for each group of a grouped convolution; all it can lose is 1."""
    view = site.view(weight.detach()).double().to(covariance.device)
    total = float(((view @ covariance) * view).sum())
    if not total > 0:
        return []
    if view.shape[1] > view.shape[2]:
        view = torch.linalg.qr(view, mode="r").R  # as many rows as columns cost the same
    count = int(items.max()) + 1
    columns, owners = consumer.columns, items[consumer.channels]
    inputs = consumer.module.in_features if isinstance(consumer.module, nn.Linear) else consumer.module.in_channels
    part = columns // (inputs // site.groups)
    columns = columns % (inputs // site.groups)
    if isinstance(consumer.module, nn.Linear):
        columns = columns // site.stride if site.by_channels else columns
    elif not site.by_channels:
        columns = (columns.unsqueeze(1) * site.taps + torch.arange(site.taps)).reshape(-1)
        owners, part = owners.repeat_interleave(site.taps), part.repeat_interleave(site.taps)
    found = []
    for g in range(site.groups):
        blocks = _blocks(owners[part == g], columns[part == g], count).to(covariance.device)
        found.append(
            Reading(
                covariance[g : g + 1],
                view[g : g + 1] / total**0.5,
                blocks,
                torch.zeros(count, dtype=torch.int64, device=covariance.device),
                (blocks >= 0).any(1),
            )
        )
    return found


def _blocks(owners: Tensor, columns: Tensor, count: int) -> Tensor:
    """(count, q): the columns of each owner, -1 where there are fewer."""
    pairs = torch.unique(torch.stack([owners, columns], 1), dim=0)
    sizes = torch.bincount(pairs[:, 0], minlength=count)
    place = torch.arange(len(pairs)) - (sizes.cumsum(0) - sizes)[pairs[:, 0]]
    blocks = torch.full((count, max(1, int(sizes.max()))), -1, dtype=torch.int64)
    blocks[pairs[:, 0], place] = pairs[:, 1]
    return blocks


def scores(found: Sequence[Reading], items: Tensor) -> Tensor:
    """(channels,) float32."""
    order, costs = eliminate(found, at_least=0)
    each = torch.diff(costs, prepend=costs.new_zeros(1)).clamp_min(0).tolist()
    level, rising = 0.0, []
    for cost in each:
        level = max(cost, level * (1 + STEP) + FLOOR)
        rising.append(level)
    result = torch.empty(len(order), dtype=torch.float64)
    result[order] = torch.tensor(rising, dtype=torch.float64)
    return result[items].float()


def own_size(group: Group) -> Tensor:
    """(channels,) where no consumer is known: the share of its row in the weights that write the channels."""
    place = {root: k for k, root in enumerate(group[0].idxs)}
    total = torch.zeros(len(place), dtype=torch.float64)
    for item in group:
        dep, idxs = item
        if dep.handler in WRITE:
            rows = outgoing(dep.target.module)
            pairs = [(i, place[r]) for i, r in zip(idxs, item.root_idxs, strict=True) if r in place]
            chosen, channels = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
            total.index_add_(0, channels, rows[chosen].square().sum(1) / rows.square().sum().clamp_min(1e-30))
    return (FLOOR * (1 + total)).float() if bool(total.any()) else total.float()
