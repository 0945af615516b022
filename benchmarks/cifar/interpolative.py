"""Interpolative decomposition, after Chee et al. (NeurIPS 2022).

Z, the activations that a consumer reads, has a column for every channel. QR with column pivoting, Z Pi = Q R,
orders the channels; the first K are kept, and interpolate the others:

    Z ~ Z_P T^T,    T^T = [I, R_11^-1 R_12] Pi^T,

which is folded into the consumer. R depends on Z^T Z = G alone: the pivoted QR is that of the root S^(1/2)
V^T of G = V S V^T. Layers go front to back on the narrow network's own activations. Widths come from one
ratio for all layers, or from one tolerance for all: the smallest K with |R_KK| <= epsilon |R_00|, on the wide
network's activations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from benchmarks.cifar.budget import Prices, largest
from benchmarks.cifar.chains import Chain, cost_of, find, shared_widths
from benchmarks.cifar.fitting import fitted, grams

SMALLEST_TOLERANCE = 1e-8


def pivoted(gram: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """R (C, C) and the order of the channels, of the pivoted QR of any Z with Z^T Z = `gram`."""
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T
    triangle, order = scipy.linalg.qr(root.numpy(), mode="r", pivoting=True)
    return triangle, order


def interpolation(gram: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The kept channels (K,), ascending, and T (C, K)."""
    triangle, order = pivoted(gram)
    # Behind the numerical rank, R holds noise: what is kept beyond it interpolates nothing.
    diagonal = np.abs(np.diagonal(triangle))
    rank = int((diagonal[:width] > 1e-7 * max(diagonal[0], 1e-300)).sum())
    transposed = np.zeros((width, len(gram)))
    transposed[:, order[:width]] = np.eye(width)
    transposed[:rank, order[width:]] = scipy.linalg.solve_triangular(
        triangle[:rank, :rank], triangle[:rank, width:]
    )
    kept, place = torch.from_numpy(order[:width].astype(np.int64)).sort()
    return kept, torch.from_numpy(transposed).T[:, place]


def _choose(gram: Tensor, chain: Chain, width: int) -> tuple[Tensor, Tensor]:
    return interpolation(gram, width)


def one_ratio(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
    """The same share of every layer."""
    return fitted(model, images, shared_widths(model, images, keep_macs), _choose)


def one_tolerance(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
    """The same relative tolerance for every layer, the smallest that the budget lets through."""
    chains, prices = find(model), Prices(model, images)
    diagonals = {chain: np.abs(np.diagonal(pivoted(g)[0])) for chain, g in grams(model, images, chains).items()}

    def fits(share: float) -> bool:
        return cost_of(model, prices, _widths(diagonals, share)) <= keep_macs * prices.wide

    return fitted(model, images, _widths(diagonals, largest(fits)), _choose)


def _widths(diagonals: dict[Chain, np.ndarray], share: float) -> dict[Chain, int]:
    """`share` runs over tolerances from 1 (at 0) to `SMALLEST_TOLERANCE`, by logarithm; 1 keeps everything."""
    tolerance = SMALLEST_TOLERANCE**share if share < 1 else -1.0
    return {chain: max(1, int((d > tolerance * d[0]).sum())) for chain, d in diagonals.items()}


RUNS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "after ID": (one_ratio, "interpolative decomposition, one ratio; inner channels"),
    "after ID (one tolerance)": (one_tolerance, "interpolative decomposition, one tolerance; inner channels"),
}
