"""The forward direction: outputs kept, critical points kept where they should be, dimensions, wrong requests.

EP_PRUNE_EMBEDDINGS says on how many random networks (acceptance: 200); 7 consecutive ones cover seven families.
"""

from __future__ import annotations

import os

import pytest
import torch
from critical import Problem
from families import network
from torch import nn

import ep_prune as ep
from ep_prune.errors import InputError
from ep_prune.widen import KINDS, embed, widenable

SEEDS = int(os.environ.get("EP_PRUNE_EMBEDDINGS", "14"))
ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Softplus)


def difference(a: nn.Module, b: nn.Module, inputs: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = b(inputs)
        return float((a(inputs) - wanted).abs().max() / wanted.abs().max())


def two_layers(
    inputs: int = 3, width: int = 4, outputs: int = 2, seed: int = 0
) -> tuple[nn.Sequential, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()
        return model, torch.randn(7, inputs, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_embeddings_keep_the_output_and_with_the_backward_condition_criticality(seed: int) -> None:
    narrow, inputs, description = network(seed)
    problem = Problem(narrow, inputs, seed)
    assert problem.gradient(narrow) < 1e-10, description
    parameters = sum(p.numel() for p in narrow.parameters())
    for kind in KINDS:
        wide, report = embed(narrow, inputs, kind=kind, seed=seed, full_output=True)
        assert difference(wide, narrow, inputs) <= 1e-12, (description, kind)
        if kind == "null":  # sigmoid(0) is not 0: behind zero padding no null is critical
            refused = report.left_alone
            assert all("neither vanishes" in why and "sigmoid" in description for why in refused.values())
        else:
            assert not report.left_alone, (description, kind)
        if len(report.left_alone) < len(widenable(narrow, inputs)):
            assert sum(p.numel() for p in wide.parameters()) > parameters, (description, kind)
        assert problem.gradient(wide) < 1e-9, (description, kind)
    if float(narrow(problem.inputs).detach().std(0).max()) == 0:
        return  # all of it switched off by ReLU: no parameter but the last bias has a gradient, embedded or not
    # So wide, and more than one draw, that it is no accident: a null that ReLU switches off is critical in any
    # case, and a network may end in one channel that ReLU lets through (seed 67), which not every draw copies.
    for draw in range(seed, seed + 4):
        wide = embed(narrow, inputs, kind="compatible", critical=False, factor=3.0, seed=draw)
        assert difference(wide, narrow, inputs) <= 1e-12, description
        if problem.gradient(wide) > 1e-6:
            break
    else:
        pytest.fail(f"no general embedding leaves the critical point: {description}")


@pytest.mark.parametrize("seed", range(50))
def test_the_rank_of_the_critical_manifold_is_the_formula(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs, width, outputs = (int(size) for size in torch.randint(2, 5, (3,)))
        first = nn.Linear(inputs, width, bias=seed % 3 > 0)
        activation = ACTIVATIONS[seed % 7]
        # A null that cannot vanish needs a bias behind it: sigmoid and softplus are not 0 at 0.
        last = nn.Linear(width, outputs, bias=seed % 4 > 0 or activation in (nn.Sigmoid, nn.Softplus))
        model = nn.Sequential(first, activation(), last).double()
        x = torch.randn(8, inputs, dtype=torch.float64)
    kind = KINDS[seed // 7 % len(KINDS)]
    _, report = embed(model, x, kind=kind, factor=2.0, seed=seed, full_output=True)
    (space,) = report.spaces
    found = report.dimension()
    # ReLU and leaky ReLU let any positive scale through; a null's constant is free where a bias can take it.
    scales = space.after - space.nulls if seed % 7 in (2, 4) else 0
    constants = space.nulls if first.bias is not None and last.bias is not None else 0
    assert (found.gained, found.mixed, found.symmetries) == (space.copies + constants, 0, scales)
    assert found.rank == found.formula
    assert found.gap[0] > 1e-3 and found.gap[1] < 1e-7


def test_the_dimension_of_three_layers_counts_products_of_neighbours() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(8, 2, dtype=torch.float64)
    _, report = embed(model, x, widths={"0": 4, "2": 5}, kind="compatible", full_output=True)
    found = report.dimension()
    assert (found.gained, found.mixed) == (2 + 2, 2 * 2)
    assert found.rank == 8


def test_given_coefficients_are_the_split() -> None:
    model, x = two_layers()
    shares = torch.tensor([[1.0, 0, 0, 0], [0, 0.25, 0, 0], [0, 0, 1, 0], [0, 0.75, 0, 0], [0, 0, 0, 1]])
    wide = embed(model, x, kind="splitting", coefficients={"0": shares})
    assert isinstance(wide, nn.Sequential)
    order = [0, 1, 2, 1, 3]
    assert torch.equal(wide[0].weight, model[0].weight[order])
    assert torch.equal(wide[0].bias, model[0].bias[order])
    assert torch.allclose(wide[2].weight, model[2].weight[:, order] * shares.sum(1), rtol=0, atol=1e-15)
    assert torch.equal(wide[2].bias, model[2].bias)


def test_threefold_splitting_sends_w_w_and_minus_w() -> None:
    model, x = two_layers()
    wide, report = embed(model, x, kind="threefold", full_output=True)
    assert isinstance(wide, nn.Sequential)
    assert torch.equal(wide[0].weight, model[0].weight.repeat(3, 1))
    assert torch.equal(wide[2].weight, torch.cat([model[2].weight, model[2].weight, -model[2].weight], 1))
    assert report.spaces[0].shares == (1.0,) * 8 + (-1.0,) * 4


def test_a_null_embedding_reads_nothing_and_is_not_read() -> None:
    model, x = two_layers()
    wide, report = embed(model, x, widths={"0": 6}, kind="null", full_output=True)
    assert isinstance(wide, nn.Sequential)
    null = [j for j, channel in enumerate(report.spaces[0].channel) if channel < 0]
    assert len(null) == 2
    assert bool((wide[0].weight[null] == 0).all()) and bool((wide[2].weight[:, null] == 0).all())
    assert bool((wide[0].bias[null] != 0).all())


def test_the_embedding_of_the_report_is_what_the_activations_show() -> None:
    for seed in (0, 7, 14):  # an MLP with tanh, sigmoid, ReLU
        model, x, _ = network(seed)
        wide, report = embed(model, x, seed=seed, full_output=True)
        assert isinstance(model, nn.Sequential) and isinstance(wide, nn.Sequential)
        assert report.embeddings
        for name, embedding in report.embeddings.items():
            place = int(name.partition(".")[0])
            assert torch.allclose(wide[:place](x), embedding.expand(model[:place](x)), rtol=0, atol=1e-12)


def test_scales_and_flips_are_those_of_the_activation() -> None:
    seen: dict[str, set[float]] = {}
    for name, activation in (("tanh", nn.Tanh), ("relu", nn.ReLU), ("gelu", nn.GELU)):
        model, x = two_layers()
        model[1] = activation()
        _, report = embed(model, x, widths={"0": 24}, full_output=True)
        seen[name] = set(report.embeddings["2.weight"].values.tolist())
    assert seen["tanh"] == {1.0, -1.0} and seen["gelu"] == {1.0}
    assert len(seen["relu"]) > 5 and min(seen["relu"]) > 0


def test_widths_name_the_spaces_to_widen() -> None:
    narrow = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    assert widenable(narrow, inputs) == {"0": 4, "2": 4}
    wide = embed(narrow, inputs, widths={"2": 9})
    assert isinstance(wide, nn.Sequential)
    assert [wide[k].weight.shape for k in (0, 2, 4)] == [(4, 3), (9, 4), (2, 9)]
    assert [wide[2].out_features, wide[4].in_features] == [9, 9]
    assert difference(wide, narrow, inputs) <= 1e-12


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"widths": {"2": 9}}, "no space '2' that can be widened: choose among 0"),
        ({"widths": {"0": 3}}, "the space '0' has 4 channels: pass a width of at least that, not 3"),
        ({"kind": "wider"}, "no embedding of kind 'wider'"),
        ({"factor": 0.5}, "does not widen"),
        ({"kind": "threefold", "widths": {"0": 9}}, "makes 12 channels of the space '0'"),
        (
            {"kind": "splitting", "coefficients": {"0": torch.eye(4)[[0, 1, 2, 3, 3]]}},
            "violate the forward condition",
        ),
        ({"kind": "splitting", "coefficients": {"0": torch.ones(5, 4) / 5}}, "has two entries"),
        ({"kind": "splitting", "coefficients": {"0": torch.eye(3)}}, r"shape \(3, 3\): pass \(width, 4\)"),
        ({"kind": "splitting", "coefficients": {"x": torch.eye(4)}}, "no space 'x'"),
        ({"kind": "compatible", "coefficients": {"0": torch.eye(4)}}, "pass kind='splitting'"),
        ({"kind": "splitting", "coefficients": {"0": torch.eye(4)}, "widths": {"0": 5}}, "for 4 channels, not 5"),
    ],
)
def test_a_wrong_request_is_one_sentence(options: dict, sentence: str) -> None:
    model, x = two_layers()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=sentence):
        embed(model, x, **options)
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_a_null_that_cannot_vanish_behind_zero_padding_is_refused_with_its_reason() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sigmoid(), nn.Conv2d(3, 2, 3, padding=1)).double()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    with pytest.raises(
        InputError, match="'0' cannot be widened so: a constant that neither vanishes nor has a bias"
    ):
        embed(model, x, widths={"0": 5}, kind="null")
    wide, report = embed(model, x, kind="null", full_output=True)
    assert "neither vanishes" in report.left_alone["0"] and not report.spaces
    assert difference(wide, model, x) == 0
    assert difference(embed(model, x, widths={"0": 5}, kind="null", critical=False), model, x) <= 1e-12
    compatible, report = embed(model, x, widths={"0": 9}, full_output=True)  # copies alone, then
    assert report.spaces[0].nulls == 0 and difference(compatible, model, x) <= 1e-12


def test_the_plan_of_a_reduction_brings_the_wide_network_back() -> None:
    model, x = two_layers()
    wide = embed(model, x, widths={"0": 9}, seed=3)
    result = ep.reduce(wide, x)
    again = embed(result.model, x, plan=result.plan)
    assert again.state_dict()["0.weight"].shape == (9, 3)
    live = wide.state_dict()["2.weight"].abs().sum(0) > 1e-12
    assert torch.allclose(again.state_dict()["0.weight"][live], wide.state_dict()["0.weight"][live], atol=1e-12)
    with pytest.raises(InputError, match="changed nothing"):
        embed(model, x, plan=ep.reduce(model, x).plan)
    with pytest.raises(InputError, match="pass no widths"):
        embed(model, x, plan=result.plan, widths={"0": 9})


def test_the_same_seed_gives_the_same_network_and_leaves_the_model_and_the_random_state() -> None:
    narrow, inputs, _ = network(2)
    narrow.train()
    kept, state = {k: v.clone() for k, v in narrow.state_dict().items()}, torch.get_rng_state()
    one, same, other = (embed(narrow, inputs, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(kept[k], v) for k, v in narrow.state_dict().items())
    assert narrow.training and embed(narrow, inputs).training
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_pinned_grouped_and_shared_channels_are_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.mix = nn.Conv2d(4, 4, 1)
            self.twice = nn.Conv2d(4, 4, 1)
            self.free = nn.Conv2d(4, 3, 1)
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.mix(self.grouped(self.stem(x).relu()).relu()).relu()
            z: torch.Tensor = self.head(self.free(self.twice(self.twice(y).relu()).relu()).relu())
            return z

    model, inputs = Shared().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert widenable(model, inputs) == {"free": 3}
    wide = embed(model, inputs)
    assert isinstance(wide, Shared)
    assert wide.free.weight.shape == (4, 4, 1, 1)
    assert difference(wide, model, inputs) <= 1e-12


@pytest.mark.parametrize("critical", [True, False])
def test_under_a_layer_norm_every_channel_is_copied_equally_often(critical: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)
        )
        model = model.double()
        nn.init.normal_(model[1].weight)
        x = torch.randn(7, 3, dtype=torch.float64)
    problem = Problem(model, x, 0)
    wide, report = embed(model, x, widths={"0": 12, "3": 7}, critical=critical, full_output=True)
    assert isinstance(wide, nn.Sequential) and wide[1].normalized_shape == (12,)
    assert sorted(report.spaces[0].channel) == sorted([0, 1, 2, 3] * 3)
    assert difference(wide, model, x) <= 1e-12
    assert (problem.gradient(wide) < 1e-9) == critical
    with pytest.raises(InputError, match="only a multiple of 4 channels keeps the function, not 6"):
        embed(model, x, widths={"0": 6})
    with pytest.raises(InputError, match="only copies, with equal shares"):
        embed(model, x, widths={"0": 8}, kind="null")
    assert widenable(model, x) == {"0": 4, "3": 5}
    assert {space.name for space in embed(model, x, kind="null", full_output=True)[1].spaces} == {"3"}


def test_reduce_undoes_equal_multiplicities_under_a_layer_norm() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    wide = embed(model, x, widths={"0": 12, "2": 9})
    result = ep.reduce(wide, x)
    assert [space.after for space in result.report.spaces][:2] == [6, 5]
    assert "which sees all channels" in str(result.report) and not result.report.barriers


class Functional(nn.Module):
    """Layers, and what the code does with them."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.code = forward
        for name, layer in layers.items():
            setattr(self, name, layer.double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self, x)


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: m.b(m.a(x).relu() / m.a.out_features),
        lambda m, x: m.b((lambda h: h / h.shape[1] ** 0.5)(m.a(x).relu())),
        lambda m, x: m.b(m.a(x).relu().view(-1, 4)),
    ],
    ids=["attribute", "shape", "view"],
)
def test_a_width_that_the_code_uses_is_found_and_its_space_left_alone(code) -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    model = Functional(
        lambda m, x: m.d(code(m, x).tanh()), a=nn.Linear(5, 4), b=nn.Linear(4, 3), d=nn.Linear(3, 2)
    )
    wide, report = embed(model, x, full_output=True)
    assert [space.name for space in report.spaces] == ["b"] and "width" in report.left_alone["a"]
    assert difference(wide, model, x) <= 1e-12
    with pytest.raises(InputError, match=r"'a' cannot be widened so: the model's code (uses|holds on to) a width"):
        embed(model, x, widths={"a": 7})


def test_a_mean_over_a_single_channel_is_no_mean_over_space() -> None:
    layers = {"a": nn.Conv2d(3, 1, 1), "b": nn.Conv2d(3, 1, 1), "c": nn.Conv2d(1, 2, 1)}
    model = Functional(lambda m, x: m.c(m.a(x).mean(1, keepdim=True) + m.b(x)), **layers)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert difference(embed(model, x, factor=3.0), model, x) <= 1e-12


@pytest.mark.parametrize("kind", ["splitting", "null", "compatible"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
def test_critical_is_about_the_parameters_that_are_trained(kind: str, activation: type[nn.Module]) -> None:
    model, x = two_layers(width=3)
    model[1] = activation()
    model[2].bias.requires_grad_(False)
    problem = Problem(model, x, 0)
    assert problem.gradient(model) < 1e-10
    for seed in range(3):
        wide, report = embed(model, x, kind=kind, seed=seed, full_output=True)
        assert report.spaces or (kind == "null" and activation is nn.Sigmoid)
        assert problem.gradient(wide) < 1e-9


def test_what_a_head_reads_in_training_alone_is_left_alone() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.aux = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).relu()
            y: torch.Tensor = self.c(self.b(h).relu())
            return y + self.aux(h) if self.training else y

    model, x = Auxiliary().double().train(), torch.randn(6, 5, dtype=torch.float64)
    assert widenable(model, x) == {"b": 4}
    wide = embed(model, x)
    assert wide.training and wide(x).shape == (6, 2)


def test_half_precision_stays_finite_and_modes_go_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).half()
    model[1].running_var.fill_(40000.0)
    x = torch.randn(5, 3).half()
    wide = embed(model.eval(), x)
    assert all(bool(tensor.isfinite().all()) for tensor in wide.state_dict().values())
    normed = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )
    normed.double().train()[1].eval()
    modes = [module.training for module in embed(normed, torch.randn(5, 3, dtype=torch.float64))]
    assert modes == [True, False, True]


def test_small_weights_are_not_taken_for_rounding() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[2].weight[3] *= 1e-15
        model[2].bias[3] *= 1e-15
        model[4].weight[:, 3] *= 1e15
    x = torch.randn(5, 3, dtype=torch.float64)
    assert difference(embed(model, x, kind="splitting"), model, x) <= 1e-9


def test_coefficients_may_be_rounded_to_float32() -> None:
    model, x = two_layers()
    shares = torch.eye(4)[[0, 1, 2, 3, 3]]
    shares[3:, 3] = torch.tensor([0.1, 0.9])
    assert difference(embed(model, x, kind="splitting", coefficients={"0": shares}), model, x) <= 1e-12
