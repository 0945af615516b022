"""Two weights moved together: against explicit Jacobians, on planted problems, and in narrow shapes."""

import copy

import pytest
import torch
from torch import nn

import ep_prune as ep
from ep_prune import fitting, gauss_newton
from ep_prune.calibrate import Program
from ep_prune.gauss_newton import Linear, Metric, improved
from ep_prune.pairs import Block, pairs_of
from ep_prune.structure import Structure
from ep_prune.trace import trace


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_layers(x, at):
    return torch.tanh(x @ at[0].T + at[1]) @ at[2].T + at[3]


def less(target: torch.Tensor):
    return lambda made: made - target


def spread(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cov(x.double().T, correction=0), x.double().mean(0)


def planted(seed: int, moved: float):
    """A teacher, a start `moved` away from it, and data of both kinds."""
    teacher = [
        noise(5, 4, seed=seed),
        noise(5, seed=seed + 1),
        noise(3, 5, seed=seed + 2),
        noise(3, seed=seed + 3),
    ]
    start = [t + moved * noise(*t.shape, seed=seed + 4 + k) for k, t in enumerate(teacher)]
    sets = []
    for k in (10, 11):
        x = noise(300, 4, seed=seed + k) + 0.5
        sets.append([(x, less(two_layers(x, teacher)))])
    x = sets[0][0][0]
    return start, *sets, (spread(x), spread(torch.tanh(x @ start[0].T + start[1])))


def loss(point, data) -> float:
    return sum(float(wrong(two_layers(x, point)).square().sum()) for x, wrong in data)


@pytest.mark.parametrize("seed", range(3))
def test_what_another_network_computes_is_learnt_from_its_outputs(seed, monkeypatch):
    monkeypatch.setattr(gauss_newton, "STEPS", 12)
    start, data, held, moments = planted(seed, 0.2)
    found = improved(two_layers, start, data, held, moments, torch.Generator().manual_seed(0))
    assert loss(found, held) < 1e-3 * loss(start, held)


def test_the_first_step_already_helps():
    start, data, held, moments = planted(0, 0.2)
    found = improved(two_layers, start, data, held, moments, torch.Generator().manual_seed(0))
    assert loss(found, held) < 0.3 * loss(start, held)


def test_where_nothing_is_wrong_nothing_changes():
    start, data, held, moments = planted(0, 0.0)
    assert improved(two_layers, start, data, held, moments, torch.Generator()) is None


def test_what_held_out_samples_dislike_is_not_done():
    """Data that ask for the opposite of what is held out."""
    start, data, _, moments = planted(0, 0.2)
    still = [(x, less(two_layers(x, start))) for x, _ in data]
    assert improved(two_layers, start, data, still, moments, torch.Generator().manual_seed(0)) is None


def test_a_residual_that_is_not_finite_changes_nothing():
    start, data, held, moments = planted(0, 0.2)
    broken = [(x, lambda made: made * torch.inf) for x, _ in data]
    assert improved(two_layers, start, broken, held, moments, torch.Generator().manual_seed(0)) is None


def test_differentiating_twice_is_the_jacobian():
    start, data, *_ = planted(1, 0.2)
    (x, wrong), change = data[0], [noise(*t.shape, seed=9) for t in planted(1, 0.2)[0]]
    with torch.enable_grad():
        linear = Linear.at(two_layers, x, wrong, start)
        found = linear.normal(change)
    jacobian = torch.func.jacrev(lambda *at: wrong(two_layers(x, at)), argnums=(0, 1, 2, 3))(*start)
    flat = torch.cat([j.reshape(linear.residual.numel(), -1) for j in jacobian], 1).double()
    expected = flat.T @ (flat @ torch.cat([c.reshape(-1) for c in change]).double())
    torch.testing.assert_close(torch.cat([f.reshape(-1) for f in found]).double(), expected, rtol=1e-4, atol=1e-2)


def test_the_metric_is_what_a_change_does_to_the_outputs_and_can_be_inverted():
    x = noise(1000, 6) @ noise(6, 6, seed=1) + noise(6, seed=2)
    metric = Metric(*spread(x), like=torch.empty(4, 6))
    metric.sent = torch.tensor([1.0, 2.0, 0.5, 3.0])
    weight, constant = noise(4, 6, seed=3), noise(4, seed=4)
    left = metric.times(weight, constant)
    expected = (metric.sent * (x @ weight.T + constant).square().mean(0)).sum()
    found = (weight * left[0]).sum() + (constant * left[1]).sum()
    torch.testing.assert_close(found, expected, rtol=3e-3, atol=0)  # the covariance is a little regularized
    back = metric.solve(*left)
    torch.testing.assert_close(back[0], weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(back[1], constant, rtol=1e-3, atol=1e-3)


# ---- on graphs ------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Of these weights, only `a` is read by one weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.c, self.d = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.e, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Linear(8, 5)

    def forward(self, x):
        y = self.b(nn.functional.max_pool2d(torch.relu(self.norm(self.a(x))), 2))
        z = torch.relu(y) + self.c(torch.relu(y))
        return self.last(torch.relu(self.e(torch.relu(self.d(torch.relu(z))))).mean((2, 3)))


def block_of(model: nn.Module, x: torch.Tensor, drop: str):
    """The block of the only pair, with every second channel of a weight's outputs gone."""
    program = Program(trace(model.eval(), (x,)))
    structure = Structure(program, {}, [name for name, _ in model.named_parameters()])
    (pair,) = pairs_of(program, structure.readers).values()
    kept = structure.everything()
    kept[structure.roots[structure.numbering.slots.bound[drop, 0]][::2]] = False
    return program, pair, structure.close(kept), structure


def test_pairs_are_what_one_weight_alone_reads():
    model = Branches().eval()
    program = Program(trace(model, (noise(2, 3, 8, 8),)))
    structure = Structure(program, {}, [name for name, _ in model.named_parameters()])
    found = [(p.first.name, p.second.name) for p in pairs_of(program, structure.readers).values()]
    assert found == [("a.weight", "b.weight")]


def test_a_block_is_the_function_of_the_network_with_zeros_in_narrow_shapes():
    model = Branches()
    for buffer in (model.norm.running_mean, model.norm.weight.data):
        buffer.add_(noise(8, seed=5).abs())
    x = noise(2, 3, 8, 8)
    program, pair, kept, structure = block_of(model, x, "a.weight")
    block = Block(program, structure, pair, kept, {})
    found = block(block.input(x), block.start())
    gone = copy.deepcopy(model)
    gone.b.weight.data[:, ~kept[structure.roots[structure.numbering.slots.bound["a.weight", 0]]]] = 0.0
    expected = gone.b(nn.functional.max_pool2d(torch.relu(gone.norm(gone.a(x))), 2))
    torch.testing.assert_close(found, expected)
    own = {
        name: program.graph.tensors[name].clone()
        for r in (pair.first, pair.second)
        for name in (r.name, str(r.constant))
    }
    block.write(own, [2 * block.parts[0].weight, torch.ones(4), block.parts[1].weight, torch.ones(8)])
    torch.testing.assert_close(own["a.weight"][block.parts[0].rows], 2 * model.a.weight[block.parts[0].rows])
    assert int((own["a.weight"] != 0).flatten(1).any(1).sum()) == 4
    torch.testing.assert_close(own["norm.running_mean"] - model.norm.running_mean, -1.0 * kept_of(kept, structure))
    torch.testing.assert_close(own["b.bias"], model.b.bias + 1.0)


def kept_of(kept, structure):
    return kept[structure.roots[structure.numbering.slots.bound["a.weight", 0]]].float()


@pytest.mark.parametrize("seed", range(2))
def test_moving_pairs_makes_the_network_better(seed, monkeypatch):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 6, 3, padding=1),
    ).eval()  # fmt: skip
    x = [noise(32, 3, 8, 8, seed=k) for k in range(4)]
    fresh = noise(64, 3, 8, 8, seed=99)

    def distance() -> float:
        narrow = ep.compress(model, x[0], x, keep_params=0.4).model
        with torch.no_grad():
            return float((narrow(fresh) - model(fresh)).square().mean())

    moved = distance()
    monkeypatch.setattr(fitting, "pairs_of", lambda program, readers: {})
    assert moved < 0.95 * distance()
