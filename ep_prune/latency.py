"""How long a model takes, measured."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ep_prune.trace import as_arguments, run


def latency_of(model: nn.Module, inputs: Any, least: int = 5, seconds: float = 0.3) -> float:
    """Milliseconds of one call, the median over at least `least` calls and about `seconds`."""
    times: list[float] = []
    run(model, inputs)  # whose errors name the layer; it watches every layer, which takes time
    args, kwargs = as_arguments(inputs)
    with torch.no_grad():
        model(*args, **kwargs)
        started = time.perf_counter()
        while len(times) < least or time.perf_counter() - started < seconds:
            _wait(inputs)
            begin = time.perf_counter()
            model(*args, **kwargs)
            _wait(inputs)
            times.append(1e3 * (time.perf_counter() - begin))
            if len(times) >= 1000:
                break
    return statistics.median(times)


def _wait(inputs: Any) -> None:
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(inputs)):
        torch.cuda.synchronize()
