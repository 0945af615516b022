"""Batch norm at inference, affine on every channel; instance norm, each channel by itself; layer norm and RMS norm
over the last axis, and group norm, which see all channels or those of a group."""

from __future__ import annotations

from ep_prune.graph import (
    Barrier,
    GroupStandardize,
    Instance,
    Node,
    Normalize,
    Operation,
    RootMeanSquare,
    Standardize,
)
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


@rule("aten.instance_norm")
def instance_norm(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    weight, bias, mean, variance = (call[key] for key in ("weight", "bias", "running_mean", "running_var"))
    if any(part is not None and part.tensor is None for part in (weight, bias, mean, variance)):
        return Barrier("its weights are computed in the forward pass")
    if call["use_input_stats"]:
        return Instance(call["input"], weight, bias)
    return Normalize(call["input"], weight, bias, mean, variance, float(call["eps"]))


@rule("aten.group_norm", "aten.native_group_norm")
def group_norm(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    weight, bias, groups = call["weight"], call["bias"], call["num_groups" if "num_groups" in call else "group"]
    if any(part is not None and part.tensor is None for part in (weight, bias)):
        return Barrier("its weights are computed in the forward pass")
    if groups == call["input"].shape[1]:
        return Instance(call["input"], weight, bias)
    return GroupStandardize(call["input"], weight, bias, int(groups))


@rule("aten.rms_norm")
def rms_norm(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    if len(call["normalized_shape"]) != 1:
        return Barrier("RMS norm over several axes")
    if call["weight"] is not None and call["weight"].tensor is None:
        return Barrier("its weights are computed in the forward pass")
    return RootMeanSquare(call["input"], call["weight"])
