"""What a model costs: parameters, multiply-accumulates, bytes of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ep_prune.trace import as_arguments, run


def _one_layer(x: Sequence[int], ih: Sequence[int], hh: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:2]) * (math.prod(ih) + math.prod(hh))


def _all_layers(x: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:2]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


_FUSED = {torch.ops.aten.mkldnn_rnn_layer: _one_layer, torch.ops.aten._cudnn_rnn: _all_layers}
"""Recurrent layers that run as one call, which torch does not count; elsewhere they are matrix products."""


@dataclass(frozen=True)
class Cost:
    """`parameters`: elements, tied ones once. `macs`: multiply-accumulates of one forward pass on the example
    inputs, divided by its batch (matrix products and convolutions, as torch.utils.flop_counter counts)."""

    parameters: int
    macs: int
    weight_bytes: int


def cost(model: nn.Module, example_inputs: Any) -> Cost:
    """The cost of `model`, in the mode that it is in."""
    with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
        run(model, example_inputs)
    args, kwargs = as_arguments(example_inputs)
    batches = [value.shape[0] for value in (*args, *kwargs.values()) if hasattr(value, "shape") and value.ndim]
    parameters = list(model.parameters())
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        macs=counter.get_total_flops() // 2 // max(batches[0] if batches else 1, 1),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )
