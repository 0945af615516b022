"""Per-channel least squares, after GRAIL (Tang et al., 2026).

Channels are kept by the L1 norm of their filters, one ratio for all layers. With the uncentred Gram matrix G
of what the consumer reads, the wide channels are fitted by the kept ones P, and the fit is folded into the
consumer:

    T = G_HP (G_PP + lambda I)^-1,    lambda = 1e-3 mean(diag G_PP)

It has no intercept and one coefficient for all taps of a kernel, as in the paper. Layers go front to back on
the narrow network's own activations. The ridge is the only setting; it is not tuned here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cifar.chains import Chain, shared_widths
from benchmarks.cifar.fitting import fitted

RIDGE = 1e-3


def largest_filters(model: nn.Module, chain: Chain, width: int) -> Tensor:
    """The `width` channels of largest L1 norm of their filters, in ascending order."""
    norms = model.get_submodule(chain.producer).weight.detach().abs().flatten(1).sum(1)
    return norms.topk(width).indices.sort().values


def fit(gram: Tensor, kept: Tensor) -> Tensor:
    """T (C, K)."""
    inner = gram[kept][:, kept]
    ridge = RIDGE * inner.diagonal().mean()
    if ridge == 0:  # all that is kept is silent: nothing to fit with
        return torch.eye(len(gram), dtype=gram.dtype)[:, kept]
    return torch.linalg.solve(inner + ridge * torch.eye(len(kept), dtype=gram.dtype), gram[kept]).T


def run(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
    """L1 selection, least-squares consumers."""

    def choose(gram: Tensor, chain: Chain, width: int) -> tuple[Tensor, Tensor]:
        kept = largest_filters(model, chain, width)
        return kept, fit(gram, kept)

    return fitted(model, images, shared_widths(model, images, keep_macs), choose)
