"""The monitor: what it records is true, it keeps to its share of the time, and training does not notice it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ep_prune.monitor
from ep_prune.effective_width import effective_width
from ep_prune.errors import InputError
from ep_prune.monitor import MEASURED, EffectiveWidthMonitor
from tests.planted import inputs, plant_layer_, randomize_


def mlp(roles: str = "a b a 2a c") -> Any:
    model = randomize_(
        nn.Sequential(nn.Linear(4, len(roles.split())), nn.ReLU(), nn.Linear(len(roles.split()), 3))
    )
    plant_layer_(model[0], roles)
    return model


PROBES = [inputs((4,), 48)]


class Clock:
    """Time that passes only when told to, and `COST` seconds for a measurement."""

    COST = 0.5

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        real = ep_prune.monitor.measure

        def slow(*args: Any) -> Any:
            self.now += self.COST
            return real(*args)

        monkeypatch.setattr(ep_prune.monitor, "measure", slow)

    def __call__(self) -> float:
        return self.now


def test_it_records_the_widths_of_the_weights_as_they_are_at_each_step() -> None:
    model = mlp()
    monitor = EffectiveWidthMonitor(model, PROBES[0][:2], (1e-1, 1e-6), every=2, probes=PROBES)
    assert monitor.records == []
    for step, roles in enumerate(["a b a 2a c", "a b c d e", "a a a a a", "a b c d e", "a b a b a"]):
        with torch.no_grad():  # in place, as optimizers do it
            plant_layer_(model[0], roles)
        measured = monitor.step(step, loss=torch.tensor(float(step)))
        assert (measured is None) == (step % 2 == 1)
        if measured is not None:
            expected = effective_width(model, PROBES[0][:2], (1e-1, 1e-6), probes=PROBES)
            assert measured.to_dict() == expected.to_dict()
    assert [r["step"] for r in monitor.records] == [0, 2, 4]
    assert [r["loss"] for r in monitor.records] == [0.0, 2.0, 4.0]
    assert [r["widths"]["0"][1e-6] for r in monitor.records] == [3, 1, 2]


def test_other_weights_loaded_into_the_model_are_followed_too() -> None:
    model = mlp("a b c d e")
    monitor = EffectiveWidthMonitor(model, PROBES[0][:2], 1e-6, every=1, probes=PROBES)
    model.load_state_dict(mlp("a b a b a").state_dict())
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    measured = monitor.step(0)
    assert measured is not None and measured.at(1e-6)["0"] == 2
    model[0] = nn.Linear(4, 4).double()
    model[2] = nn.Linear(4, 3).double()
    assert monitor.step(1) is None
    assert "another shape" in monitor.records[-1]["note"]


@pytest.mark.parametrize("share", [0.0625, 0.25])
def test_the_interval_adapts_to_the_share(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    clock = Clock(monkeypatch)
    monitor = EffectiveWidthMonitor(mlp(), PROBES[0][:2], 1e-3, probes=PROBES, share=share, clock=clock)
    assert [r["step"] for r in monitor.records] == [0] and monitor.spent == 0.0
    training = 0.0
    for step in range(1001):  # fractions of two: no rounding
        monitor.step(step)
        assert monitor.spent <= share * training
        clock.now += 0.125
        training += 0.125
    interval = Clock.COST / (MEASURED * share) / 0.125
    due = [math.ceil(n * interval) for n in range(1001)]
    assert [r["step"] for r in monitor.records] == [step for step in due if step <= 1000]


def test_a_slower_measurement_makes_the_interval_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monitor = EffectiveWidthMonitor(mlp(), PROBES[0][:2], 1e-3, probes=PROBES, share=0.1, clock=clock)
    for step in range(1, 401):
        clock.now += 0.25
        if step == 200:
            clock.COST = 5.0
        monitor.step(step)
    early = sum(1 for r in monitor.records if 0 < r["step"] <= 200)
    late = sum(1 for r in monitor.records if r["step"] > 200)
    assert early == 6 and late == 1


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.drop(self.norm(self.conv(x)).relu()).mean(2))
        return y


def trained(watched: bool) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    torch.manual_seed(3)
    model = Noisy()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    monitor = EffectiveWidthMonitor(model, torch.zeros(2, 2, 8), 0.1, every=1) if watched else None
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 8)).square().sum().backward()
        optimizer.step()
        if monitor is not None:
            assert monitor.step(step) is not None
    assert model.training
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return copy.deepcopy(model.state_dict()), gradients, torch.get_rng_state()


def test_training_is_the_same_to_the_bit_with_and_without_it() -> None:
    (state, gradients, random), (plain_state, plain_gradients, plain_random) = trained(True), trained(False)
    assert all(torch.equal(state[key], plain_state[key]) for key in plain_state)
    assert len(gradients) == 6
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))
    assert torch.equal(random, plain_random)


def test_weights_that_have_diverged_are_noted_and_the_run_goes_on() -> None:
    model = mlp()
    monitor = EffectiveWidthMonitor(model, PROBES[0][:2], 1e-3, every=1, probes=PROBES)
    healthy = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    assert monitor.step(0, loss=float("nan")) is None
    assert monitor.last is None and "NaN" in monitor.records[0]["note"] and monitor.records[0]["widths"] == {}
    model.load_state_dict(healthy)
    measured = monitor.step(1)
    assert measured is monitor.last and measured is not None and measured.at(1e-3)["0"] == 3


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def fresh() -> EffectiveWidthMonitor:
        return EffectiveWidthMonitor(mlp(), PROBES[0][:2], (1e-1, 1e-3), probes=PROBES, clock=clock)

    def run(monitor: EffectiveWidthMonitor, steps: range) -> None:
        for step in steps:
            monitor.step(step, loss=1.0 / (1 + step))
            clock.now += 0.5

    whole, first = fresh(), fresh()
    run(whole, range(200))
    run(first, range(100))
    state = json.loads(json.dumps(first.state_dict()))
    second = fresh()
    second.load_state_dict(state)
    run(second, range(100, 200))
    assert len(whole.records) > 5
    assert second.records == whole.records
    assert second.to_dict() == whole.to_dict()
    with pytest.raises(InputError, match="no state of a monitor"):
        second.load_state_dict({"records": []})
    assert second.records == whole.records


def test_the_records_as_plain_values_and_as_a_picture(tmp_path: Path) -> None:
    monitor = EffectiveWidthMonitor(mlp(), PROBES[0][:2], (1e-3, 1e-1), every=10, probes=PROBES)
    for step in range(21):
        monitor.step(step, loss=1.0 + step)
    values = json.loads(json.dumps(monitor.to_dict()))
    assert values["tols"] == [0.1, 0.001]
    assert [r["step"] for r in values["records"]] == [0, 10, 20]
    assert [1e-3, 3] in dict(values["records"][0]["widths"])["0"]
    monitor.plot(tmp_path / "widths.png")
    assert (tmp_path / "widths.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.0}, "share=1.0"),
        ({"tol": 2.0}, "tol=2.0"),
    ],
)
def test_wrong_use_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EffectiveWidthMonitor(mlp(), PROBES[0][:2], **{"tol": 0.1, **options})
