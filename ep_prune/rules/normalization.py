"""Batch norm at inference, affine on every channel; layer norm over the last axis, which sees all channels."""

from __future__ import annotations

from ep_prune.graph import Barrier, Node, Normalize, Operation, Standardize
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


@rule("aten.layer_norm", "aten.native_layer_norm")
def layer_norm(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    if len(call["normalized_shape"]) != 1:
        return Barrier("layer norm over several axes")
    weight, bias = call["weight"], call["bias"]
    if any(part is not None and part.tensor is None for part in (weight, bias)):
        return Barrier("its weights are computed in the forward pass")
    return Standardize(call["input"], weight, bias, float(call["eps"]))
