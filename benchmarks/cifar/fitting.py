"""Narrowing front to back, each layer on what the layers narrowed before it give.

Shared by the least-squares and the interpolative baseline. In one pass over the calibration images, every
consumer's inputs h (positions and images alike are samples) give the uncentred Gram matrix G = sum h h^T over
the C channels; a method turns it into the channels P that are kept and a map T (C, K) with h ~ T h_P, which
is folded into the consumer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cifar.chains import Chain, Chunks, Walk, narrow_, picking

Choose = Callable[[Tensor, Chain, int], tuple[Tensor, Tensor]]
"""(G (C, C) float64, chain, K) -> kept channels (K,), T (C, K)."""


def by_channel(x: Tensor, width: int) -> Tensor:
    """A consumer's inputs as (images, channels, positions)."""
    return x.reshape(len(x), width, -1)


def gram(chunks: Chunks, width: int) -> Tensor:
    """The uncentred Gram matrix over channels, summed in float64 over chunks of images."""
    total = torch.zeros(width, width, dtype=torch.float64)
    for x in chunks:
        rows = by_channel(x, width).transpose(0, 1).flatten(1)
        total += (rows @ rows.T).double()
    return total


def picked(x: Tensor, kept: Tensor, width: int) -> Tensor:
    """A consumer's inputs, of the kept channels alone."""
    if x.ndim > 2:
        return x[:, kept]
    return by_channel(x, width)[:, kept].flatten(1)


def fitted(model: nn.Module, images: Tensor, widths: dict[Chain, int], choose: Choose) -> nn.Module:
    """A copy of `model` with these widths of its chains; chains of full width stay untouched."""
    narrow = copy.deepcopy(model)
    walk = Walk(narrow, images)

    def visit(chain: Chain, width: int) -> Callable[[Chunks], Chunks]:
        def fold(chunks: Chunks) -> Chunks:
            kept, outgoing = choose(gram(chunks, chain.width), chain, width)
            narrow_(narrow, chain, picking(kept, chain.width), outgoing)
            return [picked(x, kept, chain.width) for x in chunks]

        return fold

    for chain, width in widths.items():
        if width < chain.width:
            walk.before[chain.consumer] = visit(chain, width)
    walk.run()
    return narrow


def grams(model: nn.Module, images: Tensor, chains: list[Chain]) -> dict[Chain, Tensor]:
    """The Gram matrix of what every chain's consumer reads in the wide network."""
    found: dict[Chain, Tensor] = {}
    walk = Walk(copy.deepcopy(model), images)

    def note(chain: Chain) -> Callable[[Chunks], Chunks]:
        def keep(chunks: Chunks) -> Chunks:
            found[chain] = gram(chunks, chain.width)
            return chunks

        return keep

    for chain in chains:
        walk.before[chain.consumer] = note(chain)
    walk.run()
    return found
