"""The baselines of `benchmarks/cifar` on tiny networks, what is planted for each, and its runner."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

# benchmarks/ is no part of the installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cifar import __main__ as runner
from benchmarks.cifar import chains, folding, interpolative, least_squares, merging, networks
from benchmarks.cifar.batch_norm import reestimated
from benchmarks.cifar.budget import Prices, largest
from benchmarks.cifar.methods import METHODS, OURS, Method
from ep_prune.cost import cost

PEERS = [name for name in METHODS if name != OURS]
BUDGET = 0.6


def images(count: int = 24, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def lively(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Gains and shifts that differ, and moments of what really comes through."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=generator) + 0.5
            module.bias.data = torch.randn(module.num_features, generator=generator) / 2
    return reestimated(model, x)


def tiny_resnet() -> nn.Module:
    torch.manual_seed(0)
    return lively(zoo.cifar_resnet(8), images())


def plain(norm: bool = False) -> nn.Module:
    """Convolutions that read one another, flattened into linear layers."""
    torch.manual_seed(0)
    body = [
        nn.Conv2d(3, 8, 3, padding=1),
        *([nn.BatchNorm2d(8)] if norm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=not norm),
        *([nn.BatchNorm2d(12)] if norm else []),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 16, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    ]
    return lively(nn.Sequential(*body), images())


MODELS = {"resnet": tiny_resnet, "plain": plain, "normed": lambda: plain(norm=True)}


@pytest.mark.parametrize("network", MODELS)
@pytest.mark.parametrize("name", PEERS)
def test_methods_keep_the_function_at_full_budget_and_meet_a_smaller_one(name, network):
    model, x = MODELS[network](), images()
    before = copy.deepcopy(model.state_dict())
    whole, narrow = (METHODS[name](model, x, budget, 0) for budget in (1.0, BUDGET))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert not any(module.training for module in (*whole.modules(), *narrow.modules()))
    held_out = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        wide, same, other = model(held_out), whole(held_out), narrow(held_out)
    assert torch.allclose(wide, same, rtol=1e-5, atol=1e-6)
    assert other.shape == wide.shape and bool(other.isfinite().all())
    left = cost(narrow, held_out).macs / cost(model, held_out).macs
    assert BUDGET - 0.2 < left <= BUDGET
    assert float((other - wide).abs().max()) > 1e-6  # another function: something has been taken off


def test_methods_are_what_the_seed_says():
    model, x = plain(norm=True), images()
    name = "after Model Folding + REPAIR"
    first, again = (METHODS[name](model, x, BUDGET, 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_budget_that_cannot_be_met_is_said():
    with pytest.raises(ValueError, match="ask for more MACs"):
        METHODS["after GRAIL"](tiny_resnet(), images(), 0.01, 0)


def test_chains_of_the_zoo():
    found = {name: chains.find(getattr(zoo, name)()) for name in ("nin", "resnet8")}
    assert [chain.width for chain in found["nin"]] == [192, 160, 96, 192, 192, 192, 192, 192]
    assert [chain.producer for chain in found["resnet8"]] == ["c.1.1", "c.3.1", "c.6.1"]
    assert [chain.norm for chain in found["resnet8"]] == ["b.1", "b.3", "b.5"]
    resnet = chains.find(tiny_resnet())
    assert [(c.producer, c.norm, c.consumer) for c in resnet] == [
        (f"layer{n}.0.conv1", f"layer{n}.0.bn1", f"layer{n}.0.conv2") for n in (1, 2, 3)
    ]
    assert [c.width for c in chains.find(plain())] == [8, 12, 20]


def test_a_layer_that_is_read_twice_is_no_chain():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x).relu()
            return self.c(x + self.b(x).sigmoid())

    assert chains.find(Twice()) == []


@pytest.mark.parametrize("network", MODELS)
def test_walk_is_the_forward_pass_and_prices_are_the_counter(network):
    model, x = MODELS[network](), images()
    with torch.no_grad():
        assert torch.allclose(torch.cat(chains.Walk(model, x, chunk=7).run()), model(x), rtol=1e-5, atol=1e-6)
    prices = Prices(model, x)
    assert prices.wide == cost(model, x[:1]).macs
    widths = chains.widths_at(chains.find(model), 0.5)
    narrow = METHODS["after Neuron Merging"](model, x, chains.cost_of(model, prices, widths) / prices.wide, 0)
    assert prices.macs(narrow) == cost(narrow, x[:1]).macs == chains.cost_of(model, prices, widths)


def test_largest_finds_the_edge():
    assert largest(lambda share: share <= 1) == 1
    assert largest(lambda share: share <= 0.3, steps=20) == pytest.approx(0.3, abs=1e-5)
    with pytest.raises(ValueError, match="at least one channel"):
        largest(lambda share: False)


def test_reestimation_takes_the_moments_of_the_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = 3 * images() + 1
    renewed = reestimated(model, x, batch=8)
    with torch.no_grad():
        z = model[0](x)
    assert torch.allclose(renewed[1].running_mean, z.mean((0, 2, 3)), atol=1e-5)
    assert torch.equal(model[1].running_mean, torch.zeros(4))


# What each method is made for, planted: then it must be exact.


def pair(first: torch.Tensor, norm: nn.BatchNorm2d | None = None) -> nn.Sequential:
    """A 1x1 convolution with these filters (C, 3), and one that reads its channels."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, len(first), 1, bias=norm is None),
        *([norm] if norm is not None else []),
        nn.ReLU(),
        nn.Conv2d(len(first), 4, 3),
    ).eval()
    model[0].weight.data = first[:, :, None, None].clone()
    if norm is None:
        model[0].bias.data.zero_()
    return model


def unit_filters() -> torch.Tensor:
    """Four filters of L1 norm 1, so that the L1 norm prefers them to their smaller copies."""
    return nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), p=1)


def off(model: nn.Module, narrow: nn.Module) -> float:
    x = images(6, 8)
    with torch.no_grad():
        return float((model(x) - narrow(x)).abs().max() / model(x).abs().max())


def narrowed(model: nn.Module, incoming: torch.Tensor, outgoing: torch.Tensor) -> nn.Module:
    narrow = copy.deepcopy(model)
    chains.narrow_(narrow, chains.find(model)[0], incoming, outgoing)
    return narrow


def test_neuron_merging_is_exact_on_scaled_copies():
    kept = unit_filters()
    model = pair(torch.cat([kept, 0.5 * kept]))
    x = images(4, 8)
    narrow = METHODS["after Neuron Merging"](model, x, 0.5, 0)
    assert narrow[0].out_channels == 4 and off(model, narrow) < 1e-5
    assert off(model, narrowed(model, torch.eye(8)[:4], torch.eye(8)[:, :4])) > 0.1  # dropping alone is not


def test_neuron_merging_sees_through_batch_norm():
    """z_d = s z_k; gain, shift and moments such that y_d = 2 y_k, with s = .5."""
    kept = unit_filters()
    norm = nn.BatchNorm2d(8, eps=0.0)
    gain, shift, mean, variance = (torch.rand(4) + 0.5 for _ in range(4))
    norm.weight.data, norm.bias.data = torch.cat([gain, 2 * gain]), torch.cat([shift, 2 * shift])
    norm.running_mean = torch.cat([mean, 0.5 * mean])
    norm.running_var = torch.cat([variance, 0.25 * variance])
    model = pair(torch.cat([kept, 0.5 * kept]), norm)
    chain = chains.find(model)[0]
    outgoing = merging.merge_map(model, chain, torch.arange(4))
    assert torch.allclose(outgoing, torch.cat([torch.eye(4), 2 * torch.eye(4)]).double(), atol=1e-5)
    assert off(model, METHODS["after Neuron Merging"](model, images(4, 8), 0.5, 0)) < 1e-5


def test_folding_is_exact_on_copies_whose_outgoing_weights_are_equal():
    first = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    model = pair(first)
    model[2].weight.data[:, 4:] = model[2].weight.data[:, :4]
    for name in ("after Model Folding", "after Model Folding + REPAIR"):
        assert off(model, METHODS[name](model, images(4, 8), 0.5, 0)) < 1e-5


def test_k_means_finds_planted_clusters_and_leaves_none_empty():
    centres = 10 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(40) % 5
    noise = 0.1 * torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = folding.k_means(centres[truth] + noise, 5, torch.Generator().manual_seed(0))
    together = labels.unsqueeze(0) == labels.unsqueeze(1)
    assert torch.equal(together, truth.unsqueeze(0) == truth.unsqueeze(1))
    copies = torch.ones(6, 2, dtype=torch.float64)
    assert len(folding.k_means(copies, 4, torch.Generator().manual_seed(0)).unique()) == 4


def moments_of(net: nn.Module, layer: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    hook = net.get_submodule(layer).register_forward_hook(lambda _, __, y: outputs.append(y.clone()))
    with torch.no_grad():
        net(x)
    hook.remove()
    return folding.moments(outputs)


def test_repair_gives_the_members_moments_back():
    model, x = plain(), images()
    narrow, averages = folding.folded(model, x, BUDGET, 0)
    folding.repair_(narrow, model, x, averages)
    for chain, average in averages.items():
        (mean, deviation), wide = (moments_of(net, chain.producer, x) for net in (narrow, model))
        assert torch.allclose(mean, average @ wide[0], atol=1e-5)
        assert torch.allclose(deviation, average @ wide[1], atol=1e-5)


@pytest.mark.parametrize("name", ["after GRAIL", "after ID", "after ID (one tolerance)"])
def test_fits_are_exact_on_dependent_channels(name):
    """Inputs are positive and so are the filters: channels 4 to 7 are sums of the kept ones."""
    basis = torch.eye(3)
    sums = torch.tensor([[0.4, 0.1, 0.2], [0.2, 0.3, 0.1], [0.1, 0.1, 0.5]])
    model = pair(torch.cat([basis, sums]))
    x = images(4, 8).abs()
    narrow = METHODS[name](model, x, 0.5, 0)
    assert narrow[0].out_channels == 3
    held_out = images(6, 8).abs()
    with torch.no_grad():
        change = (model(held_out) - narrow(held_out)).abs().max() / model(held_out).abs().max()
    assert float(change) < (2e-2 if name == "after GRAIL" else 1e-4)  # the ridge is 1e-3 of the mean square
    dropped = copy.deepcopy(model)
    chains.narrow_(dropped, chains.find(model)[0], torch.eye(6)[:3], torch.eye(6)[:, :3])
    with torch.no_grad():
        assert float((model(held_out) - dropped(held_out)).abs().max() / model(held_out).abs().max()) > 0.1


def test_interpolation_is_that_of_the_activations():
    z = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:, 4:] = z[:, :2] @ torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    kept, outgoing = interpolative.interpolation(z.T @ z, 4)
    assert kept.tolist() == sorted(kept.tolist()) and torch.equal(outgoing[kept], torch.eye(4).double())
    assert torch.allclose(z[:, kept] @ outgoing.T, z, atol=1e-6)
    more, beyond = interpolative.interpolation(z.T @ z, 5)  # one more than the rank
    assert torch.allclose(z[:, more] @ beyond.T, z, atol=1e-6) and float(beyond.abs().max()) < 100


def test_the_fit_solves_the_normal_equations():
    z = torch.randn(100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    gram, kept = z.T @ z, torch.tensor([0, 2, 3])
    ridge = least_squares.RIDGE * gram[kept][:, kept].diagonal().mean()
    outgoing = least_squares.fit(gram, kept)
    left = z[:, kept].T @ (z[:, kept] @ outgoing.T - z) + ridge * outgoing.T
    assert float(left.abs().max()) < 1e-9
    assert torch.equal(least_squares.fit(torch.zeros(5, 5).double(), kept), torch.eye(5).double()[:, kept])


# The runner.


def fake_case(stated: float | None = None) -> networks.Case:
    class Fake(networks.Case):
        def test(self):
            x = images(20)
            with torch.no_grad():
                return x, plain(norm=True)(x).argmax(1)

        def calibration(self, seed, count=networks.CALIBRATION):
            return images(count, 16) + seed

    return Fake("fake", lambda: plain(norm=True), (0,) * 3, (1,) * 3, stated if stated is not None else 100.0)


def test_runner_writes_goes_on_and_reports_errors(tmp_path, monkeypatch, capsys):
    calls = []

    def counted(model, x, keep_macs, seed):
        calls.append((keep_macs, seed, len(x)))
        return METHODS["after GRAIL"](model, x, keep_macs, seed)

    def broken(model, x, keep_macs, seed):
        raise KeyError("no such luck")

    methods = {
        "counted": Method("counted", counted, "test"),
        "counted + BN": Method("counted + BN", counted, "test", "counted"),
        "broken": Method("broken", broken, "test"),
    }
    for module in ("__main__", "table", "plot"):
        monkeypatch.setattr(sys.modules[f"benchmarks.cifar.{module}"], "METHODS", methods)
    monkeypatch.setattr(runner, "NETWORKS", {"fake": fake_case()})
    arguments = ["--out", str(tmp_path), "--images", "16", "--seeds", "0,1", "--budgets", ".7,.6"]
    arguments += ["--networks", "fake", "--methods", ",".join(methods)]
    assert runner.main(arguments) == 0
    assert calls == [(0.7, 0, 16), (0.6, 0, 16), (0.7, 1, 16), (0.6, 1, 16)]  # the twin shares its narrowing
    text = (tmp_path / "table.md").read_text()
    assert "| broken | error | error |" in text and "* broken: KeyError: 'no such luck'" in text
    assert "## fake, base 100.0 %" in text and text.count("±") >= 8
    assert (tmp_path / "plot.png").stat().st_size > 5000
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 12 and all(row["macs"] <= row["budget"] for row in rows if not row["error"])

    log = tmp_path / "results.jsonl"
    lines = log.read_text().splitlines()
    without = [
        line for line in lines if not ('"counted"' in line and '"budget": 0.6' in line and '"seed": 1' in line)
    ]
    assert len(without) == len(lines) - 1
    log.write_text("\n".join(without) + "\n" + lines[-1][:20])  # cut off while it wrote
    calls.clear()
    assert runner.main(arguments) == 0
    assert calls == [(0.6, 1, 16)]
    # what came next has a line of its own
    assert [line for line in log.read_text().splitlines() if not line.endswith("}")] == [lines[-1][:20]]
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 12


def test_runner_says_when_a_budget_is_exceeded(tmp_path, monkeypatch, capsys):
    methods = {"greedy": Method("greedy", lambda model, x, keep, seed: copy.deepcopy(model), "test")}
    for module in ("__main__", "table", "plot"):
        monkeypatch.setattr(sys.modules[f"benchmarks.cifar.{module}"], "METHODS", methods)
    monkeypatch.setattr(runner, "NETWORKS", {"fake": fake_case()})
    arguments = ["--out", str(tmp_path), "--images", "16", "--seeds", "0", "--networks", "fake"]
    assert runner.main([*arguments, "--methods", "greedy"]) == 1
    assert "greedy left 1.000 of fake's MACs, 0.5 allowed" in capsys.readouterr().err


def test_a_network_that_is_not_the_stated_one_stops_the_run():
    with pytest.raises(RuntimeError, match=r"fake classifies 100\.0 % right and not the stated 91\.5 %"):
        fake_case(stated=91.5).checked()


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        runner.main(["--methods", "L1,nonsense"])
    assert "unknown: nonsense; there are L1" in capsys.readouterr().err


@pytest.mark.data
@zoo.needs_data
def test_calibration_images_are_drawn_by_seed():
    case = networks.NETWORKS["resnet20"]
    first, again, other = (case.calibration(seed, 64) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (64, 3, 32, 32)
    with pytest.raises(ValueError, match="5000 calibration images asked for, 4000 are here"):
        case.calibration(0, 5000)
