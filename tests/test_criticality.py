"""Gradient norms and inertia against known Hessians, and that the user's model is left as it was."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from ep_prune.criticality import criticality, hessian_inertia
from ep_prune.errors import InputError


def fit(model, batch):
    return mse_loss(model(batch[0]), batch[1])


class Point(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def quadratic(matrix):
    """1/2 theta^T A theta, whose Hessian is A."""
    return lambda model, batch: model.theta @ matrix @ model.theta / 2


def rotated(eigenvalues, seed=0):
    n = len(eigenvalues)
    draw = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis, _ = torch.linalg.qr(draw)
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def mlp(widths, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(n, d_in, d_out, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator), torch.randn(n, d_out, generator=generator)


# gradients


def test_gradient_of_a_quadratic_by_hand():
    found = criticality(Point(3.0, -4.0), quadratic(torch.eye(2, dtype=torch.float64)), None)
    assert (found.loss, found.l2, found.l1) == (12.5, 5.0, 7.0)
    assert (found.parameters, found.frozen) == (2, 0)


def test_layers_are_those_of_autograd_in_float64():
    model, batch = mlp((3, 4, 2)), data(10, 3, 2)
    double = copy.deepcopy(model).double()
    fit(double, [t.double() for t in batch]).backward()
    found = criticality(model, fit, batch)
    assert [layer.layer for layer in found.layers] == ["0", "2"]
    assert [layer.parameters for layer in found.layers] == [16, 10]
    for layer in found.layers:
        slopes = torch.cat([p.grad.flatten() for p in double[int(layer.layer)].parameters()])
        assert layer.l2 == pytest.approx(float(slopes.norm()), rel=1e-12)
        assert layer.l1 == pytest.approx(float(slopes.abs().sum()), rel=1e-12)
    assert found.l2 == pytest.approx(math.hypot(*(layer.l2 for layer in found.layers)), rel=1e-12)
    assert found.l1 == pytest.approx(sum(layer.l1 for layer in found.layers), rel=1e-12)


def test_frozen_parameters_do_not_count():
    model, batch = mlp((3, 4, 2)), data(10, 3, 2)
    whole = criticality(model, fit, batch)
    model[0].weight.requires_grad_(False)
    found = criticality(model, fit, batch)
    assert (found.parameters, found.frozen) == (whole.parameters - 12, 12)
    assert [layer.parameters for layer in found.layers] == [4, 10]
    assert found.layers[1] == whole.layers[1]
    assert hessian_inertia(model, fit, batch).parameters == 14


def test_tied_parameters_count_once():
    model, batch = mlp((3, 3, 3)), data(10, 3, 3)
    model[2].weight = model[0].weight
    found = criticality(model, fit, batch)
    assert found.parameters == 9 + 3 + 3
    assert [layer.parameters for layer in found.layers] == [12, 3]
    double = copy.deepcopy(model).double()
    fit(double, [t.double() for t in batch]).backward()  # sums over both uses
    assert found.l2 == pytest.approx(float(torch.cat([p.grad.flatten() for p in double.parameters()]).norm()))
    assert hessian_inertia(model, fit, batch).parameters == 15


def test_table_and_dict_hold_the_figures():
    model = mlp((3, 4, 2))
    model[2].bias.requires_grad_(False)
    found = criticality(model, fit, data(10, 3, 2))
    assert str(found).splitlines()[2].split() == [
        "0",
        "16",
        f"{found.layers[0].l2:.3e}",
        f"{found.layers[0].l1:.3e}",
    ]
    assert str(found).splitlines()[-1].endswith("; 2 frozen parameters")
    assert found.to_dict()["layers"][1]["l2"] == found.layers[1].l2


# known Hessians


@pytest.mark.parametrize("counts", [(2, 0, 0), (3, 2, 1), (1, 4, 3), (0, 3, 0), (0, 0, 5)])
def test_inertia_of_quadratics(counts):
    positive, zero, negative = counts
    values = [1.0 + k for k in range(positive)] + [0.0] * zero + [-1e-3 * (1 + k) for k in range(negative)]
    found = hessian_inertia(Point(*[0.0] * len(values)), quadratic(rotated(values)), None)
    assert (found.positive, found.zero, found.negative) == counts
    assert found.eigenvalues.tolist() == pytest.approx(sorted(values), abs=1e-14)
    assert (found.errors, found.unresolved) == ((0.0, 0.0, 0.0), 0.0)


def test_loss_without_curvature_has_zeros_only():
    found = hessian_inertia(Point(1.0, 2.0), lambda model, batch: model.theta.sum(), None)
    assert (found.positive, found.zero, found.negative, found.gap) == (0, 2, 0, None)


def test_monkey_saddle_off_its_centre():
    """x^3 - 3 x y^2 has the Hessian [[6x, -6y], [-6y, -6x]], with eigenvalues +-6 r."""
    found = hessian_inertia(
        Point(0.3, 0.4), lambda model, batch: model.theta[0] ** 3 - 3 * model.theta[0] * model.theta[1] ** 2, None
    )
    assert found.eigenvalues.tolist() == pytest.approx([-3.0, 3.0])


def test_split_neuron_at_a_critical_point():
    """y = a tanh(w x) fits its own data; split, it has the same gradient, 0, and one more zero eigenvalue."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    narrow = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    wide = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    y = narrow(x).detach()
    wide[0].weight.data = narrow[0].weight.data.repeat(2, 1)
    wide[0].bias.data = narrow[0].bias.data.repeat(2)
    wide[2].weight.data = narrow[2].weight.data @ torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    found = [hessian_inertia(model, fit, (x, y)) for model in (narrow, wide)]
    assert [(i.positive, i.zero, i.negative) for i in found] == [(3, 0, 0), (3, 3, 0)]  # no residual: H^(2) = 0
    assert criticality(wide, fit, (x, y)).l2 < 1e-15


def test_tolerance_decides_and_the_gap_shows_it():
    model, loss = (
        Point(0.0, 0.0, 0.0),
        quadratic(torch.diag(torch.tensor([1.0, 1e-6, -1e-9], dtype=torch.float64))),
    )
    found = hessian_inertia(model, loss, None)
    assert (found.positive, found.zero, found.negative) == (2, 0, 1)
    assert (found.largest, found.largest_zero) == (1.0, None)
    loose = hessian_inertia(model, loss, None, tolerance=1e-7)
    assert (loose.positive, loose.zero, loose.negative) == (2, 1, 0)
    assert (loose.largest_zero, loose.smallest_nonzero) == (1e-9, 1e-6)
    assert loose.gap == pytest.approx(1e3)
    assert "largest |lambda| counted as zero: 1.0e-09" in str(loose)
    assert loose.to_dict()["eigenvalues"] == [-1e-9, 1e-6, 1.0]


def test_tied_hessian_is_that_of_the_free_parameters():
    """L = (w w x - y)^2 with one weight used twice: d2L/dw2 = 2 (2 w x)^2 + 4 x (w^2 x - y)."""

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

        def forward(self, x):
            return self.a * self.b * x

    x, y = torch.tensor([2.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    found = hessian_inertia(Squared(), fit, (x, y))
    assert found.eigenvalues.tolist() == pytest.approx([2 * 4 + 4 * 2 * (0.5 - 3)])


def test_attention_and_recurrent_networks_have_second_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    attention = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True, norm_first=True)
    for model in (attention, nn.LSTM(4, 2, batch_first=True)):
        found = hessian_inertia(model, lambda m, b: sum(t.square().mean() for t in m(b)[:1]), x, method="exact")
        assert found.positive + found.zero + found.negative == sum(p.numel() for p in model.parameters())
        assert found.negative > 0


# Lanczos


def test_lanczos_is_exact_once_the_krylov_space_is_exhausted():
    """With one eigenvalue of each sign every probe of signs sees the same three Ritz values."""
    values = [2.0] * 5 + [0.0] * 9 + [-1.0] * 2
    found = hessian_inertia(
        Point(*[0.0] * 16),
        quadratic(torch.diag(torch.tensor(values, dtype=torch.float64))),
        None,
        method="lanczos",
    )
    # on a diagonal matrix v_i^2 = 1 for all i, so that the estimate has no variance
    assert (found.positive, found.zero, found.negative) == pytest.approx((5, 9, 2), abs=1e-10)
    assert max(found.errors) < 1e-10
    assert found.unresolved == 0
    assert found.eigenvalues is None


@pytest.fixture(scope="module")
def network():
    """1,539 parameters, away from any critical point: a spectrum that is dense about zero, the hard case."""
    model, batch = mlp((20, 32, 24, 3)), data(100, 20, 3)
    return model, batch, hessian_inertia(model, fit, batch, method="exact")


def test_lanczos_counts_are_within_the_stated_error(network):
    model, batch, exact = network
    assert exact.parameters == 1539
    found = hessian_inertia(model, fit, batch, method="lanczos", probes=8, steps=96)
    assert found.largest == pytest.approx(exact.largest, rel=1e-6)
    limit = found.tolerance
    true = [
        int((exact.eigenvalues > limit).sum()),
        int((exact.eigenvalues.abs() <= limit).sum()),
        int((exact.eigenvalues < -limit).sum()),
    ]
    assert min(true) > 200  # all three are there to be counted
    assert found.unresolved < 300
    for count, error, expected in zip(
        (found.positive, found.zero, found.negative), found.errors, true, strict=True
    ):
        assert error < 15
        assert abs(count - expected) < 3 * error + 0.1 * found.unresolved + 1
        assert abs(count - expected) < 50
    assert found.positive + found.zero + found.negative == pytest.approx(1539)


def test_lanczos_is_seeded(network):
    model, batch, _ = network
    first, again, other = (
        hessian_inertia(model, fit, batch, method="lanczos", probes=2, steps=8, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first.positive != other.positive
    assert "+-" in str(first)
    assert first.to_dict()["eigenvalues"] is None


# the user's model


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    batch = data(10, 3, 2)
    fit(model, batch).backward()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()

    def noisy(model, batch):
        batch[0].mul_(1.0)
        return fit(model, batch) + 0 * torch.rand(())

    def broken(model, batch):
        torch.rand(3)
        raise RuntimeError("no")

    inputs = batch[0].clone()
    first = criticality(model, noisy, batch)
    hessian_inertia(model, noisy, batch)
    hessian_inertia(model, noisy, batch, method="lanczos", probes=2, steps=3)
    with torch.no_grad(), pytest.raises(InputError, match="no"):
        criticality(model, broken, batch)
    with torch.inference_mode():
        assert criticality(model, noisy, batch) == first
    assert torch.get_rng_state().equal(state)
    assert batch[0].equal(inputs)
    assert batch[0].dtype == model[0].weight.dtype == torch.float32
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


# errors


@pytest.mark.parametrize(
    "loss, sentence",
    [
        (nn.MSELoss(), r"does not run on the float64 copy .*loss takes \(model, batch\)"),
        (lambda model, batch: model(batch[0]), r"no real scalar tensor \(shape \(10, 2\)\)"),
        (lambda model, batch: 1.0, r"no real scalar tensor \(float\)"),
        (lambda model, batch: fit(model, batch) * math.nan, "the loss is nan"),
        (lambda model, batch: torch.zeros(()), "does not depend on the model"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, sentence):
    for measure in (criticality, hessian_inertia):
        with pytest.raises(InputError, match=sentence):
            measure(mlp((3, 4, 2)), loss, data(10, 3, 2))


def test_a_model_that_cannot_be_judged_is_refused():
    with pytest.raises(InputError, match=r"expected an nn\.Module, got function"):
        criticality(fit, fit, data(10, 3, 2))
    with pytest.raises(InputError, match="no trainable parameter"):
        criticality(mlp((3, 4, 2)).requires_grad_(False), fit, data(10, 3, 2))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"method": "power"}, "no method 'power': choose one of auto, exact, lanczos"),
        ({"tolerance": -1.0}, "a tolerance of -1.0"),
        ({"tolerance": math.nan}, "a tolerance of nan"),
        ({"probes": 1}, "at least 2 probes"),
        ({"steps": 0}, "at least 1 step"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        hessian_inertia(mlp((3, 4, 2)), fit, data(10, 3, 2), **options)
