"""The recipes of Fig. 3 and Fig. 4 of arXiv 2105.14573, run to their end in seconds, and what their tables say."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from recipes.embedding_principle import critical_functions, critical_points, hessian


@pytest.fixture(scope="module")
def spectra(tmp_path_factory):
    out = tmp_path_factory.mktemp("hessian")
    hessian.main(["--quick", "--out", str(out)])
    return out, json.loads((out / "hessian.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    out = tmp_path_factory.mktemp("functions")
    critical_functions.main(["--quick", "--out", str(out)])
    return out, json.loads((out / "critical_functions.json").read_text(encoding="utf-8"))


def counts(table, name, key):
    return [row[key] for row in table[name]["widths"]]


def test_splitting_adds_eigenvalues_as_in_the_paper(spectra):
    _, table = spectra
    assert counts(table, "1-D", "width") == [2, 3, 4]
    assert counts(table, "1-D", "negative") == [0, 1, 2] == table["1-D"]["paper, negative"]
    assert counts(table, "1-D", "zero") == [0, 1, 2]
    assert counts(table, "Iris", "width") == [3, 4, 5, 6]
    assert counts(table, "Iris", "negative") == [1, 3, 5, 7]
    assert counts(table, "Iris", "negative")[1:] == table["Iris"]["paper, negative"]
    assert counts(table, "Iris", "zero") == [0, 1, 2, 3]


@pytest.mark.parametrize("name, per_neuron", [("1-D", 3), ("Iris", 7)])
def test_every_width_is_critical_and_its_counts_are_clear(spectra, name, per_neuron):
    for row in spectra[1][name]["widths"]:
        assert row["gradient L1"] < 1e-13
        assert row["output change"] < 1e-14
        assert row["loss"] == pytest.approx(spectra[1][name]["widths"][0]["loss"], rel=1e-12)
        assert (
            row["positive"] + row["zero"] + row["negative"] == row["width"] * per_neuron == len(row["eigenvalues"])
        )
        assert row["smallest |nonzero|"] > 1e6 * (row["largest |zero|"] or 1e-16)


def test_a_split_never_loses_an_eigenvalue_of_any_sign(spectra):
    """Theorem 6.2 of arXiv 2111.15527, whichever neuron is split."""
    for entry in spectra[1].values():
        if "widths" not in entry:
            continue
        for before, after in zip(entry["widths"], entry["widths"][1:], strict=False):
            assert all(after[key] >= before[key] for key in ("positive", "zero", "negative"))
            assert min(after["negative by neuron"]) == after["negative"] >= before["negative"]


@pytest.mark.parametrize("index, name", [(0, "1-D"), (1, "Iris")])
def test_what_a_split_adds_is_the_inertia_of_its_own_block(spectra, index, name):
    """[[A, B], [B^T, 0]] of the recipe's docstring, written out for the first split of either chain."""
    out, table = spectra
    case = hessian.cases(True)[index]
    with safe_open(str(out / "hessian.state"), "pt") as file:
        point = file.get_tensor(name)
    model = critical_points.two_layer(case.x.shape[1], case.width, case.y.shape[1], case.activation, case.bias)
    critical_points.at(model, point)
    before, after = table[name]["widths"][:2]
    x = torch.cat([case.x, torch.ones(len(case.x), 1, dtype=torch.float64)], dim=1) if case.bias else case.x
    s = model[:2](case.x)[:, after["split neuron"]].detach()
    first, second = (1 - s**2, -2 * s * (1 - s**2)) if name == "1-D" else (s * (1 - s), s * (1 - s) * (1 - 2 * s))
    residual = (model(case.x) - case.y).detach()
    outgoing = model[2].weight[:, after["split neuron"]].detach()
    a = torch.einsum("i,id,ie->de", residual @ outgoing * second, x, x) / len(x)
    b = torch.einsum("i,id,ik->dk", first, x, residual) / len(x)
    assert (b @ outgoing).abs().max() < 1e-13
    zeros = torch.zeros(b.shape[1], b.shape[1], dtype=torch.float64)
    block = torch.linalg.eigvalsh(torch.cat([torch.cat([a, b], 1), torch.cat([b.T, zeros], 1)]))
    bound = 1e-11 * block.abs().max()
    added = [int((block > bound).sum()), int((block.abs() <= bound).sum()), int((block < -bound).sum())]
    assert added == [after[key] - before[key] for key in ("positive", "zero", "negative")]


def test_four_functions_are_those_where_training_ends(functions):
    _, table = functions
    by_width = {m: [f for f in table["functions"] if str(m) in f["ends"]] for m in (1, 2, 3)}
    assert [f["loss"] for f in by_width[1]] == pytest.approx([0.10902], abs=1e-5)
    assert [f["loss"] for f in by_width[3]] == pytest.approx([0], abs=1e-20)
    losses = [round(f["loss"], 4) for f in by_width[2]]
    assert set(losses) <= {0.0896, 0.0698}  # .0896 is the symmetric saddle, which quick runs have not left yet
    assert losses.count(0.0698) == 2
    mirrored = [torch.tensor(f["f"]) for f in by_width[2] if round(f["loss"], 4) == 0.0698]
    assert mirrored[0].allclose(-mirrored[1].flip(0), atol=1e-6)  # the target is odd


def test_degeneracy_is_what_is_missing_to_width_three(functions):
    found = functions[1]["functions"]
    assert {f["m0"] for f in found} >= {1, 2, 3}
    for f in found:
        assert f["inertia split to 3"][1] == 3 - f["m0"]
        if f["m0"]:
            assert f["inertia where narrowest"][1] == 0
    embedded = [f for f in found if f["m0"] < 3 and "3" in f["passed"]]
    assert embedded  # narrower networks' critical points, found by the search at width 3 itself
    assert any(entry["inertia"] == f["inertia split to 3"] for f in embedded for entry in f["inertia found at 3"])


def test_every_point_is_accounted_for(functions):
    _, table = functions
    for entry in table["trials"]:
        assert entry["critical"] + entry["to infinity"] + entry["not polished"] == entry["points"]
        assert entry["trials that end critical"] == entry["trials"]
        tallied = [f[key].get(str(entry["width"]), 0) for f in table["functions"] for key in ("ends", "passed")]
        assert sum(tallied) == entry["critical"]


@pytest.mark.parametrize("recipe, name", [(hessian, "hessian"), (critical_functions, "critical_functions")])
def test_pictures_are_drawn_and_a_second_run_goes_on_from_the_first(recipe, name, request, monkeypatch):
    out, table = request.getfixturevalue("spectra" if name == "hessian" else "functions")
    assert (out / f"{name}.png").stat().st_size > 20_000

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(recipe, "train", never)
    recipe.main(["--quick", "--out", str(out)])
    assert json.loads((out / f"{name}.json").read_text(encoding="utf-8")) == table


def test_polishing_reaches_a_saddle_and_stays_on_it():
    """x^4/4 - x^2/2 + y^2/2 has its saddle at 0; descent would run to (+-1, 0)."""

    def value(points):
        x, y = points.T
        return x**4 / 4 - x**2 / 2 + y**2 / 2

    start = torch.tensor([[0.3, 0.5], [0.9, -0.5]], dtype=torch.float64)
    points, norms = critical_points.polish(value, start, 50, 1e-14, "")
    assert norms.max() <= 1e-14
    assert points.allclose(torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_batched_derivatives_are_those_of_the_module(bias):
    torch.manual_seed(0)
    model = critical_points.two_layer(2, 3, 2, nn.Tanh(), bias)
    x, y = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    value = critical_points.mean_square(model, x, y)
    points = critical_points.draw(model, 5, 1.0, 0)
    slopes = critical_points.slopes(value, points)
    for trial, point in enumerate(points):
        critical_points.at(model, point).zero_grad()
        (model(x) - y).square().mean().backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert slopes[trial].allclose(expected, rtol=1e-12, atol=1e-14)
        alone = torch.autograd.functional.hessian(lambda p: value(p[None])[0], point)
        assert critical_points.curvatures(value, points)[trial].allclose(alone, rtol=1e-10, atol=1e-12)


def test_a_trial_is_the_same_however_many_there_are():
    model = critical_points.two_layer(4, 3, 3, nn.Sigmoid(), False)
    assert critical_points.draw(model, 8, 1.0, 0).equal(critical_points.draw(model, 40, 1.0, 0)[:8])


@pytest.mark.parametrize("share", [0.5, -2.0])
def test_split_keeps_the_output(share):
    torch.manual_seed(0)
    model = critical_points.two_layer(2, 3, 2, nn.Tanh())
    x = torch.randn(9, 2, dtype=torch.float64)
    wide = critical_points.split(model, 1, share)
    assert wide[0].out_features == 4
    assert wide(x).allclose(model(x), rtol=0, atol=1e-14)
