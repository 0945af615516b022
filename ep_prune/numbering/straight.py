"""Activations that do not bend on a declared domain: there they multiply by a number, or are a constant.

    relu(z) = z where low >= 0, and 0 where high <= 0; leaky ReLU, |z| likewise; clamps where no end cuts
    tanh(z) = c where f(low) and f(high) are one number at the precision of the weights

A channel counts as such where all of its positions do, with the same number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ep_prune.channels import Channels
from ep_prune.graph import Node, Pointwise
from ep_prune.numbering.state import Numbering

CLAMPS = ("aten.relu6", "aten.hardtanh", "aten.clamp", "aten.clamp_min", "aten.clamp_max")
SATURATING = ("aten.tanh", "aten.sigmoid", "aten.erf", "aten.atan", "aten.hardsigmoid")


def straight_parts(op: Pointwise, node: Node, n: Numbering, x: Channels) -> tuple[Tensor, Tensor] | None:
    """(n,) the gain and (n,) the constant of every row, NaN where it has none; None where nothing is declared."""
    ends = n.ranges.get(op.x)
    if ends is None:
        return None
    try:
        labels = x.labels.expand(ends[0].shape).reshape(-1)
    except RuntimeError:  # channels that differ along the batch
        return None
    count = len(x.rows)
    low = torch.full((count,), torch.inf, dtype=torch.float64).scatter_reduce_(
        0, labels, ends[0].reshape(-1), "amin"
    )
    high = torch.full((count,), -torch.inf, dtype=torch.float64).scatter_reduce_(
        0, labels, ends[1].reshape(-1), "amax"
    )
    gain, value = (torch.full((count,), torch.nan, dtype=torch.float64) for _ in range(2))
    on, off = low >= 0, high <= 0
    if node.op == "aten.relu":
        gain[on], value[off] = 1.0, 0.0
    elif node.op == "aten.abs":
        gain[off], gain[on] = -1.0, 1.0
    elif node.op == "aten.leaky_relu":
        gain[off] = op.function(torch.tensor([-1.0], dtype=torch.float64)).neg()
        gain[on] = 1.0
    elif node.op in CLAMPS:
        least, most = op.function(low), op.function(high)
        gain[(least == low) & (most == high)] = 1.0
        value = torch.where(least == most, least, value)
    elif node.op in SATURATING:
        least, most = op.function(low), op.function(high)
        same = (most - least).abs() <= _precision(n) / 2 * torch.minimum(least.abs(), most.abs())
        value = torch.where(same, (least + most) / 2, value)
    else:
        return None
    return torch.where(value.isnan(), gain, torch.nan), value


def _precision(n: Numbering) -> float:
    """The finest rounding unit of the model's weights."""
    stored = [torch.finfo(t.dtype).eps for t in n.graph.tensors.values() if t.is_floating_point()]
    return min(stored, default=2.0**-52)
