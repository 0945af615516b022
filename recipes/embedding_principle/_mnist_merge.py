"""The paper's merging (arXiv 2105.14573, Fig. 5): cosine groups, one random representative each.

Neurons of low amplitude |w_k| |a_k| are deleted; the others are put into groups of pairwise cosine at least c; a
random member j of a group stays, with the outgoing weight

    a_j'  =  sum_k a_k |w_k| / |w_j|,

which keeps the function if all members are collinear (ReLU is homogeneous), and is off by what they are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.embedding_principle._mnist_network import Network

LOW = 0.01
"""Neurons below this share of the largest amplitude count as low. No figure is given in the paper; in the networks
trained here amplitudes leave a gap from 1e-7 to 1e-1 of the largest, so that any value in it does the same."""


def live(network: Network) -> Tensor:
    """Indices of the neurons that are not of low amplitude."""
    amplitude = network.amplitude()
    return (amplitude > LOW * amplitude.max()).nonzero().squeeze(1)


def groups(network: Network, cosine: float) -> list[Tensor]:
    """Disjoint groups of neurons, all pairs within one having at least this cosine of incoming weights.

    A group grows around the free neuron of largest amplitude, taking the nearest ones first, as long as the
    newcomer is near to all members.
    """
    unit = torch.nn.functional.normalize(network.incoming, dim=1)
    near = unit @ unit.T
    free = torch.ones(network.width, dtype=torch.bool)
    found = []
    for start in network.amplitude().argsort(descending=True).tolist():
        if not free[start]:
            continue
        candidates = free & (near[start] >= cosine)
        candidates[start] = False
        members = [start]
        for k in (
            near[start].masked_fill(~candidates, -2).argsort(descending=True)[: int(candidates.sum())].tolist()
        ):
            if bool((near[k, members] >= cosine).all()):
                members.append(k)
        group = torch.tensor(members)
        free[group] = False
        found.append(group)
    return found


def merge(network: Network, cosine: float, generator: torch.Generator) -> Network:
    """The paper's narrow network at this cosine."""
    network = network.take(live(network))
    length = network.incoming.norm(dim=1)
    keep, outgoing = [], []
    for group in groups(network, cosine):
        j = group[torch.randint(len(group), (1,), generator=generator)]
        keep.append(j)
        outgoing.append((network.outgoing[group] * (length[group] / length[j]).unsqueeze(1)).sum(0))
    return Network(network.incoming[torch.cat(keep)], torch.stack(outgoing), network.head)
