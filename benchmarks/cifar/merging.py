"""Neuron merging, after Kim et al. (NeurIPS 2020). It needs no data.

Filters are kept by their L1 norm, one ratio for all layers. Each dropped filter d is added, scaled, onto one
kept filter k in the consumer: V'[k] = V[k] + S V[d]. With s = |w_d| / |w_k|, so that z_d ~ s z_k if the
filters point the same way, and batch norm y = g (z - m) / q + b behind each (q the standard deviation),

    y_d ~ S y_k + B,    S = s (g_d / q_d) (q_k / g_k),    B = b_d - S b_k + (g_d / q_d) (s m_k - m_d),

and relu(S y_k) = S relu(y_k) for S > 0, if B is small. The best match has the smallest l (1 - cosine) + (1 -
l) |B| / S, the second part scaled to [0, 1]; below a cosine of t nothing is merged. l = .85 and t = .1 as in
the authors' scripts for batch norm, t = .45 without, where the bias counts as one more weight of the filter.

Two things of the authors' code are set right here: it takes the variance for q, and divides S's gains the
other way round. Kept as in the paper: one match for each filter, and B is never compensated.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar.chains import Chain, narrow_, picking, shared_widths
from benchmarks.cifar.least_squares import largest_filters

COSINE_SHARE = 0.85
LOWEST_COSINE_NORMED, LOWEST_COSINE_PLAIN = 0.1, 0.45
TINY = 1e-12


def merge_map(model: nn.Module, chain: Chain, kept: Tensor) -> Tensor:
    """T (C, K): what of each wide channel is added onto each kept one."""
    producer = model.get_submodule(chain.producer)
    filters = producer.weight.detach().double().flatten(1)
    norm = model.get_submodule(chain.norm) if chain.norm else None
    if norm is None and producer.bias is not None:
        filters = torch.cat([filters, producer.bias.detach().double().unsqueeze(1)], dim=1)
    lengths = filters.norm(dim=1).clamp(min=TINY)
    cosine = F.normalize(filters, dim=1) @ F.normalize(filters[kept], dim=1).T
    scale = lengths.unsqueeze(1) / lengths[kept]
    distance, lowest = 1 - cosine, LOWEST_COSINE_PLAIN
    if norm is not None:
        scale, offset = _through_norm(norm, producer.bias, scale, kept)
        allowed = scale > 0  # relu(S y) = S relu(y) for these alone
        offset = torch.where(allowed, offset.abs() / scale, torch.inf)
        least = offset.amin(1, keepdim=True).nan_to_num(posinf=0.0)
        most = torch.where(offset.isfinite(), offset, least).amax(1, keepdim=True)
        offset = (offset - least) / (most - least).clamp(min=TINY)
        distance, lowest = COSINE_SHARE * distance + (1 - COSINE_SHARE) * offset, LOWEST_COSINE_NORMED
    best = distance.argmin(1, keepdim=True)
    good = (cosine.gather(1, best) >= lowest) & distance.gather(1, best).isfinite()
    merged = torch.zeros_like(cosine).scatter_(1, best, torch.where(good, scale.gather(1, best), 0.0))
    merged[kept] = torch.eye(len(kept), dtype=merged.dtype)
    return merged


def _through_norm(norm: nn.Module, bias: Tensor | None, scale: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """S and B of every (dropped, kept) pair (C, K)."""
    mean, deviation = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
    if bias is not None:
        mean = mean - bias.detach().double()  # z without the layer's bias
    gain, shift = norm.weight.detach().double(), norm.bias.detach().double()
    slope = gain / deviation
    safe = torch.where(slope.abs() < TINY, torch.inf, slope)  # a kept channel without gain takes nothing on
    through = scale * slope.unsqueeze(1) / safe[kept]
    offset = slope.unsqueeze(1) * (scale * mean[kept] - mean.unsqueeze(1))
    return through, shift.unsqueeze(1) - through * shift[kept] + offset


def run(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
    """L1 selection, each dropped filter merged into its best match; the weights alone are looked at."""
    narrow = copy.deepcopy(model)
    for chain, width in shared_widths(model, images, keep_macs).items():
        if width < chain.width:
            kept = largest_filters(model, chain, width)
            narrow_(narrow, chain, picking(kept, chain.width), merge_map(model, chain, kept))
    return narrow
