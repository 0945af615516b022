"""`ep_prune.compress` as a method of the benchmark, with its defaults and the same calibration images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ep_prune

BATCH = 128


def run(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
    """The compressed network. Raises RuntimeError where this version has no `compress`."""
    compress = getattr(ep_prune, "compress", None)
    if compress is None:
        raise RuntimeError("this version of ep_prune has no compress: the row stays empty until it does")
    torch.manual_seed(seed)
    given = list(images.split(BATCH))
    return compress(model, images[:2], given, keep_macs=keep_macs, samples=len(images)).model
