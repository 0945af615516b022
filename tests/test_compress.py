"""`compress`: small networks of every kind to a budget, the budgets, the calibration data, and how it refuses."""

import copy
import functools
import importlib
import json
import math

import families
import numpy as np
import planted
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ep_prune as ep
from ep_prune.cost import cost
from ep_prune.demo_model import digits_data, load_digits_net
from ep_prune.latency import latency_of

QUIET = {"progress": False}


def set_clock(monkeypatch, measured):
    monkeypatch.setattr(importlib.import_module("ep_prune.compress"), "latency_of", measured)


@pytest.fixture(autouse=True)
def one_thread_and_a_still_clock(monkeypatch):
    """Latency is what a test says it is: measuring takes most of the time of a small network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    set_clock(monkeypatch, lambda *_, **__: 1.0)
    yield
    torch.set_num_threads(threads)


# ---- networks ------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """Two branches and what they were made of, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.c, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(24, 4)

    def forward(self, x):
        y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.head(torch.cat([y, F.relu(self.c(y))], 1).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.blocks = nn.Sequential(
            families.Residual(12, 16, 12, 1, nn.ReLU), families.Residual(12, 16, 16, 2, nn.ReLU)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.down, self.inner = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 16, 2, stride=2)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2, bias=bias), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.down(x))
        return self.out(torch.cat([y, F.relu(self.up(F.relu(self.inner(y))))], 1))


class Normed(nn.Module):
    """A block of a transformer without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.up, self.down, self.last = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.down(F.gelu(self.up(self.norm(x)))))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.hidden, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, tokens):
        return self.last(torch.tanh(self.hidden(self.table(tokens).mean(1))))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x, y):
        return {"scores": self.last(F.relu(self.a(x)) * 2 + F.relu(self.b(y))), "size": x.abs().sum(1)}


def mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 20, bias=bias),
        nn.ReLU(),
        nn.Linear(20, 20, bias=bias),
        nn.Tanh(),
        nn.Linear(20, 4, bias=bias),
    )


def convolutions(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=bias), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, bias=bias), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3, bias=bias),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(24, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 12, 5, padding=2), nn.GELU(), nn.Conv1d(12, 12, 3, dilation=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, stride=2), nn.BatchNorm3d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 36, 20), nn.ReLU(), nn.Linear(20, 3),
    )  # fmt: skip


NETS = {
    "residual": (Residual, (3, 8, 8)),
    "joined": (Joined, (3, 8, 8)),
    "depthwise": (depthwise, (3, 8, 8)),
    "grouped": (grouped, (3, 8, 8)),
    "unet": (UNet, (2, 8, 8)),
    "unet without bias": (lambda: UNet(False), (2, 8, 8)),
    "mlp": (mlp, (6,)),
    "mlp without bias": (lambda: mlp(False), (6,)),
    "convolutions without bias": (lambda: convolutions(False), (3, 8, 8)),
    "conv1d": (conv1d, (3, 16)),
    "conv3d": (conv3d, (1, 6, 6, 6)),
    "layer norm": (Normed, (6,)),
    "flattened": (flattened, (1, 6, 6)),
}


def made(name: str) -> nn.Module:
    """One of `NETS`, always the same, in eval mode, with batch norms that have seen something."""
    return filled(NETS[name][0])


def filled(build) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change(wide: nn.Module, narrow: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return planted.relative(wide(x), narrow(x))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        x.dtype == second[k].dtype and torch.equal(x, second[k]) for k, x in first.items()
    )


X = noise(200, 6, seed=1)
"""Calibration for `mlp`, whose example is its beginning."""


def compress_mlp(calibration=None, **options):
    return ep.compress(made("mlp"), X[:2], [X] if calibration is None else calibration, **options, **QUIET)


@functools.cache
def half() -> ep.Compressed:
    """What most tests compare with."""
    return compress_mlp(keep_macs=0.5)


def test_the_report_has_the_divergence_from_wide_to_narrowest_and_what_was_measured():
    report = half().report
    macs, expected = ([getattr(point, name) for point in report.path] for name in ("macs", "divergence"))
    assert macs[0] == report.reduced.macs and expected[0] == pytest.approx(0, abs=1e-6)
    assert macs == sorted(macs, reverse=True) and expected == sorted(expected)
    assert macs[-1] < report.after.macs  # the budget is not the end
    (trial,) = report.trials
    assert (trial.macs, trial.parameters) == (report.after.macs, report.after.parameters)
    assert trial.divergence == report.divergence


# ---- every kind of network -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_half_of_the_multiplications_and_everything_else_as_it_was(name, tmp_path):
    model, shape = made(name), NETS[name][1]
    batches = [noise(30, *shape, seed=seed) for seed in range(5)]  # 150 samples: no multiple of a chunk
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    result = ep.compress(model, batches[0][:2], batches, keep_macs=0.5, **QUIET)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

    x = noise(7, *shape, seed=99)
    wide, narrow = (cost(m, x) for m in (model, result.model))
    assert 0.3 * wide.macs < narrow.macs <= 0.5 * wide.macs
    assert narrow.parameters < wide.parameters
    assert (result.report.after.macs, result.report.after.parameters) == (narrow.macs, narrow.parameters)
    assert type(result.model) is type(model) and not result.model.training
    assert result.report.grade == "fitted" and not result.report.untouched and not result.report.collapsed
    assert change(model, result.model, x) < 0.5
    assert any(w.after < w.before for w in result.report.widths)

    assert same_weights(result.plan.apply(made(name)), result.model)
    ep.save(result, tmp_path / "narrow.safetensors")
    assert same_weights(ep.load(lambda: made(name), tmp_path / "narrow.safetensors"), result.model)
    assert same_weights(ep.Plan.load(tmp_path / "narrow.safetensors").apply(made(name)), result.model)
    told = json.loads(json.dumps(result.report.to_dict()))
    assert told["after"]["macs"] == narrow.macs and told["grade"] == "fitted"
    assert f"MACs        {wide.macs:,} -> {narrow.macs:,}" in str(result.report)


@pytest.mark.parametrize("seed", range(7))
def test_random_networks_of_all_families_lose_a_channel_or_more(seed):
    """Float64, widths of 2 to 5: hardly anything to spare, and what is left must still be the fitted function."""
    model, x, _ = families.network(seed + 14)
    draw = torch.Generator().manual_seed(seed)
    batch = torch.randn(96, *x.shape[1:], generator=draw, dtype=x.dtype)
    result = ep.compress(model, x, [batch], keep_macs=0.8, **QUIET)
    assert result.report.after.macs <= 0.8 * result.report.before.macs
    assert all(p.dtype == torch.float64 for p in result.model.parameters())
    found = planted.relative(model(batch), result.model(batch))
    assert math.isfinite(found) and found < 2


@pytest.mark.parametrize(("name", "dtype"), [("mlp", torch.float16), ("depthwise", torch.bfloat16)])
def test_half_precision_stays_half_precision(name, dtype):
    model, shape = made(name).to(dtype), NETS[name][1]
    result = ep.compress(model, noise(2, *shape).to(dtype), [noise(100, *shape, seed=1)], keep_macs=0.5, **QUIET)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    x = noise(8, *shape, seed=2)
    assert result.model(x.to(dtype)).dtype == dtype
    assert change(model.float(), result.model.float(), x) < 0.2


def test_the_modes_of_the_model_are_those_of_the_result_and_frozen_weights_stay_frozen():
    model = made("residual").train()
    model.blocks[0].eval()
    model.stem.requires_grad_(False)
    result = ep.compress(model, noise(2, 3, 8, 8), [noise(64, 3, 8, 8, seed=1)], keep_macs=0.6, **QUIET)
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in result.model.named_modules()} == modes
    assert modes[""] and not modes["blocks.0"]
    trained = {name: p.requires_grad for name, p in result.model.named_parameters()}
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not trained["stem.0.weight"] and trained["head.weight"]


def test_the_same_seed_gives_the_same_model():
    assert same_weights(compress_mlp(keep_macs=0.5).model, half().model)


def test_tokens_are_calibrated_on():
    tokens = torch.randint(0, 20, (100, 7), generator=torch.Generator().manual_seed(0))
    model = filled(Words)
    result = ep.compress(model, tokens[:2], [tokens], keep_params=0.5, **QUIET)
    assert result.report.after.parameters <= 0.5 * result.report.before.parameters
    assert result.model.table.embedding_dim < 16
    assert change(model, result.model, tokens) < 0.5


@functools.cache
def two_told_apart() -> ep.Compressed:
    x, y = noise(100, 5), 3 * noise(100, 5, seed=1) + 1
    return ep.compress(filled(Two), (x[:2], y[:2]), [(x, y)], keep_macs=0.5, **QUIET)


@pytest.mark.parametrize("form", ["keywords", "swapped", "labelled", "labelled keywords"])
def test_two_inputs_are_told_apart_by_place_or_name(form):
    x, y = noise(100, 5), 3 * noise(100, 5, seed=1) + 1
    labels = torch.arange(100)
    example, batch = {
        "keywords": ({"x": x[:2], "y": y[:2]}, {"x": x, "y": y}),
        "swapped": ({"x": x[:2], "y": y[:2]}, {"y": y, "x": x, "label": labels}),
        "labelled": ((x[:2], y[:2]), [(x, y), labels]),
        "labelled keywords": ({"x": x[:2], "y": y[:2]}, ({"y": y, "x": x}, labels)),
    }[form]
    result = ep.compress(filled(Two), example, [batch], keep_macs=0.5, **QUIET)
    assert same_weights(result.model, two_told_apart().model)
    assert result.report.after.macs <= 0.5 * result.report.before.macs


def test_a_plan_of_fitted_weights_is_for_its_own_weights_alone():
    result = half()
    assert result.plan.fitted and not result.reduced.plan.fitted
    other = spoilt(made("mlp"), 0.1)
    for recheck in (None, X[:2]):
        with pytest.raises(ep.PlanError, match="fitted for others than these"):
            result.plan.apply(other, recheck=recheck)
    with pytest.raises(ep.InputError, match="only what reduce found can be undone"):
        ep.embed(result.model, X[:2], plan=result.plan)


# ---- redundancy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["splitting", "compatible"])
def test_what_embed_made_wide_comes_back_for_free(kind):
    narrow = planted.randomize_(made("residual"), 1)
    x = noise(4, 3, 8, 8).double()
    wide = ep.embed(narrow, x, kind=kind, seed=0)
    budget = cost(narrow, x).macs
    assert cost(wide, x).macs > 1.3 * budget
    result = ep.compress(wide, x, [noise(80, 3, 8, 8, seed=1).double()], keep_macs=budget, **QUIET)
    assert result.report.after.macs <= budget
    assert change(wide, result.model, noise(20, 3, 8, 8, seed=2).double()) < 1e-9


def spoilt(model: nn.Module, size: float) -> nn.Module:
    """All weights moved a little, each by its own share of the tensor's deviation."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += size * p.std().nan_to_num(1.0) * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return model


def dropped(wide: nn.Module, widths: list[int]) -> nn.Module:
    """A chain whose convolutions lose their filters of least norm, down to `widths`; nothing refitted."""
    narrow = copy.deepcopy(wide)
    layers = [m for m in narrow if isinstance(m, nn.Conv2d)]
    for layer, width in zip(layers, widths, strict=True):
        gone = layer.weight.flatten(1).norm(dim=1).argsort()[: layer.out_channels - width]
        with torch.no_grad():
            layer.weight[gone] = 0.0
            layer.bias[gone] = 0.0
    return narrow


def test_near_copies_are_merged_where_dropping_channels_breaks_the_network():
    narrow = planted.randomize_(filled(convolutions), 2)
    x = noise(300, 3, 8, 8, seed=1).double()
    wide = spoilt(ep.embed(narrow, x[:2], kind="splitting", factor=2.0, seed=0), 1e-3)
    assert ep.reduce(wide, x[:2], progress=False).report.after.macs == cost(wide, x[:2]).macs  # nothing exact
    result = ep.compress(wide, x[:2], [x[:250]], keep_macs=cost(narrow, x[:2]).macs, **QUIET)
    found = change(wide, result.model, x[250:])
    widths = [m.out_channels for m in result.model if isinstance(m, nn.Conv2d)]
    assert all(width < 24 for width in widths)
    plain = change(wide, dropped(wide, widths), x[250:])
    assert found < 0.02 and found < plain / 20


def test_channels_that_depend_on_one_another_on_the_data_alone_go_nearly_for_free():
    """Inputs on a plane of 3 dimensions through a linear layer without activation: 3 channels tell everything."""
    draw = noise(3, 8, seed=5)
    x = noise(400, 3, seed=6) @ draw
    model = filled(lambda: nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 4)))
    result = ep.compress(model, x[:2], [x[:300]], keep_macs=0.35, **QUIET)
    assert result.model[0].out_features <= 6
    assert change(model, result.model, x[300:]) < 0.03


def test_a_trained_network_keeps_its_answers_at_a_twentieth_of_its_multiplications():
    net, (train, _), (images, classes) = load_digits_net(), digits_data("train"), digits_data("test")
    result = ep.compress(net, images[:2], train[:384].split(64), keep_macs=0.05, **QUIET)
    assert result.report.after.macs <= 0.05 * result.report.before.macs
    assert result.report.reduced.macs > 0.08 * result.report.before.macs  # more than what is exact
    with torch.no_grad():
        wide, narrow = (float((m(images).argmax(1) == classes).float().mean()) for m in (net, result.model))
    assert wide > 0.99 and narrow > 0.93
    assert result.report.agreement > 0.9 and not result.report.collapsed and not result.report.notes


# ---- budgets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "share"),
    [("mlp without bias", 0.3), ("mlp without bias", 0.7), ("convolutions without bias", 0.4), ("residual", 0.5)],
)
def test_parameters_stay_within_their_budget_new_biases_and_all(name, share):
    model, shape = made(name), NETS[name][1]
    batches = [noise(80, *shape, seed=1)]
    result = ep.compress(model, noise(2, *shape), batches, keep_params=share, **QUIET)
    count = sum(p.numel() for p in result.model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert 0.75 * share * whole < count <= share * whole


def test_two_counted_budgets_are_both_met():
    for macs, size in ((0.3, 0.6), (0.6, 0.3)):
        report = compress_mlp(keep_macs=macs, keep_params=size).report
        assert report.after.macs <= macs * report.before.macs
        assert report.after.parameters <= size * report.before.parameters
        assert report.budget == f"keep_macs={macs}, keep_params={size}"


def test_a_budget_is_a_share_or_a_number():
    whole = cost(made("mlp"), X).macs
    for half in (whole // 2, float(whole // 2), np.float32(0.5)):
        assert 0.4 * whole < compress_mlp(keep_macs=half).report.after.macs <= 0.5 * whole
    for all_of_it in (1, 2 * whole):
        result = compress_mlp(keep_macs=all_of_it)
        assert same_weights(result.model, made("mlp")) and result.report.change == 0.0


def test_a_tiny_tolerance_gives_what_reduce_gives():
    narrow = planted.randomize_(mlp(), 3)
    x = noise(100, 6, seed=1).double()
    wide = ep.embed(narrow, x[:2], kind="splitting", seed=0)
    result = ep.compress(wide, x[:2], [x], tol=1e-9, **QUIET)
    reduced = ep.reduce(wide, x[:2], progress=False)
    assert same_weights(result.model, reduced.model)
    assert result.report.after == result.report.reduced and result.report.after.macs < result.report.before.macs


def test_a_larger_tolerance_gives_narrower_networks_that_keep_it():
    sizes = []
    for tol in (0.02, 0.1, 0.5):
        report = compress_mlp(tol=tol).report
        assert report.change <= tol and report.grade == "fitted" and report.evaluations == 0
        sizes.append(report.after.macs)
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[0] < cost(made("mlp"), X).macs


def test_the_change_is_relative_to_each_output_of_its_own():
    """The second output is ten thousand times as large, and hardly changes: it must not hide the first."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.rest = filled(mlp), nn.Linear(6, 2)

        def forward(self, x):
            return self.body(x), 1e4 * self.rest(x)

    model = filled(Scales)
    result = ep.compress(model, X[:2], [X], keep_macs=0.4, **QUIET)
    held = X[-(200 // 8) :]
    found = change(lambda x: model(x)[0], lambda x: result.model(x)[0], held)
    assert found > 0.02 and result.report.change == pytest.approx(found, rel=1e-3)


def squared_error(model: nn.Module) -> float:
    with torch.no_grad():
        return -float((model(X) - made("mlp")(X)).square().mean())


def test_a_drop_is_kept_in_at_most_twelve_evaluations():
    for most in (1e-5, 1e-3, 1e9):
        seen: list[nn.Module] = []

        def evaluate(model: nn.Module, seen: list[nn.Module] = seen) -> float:
            assert not model.training
            seen.append(model)
            return squared_error(model)

        result = compress_mlp(max_drop=most, evaluate=evaluate)
        assert result.report.evaluations == len(seen) <= 12
        assert -squared_error(result.model) <= most
        assert same_weights(seen[0], made("mlp"))
        if most == 1e9:
            assert [m.out_features for m in result.model if isinstance(m, nn.Linear)] == [1, 1, 4]
        else:
            assert result.report.after.macs < result.report.before.macs


def test_no_allowed_drop_leaves_what_is_exact():
    result = compress_mlp(max_drop=0.0, evaluate=squared_error)
    assert same_weights(result.model, made("mlp"))


def test_a_figure_that_falls_with_every_look_cannot_be_kept():
    looks = []

    def evaluate(model: nn.Module) -> float:
        looks.append(model)
        return -float(len(looks))

    with pytest.raises(ep.InputError, match=r"max_drop=0\.1 cannot be met"):
        compress_mlp(max_drop=0.1, evaluate=evaluate)
    assert len(looks) <= 12


@pytest.mark.parametrize("value", [None, math.nan, "good"])
def test_what_evaluate_returns_must_be_a_number(value):
    with pytest.raises(ep.InputError, match="let it return a number"):
        compress_mlp(max_drop=0.1, evaluate=lambda _: value)


def test_an_error_in_evaluate_is_the_users_own():
    with pytest.raises(ZeroDivisionError):
        compress_mlp(max_drop=0.1, evaluate=lambda _: 1 / 0)


@pytest.fixture
def clock(monkeypatch):
    """A call takes a millisecond for every 100 parameters."""

    def measured(model: nn.Module, *_: object, **__: object) -> float:
        return sum(p.numel() for p in model.parameters()) / 100

    set_clock(monkeypatch, measured)


@pytest.mark.usefixtures("clock")
def test_a_latency_is_met_by_the_widest_network_that_meets_it():
    result = compress_mlp(latency=4)
    assert 3 < result.report.latency_after <= 4 < result.report.latency_before == 6.44
    assert same_weights(compress_mlp(latency=10).model, made("mlp"))


@pytest.mark.usefixtures("clock")
def test_a_latency_beside_other_budgets():
    report = compress_mlp(latency=100, keep_macs=0.5).report
    assert report.after.macs <= 0.5 * report.before.macs
    report = compress_mlp(latency=2, keep_macs=0.5).report
    assert report.latency_after <= 2 and report.after.macs <= 0.5 * report.before.macs
    assert compress_mlp(latency=4, tol=1.0).report.latency_after <= 4
    with pytest.raises(ep.InputError, match="cannot be met together"):
        compress_mlp(latency=2, tol=1e-4)


@pytest.mark.usefixtures("clock")
def test_a_latency_that_cannot_be_met_is_answered_with_the_least():
    with pytest.raises(ep.InputError, match=r"latency=0\.1 ms cannot be met: the narrowest model takes 0\.17 ms"):
        compress_mlp(latency=0.1)


def test_latency_is_the_median_of_calls():
    assert 1e-3 < latency_of(made("mlp"), X[:2], least=3, seconds=0.0) < 1e3


class Halves(nn.Module):
    """A convolution whose outputs are two halves of one width, which are added up by weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.a, self.b = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        left, right = self.both(x).chunk(2, 1)
        return (self.a(F.relu(left)) + self.b(F.relu(right))).mean((2, 3))


def doubling() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, groups=12),
        nn.ReLU(),
        nn.Conv2d(24, 4, 1),
        nn.Flatten(),
    )


ROUNDED = {
    "residual": (made, 8), "depthwise": (made, 8), "grouped": (made, 8), "mlp": (made, 8), "layer norm": (made, 8),
    "joined": (made, 4), "flattened": (made, 4), "unet": (made, 2),
    "halves": (lambda _: filled(Halves), 8), "doubling": (lambda _: filled(doubling), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_widths_are_rounded(name):
    make, round_to = ROUNDED[name]
    model, shape = make(name), NETS[name][1] if name in NETS else (3, 3, 3)
    result = ep.compress(
        model, noise(2, *shape), [noise(60, *shape, seed=1)], keep_macs=0.75, round_to=round_to, **QUIET
    )
    narrowed = [w for w in result.report.widths if w.after < w.before]
    assert narrowed and all(w.after % round_to == 0 for w in narrowed), narrowed
    assert result.report.after.macs <= 0.75 * result.report.before.macs


def test_what_is_protected_keeps_its_width():
    result = compress_mlp(keep_macs=0.5, protect=["0"])
    assert result.model[0].out_features == 20 and result.model[2].out_features < 20
    with pytest.raises(ep.InputError, match="protect names 'nothing'"):
        compress_mlp(keep_macs=0.5, protect=["nothing"])
    with pytest.raises(ep.InputError, match=r"keeps 600 MACs \(100\.0 %"):
        compress_mlp(keep_macs=0.5, protect=["0", "2"])


def test_a_least_width_is_kept_everywhere_or_by_name():
    for least in (5, {"0": 15, "2": 3}):
        result = compress_mlp(tol=1e9, min_width=least)
        widths = [result.model[k].out_features for k in (0, 2)]
        assert widths == ([5, 5] if least == 5 else [15, 3])
    with pytest.raises(ep.InputError, match="min_width names 'first'"):
        compress_mlp(keep_macs=0.5, min_width={"first": 3})


def test_the_least_that_is_named_can_be_had_and_less_cannot():
    for option, unit in (("keep_macs", "MACs"), ("keep_params", "parameters")):
        with pytest.raises(ep.InputError) as caught:
            compress_mlp(**{option: 0.001})
        text = str(caught.value)
        assert f" {unit} (" in text and "of the given model's" in text and "\n" not in text
        least = int(text.split("keeps ")[1].split(" ")[0].replace(",", ""))
        report = compress_mlp(**{option: least}).report
        assert (report.after.macs if unit == "MACs" else report.after.parameters) == least
        with pytest.raises(ep.InputError, match="cannot be met"):
            compress_mlp(**{option: least - 1})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no budget: pass keep_macs="),
        ({"keep_macs": 0}, "keep_macs=0 is no budget"),
        ({"keep_macs": -1}, "keep_macs=-1 is no budget"),
        ({"keep_macs": math.nan}, "keep_macs=nan is no budget"),
        ({"keep_params": math.inf}, "keep_params=inf is no budget"),
        ({"keep_macs": True}, "keep_macs=True is no budget"),
        ({"keep_macs": "half"}, "keep_macs='half' is no budget"),
        ({"keep_macs": 1.5}, "neither a share up to 1 nor a whole number"),
        ({"tol": -0.1}, "tol=-0.1 is no budget"),
        ({"latency": math.nan}, "latency=nan is no budget"),
        ({"max_drop": 0.1}, "max_drop= and evaluate= go together"),
        ({"keep_macs": 0.5, "evaluate": squared_error}, "max_drop= and evaluate= go together"),
        ({"keep_macs": 0.5, "round_to": 0}, "round_to=0 is not at least 1"),
        ({"keep_macs": 0.5, "samples": 3}, "samples=3 is too few"),
        ({"keep_macs": 0.5, "tol": 1e-4}, "the budgets cannot be met together"),
    ],
)
def test_wrong_budgets_are_refused_in_one_sentence(options, said):
    with pytest.raises(ep.InputError) as caught:
        compress_mlp(**options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- calibration ---------------------------------------------------------------------------------------


def with_a(value: float) -> torch.Tensor:
    bad = X[:10].clone()
    bad[3, 2] = value
    return bad


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([X[:50], with_a(math.nan)], "batch 1 of the calibration data holds NaN or infinite values"),
        ([with_a(-math.inf)], "batch 0 of the calibration data holds NaN or infinite values"),
        ([X, noise(8, 7)], "batch 1 of the calibration data has shapes [(8, 7)]"),
        ([noise(8, 6, 6)], "has shapes [(8, 6, 6)]"),
        ([torch.tensor(1.0)], "has shapes [()]"),
        (["images"], "has shapes []"),
        ([X.int()], "batch 0 of the calibration data has type torch.int32, the example torch.float32"),
        ([], "calibration holds 0 samples: pass at least 4"),
        ([X[:0]], "calibration holds 0 samples: pass at least 4"),
        ([X[:1]], "calibration holds 1 samples: pass at least 4"),
        ([X[:2], X[2:3]], "calibration holds 3 samples: pass at least 4"),
        ([X[:1].expand(50, 6)], "all 50 samples of the calibration data are the same"),
        ([torch.zeros(9, 6), torch.zeros(9, 6)], "all 18 samples of the calibration data are the same"),
        ({"x": X}, "calibration is of type dict"),
        (5, "calibration is of type int"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused_in_one_sentence(batches, said):
    with pytest.raises(ep.InputError) as caught:
        compress_mlp(batches, keep_macs=0.5, samples=250)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_without_an_input_is_named():
    x = noise(50, 5)
    with pytest.raises(ep.InputError, match="batch 0 of the calibration data has no 'y'"):
        ep.compress(filled(Two), {"x": x[:2], "y": x[:2]}, [{"x": x}], keep_macs=0.5, **QUIET)
    with pytest.raises(ep.InputError, match="tensors of different lengths"):
        ep.compress(filled(Two), (x[:2], x[:2]), [(x, x[:9])], keep_macs=0.5, **QUIET)


def test_labels_are_not_read_and_any_loader_will_do():
    labels = torch.arange(200)
    expected = half()
    dataset = torch.utils.data.TensorDataset(X, labels)
    for calibration in (
        X,
        [[part, labels[:33]] for part in X.split(33)],
        (part for part in X.split(7)),
        torch.utils.data.DataLoader(dataset, batch_size=33),
    ):
        assert same_weights(compress_mlp(calibration, keep_macs=0.5).model, expected.model)


def test_no_more_samples_are_used_than_asked_for_and_the_report_counts_them():
    taken = []

    def batches():
        for part in X.split(10):
            taken.append(len(part))
            yield part

    report = compress_mlp(batches(), keep_macs=0.5, samples=32).report
    assert report.samples_used == 32 and sum(taken) == report.samples_given == 40
    assert "on 32 of 40 samples" in str(report)


@pytest.mark.parametrize("count", [4, 5, 8, 17, 65])
def test_few_samples_make_a_model_that_runs_and_a_report_that_is_honest(count):
    result = compress_mlp([X[:count]], keep_macs=0.5)
    assert 4 <= result.report.samples_used <= count
    assert change(made("mlp"), result.model, X) < 3 or result.report.collapsed
    assert math.isfinite(result.report.divergence)


def test_eight_images_at_a_small_budget_collapse_a_trained_network_and_the_report_says_so():
    net, (train, _), (images, classes) = load_digits_net(), digits_data("train"), digits_data("test")
    result = ep.compress(net, images[:2], [train[:8]], keep_macs=0.02, **QUIET)
    with torch.no_grad():
        narrow = float((result.model(images).argmax(1) == classes).float().mean())
    assert narrow < 0.6
    assert result.report.collapsed and "COLLAPSED" in str(result.report)


def test_images_of_one_class_are_not_enough_and_the_report_says_so():
    net, (train, labels), (images, _) = load_digits_net(), digits_data("train"), digits_data("test")
    result = ep.compress(net, images[:2], [train[labels == 3]], keep_macs=0.3, **QUIET)
    assert any("calibration covers 1 of 10 classes" in note for note in result.report.notes)
    assert "calibration covers 1 of 10 classes" in str(result.report)


def test_without_calibration_synthetic_inputs_stand_in_and_the_report_says_so():
    model = made("residual")
    result = ep.compress(model, noise(2, 3, 8, 8), keep_macs=0.5, **QUIET)
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    assert any("synthetic inputs stood in" in note for note in result.report.notes)
    assert change(model, result.model, noise(50, 3, 8, 8, seed=3)) < 0.5


class Wrapped(nn.Module):
    """`mlp`, and something done to what goes in or comes out."""

    def __init__(self, before=lambda x: x, after=lambda x: x) -> None:
        super().__init__()
        self.body, self.before, self.after = made("mlp"), before, after

    def forward(self, x):
        return self.after(self.body(self.before(x)))


def test_a_model_that_gives_nan_or_is_random_is_refused():
    for wrong, said in (
        (Wrapped(after=torch.log), "the model gives NaN on the calibration data"),
        (Wrapped(before=lambda x: x + torch.randn_like(x)), "turn off what is random"),
    ):
        with pytest.raises(ep.InputError, match=said):
            ep.compress(wrong.eval(), X[:2], [X], keep_macs=0.5, **QUIET)


OUTPUTS = {
    "masked scores": lambda y: y.masked_fill(torch.tensor([False, False, True, False]), -math.inf),
    "one number": lambda y: y.square().mean(),
    "one a sample": lambda y: y.sum(1),
    "many": lambda y: (y, y, {"top": y.argmax(1), "none": None}, 3),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_form_can_be_fitted(name):
    model = Wrapped(after=OUTPUTS[name]).eval()
    report = ep.compress(model, X[:2], [X], keep_macs=0.5, **QUIET).report
    assert report.after.macs <= 0.5 * report.before.macs
    assert 0 < report.change < 1 and 0 < report.divergence < 0.1 and not report.collapsed
    assert (report.agreement is None) == (name in ("one number", "one a sample"))


def test_the_callers_modes_of_torch_make_no_difference():
    expected = half()
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            result = compress_mlp(keep_macs=0.5)
        assert same_weights(result.model, expected.model)
    assert all(not p.is_inference() for p in result.model.parameters())


class Numbered(nn.Module):
    """The number of a grouped convolution's channels stands in the code, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.last = (
            nn.Conv2d(3, 16, 1),
            nn.Conv2d(16, 16, 1, groups=4),
            nn.Conv2d(16, 4, 1),
        )
        self.free = nn.Conv2d(4, 16, 1)
        self.end = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y = F.relu(self.grouped(F.relu(self.first(x)).view(-1, 16, 9).view(-1, 16, 3, 3)))
        return self.end(F.relu(self.free(self.last(y)))).mean((2, 3))


def test_equal_groups_are_rehearsed_as_groups():
    result = ep.compress(filled(Numbered), noise(2, 3, 3, 3), [noise(60, 3, 3, 3, seed=1)], keep_macs=0.8, **QUIET)
    assert result.model.first.out_channels == 16
    assert result.report.untouched["first"] == "a size written in the code does not follow"


def test_values_that_overflow_make_a_collapsed_model_and_no_crash():
    report = compress_mlp([1e20 * X], keep_macs=0.5).report
    assert report.collapsed and not report.divergence < 1


# ---- what cannot be narrowed ---------------------------------------------------------------------------


class Decided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x).argmax(1)


class Fixed(nn.Module):
    """A size written in the code that does not follow the width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1)
        self.free, self.last = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        y = F.relu(self.conv(x)).view(-1, 2, 4, 16).sum(1).view(-1, 4, 4, 4)
        y = F.relu(self.after(y)).mean((2, 3))
        return self.last(F.relu(self.free(torch.cat([y, y], 1))))


class Twice(nn.Module):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.shared(torch.tanh(self.shared(torch.relu(self.first(x)))))))


def test_decisions_alone_are_no_output_to_fit():
    with pytest.raises(ep.InputError, match="let the model return its scores"):
        ep.compress(filled(Decided), X[:2], [X], keep_macs=0.5, **QUIET)


@pytest.mark.parametrize("model", [nn.Linear(6, 3), nn.ReLU(), nn.BatchNorm1d(6), nn.LayerNorm(6)])
def test_a_model_without_inner_channels_is_as_narrow_as_it_gets(model):
    result = ep.compress(model.eval(), X[:2], [X], tol=0.5, **QUIET)
    assert same_weights(result.model, model) and result.report.change == 0.0
    if any(True for _ in model.parameters()):
        with pytest.raises(ep.InputError, match=r"100\.0 % of the given model's"):
            ep.compress(model, X[:2], [X], keep_params=0.5, **QUIET)


def test_sizes_in_the_code_and_shared_weights_are_left_alone_and_named():
    result = ep.compress(filled(Fixed), noise(2, 3, 4, 4), [noise(60, 3, 4, 4, seed=1)], tol=0.5, **QUIET)
    assert result.model.conv.out_channels == 8
    assert result.model.free.out_features < 16
    result = ep.compress(filled(Twice), X[:2], [X], tol=1e9, **QUIET)
    assert result.model.shared.weight.shape == (12, 12)
    assert result.report.untouched == {"shared": "its weight is used in several places"}
    with pytest.raises(ep.InputError, match=r"left alone is shared \(its weight is used in several places\)"):
        ep.compress(filled(Twice), X[:2], [X], keep_macs=0.1, **QUIET)
