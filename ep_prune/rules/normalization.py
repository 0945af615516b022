"""Batch norm at inference: y = (x - mean) / sqrt(variance + eps) * weight + bias, affine on every channel."""

from __future__ import annotations

from ep_prune.graph import Barrier, Node, Normalize, Operation
from ep_prune.rules.registry import Tensors, arguments, rule


@rule("aten.batch_norm", "aten._native_batch_norm_legit_no_training")
def batch_norm(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    if call.get("training") or call["running_mean"] is None:
        return Barrier("batch norm with the statistics of the batch")
    parts = [call[key] for key in ("weight", "bias", "running_mean", "running_var")]
    if any(part is not None and part.tensor is None for part in parts):
        return Barrier("its statistics are computed in the forward pass")
    weight, bias, mean, variance = parts
    return Normalize(call["input"], weight, bias, mean, variance, float(call["eps"]))
