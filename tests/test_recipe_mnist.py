"""The MNIST recipe: the paper's merging, our elimination, the gradients of training, and --quick as a whole."""

import argparse
import json

import pytest
import torch

from recipes.embedding_principle import common, mnist
from recipes.embedding_principle._mnist_merge import groups, live, merge
from recipes.embedding_principle._mnist_narrow import collinear, elimination_order, fit_incoming, narrow
from recipes.embedding_principle._mnist_network import Network, load_images
from recipes.embedding_principle._mnist_training import fresh, start, train

EPS = torch.finfo(torch.float64).eps


def small(seed: int, width: int = 5, inputs: int = 8) -> Network:
    torch.manual_seed(seed)
    double = torch.float64
    return Network(torch.randn(width, inputs, dtype=double), torch.randn(width, 10, dtype=double), "linear")


def split(network: Network, copies: int, seed: int) -> Network:
    """Every neuron in `copies` parts at random positive scales, shares of any sign, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.randn(network.width, copies, generator=generator, dtype=torch.float64)
    shares[:, -1] = 1 - shares[:, :-1].sum(1)
    scale = torch.rand(network.width, copies, generator=generator, dtype=torch.float64) + 0.5
    incoming = network.incoming.unsqueeze(1) * scale.unsqueeze(2)
    outgoing = network.outgoing.unsqueeze(1) * (shares / scale).unsqueeze(2)
    order = torch.randperm(network.width * copies, generator=generator)
    return Network(incoming.flatten(0, 1)[order], outgoing.flatten(0, 1)[order], network.head)


def inputs(n: int = 200, d: int = 8) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def off(a: Network, b: Network) -> float:
    """Relative mean square difference on inputs that nothing was fitted to."""
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return float((a(x) - b(x)).square().mean() / b(x).square().mean())


@pytest.mark.parametrize("seed", range(3))
def test_elimination_recovers_a_planted_network(seed):
    origin = small(seed)
    wide = split(origin, 4, seed)
    assert wide.width == 20 and off(wide, origin) < 1e-28
    found = narrow(wide, inputs(), [4, 5])
    assert found[5].width == 5 and off(found[5], origin) < 1e-20
    assert off(found[4], origin) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_collinear_merges_exactly_and_only_what_is_collinear(seed):
    origin = small(seed)
    merged = collinear(split(origin, 4, seed), EPS)
    assert merged.width == 5 and off(merged, origin) < 1e-26
    apart = Network(origin.incoming * (1 + 1e-6 * torch.randn(5, 8)), origin.outgoing, "linear")
    both = Network(torch.cat([origin.incoming, apart.incoming]), torch.cat([origin.outgoing] * 2), "linear")
    assert collinear(both, EPS).width == 10


def test_elimination_costs_are_those_of_least_squares():
    """The neuron that goes first is the one without which least squares does best."""
    wide = small(3, width=12)
    hidden = wide.hidden(inputs())
    target = hidden @ wide.outgoing
    left = []
    for j in range(12):
        rest = hidden[:, [k for k in range(12) if k != j]]
        left.append(float((rest @ torch.linalg.lstsq(rest, target).solution - target).square().sum()))
    order = elimination_order(hidden, wide.outgoing)
    assert int(order[0]) == min(range(12), key=left.__getitem__)
    assert sorted(order.tolist()) == list(range(12))


def test_dead_and_null_neurons_go_first():
    wide = small(4, width=6)
    incoming = torch.cat([wide.incoming, torch.zeros(1, 8, dtype=torch.float64), torch.ones(1, 8).double()])
    outgoing = torch.cat([wide.outgoing, torch.ones(1, 10).double(), torch.zeros(1, 10).double()])
    assert off(narrow(Network(incoming, outgoing, "linear"), inputs(), [6])[6], wide) < 1e-20


def test_fitting_incoming_weights_never_ends_worse_and_helps():
    wide = small(5, width=12)
    x = inputs()
    answers = wide(x)
    closed = narrow(wide, x, [8])[8]
    fitted = fit_incoming(closed, x, answers)
    before, after = ((network(x) - answers).square().sum() for network in (closed, fitted))
    assert fitted.width == 8 and after < 0.9 * before


def test_groups_have_pairwise_cosine_and_cover():
    network = small(6, width=60, inputs=3)
    unit = torch.nn.functional.normalize(network.incoming, dim=1)
    found = groups(network, 0.9)
    assert sorted(torch.cat(found).tolist()) == list(range(60))
    assert len(found) < 60 and all(float((unit[g] @ unit[g].T).min()) >= 0.9 for g in found)


def test_paper_merging_is_exact_on_collinear_neurons_and_drops_low_ones():
    origin = small(9)
    wide = split(origin, 3, 9)
    low = Network(
        torch.cat([wide.incoming, 1e-9 * torch.randn(2, 8).double()]),
        torch.cat([wide.outgoing, 1e-9 * torch.randn(2, 10).double()]),
        "linear",
    )
    assert set(live(low).tolist()) <= set(range(15))
    low.outgoing[:15] += 1.0  # no share small enough to count as low
    merged = merge(low, 0.999, torch.Generator().manual_seed(0))
    assert merged.width == 5 and off(merged, low.take(torch.arange(15))) < 1e-26


def test_paper_merging_weighs_by_length():
    incoming = torch.tensor([[1.0, 0.0], [1.9, 0.3]], dtype=torch.float64)
    outgoing = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    for seed in range(4):
        merged = merge(Network(incoming, outgoing, "linear"), 0.9, torch.Generator().manual_seed(seed))
        length = incoming.norm(dim=1)
        expected = (outgoing.squeeze(1) * length).sum() / merged.incoming.norm()
        assert merged.width == 1 and torch.allclose(merged.outgoing.squeeze(), expected, rtol=1e-14, atol=0)


def settings(out, **more) -> argparse.Namespace:
    base = {"out": out, "threads": 1, "width": 12, "epochs": 30, "loss": 0.0, "lr": 1e-3, "quick": True, "seed": 0}
    return argparse.Namespace(**{**base, **more})


@pytest.mark.parametrize("head", mnist.HEADS)
def test_training_steps_are_those_of_autograd(head, tmp_path):
    images = load_images(True)
    args = settings(tmp_path)
    run = train(args, images, 0, head)
    origin = fresh(args, 0, head, images.x.shape[1]).network
    weights = [origin.incoming.clone().requires_grad_(), origin.outgoing.clone().requires_grad_()]
    optimizer = torch.optim.Adam(weights, lr=args.lr)
    for _ in range(args.epochs):
        f = (images.x.float() @ weights[0].T).relu() @ weights[1]
        f = f.softmax(1) if head == "softmax" else f
        optimizer.zero_grad()
        (f - images.targets().float()).square().mean().backward()
        optimizer.step()
    for mine, other in zip((run.network.incoming, run.network.outgoing), weights, strict=True):
        assert torch.allclose(mine, other.detach(), rtol=1e-3, atol=1e-5)


def test_training_goes_on_from_its_state(tmp_path):
    images = load_images(True)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = train(settings(tmp_path / "a"), images, 0, "softmax")
    args = settings(tmp_path / "b")
    half = fresh(args, 0, "softmax", images.x.shape[1])
    mnist.advance_(half, images, args.lr, 15)
    values = {"epoch": half.epoch, "curve": half.curve, "done": False, "seconds": 0.0}
    common.save_state(tmp_path / "b" / "mnist.softmax.0.state", args, half.tensors(), values)
    resumed = train(args, images, 0, "softmax")
    assert resumed.epoch == 30
    assert torch.equal(resumed.network.incoming, whole.network.incoming)
    assert start(whole.network).epoch == 0


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DATA", tmp_path)
    with pytest.raises(SystemExit, match=r"train_5000.npz is missing: set EP_PRUNE_DATA"):
        load_images(False)


def test_quick_from_end_to_end(tmp_path, capsys):
    assert mnist.main(["--quick", "--out", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "mnist.json").read_text())
    assert (tmp_path / "mnist.png").stat().st_size > 10_000
    assert set(table["runs"]) == set(table["summary"]) == set(mnist.HEADS)
    for (run,) in table["runs"].values():
        assert run["wide"]["agreement"] == 1 and run["wide"]["accuracy"] > 0.8
        assert run["groups at .9"] <= run["not collinear"] <= run["live"] <= 40
        for kind in ("paper", "paper, retrained", "closed form", "fitted"):
            assert run[kind] and all(0 < row["width"] <= run["live"] for row in run[kind])
        ours = {row["width"]: row["loss"] for row in run["closed form"]}
        assert {row["width"] for row in run["paper"]} <= set(ours)
        widest = max(run["closed form"], key=lambda row: row["width"])
        assert widest["loss"] == pytest.approx(run["wide"]["loss"], rel=0.05) and widest["agreement"] > 0.97
    first = capsys.readouterr().out + (tmp_path / "mnist.json").read_text()
    assert "softmax, seed 0" in first
    assert mnist.main(["--quick", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "mnist.json").read_text()) == table


def test_where_the_closed_form_is_not_enough_the_fitted_network_is_looked_at():
    def rows(*pairs):
        return [{"width": width, "loss": loss} for width, loss in pairs]

    run = {
        "wide": {"loss": 1.0},
        "paper": [
            {**row, "cosine": c}
            for row, c in zip(rows((9, 1.2), (8, 1.4), (5, 2.0)), (0.9, 0.8, 0.7), strict=True)
        ],
        "closed form": rows((9, 1.15), (8, 1.2), (7, 1.3)),
        "fitted": rows((9, 1.05), (7, 1.1)),
    }
    tables = mnist._mnist_tables
    assert tables.halves(run, "closed form") == {0.9: False, 0.8: True}
    assert tables.not_halved(run) == [9]
    assert tables.halves(run, "closed form", "fitted") == {0.9: True, 0.8: True}
