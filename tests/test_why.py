"""Why channels stayed: reasons, and nearest misses of copies that are planted at a known distance."""

from __future__ import annotations

import json

import pytest
import torch
from planted import randomize_
from torch import Tensor, nn

import ep_prune as ep
from ep_prune.cli import main

NEAR = 1e-6


@torch.no_grad()
def plant_near_(weight: Tensor, bias: Tensor, source: int, copy: int, ratio: float, residual: float) -> None:
    """Row `copy` = ratio * (row `source` + residual * a vector of its length, at right angles to it)."""
    row = torch.cat([weight[source].flatten(), bias[source : source + 1]])
    other = torch.randn(row.shape, generator=torch.Generator().manual_seed(7), dtype=row.dtype)
    other -= other @ row / (row @ row) * row
    new = ratio * (row + residual * row.norm() * other / other.norm())
    weight[copy] = new[:-1].reshape(weight[copy].shape)
    bias[copy] = new[-1]


class Net(nn.Module):
    """A convolution and a linear layer with an activation between, with or without pooling and batch norm."""

    def __init__(self, act: nn.Module, norm: bool = False, pool: bool = False, flat: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.act = act
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.mean = nn.Identity() if flat else nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6 * (16 if flat and not pool else 4 if flat else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.mean(self.pool(self.act(self.norm(self.conv(x))))).flatten(1))
        return y


INPUT = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    ("act", "ratio", "rule"),
    [
        (nn.ReLU(), 2.5, "scaled"),
        (nn.ReLU(), 1.0, "split"),
        (nn.Tanh(), -1.0, "flipped"),
        (nn.GELU(), 1.0, "split"),
    ],
    ids=["relu", "relu split", "tanh", "gelu"],
)
def test_a_near_copy_is_named_with_its_residual(act, ratio, rule, pool, flat):
    net = randomize_(Net(act, pool=pool and rule != "flipped", flat=flat))
    plant_near_(net.conv.weight, net.conv.bias, 1, 4, ratio, NEAR)
    found = ep.why(net, INPUT, "conv")
    assert (found.before, found.channels.tolist()) == (6, list(range(6)))
    assert found.other[4] == 1 and found.other[1] == 4
    assert found.rules()[4] == found.rules()[1] == rule
    assert found.residual[4] == pytest.approx(NEAR, rel=1e-3)
    assert found.ratio[4] == pytest.approx(ratio, rel=1e-5)
    assert bool((found.rounding <= 1e-13).all())
    rest = [0, 2, 3, 5]
    assert bool((found.residual[rest].nan_to_num(9.0) > 1e-2).all())
    reason, first_rule, places = next(group for group in found.groups() if 4 in group[2])
    assert reason == "distinct and read" and first_rule == rule and set(places[:2]) == {1, 4}


def test_scaled_copies_are_none_behind_gelu():
    net = randomize_(Net(nn.GELU()))
    plant_near_(net.conv.weight, net.conv.bias, 1, 4, 2.5, NEAR)
    assert ep.why(net, INPUT, "conv").residual[4] > 0.1


def test_batch_norm_sets_the_scale_and_has_a_say():
    net = randomize_(Net(nn.ReLU(), norm=True))
    with torch.no_grad():
        norm = net.norm
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight, bias = gain.reshape(-1, 1, 1, 1) * net.conv.weight, gain * (net.conv.bias - norm.running_mean)
        bias = bias + norm.bias
        plant_near_(weight, bias, 1, 4, 2.5, NEAR)  # of what stands behind the batch norm
        net.conv.weight.copy_(weight / gain.reshape(-1, 1, 1, 1))
        net.conv.bias.copy_((bias - norm.bias) / gain + norm.running_mean)
    for name in ("conv", "norm", "conv.weight", "norm.bias"):
        found = ep.why(net, INPUT, name)
        assert found.space == "conv"
        assert found.residual[4] == pytest.approx(NEAR, rel=1e-3) and found.other[4] == 1


def test_a_channel_that_is_hardly_read_is_nearly_null():
    net = randomize_(Net(nn.ReLU()))
    with torch.no_grad():
        net.head.weight[:, 3] = 1e-8
    found = ep.why(net, INPUT, "conv")
    assert found.rules()[3] == "null"
    rows = torch.cat([net.conv.weight.flatten(1), net.conv.bias.unsqueeze(1)], 1).detach()
    sent = net.head.weight.detach().abs() * rows.norm(dim=1)  # what a ReLU lets through grows with its row
    wanted = sent[:, 3] / sent.norm(dim=1)
    assert float(found.seen[3]) == pytest.approx(float(wanted.max()), rel=1e-9)


def test_channels_go_by_their_numbers_in_the_given_model():
    net = randomize_(Net(nn.ReLU()))
    with torch.no_grad():
        net.head.weight[:, 0] = 0.0  # null: goes
        net.conv.weight[3], net.conv.bias[3] = 2 * net.conv.weight[2], 2 * net.conv.bias[2]  # scaled: goes
    plant_near_(net.conv.weight, net.conv.bias, 2, 5, 1.0, NEAR)
    found = ep.why(net, INPUT, "conv")
    assert found.before == 6 and found.channels.tolist() == [1, 2, 4, 5]
    assert found.other.tolist()[1] == 5 and found.other.tolist()[3] == 2


class Joined(nn.Module):
    """Two branches joined before one reader, and a grouped convolution on top."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
        self.deep = nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.deep(torch.relu(torch.cat([self.left(x), self.right(x)], 1))).tanh())
        return y


def test_depthwise_filters_and_joined_branches():
    net = randomize_(Joined())
    with torch.no_grad():  # channels 0 and 4 are copies before the filters, which differ a little
        net.right.weight[1], net.right.bias[1] = net.left.weight[0], net.left.bias[0]
    plant_near_(net.deep.weight, net.deep.bias, 0, 4, -1.0, NEAR)
    found = ep.why(net, INPUT, "deep")
    places = {channel: place for place, channel in enumerate(found.channels.tolist())}
    place = places[0]
    assert found.rules()[place] == "flipped"
    assert found.residual[place] == pytest.approx(NEAR, rel=1e-3)


def test_pins_say_what_holds_them():
    net = randomize_(Net(nn.ReLU()))
    found = ep.why(net, INPUT, "head")
    assert {found.reasons[code] for code in found.reason.tolist()} == {"an output of the model"}
    assert "3  an output of the model" in str(found)
    found = ep.why(net, INPUT, "conv", protect=["conv"])
    assert {found.reasons[code] for code in found.reason.tolist()} == {"protected"}


def test_a_layer_without_channels_is_refused_with_names():
    net = randomize_(Net(nn.ReLU()))
    with pytest.raises(ep.InputError, match="no layer 'cnv' that writes channels: name one such as conv"):
        ep.why(net, INPUT, "cnv")


def planted() -> nn.Module:
    """What the command line is asked about."""
    net = randomize_(Net(nn.ReLU()))
    plant_near_(net.conv.weight, net.conv.bias, 1, 4, 2.0, 1e-4)
    return net


def test_the_command_line(capsys):
    asked = ["inspect", "test_why:planted", "--input=2,2,4,4", "--why=conv"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert "conv: 6 of 6 channels stay" in text
    assert "nearest rule: scaled, missed by 1.0e-04" in text
    assert "channel 4 is 2 x channel 1 up to 1.0e-04" in text
    assert main([*asked, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["why"]
    assert found["nearest"][4] == 1 and found["rule"][4] == "scaled" and found["reason"][4] == "distinct and read"
    assert found["residual"][4] == pytest.approx(1e-4, rel=1e-3)
    assert main(["inspect", "test_why:planted", "--input=2,2,4,4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["grade"] == "exact"
