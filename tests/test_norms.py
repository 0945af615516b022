"""Instance, group and RMS norm: what goes through each, and a gated block behind a norm written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ep_prune as ep
from tests.planted import randomize_, relative

F64 = torch.float64


def network(norm: nn.Module) -> nn.Sequential:
    """Channels: 1 = 0, 2 = -0 + an offset, 3 = 2 * 0, 4 a constant, 5 unread; gains and shifts of the norm at
    random."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.Conv2d(6, 3, 1))
    randomize_(model)
    with torch.no_grad():
        weight, bias = model[0].weight, model[0].bias
        for place, factor, offset in ((1, 1.0, 0.0), (2, -1.0, 0.7), (3, 2.0, 0.0)):
            weight[place], bias[place] = factor * weight[0], factor * bias[0] + offset
        weight[4] = 0
        model[2].weight[:, 5] = 0
    return model


@pytest.mark.parametrize(
    "norm, left",
    [
        (nn.InstanceNorm2d(6, affine=True), 2),
        (nn.GroupNorm(6, 6), 2),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), 1),
        (nn.InstanceNorm2d(6), 6),  # without a parameter, nothing tells the module its new width: rolled back
        (nn.GroupNorm(3, 6), 6),
        (nn.GroupNorm(1, 6), 6),
    ],
    ids=["instance", "groups of one", "running statistics", "not affine", "groups of two", "one group"],
)
def test_norms_over_space(norm: nn.Module, left: int) -> None:
    model = network(norm)
    x = torch.randn(2, 2, 7, 7, dtype=F64)
    result = ep.reduce(model, x)
    assert result.model[0].out_channels == left, str(result.report)
    assert not result.report.barriers
    for size in (5, 9):
        x = torch.randn(3, 2, size, size, dtype=F64)
        assert relative(model(x), result.model(x)) < 1e-10


class ByHand(nn.Module):
    """As in Llama and T5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Gated(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x))) with 8 hidden units, 5 of which are needed."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((4, 8), (4, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@pytest.mark.parametrize("norm", [ByHand(4), nn.RMSNorm(4), nn.RMSNorm(4, elementwise_affine=False)])
def test_a_gated_block_behind_an_rms_norm(norm: nn.Module) -> None:
    model = Gated(norm)
    randomize_(model)
    with torch.no_grad():
        for place, factor in (
            (2, 1.0),
            (3, -2.5),
        ):  # a copy, and one with another factor in the branch without gate
            model.gate.weight[place], model.up.weight[place] = model.gate.weight[0], factor * model.up.weight[0]
        model.up.weight[6] = 0
    x = torch.randn(2, 5, 4, dtype=F64)
    result = ep.reduce(model, x)
    assert result.model.gate.out_features == result.model.down.in_features == 5, str(result.report)
    assert relative(model(x), result.model(x)) < 1e-12
    reasons = {why for space in result.report.spaces for why in space.stayed}
    assert isinstance(norm, ByHand) or not result.report.barriers, reasons


def test_what_an_rms_norm_hands_on_keeps_its_ratios() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.RMSNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    randomize_(model)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = -2 * model[0].weight[0], -2 * model[0].bias[0]
        one, two = model[1].weight[:2]
        weight, bias = model[2].weight, model[2].bias
        weight[1] = weight[0]  # the same sum, put on the other of two proportional channels
        weight[1, 0], weight[1, 1] = 0, weight[0, 1] + weight[0, 0] * one / (-2 * two)
        bias[1] = bias[0]
    x = torch.randn(6, 3, dtype=F64)
    result = ep.reduce(model, x)
    assert result.model[2].out_features == 3 and result.model[0].out_features == 4
    assert relative(model(x), result.model(x)) < 1e-12
