"""Small networks with redundancy planted by hand, and what must be left of it.

Channels are described by *roles*: a letter is a generic row of weights, a factor before it a multiple of that row
(``2.5a``, ``-a``), ``k.5`` a channel that is the constant .5, ``n`` a generic row that nobody reads. The narrow
network keeps a selection of the wide one's rows, so that `kept` can say which.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROLES = "a b k.5 a 2.5a -a n k-.75"


def parse(role: str) -> tuple[float, str]:
    """``2.5a`` as (2.5, "a")."""
    if role[0] == "k":
        return float(role[1:]), "k"
    found = re.fullmatch(r"(-?[0-9.]*)([a-z])", role)
    assert found, role
    factor = {"": 1.0, "-": -1.0}.get(found[1])
    return (float(found[1]) if factor is None else factor), found[2]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in float64 and eval mode, all weights, biases and statistics from continuous distributions."""
    draw = generator(seed)
    model.double().eval()
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=draw, dtype=tensor.dtype) + 0.5)
            else:
                scale = 1.0 if tensor.ndim < 2 else 1.5 / tensor[0].numel() ** 0.5
                tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype) * scale)
    return model


@torch.no_grad()
def plant_(
    weight: Tensor, bias: Tensor | None, roles: str, *, center: float = 0.0, gain: float = 1.0, seed: int = 0
) -> None:
    """Write `roles` to the rows of a weight (n, ...) and its bias; ``-a`` is the mirror image about `center`."""
    draw = generator(seed)
    rows: dict[str, tuple[Tensor, float]] = {}
    for place, role in enumerate(roles.split()):
        factor, letter = parse(role)
        if letter == "k":
            weight[place] = 0.0
            assert bias is not None
            bias[place] = factor
            continue
        if letter not in rows:
            row = torch.rand(weight[0].shape, generator=draw, dtype=torch.float64) * 2 - 1
            # |row x + offset| <= gain for inputs in [-1, 1]
            rows[letter] = (0.7 * gain * row / row.abs().sum(), 0.3 * gain * (0.3 + 0.07 * len(rows)))
        row, offset = rows[letter]
        weight[place] = factor * row.to(weight)
        if bias is not None:
            bias[place] = factor * offset + (2 * center if factor < 0 else 0.0)


def plant_layer_(layer: nn.Module, roles: str, **options: Any) -> None:
    """`plant_` on a linear layer or a convolution, transposed too."""
    weight = layer.get_parameter("weight")
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    plant_(weight.transpose(0, 1) if transposed else weight, layer._parameters.get("bias"), roles, **options)


@torch.no_grad()
def unread_(weight: Tensor, roles: str) -> None:
    """Zero what a consumer (inputs along `weight`'s first axis) reads of the channels ``n``."""
    for place, role in enumerate(roles.split()):
        if role == "n":
            weight[place] = 0.0


def kept(wide: nn.Module, narrow: nn.Module) -> list[int]:
    """Which output channels of the wide layer the narrow one kept, told by their weights."""

    def rows(layer: nn.Module) -> Tensor:
        weight = layer.get_parameter("weight").detach()
        plain = isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
        if not plain or isinstance(layer, nn.modules.conv._ConvTransposeNd):
            weight = weight.transpose(0, 1)
        bias = layer._parameters.get("bias")
        parts = [weight.flatten(1)] + ([] if bias is None else [bias.detach().unsqueeze(1)])
        return torch.cat(parts, 1)

    before, after = rows(wide), rows(narrow)
    places: list[int] = []
    for row in after:
        same = (before == row).all(1).nonzero().flatten().tolist()
        fresh = [place for place in same if place not in places]
        assert fresh, "a row of the narrow layer is not one of the wide layer's"
        places.append(fresh[0])
    return places


@dataclass(frozen=True, eq=False)
class Case:
    """One small network: `producer` names the planted layer, `kept` the channels that must be left of it.

    `widths`: exact widths of further layers after the reduction. `barrier`: the operator that the report must
    name. `shape`: of one sample.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kept: tuple[int, ...]
    producer: str = "producer"
    widths: Mapping[str, int] = field(default_factory=dict)
    barrier: str = ""
    tolerance: float = 1e-10
    tokens: bool = False
    rolled_back: bool = False


class Chain(nn.Module):
    """producer, the operator under test, consumer."""

    def __init__(self, producer: nn.Module, operator: Callable[..., Any], consumer: nn.Module) -> None:
        super().__init__()
        self.producer = producer
        self.operator = operator
        self.consumer = consumer

    def forward(self, x: Tensor) -> Any:
        return self.consumer(self.operator(self.producer(x)))


class Bundle(nn.Module):
    """Several independent networks on one input: one trace serves many rows of the table."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = nn.ModuleDict({case.name: case.build() for case in cases})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: case(x) for name, case in self.cases.items()}


def inputs(shape: tuple[int, ...], batch: int, seed: int = 0, tokens: bool = False) -> Tensor:
    """Uniform in [-1, 1], or tokens below 20."""
    draw = generator(1000 + seed)
    if tokens:
        return torch.randint(0, 20, (batch, *shape), generator=draw)
    return torch.rand((batch, *shape), generator=draw, dtype=torch.float64) * 2 - 1


def relative(wide: Tensor, narrow: Tensor) -> float:
    """max |difference| / max |wide|."""
    assert wide.shape == narrow.shape
    assert bool(torch.isfinite(wide).all())
    size = float(wide.detach().abs().max())
    assert size > 0
    return float((wide - narrow).detach().abs().max()) / size
