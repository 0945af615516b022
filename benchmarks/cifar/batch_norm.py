"""Batch-norm re-estimation: mean and variance of every batch norm, taken anew on the calibration images.

Narrowing shifts what a batch norm reads; its recorded moments then no longer normalise. Taking them anew
needs no labels and repairs much of what pruning breaks, so no comparison is fair without it. As is usual, all
batch norms are re-estimated in one pass in training mode (each batch normalised by its own moments, the
moments averaged over batches of equal size); everything else stays in evaluation mode.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BATCH = 256


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is anything to re-estimate."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@torch.no_grad()
def reestimated(model: nn.Module, images: Tensor, batch: int = BATCH) -> nn.Module:
    """A copy of `model`, in evaluation mode, with the moments of its batch norms on `images` (N, C, H, W)."""
    model = copy.deepcopy(model).eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
        norm.train()
    for part in images.split(batch):
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
