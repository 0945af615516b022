"""Declared domains: what bounds prove on a box is folded, what bends in a corner stays, bad boxes are errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo import needs_data

import ep_prune as ep
from ep_prune.bounds import Bounds, Budget, prove
from ep_prune.cli import main
from ep_prune.trace import trace


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    """A ReLU network in float64 with weights of a seed."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs).double()
        layer.weight.data = torch.randn(outputs, inputs, generator=generator(seed + len(layers))).double()
        layer.weight.data /= inputs**0.5
        layer.bias.data = torch.randn(outputs, generator=generator(seed + 99 + len(layers))).double() * 0.1
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def samples(low: Tensor, high: Tensor, count: int = 4000, seed: int = 1) -> Tensor:
    """Points of a box, all of its corners among them where it has few dimensions."""
    points = low + torch.rand(count, len(low), generator=generator(seed), dtype=torch.float64) * (high - low)
    corners = torch.rand(count, len(low), generator=generator(seed + 1)) < 0.5
    return torch.cat([points, torch.where(corners, low, high)])


def gap(wide: nn.Module, narrow: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((wide(x) - narrow(x)).abs().max() / wide(x).abs().max())


def widths(result: ep.Result) -> list[int]:
    return [space.after for space in result.report.spaces]


LOW, HIGH = torch.tensor([-1.0, 0.0, -2.0]).double(), torch.tensor([1.0, 0.5, 3.0]).double()


def reach(weight: Tensor) -> Tensor:
    """The largest value of weight @ x on the box."""
    return weight.clamp_min(0) @ HIGH + weight.clamp_max(0) @ LOW


def planted(off: int, on: int, rank: int, bending: int) -> nn.Sequential:
    """3 -> hidden -> 4: units always off and always on on the box by their biases, the latter of low rank."""
    net = mlp(3, off + on + bending, 4)
    first = net[0]
    assert isinstance(first, nn.Linear)
    directions = torch.randn(rank, 3, generator=generator(5)).double()
    first.weight.data[off : off + on] = torch.randn(on, rank, generator=generator(6)).double() @ directions
    first.bias.data[:off] = -reach(first.weight.data[:off]) - 1e-6
    first.bias.data[off : off + on] = reach(-first.weight.data[off : off + on]) + 1e-6
    first.bias.data[off + on :] = 0.0  # zero lies in the box: these bend
    return net


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_planted_units_go_to_the_exact_width(rank: int) -> None:
    net = planted(5, 7, rank, 4)
    result = ep.reduce(net, samples(LOW, HIGH, 3), domain=(LOW, HIGH))
    assert widths(result) == [rank + 4, 4]
    gone = result.report.spaces[0].gone
    assert gone["null"] == 5 and sum(gone.values()) == 12 - rank
    assert gap(net, result.model, samples(LOW, HIGH)) <= 1e-10
    assert result.report.grade == "exact" and "on the declared domain" in str(result.report)
    assert gap(net, result.model, samples(LOW - 20, HIGH + 20)) > 1e-3, "the claim is one about the box"


def test_without_a_domain_they_all_stay() -> None:
    net = planted(5, 7, 2, 4)
    assert widths(ep.reduce(net, samples(LOW, HIGH, 3))) == [16, 4]


def test_a_unit_that_bends_in_one_corner_stays() -> None:
    """Off but for a corner of volume 1e-12 of the box: random points do not see it."""
    net = planted(2, 0, 1, 4)
    first = net[0]
    assert isinstance(first, nn.Linear)
    first.bias.data[0] = -reach(first.weight.data[:1])[0] + 1e-4
    result = ep.reduce(net, samples(LOW, HIGH, 3), domain=(LOW, HIGH))
    assert widths(result) == [5, 4]
    assert gap(net, result.model, samples(LOW, HIGH)) <= 1e-10


def test_a_unit_that_is_nearly_always_on_stays() -> None:
    net = planted(0, 6, 1, 4)
    first = net[0]
    assert isinstance(first, nn.Linear)
    first.bias.data[2] -= 1e-4
    assert widths(ep.reduce(net, samples(LOW, HIGH, 3), domain=(LOW, HIGH))) == [1 + 1 + 4, 4]


def test_deeper_claims_need_backward_bounds() -> None:
    """relu(a) - relu(a - 1) is never below 0: intervals do not know that the two go together."""
    net = mlp(1, 2, 3, 2)
    first, second = net[0], net[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    first.weight.data, first.bias.data = torch.ones(2, 1).double(), torch.tensor([0.0, -1.0]).double()
    second.weight.data = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).double()
    second.bias.data = torch.tensor([-1e-3, 1e-3, -0.5]).double()
    x = torch.zeros(2, 1).double()
    box = (torch.tensor([-3.0]).double(), torch.tensor([5.0]).double())
    graph = trace(net, x)
    proof = prove(net, graph, x, [box])
    relu = [node for node in graph.nodes if node.op == "aten.relu"][1]
    found = proof.bounds[relu.args[0]]
    assert isinstance(found, Bounds)
    assert float(found.high[0, 0]) <= 0 <= float(found.low[0, 1]) and proof.open == 0
    assert widths(ep.reduce(net, x, domain=(-3.0, 5.0)))[1] == 2


def nets() -> list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    conv = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 5, 3),
        nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.GELU(),
        nn.Linear(4, 3), nn.SiLU(),
    )  # fmt: skip

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = x + 2 * torch.relu(self.a(x))
            z = y - torch.sigmoid(self.b(y)) * y
            return nn.functional.hardtanh(self.c(torch.cat([z, y.flip(1)], 1)))

    return [
        ("mlp", lambda: mlp(6, 9, 8, 3), (6,)),
        ("conv", lambda: conv, (2, 8, 8)),
        ("residual", Residual, (6,)),
    ]


@pytest.mark.parametrize("name,make,shape", nets(), ids=[name for name, _, _ in nets()])
@pytest.mark.parametrize("seed", range(3))
def test_no_value_of_any_node_leaves_its_bounds(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], seed: int
) -> None:
    net = make().double().eval()
    for k, p in enumerate(net.parameters()):
        p.data = torch.randn(p.shape, generator=generator(seed * 100 + k)).double() * 0.7
    low = torch.randn(shape, generator=generator(seed)).double()
    high = low + 3 * torch.rand(shape, generator=generator(seed + 50)).double()
    x = low.expand(2, *shape).contiguous()
    graph = trace(net, x)
    proof = prove(net, graph, x, [(low, high)])
    flat = samples(low.reshape(-1), high.reshape(-1), 500, seed)
    many = flat.reshape(-1, *shape)
    wide = trace(net, many)
    place = next(node for node in wide.nodes if node.op == "placeholder" and node.tensor is None)
    nodes = [node for node in wide.nodes if node.tensor is None and node.dtype is not None]
    values = ep_values(wide, place, many, nodes)
    bounded = 0
    for own, node in zip(graph.nodes, wide.nodes, strict=True):
        found = proof.bounds[own]
        if node in values and isinstance(found, Bounds):
            bounded += 1
            value = values[node]
            assert bool((value >= found.low).all() & (value <= found.high).all()), f"{name}: {node.where}"
    assert bounded >= len([n for n in nodes if n.target is not None]), "every node here has bounds"


def ep_values(graph, place, x, nodes):  # type: ignore[no-untyped-def]
    from ep_prune.evaluate import evaluate

    found = evaluate(graph, {place: x}, [node for node in nodes if node is not place])
    return {node: value for node, value in found.items() if isinstance(value, Tensor)}


def test_backward_bounds_are_tighter_than_intervals() -> None:
    net = mlp(8, 12, 12, 5)
    x = torch.zeros(2, 8).double()
    box = (-torch.ones(8).double(), torch.ones(8).double())
    graph = trace(net, x)
    relu = [node for node in graph.nodes if node.op == "aten.relu"][1].args[0]
    tight = prove(net, graph, x, [box]).bounds[relu]
    loose = prove(net, graph, x, [box], Budget(rows=0)).bounds[relu]
    assert isinstance(tight, Bounds) and isinstance(loose, Bounds)
    assert float((tight.high - tight.low).mean()) < 0.9 * float((loose.high - loose.low).mean())


def test_an_operator_without_bounds_makes_no_claim() -> None:
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(torch.softmax(x, 1))))

    net = Soft().double()
    net.a.bias.data[:] = -100.0  # always off, and nobody says between what softmax lies
    assert widths(ep.reduce(net, torch.rand(2, 3).double(), domain=(0.0, 1.0)))[0] == 8


def test_a_channel_is_off_only_where_all_of_its_positions_are() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    weight = net[0].weight.data
    weight[:] = torch.rand(3, 1, 3, 3, generator=generator()).double() + 0.1
    sums = weight.sum((1, 2, 3))
    net[0].bias.data = torch.stack([-sums[0] - 1e-3, -sums[1] + 1e-3, torch.zeros(()).double()])
    result = ep.reduce(net, torch.rand(2, 1, 4, 4).double(), domain=(0.0, 1.0))
    assert widths(result)[0] == 2
    assert gap(net, result.model, torch.rand(200, 1, 4, 4, generator=generator()).double()) <= 1e-10


def test_saturated_tanh_is_a_constant() -> None:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].bias.data[:2] = torch.tensor([30.0, -30.0])
    net[0].bias.data[2] = 4.0
    result = ep.reduce(net, torch.rand(2, 2), domain=(-1.0, 1.0))
    assert widths(result)[0] == 3 and result.report.spaces[0].gone["constant"] == 2
    assert widths(ep.reduce(net, torch.rand(2, 2)))[0] == 5


def test_plan_is_saved_loaded_and_applied(tmp_path) -> None:  # type: ignore[no-untyped-def]
    net = planted(3, 6, 2, 4).float()
    low, high = LOW.float(), HIGH.float()
    example = samples(LOW, HIGH, 3).float()
    result = ep.reduce(net, example, domain=(low, high))
    path = tmp_path / "narrow.safetensors"
    ep.save(result, path)
    plan = ep.Plan.load(path)
    assert plan.domain == [low.tolist(), high.tolist()]
    again = plan.apply(net)
    for a, b in zip(result.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    other = planted(3, 6, 2, 4).float()
    other[2].weight.data *= 2
    with torch.no_grad():
        assert torch.allclose(plan.apply(other, recheck=example)(example), other(example), atol=1e-5)
    with pytest.raises(ep.InputError, match="outside the declared domain"):
        plan.apply(other, recheck=example + 100)
    loaded = ep.load(lambda: planted(3, 6, 2, 4).float(), path)
    assert torch.equal(loaded(example), result.model(example))


def test_the_verifier_probes_inside_alone() -> None:
    net = planted(5, 7, 2, 4)
    narrow = ep.reduce(net, samples(LOW, HIGH, 3), domain=(LOW, HIGH)).model
    x = samples(LOW, HIGH, 3)
    assert ep.verify(net, narrow, x, domain=(LOW, HIGH)).ok
    assert not ep.verify(net, narrow, x).ok, "outside they differ, and without a domain probes lie outside"

    narrow[0].bias.data += 1e-3  # the verifier sees a change inside
    assert not ep.verify(net, narrow, x, domain=(LOW, HIGH)).ok


def test_two_inputs_by_keyword() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x) + self.b(y)))

    net = Two().double()
    for part in (net.a, net.b):  # both signs in every row and 0 in the box: these bend
        part.weight.data[:, 0], part.weight.data[:, 1] = 0.5, -torch.rand(6, generator=generator()).double() - 0.1
        part.bias.data[:] = 0.0
    net.a.bias.data[:2] = -50.0
    inputs = {"y": torch.rand(2, 2).double(), "x": torch.rand(2, 3).double()}
    assert widths(ep.reduce(net, inputs, domain={"x": (0, 1), "y": (0, 1)}))[0] == 4
    assert widths(ep.reduce(net, inputs, domain={"x": (0, 1)}))[0] == 6, "y may be anything"
    inputs = (inputs["x"], inputs["y"])
    assert widths(ep.reduce(net, inputs, domain=[(0, 1), ([0.0, 0.0], [1.0, 1.0])]))[0] == 4


@pytest.mark.parametrize(
    "domain,message",
    [
        ((1.0, 0.0), "lo > hi"),
        (([0.0, 0.0], [1.0, 1.0]), "shape"),
        ((float("nan"), 1.0), "NaN"),
        ((0.0, float("inf")), "infinite"),
        ((0.0,), "pair"),
        (0.5, "pair"),
        (("a", "b"), "number"),
        ((2.0, 3.0), "outside the declared domain"),
        ({"z": (0, 1)}, "keyword"),
    ],
)
def test_a_bad_domain_is_one_sentence(domain: object, message: str) -> None:
    with pytest.raises(ep.InputError, match=message) as caught:
        ep.reduce(mlp(3, 4, 2), torch.rand(2, 3).double(), domain=domain)
    assert "\n" not in str(caught.value)


def test_probes_outside_are_an_error() -> None:
    with pytest.raises(ep.InputError, match="probes"):
        ep.reduce(mlp(3, 4, 2), torch.rand(2, 3).double(), domain=(0, 1), probes=[torch.rand(2, 3).double() + 1])


def test_why_says_on_the_declared_domain() -> None:
    found = ep.why(planted(5, 7, 2, 4), samples(LOW, HIGH, 3), "0", domain=(LOW, HIGH))
    assert len(found.channels) == 6 and "on the declared domain" in str(found)


# ---- linear dependence: nothing between producer and consumer --------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_bottleneck_goes_to_the_rank_of_the_product(bias: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 9, bias=bias), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2)).double()
    net[1].weight.data = torch.randn(7, 3, generator=generator()).double() @ torch.randn(3, 9).double()
    result = ep.reduce(net, torch.randn(2, 6).double())
    assert widths(result)[0] == 3
    assert gap(net, result.model, torch.randn(500, 6).double()) <= 1e-10


def test_padded_convolutions_without_activation_keep_their_borders() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    net = net.double()
    mix = torch.randn(2, 6, generator=generator()).double()
    net[1].weight.data = torch.einsum("oRhw,Ri->oihw", torch.randn(4, 2, 3, 3).double(), mix)
    result = ep.reduce(net, torch.randn(2, 2, 6, 6).double())
    assert widths(result)[0] <= 3
    assert gap(net, result.model, torch.randn(50, 2, 6, 6).double()) <= 1e-10


# ---- real networks ------------------------------------------------------------------------------------------


@pytest.mark.data
@needs_data
def test_leopp_network_without_a_solver() -> None:
    net = zoo.load_leopp("cifar10_mlp_116_248")
    result = ep.reduce(
        net, torch.zeros(2, 3, 32, 32) if _takes_images(net) else torch.zeros(2, 3072), domain=(0, 1)
    )
    first, second = widths(result)[:2]
    assert first <= 33 and second <= 134 and result.report.after.parameters <= 107_315
    real, _ = zoo.cifar_test()
    random = torch.rand(10_000, *real.shape[1:], generator=generator())
    with torch.no_grad():
        for x in (real, random):
            x = x.reshape(len(x), -1) if not _takes_images(net) else x
            exact, narrow = net.double()(x.double()), result.model.double()(x.double())
            rounding = float((net.float()(x).double() - exact).abs().max())
            assert float((narrow - exact).abs().max()) < rounding


def _takes_images(net: nn.Module) -> bool:
    try:
        net(torch.zeros(1, 3, 32, 32))
    except RuntimeError:
        return False
    return True


@pytest.mark.data
@needs_data
def test_mountaincar_policy_is_proved_on_its_whole_box() -> None:
    net = zoo.load_policy("mountaincar")
    low, high = zoo.policy_box("mountaincar")
    states = zoo.policy_states("mountaincar")
    result = ep.reduce(net, states[:2], domain=(low, high))
    first, second = widths(result)[:2]
    assert first <= 114 and second <= 23
    with torch.no_grad():
        assert torch.equal(net(states).argmax(1), result.model(states).argmax(1))


# ---- command line ---------------------------------------------------------------------------------------------


def policy() -> nn.Module:
    """A factory for the command line: three of eight units are off on the box of its test."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].weight.data[:, 0].abs_()
    net[0].weight.data[:, 1].abs_().neg_()
    net[0].bias.data[:] = 0.0
    net[0].bias.data[:3] = -20.0
    return net


def test_the_command_line_declares_and_remembers_a_domain(tmp_path, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = tmp_path / "narrow.safetensors"
    model = ["test_domain:policy", "--input", "1,2"]
    assert main(["reduce", *model, "--domain=-1,1:-0.5,0.5", "--out", str(path)]) == 0
    assert "8 -> 5" in (said := capsys.readouterr().out) and "[-1, 1] x [-0.5, 0.5]" in said
    assert main(["verify", model[0], str(path), *model[1:]]) == 0, "inside the domain that the file holds"
    assert main(["verify", model[0], str(path), *model[1:], "--domain=-99,99"]) == 1
    assert main(["inspect", *model, "--domain=-1,1", "--why", "0"]) == 0
    assert "on the declared domain" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1", "a,b", "0,1,2", "0,1:0,1:0,1", "1,0", "nan,1"])
def test_a_bad_box_on_the_command_line_is_wrong_use(text, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["reduce", "test_domain:policy", "--input", "1,2", f"--domain={text}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ep-prune: ") and error.count("\n") == 1
