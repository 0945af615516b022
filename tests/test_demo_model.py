"""The demo network in the package: that it loads, reads digits, and is wide where its training left it so."""

import json
import sys
from importlib import resources

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ep_prune.demo_model import WEIGHTS, digits_data, digits_net, load_digits_net

PATH = resources.files("ep_prune") / "data" / WEIGHTS

# The sets of channels, the batch norms that write to each, and how many of its channels are
# (live, constant, null): constant where all gains are 0 and a shift is not, null where all are 0.
CHANNELS = {
    "stream A": (["stem.1", "block1.norm2", "block2.norm2"], (23, 4, 5)),
    "block1 inner": (["block1.norm1"], (10, 6, 16)),
    "block2 inner": (["block2.norm1"], (3, 9, 20)),
    "block3 inner": (["block3.norm1"], (10, 6, 48)),
    "stream B": (["block3.norm2", "block3.shortcut.1"], (10, 9, 45)),
}


def metadata() -> dict[str, str]:
    with safe_open(str(PATH), "pt") as file:
        return file.metadata()


def test_file_is_small_and_float32():
    assert len(PATH.read_bytes()) < 600_000
    floating = [t for t in load_digits_net().state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    assert all(t.isfinite().all() for t in floating)


def test_split_is_disjoint_and_scaled():
    (x, y), (x_test, y_test) = digits_data("train"), digits_data("test")
    assert (x.shape, x_test.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)
    assert set(y_test.tolist()) == set(range(10))
    # All 1,797 images differ, so a common image would be a leak between the two parts.
    assert len(torch.cat([x, x_test]).flatten(1).unique(dim=0)) == 1797
    assert digits_data("test")[0].equal(x_test)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"'valid'.*'train' or 'test'"):
        digits_data("valid")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install ep-prune\[demo\]"):
        digits_data("test")


def test_accuracy_is_the_one_on_record():
    x, y = digits_data("test")
    net = load_digits_net()
    assert not net.training
    with torch.no_grad():
        accuracy = float((net(x).argmax(1) == y).double().mean())
    assert accuracy >= 0.97
    assert accuracy == pytest.approx(float(metadata()["test accuracy"]), abs=1e-6)


@pytest.mark.parametrize("name", CHANNELS)
def test_exact_zeros(name):
    members, expected = CHANNELS[name]
    modules = dict(load_digits_net().named_modules())
    flat = torch.stack([modules[member].weight == 0 for member in members]).all(0)
    zero = torch.stack([modules[member].bias == 0 for member in members]).all(0)
    counted = (int((~flat).sum()), int((flat & ~zero).sum()), int((flat & zero).sum()))
    assert counted == expected
    recorded = json.loads(metadata()["channels"])[name]
    assert counted == (recorded["live"], recorded["constant"], recorded["null"])


def test_two_fifths_of_the_inner_channels_have_gain_zero():
    net = load_digits_net()
    gains = torch.cat([block.norm1.weight for block in (net.block1, net.block2, net.block3)])
    assert (gains == 0).double().mean() >= 0.4


def test_untrained_network_has_no_zero_gain():
    norms = [module for module in digits_net().modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 8
    assert not any((norm.weight == 0).any() for norm in norms)
