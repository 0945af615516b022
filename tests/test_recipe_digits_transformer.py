"""The transformer recipe in quick settings: what it counts, what its peers do, and what it writes."""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # recipes/ is no part of the installed package

from ep_prune.cost import cost
from recipes import digits_transformer as recipe
from recipes import small_transformer as small


def network(seed: int = 0) -> small.DigitsTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return small.DigitsTransformer().eval()


def images(count: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_counted_are_the_linear_layers_of_attention_and_mlps():
    net = network()
    assert small.counted(net) == 4 * 16 * (64 * 192 + 64 * 64 + 2 * 64 * 256)
    assert cost(net, images(2)).macs - small.counted(net) == 16 * 4 * 64 + 64 * 10
    assert small.even(net, 0.5) == [(4, 128)] * 4
    for share in recipe.SHARES:
        kept = small.counted(small.peer(net, small.even(net, share), 2)) / small.counted(net)
        assert share - 0.003 < kept <= share


@torch.no_grad()
def test_magnitude_pruning_is_the_wide_network_without_the_smallest_units():
    net, x = network(1), images()
    for block in net.blocks:
        nn.init.normal_(block.attention.qkv.weight, std=0.3)
        nn.init.normal_(block.attention.qkv.bias)
        block.attention.proj.weight[:, 8:24] *= 1e-3  # heads 1 and 2 are read little, and write little
        block.attention.qkv.weight.view(3, 8, 8, 64)[:, 1:3] *= 1e-2
        block.fc1.weight[:200] *= 1e-2
        block.fc2.weight[:, :200] *= 1e-2
    masked = copy.deepcopy(net)
    for block in masked.blocks:
        block.attention.proj.weight[:, 8:24] = 0
        block.fc2.weight[:, :200] = 0
    for order in (1, 2):
        narrow = small.peer(net, [(6, 56)] * 4, order)
        assert small.widths_of(narrow) == [(6, 56)] * 4
        torch.testing.assert_close(narrow(x), masked(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_least_squares_peer_makes_up_for_copies():
    """Half of the hidden units repeat the other half, and heads likewise: nothing need be lost."""
    net, x = network(2), images(64)
    for block in net.blocks:
        block.fc1.weight[128:], block.fc1.bias[128:] = block.fc1.weight[:128], block.fc1.bias[:128]
        block.fc2.weight[:, :128] *= 1.1  # which half stays is told
        attention = block.attention
        for part in (attention.qkv.weight.view(3, 8, 8, 64), attention.qkv.bias.view(3, 8, 8)):
            part[:, 4:] = part[:, :4]
        attention.proj.weight[:, :32] *= 1.1
    fitted, dropped = (small.peer(net, [(4, 128)] * 4, 2, given) for given in (x, None))
    errors = [float((narrow(x) - net(x)).abs().max() / net(x).abs().max()) for narrow in (fitted, dropped)]
    assert errors[0] < 0.02 < 0.1 < errors[1]


def test_a_quick_run_trains_compares_and_writes(tmp_path, monkeypatch, capsys):
    class Tiny(small.DigitsTransformer):
        def __init__(self) -> None:
            super().__init__(2, 32, 4, 64)

    monkeypatch.setattr(recipe, "DigitsTransformer", Tiny)
    out = tmp_path / "out"
    quick = ["--quick", "--calibration", "64", "--out", str(out)]
    assert recipe.main(quick) == 0
    rows = json.loads((out / "results.json").read_text())
    methods = [row["method"] for row in rows]
    assert methods[0] == recipe.OURS and len(set(methods)) == len(methods) == 7
    assert all(0 < row["kept"] <= 0.5 and 0 <= row["accuracy"] <= 100 for row in rows)
    assert rows[0]["widths"] == rows[5]["widths"] == rows[6]["widths"] and rows[2]["widths"] == [[2, 32]] * 2
    heads, hidden = (sum(part) for part in zip(*rows[1]["widths"], strict=True))
    assert heads == 4 and 60 < hidden <= 64
    written = (out / "results.md").read_text()
    assert written.count("\n| ") >= 7 and "| compress |" in written and "network 0: " in written
    assert (out / "accuracy.png").stat().st_size > 1000
    (weights,) = out.glob("network-*.safetensors")
    age = weights.stat().st_mtime_ns
    first = capsys.readouterr().out
    assert recipe.main(quick) == 0 and weights.stat().st_mtime_ns == age  # trained once
    assert capsys.readouterr().out.splitlines()[0] == first.splitlines()[0]
    assert [{**row, "seconds": 0} for row in json.loads((out / "results.json").read_text())] == [
        {**row, "seconds": 0} for row in rows
    ]


def test_training_lowers_the_loss_and_repeats():
    x, y = recipe.digits_data("train")
    x, y = x[:192], y[:192]
    settings = recipe.Settings(epochs=3, batch=64)
    one, other = (recipe.train(settings, 0, x, y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        start = F.cross_entropy(network()(x), y)
        assert F.cross_entropy(one(x), y) < 0.95 * start and not one.training
