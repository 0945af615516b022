"""Pairs s(z), s(-z) of activations that are even plus linear, by the rank of their residue."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ep_prune as ep
from tests.planted import randomize_, relative

F64 = torch.float64


def paired(act: nn.Module, pairs: int, outputs: int, *, ratio: float = 1.0) -> nn.Sequential:
    """3 inputs, `pairs` pairs and one unit alone, `outputs` outputs."""
    model = nn.Sequential(nn.Linear(3, 2 * pairs + 1), act, nn.Linear(2 * pairs + 1, outputs))
    randomize_(model)
    with torch.no_grad():
        for part in (model[0].weight, model[0].bias):
            part[pairs : 2 * pairs] = -ratio * part[:pairs]
    return model


LINEAR = (nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.2))


@pytest.mark.parametrize("act", LINEAR, ids=str)
@pytest.mark.parametrize("outputs", [1, 2])
def test_pairs_become_one_unit_each_and_the_rank(act: nn.Module, outputs: int) -> None:
    model = paired(act, 6, outputs)
    x = torch.randn(5, 3, dtype=F64)
    result = ep.reduce(model, x)
    assert result.model[0].out_features == 6 + 1 + 2 * outputs
    assert relative(model(50 * x), result.model(50 * x)) < 1e-12
    (space,) = (space for space in result.report.spaces if space.name == "0")
    assert space.gone["linear"] == 6 - 2 * outputs


def test_no_residue_needs_no_units() -> None:
    model = paired(nn.GELU(), 3, 2)
    with torch.no_grad():  # z_2 = z_0 + z_1, and what the second units send cancels
        for part in (model[0].weight, model[0].bias):
            part[2] = part[0] + part[1]
            part[5] = -part[2]
        weight = model[2].weight
        weight[:, 4], weight[:, 5] = weight[:, 3], -weight[:, 3]
    x = torch.randn(5, 3, dtype=F64)
    narrow = ep.reduce(model, x).model
    assert narrow[0].out_features == 4
    assert relative(model(x), narrow(x)) < 1e-12


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.1)], ids=str)
def test_homogeneous_pairs_may_have_any_ratio(act: nn.Module) -> None:
    model = paired(act, 6, 1, ratio=1.7)
    x = torch.randn(5, 3, dtype=F64)
    narrow = ep.reduce(model, x).model
    assert narrow[0].out_features == 9
    assert relative(model(x), narrow(x)) < 1e-12


@pytest.mark.parametrize("act", [nn.Softplus(), nn.ELU(), nn.Mish()], ids=str)
def test_what_has_no_such_identity_stays(act: nn.Module) -> None:
    """torch's softplus turns linear at 20, off its own identity."""
    assert ep.reduce(paired(act, 4, 1), torch.randn(5, 3, dtype=F64)).model[0].out_features == 9


def test_full_rank_leaves_the_pairs() -> None:
    assert ep.reduce(paired(nn.ReLU(), 4, 6), torch.randn(5, 3, dtype=F64)).model[0].out_features == 9


def test_pairs_of_channels_behind_padding() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 11, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(11, 1, 1), nn.Tanh()
    )
    padded = nn.Sequential(nn.Conv2d(1, 24, 1), nn.SiLU(), nn.Conv2d(24, 1, 3, padding=1))
    for net, pairs in ((model, 5), (padded, 12)):
        randomize_(net)
        with torch.no_grad():
            for part in (net[0].weight, net[0].bias):
                part[pairs : 2 * pairs] = -part[:pairs]
    x = torch.randn(2, 2, 6, 6, dtype=F64)
    narrow = ep.reduce(model, x).model
    assert narrow[0].out_channels == 5 + 1 + 2
    assert relative(model(x), narrow(x)) < 1e-12
    narrow = ep.reduce(padded, x[:, :1]).model
    assert narrow[0].out_channels == 12 + 2 * 2  # one input and a bias: rank 2 at every tap
    assert relative(padded(x[:, :1]), narrow(x[:, :1])) < 1e-12


def test_in_single_precision() -> None:
    model = paired(nn.GELU(), 6, 1).float()
    x = torch.randn(5, 3)
    narrow = ep.reduce(model, x).model
    assert narrow[0].out_features == 9
    assert relative(model(x), narrow(x)) < 1e-5
