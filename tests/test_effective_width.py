"""Effective width: exact on planted redundancy, never below what a network built by hand confirms."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import network
from torch import Tensor, nn

from ep_prune.effective_width import EffectiveWidths, effective_width, set_up
from ep_prune.elimination import Part, absorbed, elimination_order, fitted_embedding
from ep_prune.errors import InputError
from ep_prune.evaluate import bind, boundary, evaluate
from ep_prune.trace import trace
from ep_prune.widen import embed, widenable
from tests.planted import generator, inputs, plant_layer_, randomize_, relative


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def mlp(width: int, inputs: int = 4, outputs: int = 3, act: type[nn.Module] = nn.Tanh, seed: int = 0) -> Any:
    return randomize_(nn.Sequential(nn.Linear(inputs, width), act(), nn.Linear(width, outputs)), seed)


# ---- planted redundancy: the exact width ----------------------------------------------------------------------


EMBEDDED = (
    "mlp with sigmoid",
    "cnn with tanh",
    "resnet with silu",
    "concat with gelu",
    "depthwise with leaky_relu",
)


@pytest.mark.parametrize("kind", EMBEDDED)
def test_embedded_networks_have_their_narrow_widths(kind: str) -> None:
    """A general compatible embedding (copies, signs, offsets, constants) of one irreducible network a family."""
    seed = next(seed for seed in range(100) if network(seed)[2].startswith(f"{kind},"))
    narrow, example, description = network(seed)
    wide = embed(narrow, example, seed=seed)
    found = effective_width(wide, example, 1e-8, probes=[normal(64, *example.shape[1:], seed=seed)])
    expected = widenable(narrow, example)
    assert len(expected) >= 2
    for name, width in expected.items():
        curve = found.spaces[name]
        assert curve.at(1e-8) <= width < curve.full, description
        if not kind.startswith("depthwise"):  # whose layers without activation may have a lower rank
            assert curve.at(1e-8) == width, description
            assert curve.changes[width] <= 1e-8 < curve.changes[width - 1], description


@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_every_kind_of_redundant_neuron_goes(act: type[nn.Module]) -> None:
    roles = {nn.Tanh: "a b k.5 a -a n k-.75", nn.Sigmoid: "a b k.5 a -a n", nn.ReLU: "a b k.5 a 2.5a .5b n"}[act]
    model = mlp(len(roles.split()), act=act)
    plant_layer_(model[0], roles)
    with torch.no_grad():
        model[2].weight[:, roles.split().index("n")] = 0.0
    assert effective_width(model, inputs((4,), 8), 1e-9, probes=[inputs((4,), 64)]).at(1e-9)["0"] == 2


def test_a_linear_dependence_that_is_no_copy_goes_too() -> None:
    """Without an activation between, five channels of rank two are two."""
    model = randomize_(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    with torch.no_grad():
        model[0].weight.copy_(normal(5, 2) @ normal(2, 6, seed=1))
    found = effective_width(model, inputs((6,), 8), 1e-9, probes=[inputs((6,), 64)])
    assert found.at(1e-9) == {"0": 2, "1": 4}


def test_a_constant_that_zero_padding_sees_is_not_folded_into_a_bias() -> None:
    def cnn(padding: int) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=padding))
        randomize_(model)
        plant_layer_(model[0], "a b k.5")
        return model

    probes = [inputs((2, 7, 7), 32)]
    assert effective_width(cnn(0), probes[0][:2], 1e-9, probes=probes).at(1e-9)["0"] == 2
    assert effective_width(cnn(1), probes[0][:2], 1e-9, probes=probes).at(1e-9)["0"] == 3


def test_near_equal_neurons_with_large_opposite_weights_are_two() -> None:
    """(s(w x + d v x) - s(w x)) / d is a derivative: one neuron is far from it."""
    model = mlp(3)
    plant_layer_(model[0], "a a b")
    with torch.no_grad():
        model[0].weight[1] += 1e-3 * torch.tensor([1.0, -1.0, 0.5, 0.3])
        model[2].weight[:, 0] = torch.tensor([1.0, -2.0, 0.5]) / 1e-3
        model[2].weight[:, 1] = -model[2].weight[:, 0]
    assert effective_width(model, inputs((4,), 8), 1e-2, probes=[inputs((4,), 64)]).at(1e-2)["0"] == 3


# ---- what is measured is true --------------------------------------------------------------------------------


def test_a_network_built_by_hand_changes_as_much_as_the_curve_says() -> None:
    model, probes = mlp(12, seed=3), inputs((4,), 100, seed=1)
    gauge = set_up(model, probes[:4], [probes])
    measurement = next(m for m in gauge.measurements() if m.space.name == "0")
    for k in (1, 3, 7, 11):
        keep = measurement.order[:k].sort().values
        trial = measurement.narrowed(k)
        (shift, axis), *_ = trial.shift.values()
        assert axis == 1
        narrow = mlp(k)
        with torch.no_grad():
            narrow[0].weight.copy_(model[0].weight[keep])
            narrow[0].bias.copy_(model[0].bias[keep])
            narrow[2].weight.copy_(trial.tensors["2.weight"][:, keep])
            narrow[2].bias.copy_(model[2].bias + shift)
        by_hand = relative(model(probes), narrow(probes))
        assert by_hand > 1e-6
        assert measurement.change(k) == pytest.approx(by_hand, rel=1e-9)


def test_widths_follow_the_tolerances_and_were_all_measured() -> None:
    model, probes = mlp(24, inputs=2, seed=1), [inputs((2,), 200)]
    tols = (0.3, 0.1, 1e-2, 1e-3, 1e-4, 0.0)
    curve = effective_width(model, probes[0][:4], tols, probes=probes).spaces["0"]
    widths = [curve.widths[tol] for tol in tols]
    assert widths == sorted(widths) and widths[0] < widths[3] < widths[-1] == 24
    for tol, width in curve.widths.items():
        assert curve.changes[width] <= tol and curve.at(tol) == width


def test_a_fit_to_few_probes_does_not_count() -> None:
    """With 24 probes any 24 neurons fit the outputs there; every second probe is held out and shows it."""
    model = mlp(200, inputs=16)
    found = effective_width(model, inputs((16,), 8), 1e-3, probes=[inputs((16,), 24)])
    assert found.at(1e-3)["0"] > 150


@pytest.mark.parametrize("refine", [False, True])
def test_neurons_that_share_a_direction_but_not_its_length_need_the_refinement(refine: bool) -> None:
    model = mlp(60, inputs=1, outputs=1)
    with torch.no_grad():
        length = 0.85 + 0.3 * torch.rand(60, generator=generator(2), dtype=torch.float64)
        model[0].weight[:, 0], model[0].bias[:] = 0.1 * length, 0.02 * length
        model[2].weight[:] = normal(1, 60).abs() / 60
    probes = [torch.linspace(-15, 15, 101, dtype=torch.float64).unsqueeze(1)]
    found = effective_width(model, probes[0][:2], 1e-3, probes=probes, refine=refine)
    assert found.at(1e-3)["0"] == (1 if refine else 2)
    assert found.spaces["0"].selected == {1e-3: 2}


def test_refined_widths_in_a_deep_network_are_at_most_the_selected_ones() -> None:
    model = randomize_(nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 2)))
    probes = [inputs((2,), 120)]
    plain, refined = (effective_width(model, probes[0][:4], 3e-2, probes=probes, refine=r) for r in (False, True))
    assert refined.at(3e-2)["0"] < plain.at(3e-2)["0"]
    assert refined.at(3e-2)["2"] <= plain.at(3e-2)["2"]
    assert all(c.changes[c.widths[3e-2]] <= 3e-2 for c in refined.curves)


# ---- what cannot be narrowed -----------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, between: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.between(self.layers, x)
        return result


def twice(layers: Any, x: Tensor) -> Tensor:
    """One weight, read along either axis."""
    y = layers[0](x).tanh()
    z: Tensor = layers[2](F.linear(y, layers[1].weight).tanh() + (y @ layers[1].weight).tanh())
    return z


def cut(layers: Any, x: Tensor) -> Tensor:
    a, b = layers[0](x).chunk(2, 1)
    y: Tensor = layers[1](a.tanh()) + layers[2](b.tanh())
    return y


def grouped(layers: Any, x: Tensor) -> Tensor:
    y: Tensor = layers[2](layers[1](layers[0](x).relu()).relu())
    return y


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (3,), "read by"),
        (Chain(twice, nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)), (3,), "has another use"),
        (Chain(cut, nn.Linear(3, 6), nn.Linear(3, 2), nn.Linear(3, 2)), (3,), "equally wide"),
        (
            Chain(grouped, nn.Conv1d(2, 6, 1), nn.Conv1d(6, 6, 3, groups=2), nn.Conv1d(6, 2, 1)),
            (2, 5),
            "read by a grouped convolution",
        ),
    ],
    ids=["layer norm", "another use", "cut", "grouped"],
)
def test_fixed_spaces_keep_their_width_and_say_why(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    randomize_(model)
    found = effective_width(model, inputs(shape, 8), 0.5, probes=[inputs(shape, 32)])
    curve = found.curves[0]
    assert reason in curve.fixed
    assert (curve.at(0.5), curve.full) == (6, 6)
    assert found.curves[-1].fixed == "an output of the model"
    assert f"fixed: {curve.fixed}" in str(found)


def test_a_space_that_the_outputs_do_not_need_has_width_one() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.more = nn.Linear(3, 2), nn.Linear(3, 120), nn.Linear(120, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x) + 0.0 * self.more(self.unused(x).tanh())
            return y

    found = effective_width(randomize_(Dead()), inputs((3,), 8), 1e-9, probes=[inputs((3,), 400)])
    assert found.at(1e-9)["unused"] == 1 and found.spaces["unused"].full == 120


def test_probes_that_overflow_are_refused_by_name() -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.exp(self.a(x))).tanh()
            return y

    with pytest.raises(InputError, match=r"in front of 'b.weight'"):
        effective_width(randomize_(Overflows()), inputs((3,), 8), 0.1, probes=[1e4 * inputs((3,), 40)])


# ---- use -----------------------------------------------------------------------------------------------------


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model(torch.randn(3, 2, 5, 5)).sum().backward()
    model.train()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    found = effective_width(model, torch.zeros(1, 2, 5, 5), seed=1)
    assert found.synthetic and found.samples >= 64 and found.spaces["0"].full == 4
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert len(gradients) == 6
    assert all(
        torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True) if p.grad is not None
    )


def test_the_result_as_text_as_plain_values_and_as_a_picture(tmp_path: Path) -> None:
    model, probes = mlp(6), inputs((4,), 64)
    labelled = [(probes[:32], torch.zeros(32)), (probes[32:63], torch.zeros(31))]
    found = effective_width(model, probes[:1], (1e-2, 1e-1), probes=labelled, spaces=["0"])
    assert found.tols == (0.1, 0.01) and list(found.spaces) == ["0"] and found.samples == 63
    values = json.loads(json.dumps(found.to_dict()))
    assert values["grade"] == "fitted"
    assert values["spaces"][0]["widths"] == [[0.1, found.at(0.1)["0"]], [0.01, found.at(0.01)["0"]]]
    assert [6, 0.0] in values["spaces"][0]["changes"]
    lines = str(found).splitlines()
    assert lines[0].split() == ["space", "full", "1e-01", "1e-02"]
    assert lines[2].split() == ["0", "6", str(found.at(0.1)["0"]), str(found.at(0.01)["0"])]
    assert lines[-1] == "fitted, 63 probes"
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_inputs_by_keyword() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 5), nn.Linear(3, 5), nn.Linear(5, 1)

        def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
            return {"y": self.c((self.a(first) + self.b(second)).tanh())}

    model = randomize_(Two())
    probes = {"second": inputs((3,), 40), "first": inputs((2,), 40, seed=1)}
    found = effective_width(model, {k: v[:3] for k, v in probes.items()}, 1e-12, probes=[probes])
    assert found.at(1e-12)["a"] == 5 and found.spaces["a"].producers == ("a.weight", "b.weight")


def measured(**options: Any) -> EffectiveWidths:
    return effective_width(mlp(5), inputs((4,), 3), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 1.0}, r"tol=1.0 is not in \[0, 1\)"),
        ({"tol": math.nan}, "tol=nan"),
        ({"tol": ()}, "tol is empty"),
        ({"spaces": ["1"]}, "no space '1': choose among 0, 2"),
        ({"probes": []}, "probes is empty"),
        ({"probes": [torch.zeros(5, 4), torch.zeros(5, 3)]}, "pass batches of one shape"),
        ({"probes": [torch.zeros(5, 3, dtype=torch.float64)]}, "export|run"),
    ],
)
def test_wrong_use_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        measured(**options)
    assert type(caught.value).__module__ == "ep_prune.errors"


# ---- the parts -----------------------------------------------------------------------------------------------


def test_the_interpreter_runs_a_float32_model_with_casts_in_float64() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.max_pool2d(self.conv(x).relu(), 2).float().mean((2, 3))
            a, b = self.head(y).chunk(2, 1)
            return a, b * torch.ones(1, dtype=torch.float32)

    model = Casts().eval()
    x = torch.randn(3, 2, 6, 6, generator=generator(0))
    graph = trace(model, x)
    found = evaluate(graph, bind(graph, x), graph.outputs)
    with torch.no_grad():
        conv, head = copy.deepcopy(model.conv).double(), copy.deepcopy(model.head).double()
        expected = head(F.max_pool2d(conv(x.double()).relu(), 2).mean((2, 3))).chunk(2, 1)
    for node, value in zip(graph.outputs, expected, strict=True):
        assert found[node].dtype == torch.float64
        assert relative(value, found[node]) < 1e-14


def test_the_interpreter_exchanges_tensors_and_goes_on_from_given_values() -> None:
    model, x = mlp(5), inputs((4,), 6)
    graph = trace(model, x)
    first, _, last = (node for node in graph.nodes if node.target is not None)
    weight, offset = normal(3, 5), normal(3, seed=1)
    edge = boundary(graph, [], ["2.weight"])
    assert [node.op for node in edge] == ["aten.tanh"]
    given = evaluate(graph, bind(graph, x), edge)
    found = evaluate(graph, given, graph.outputs, replace={"2.weight": weight}, shift={last: (offset, 1)})
    expected = model[1](model[0](x)) @ weight.T + model[2].bias + offset
    assert relative(expected, found[graph.outputs[0]]) < 1e-14
    assert boundary(graph, [first]) == (x_node(graph),)
    with pytest.raises(InputError, match="pass batches of one size"):
        bind(graph, inputs((4,), 7))


def x_node(graph: Any) -> Any:
    return next(node for node in graph.nodes if node.op == "placeholder" and node.tensor is None)


def test_orthogonal_channels_go_in_the_order_of_their_effect() -> None:
    factor, _ = torch.linalg.qr(normal(30, 8))
    effect = torch.tensor([3.0, 0.1, 5.0, 2.0, 0.0, 1.0, 4.0, 0.5], dtype=torch.float64)
    sent = torch.diag(effect) @ torch.linalg.qr(normal(8, 8, seed=1)).Q
    pinned = torch.zeros(8, dtype=torch.bool)
    assert elimination_order([Part(factor, sent)], pinned).tolist() == [2, 6, 0, 3, 5, 7, 1, 4]
    pinned[1] = True
    assert elimination_order([Part(factor, sent)], pinned).tolist() == [1, 2, 6, 0, 3, 5, 7, 4]


@pytest.mark.parametrize("n", [40, 150, 300])
def test_a_planted_rank_is_found_among_few_and_many_channels(n: int) -> None:
    values = normal(400, 4) @ normal(4, n, seed=1)
    factor = absorbed(absorbed(None, values[:300]), values[300:])
    assert factor.shape == (n, n)
    order = elimination_order([Part(factor, normal(n, 2, seed=2))], torch.zeros(n, dtype=torch.bool))
    assert sorted(order.tolist()) == list(range(n))
    keep = order[:4].sort().values
    embedding = fitted_embedding(factor, keep)
    assert torch.equal(embedding[keep], torch.eye(4, dtype=torch.float64))
    assert relative(values, values[:, keep] @ embedding.T) < 1e-10
    assert relative(values, values[:, keep[:3]] @ fitted_embedding(factor, keep[:3]).T) > 1e-2


def test_many_independent_channels_are_ordered_as_few_are() -> None:
    """More than `LARGE`, all independent: the updated inverse keeps those with an effect before those without."""
    values = normal(600, 160)
    sent = torch.zeros(160, 3, dtype=torch.float64)
    sent[::4] = normal(40, 3, seed=1)
    order = elimination_order([Part(absorbed(None, values), sent)], torch.zeros(160, dtype=torch.bool))
    assert set(order[:40].tolist()) == set(range(0, 160, 4))
