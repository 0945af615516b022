"""The recipes on condensation: their hand-written gradients, what they measure on made-up data, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.embedding_principle import common, condensation, width500


def test_a_step_of_descent_is_the_gradient_of_the_mean_of_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(7, 2, generator=draw, dtype=torch.float64)
    out = torch.randn(7, generator=draw, dtype=torch.float64)
    descent = width500.Descent(weights.clone(), out.clone(), 0.03)
    x = torch.linspace(-15, 15, 50, dtype=torch.float64)
    points = weights.clone().requires_grad_(), out.clone().requires_grad_()

    def loss() -> torch.Tensor:
        hidden = torch.tanh(points[0][:, :1] * x + points[0][:, 1:])
        return (points[1] @ hidden - width500.target(x)).square().mean()

    value = loss()
    assert descent.loss() == pytest.approx(value.item(), rel=1e-12)
    value.backward()
    descent.step()
    assert torch.allclose(descent.weights, weights - 0.03 * points[0].grad, rtol=0, atol=1e-13)
    assert torch.allclose(descent.out, out - 0.03 * points[1].grad, rtol=0, atol=1e-13)
    with torch.no_grad():
        seen = descent.model(x.unsqueeze(1)).squeeze(1)
        hidden = torch.tanh(descent.weights[:, :1] * x + descent.weights[:, 1:])
    assert torch.allclose(seen, descent.out @ hidden, rtol=0, atol=1e-13)


def test_the_best_width_1_function_is_better_than_any_on_a_grid() -> None:
    x = torch.linspace(-15, 15, 50, dtype=torch.float64)
    f, loss = width500.best_width_1(x)
    assert loss == pytest.approx(float((f - width500.target(x)).square().mean()), rel=1e-12)
    a, w = torch.meshgrid(torch.linspace(1, 8, 141), torch.linspace(0.02, 1, 197), indexing="ij")
    grid = a.double().reshape(-1, 1) * torch.tanh(w.double().reshape(-1, 1) * x)
    best = float((grid - width500.target(x)).square().mean(1).min())
    assert loss <= best <= loss * 1.001


def test_the_first_plateau_is_the_longest_flat_stretch() -> None:
    losses = [5.0, 1.0, 0.5, 0.110, 0.111, 0.110, 0.109, 0.111, 0.05, 0.01, 0.001, 0.001, 0.001, 0.001]
    steps = [10 * k for k in range(len(losses))]
    assert width500.first_plateau(steps, losses) == (3, 7)


def test_directions_are_counted_by_weight() -> None:
    weights = torch.tensor([[1.0, 0.0], [2.0, 0.01], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]]).double()
    out = torch.tensor([1.0, -1.0, 1.0, 1.0, 1e-3]).double()
    assert condensation.directions(weights, out) == 3


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (width500, ["--steps", "120", "--width", "12", "--rate", "0.01"]),
        (condensation, ["--steps", "50", "--width", "12"]),
    ],
)
def test_an_interrupted_run_ends_as_one_that_was_not(
    recipe: Any, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = recipe.__name__.rpartition(".")[2]
    whole, cut = (["--quick", *options, "--out", str(tmp_path / part)] for part in ("whole", "cut"))
    recipe.main(whole)
    save = common.save_state

    def interrupted(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(cut)
    assert not (tmp_path / "cut" / f"{name}.json").exists()
    recipe.main(cut)
    tables = [json.loads((tmp_path / part / f"{name}.json").read_text()) for part in ("whole", "cut")]
    key = "curve" if recipe is width500 else "runs"
    assert len(tables[0][key]) >= 2
    assert tables[0][key] == tables[1][key]
    assert (tmp_path / "cut" / f"{name}.png").stat().st_size > 5000
    assert not list((tmp_path / "cut").glob("*.state"))
