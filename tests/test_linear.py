"""Channels that nothing bends before they are read, and channels that stand or fall together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ep_prune as ep
from ep_prune.mixing import NEAR, THROUGH
from ep_prune.selection import COPY, DISTINCT
from ep_prune.spaces import TIED
from tests.planted import randomize_, relative

F64 = torch.float64


def bottleneck(padding: int, bias: bool) -> nn.Sequential:
    """conv, batch norm, conv: 8 channels, of which the last 3 are mixtures of 5 as batch norm leaves them."""
    model = nn.Sequential(nn.Conv2d(6, 8, 1, bias=bias), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3, padding=padding))
    randomize_(model)
    conv, norm = model[0], model[1]
    mix = torch.randn(3, 5, dtype=F64)
    with torch.no_grad():
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        rows = conv.weight.flatten(1) * gain.unsqueeze(1)
        conv.weight[5:] = (mix @ rows[:5] / gain[5:].unsqueeze(1)).reshape(conv.weight[5:].shape)
        if padding:  # the constants as well, else the padding tells them apart
            given = norm.bias - gain * norm.running_mean + (conv.bias * gain if bias else 0)
            norm.bias[5:] += mix @ given[:5] - given[5:]
    return model.eval()


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_rank_through_batch_norm(padding: int, bias: bool) -> None:
    model = bottleneck(padding, bias)
    x = torch.randn(4, 6, 6, 6, dtype=F64)
    result = ep.reduce(model, x)
    narrow = result.model
    assert narrow[0].out_channels == 5
    assert relative(model(x), narrow(x)) < 1e-12
    (space,) = (space for space in result.report.spaces if space.name == "0")
    assert space.gone["linear"] == 3
    for row, variance in zip(narrow[0].weight, narrow[1].running_var, strict=True):
        (place,) = (k for k in range(8) if torch.equal(model[0].weight[k], row))
        assert torch.equal(
            model[1].running_var[place], variance
        )  # chosen, not mixed: its moments are still its own


class Twice(nn.Module):
    """A linear layer's 7 channels, of rank 3, joined with themselves before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 7), nn.Linear(14, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.head(torch.cat([z, z], -1))


def test_rank_through_a_concatenation() -> None:
    model = Twice()
    randomize_(model)
    with torch.no_grad():
        model.first.weight.copy_(torch.randn(7, 1, dtype=F64) @ torch.randn(1, 5, dtype=F64))
    x = torch.randn(3, 5, dtype=F64)
    narrow = ep.reduce(model, x).model
    assert narrow.first.out_features == 1 and narrow.head.in_features == 2
    assert relative(model(x), narrow(x)) < 1e-12


class Shuffled(nn.Module):
    """Four channels in two halves that are interleaved, the last three of them copies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.first(x))
        return self.head(z.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


def test_what_has_no_choice_is_kept_first() -> None:
    """Channels 0 and 2 stand or fall together: 0 must stay, so that 2, not 1, stands for the copies."""
    model = Shuffled()
    randomize_(model)
    with torch.no_grad():
        for part in (model.first.weight, model.first.bias):
            part[2:] = part[1] * torch.tensor([2.0, 0.5], dtype=F64).reshape(-1, *[1] * (part.ndim - 1))
    x = torch.randn(3, 3, dtype=F64)
    result = ep.reduce(model, x)
    assert result.model.first.out_features == 2
    assert relative(model(x), result.model(x)) < 1e-12
    (space,) = (space for space in result.report.spaces if space.name == "first")
    assert not set(space.stayed) - {DISTINCT}


def reasons(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Why the channels of the first layer stayed."""
    return next(space.stayed for space in ep.reduce(model, x).report.spaces if space.name == "0")


def test_a_rank_that_is_not_quite_lower_is_named() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5))
    randomize_(model)
    model[0].weight.data[3] = model[0].weight.data[:3].sum(0) * (1 + 1e-12 * torch.randn(5, dtype=F64))
    assert reasons(model, torch.randn(2, 5, dtype=F64))[NEAR] == 1


def test_a_rank_that_no_fold_reaches_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(5, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1))
    randomize_(model)
    model[0].weight.data[3] = model[0].weight.data[:3].sum(0)
    assert reasons(model, torch.randn(2, 5, 4, 4, dtype=F64))[THROUGH + "aten.conv2d"] == 1


def test_copies_that_the_padding_tells_apart_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(5, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))
    randomize_(model)
    conv, last = model[0], model[2]
    with torch.no_grad():
        conv.weight[1], conv.bias[1] = -conv.weight[0], -conv.bias[0]
        model[1] = nn.Sigmoid()  # s(-z) = 1 - s(z): the 1 meets the padding
    assert reasons(model, torch.randn(2, 5, 4, 4, dtype=F64)).get(COPY) == 1
    last.padding = (0, 0)
    assert COPY not in reasons(model, torch.randn(2, 5, 4, 4, dtype=F64))


def test_channels_that_stand_or_fall_together_are_named() -> None:
    model = Shuffled()
    randomize_(model)
    (space,) = (s for s in ep.reduce(model, torch.randn(3, 3, dtype=F64)).report.spaces if s.name == "first")
    assert space.stayed == {DISTINCT: 2, TIED: 2}
