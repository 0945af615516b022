"""Recurrent layers: random widenings are undone, what differs stays, modules stay true, others stand aside."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package

from planted import relative

import ep_prune as ep
from benchmarks.recurrent_networks import Tagger, Units, Widener, options_of, tagger, widened
from ep_prune.cost import cost
from ep_prune.numbering import recurrent as algebra

TOKENS = torch.randint(0, 11, (6, 7), generator=torch.Generator().manual_seed(0))
BOTH = {"num_layers": 2, "bidirectional": True}

CASES = {
    "lstm": (nn.LSTM, {}, "all"),
    "lstm, stacked": (nn.LSTM, {"num_layers": 2, "batch_first": True}, "last"),
    "lstm, both ways": (nn.LSTM, {"bidirectional": True}, "all"),
    "lstm, stacked, both ways": (nn.LSTM, BOTH, "last"),
    "lstm, cells": (nn.LSTM, BOTH, "cell"),
    "lstm, projected": (nn.LSTM, {"proj_size": 2}, "last"),
    "lstm, projected, cells": (nn.LSTM, {"proj_size": 2}, "cell"),
    "lstm, projected, stacked": (nn.LSTM, {"proj_size": 2, **BOTH}, "all"),
    "lstm, projected, three layers": (nn.LSTM, {"proj_size": 2, "num_layers": 3}, "cell"),
    "lstm without biases": (nn.LSTM, {"bias": False}, "all"),
    "gru": (nn.GRU, {}, "all"),
    "gru, stacked, both ways": (nn.GRU, {**BOTH, "batch_first": True}, "last"),
    "gru without biases": (nn.GRU, {"bias": False}, "last"),
    "rnn": (nn.RNN, {}, "all"),
    "rnn, stacked, both ways": (nn.RNN, BOTH, "last"),
    "relu": (nn.RNN, {"nonlinearity": "relu"}, "all"),
    "relu, stacked": (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}, "last"),
}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_a_widened_network_becomes_as_narrow_as_it_was(name):
    kind, options, use = CASES[name]
    narrow = tagger(kind, use, seed=1, **options)
    wide = widened(narrow, seed=1)
    assert wide.layers.hidden_size == 11 and narrow.layers.hidden_size == 5
    assert relative(wide(TOKENS), narrow(TOKENS)) < 1e-12
    result = ep.reduce(wide, TOKENS)
    assert shapes(result.model) == shapes(narrow)
    assert relative(wide(TOKENS), result.model(TOKENS)) < 1e-10
    assert result.report.barriers == {}
    longer = torch.randint(0, 11, (30, 30))
    assert relative(wide(longer), result.model(longer)) < 1e-10


@pytest.mark.parametrize("name", ["lstm, stacked, both ways", "gru", "rnn", "relu"])
def test_in_single_precision(name):
    kind, options, use = CASES[name]
    narrow = tagger(kind, use, seed=2, **options)
    wide = widened(narrow, seed=2).float()
    result = ep.reduce(wide, TOKENS)
    assert shapes(result.model) == shapes(narrow)
    assert relative(wide(TOKENS), result.model(TOKENS)) < 1e-5
    assert result.verification.ok


@pytest.mark.parametrize("name", ["lstm, projected, stacked", "gru", "rnn", "relu"])
def test_a_network_that_is_not_wide_stays(name):
    kind, options, use = CASES[name]
    narrow = tagger(kind, use, seed=3, **options)
    result = ep.reduce(narrow, TOKENS)
    assert shapes(result.model) == shapes(narrow) and not result.plan.rounds


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("entry", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_units_that_differ_in_one_number_stay(kind, entry):
    """Two split units of five, each with a weight that is shared out in another way by every row of W_hh: once a
    copy is off in one entry, its two halves are told apart, and with them those of whatever reads them."""
    wide = widened(tagger(kind, "all", seed=4), Widener(4, unread=0, zero=0, copies=2, factors=False))
    source = wide.units[0].source
    assert int((source == source[-1]).sum()) == 2
    assert ep.reduce(wide, TOKENS).model.layers.hidden_size == 5
    with torch.no_grad():
        wide.layers.get_parameter(entry).view(-1)[-1] += 1e-3
    result = ep.reduce(wide, TOKENS)
    assert result.model.layers.hidden_size == 7
    assert relative(wide(TOKENS), result.model(TOKENS)) < 1e-10


def test_units_that_only_their_pasts_tell_apart():
    """Equal rows of W_ih and biases: a chain, in which unit k differs from k + 1 only k steps back."""
    model = tagger(nn.RNN, "all", seed=5)
    layers = model.layers
    with torch.no_grad():
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            layers.get_parameter(name)[:] = layers.get_parameter(name)[:1].clone()
        layers.weight_hh_l0[:] = torch.diag(torch.full((4,), 0.5), -1)
    result = ep.reduce(model, TOKENS)
    assert result.model.layers.hidden_size == 5
    with torch.no_grad():
        layers.weight_hh_l0[0, 0] = 0.5  # now the chain ends in a loop, and all are equal
    result = ep.reduce(model, TOKENS)
    assert result.model.layers.hidden_size == 1
    assert relative(model(TOKENS), result.model(TOKENS)) < 1e-10


@pytest.mark.parametrize("read", [0.0, 0.5])
def test_a_cycle_that_nobody_reads_goes(read):
    model = tagger(nn.GRU, "all", seed=6)
    with torch.no_grad():
        model.layers.weight_hh_l0[:, 3:] = 0.0
        model.layers.weight_hh_l0.view(3, 5, 5)[:, 3, 4] = 1.0
        model.layers.weight_hh_l0.view(3, 5, 5)[:, 4, 3] = 1.0
        model.head.weight[:, 3:] = 0.0
        model.layers.weight_hh_l0[7, 4] = read  # one live unit reads unit 4, which reads 3
    result = ep.reduce(model, TOKENS)
    assert result.model.layers.hidden_size == (5 if read else 3)
    assert relative(model(TOKENS), result.model(TOKENS)) < 1e-10


@pytest.mark.parametrize("fed_back", [False, True])
def test_constants_of_plain_units(fed_back):
    """tanh(b) from the first step on: a bias to the head; to W_hh a step in time, which one unit stands for."""
    model = tagger(nn.RNN, "all", seed=7)
    layers = model.layers
    with torch.no_grad():
        layers.weight_ih_l0[2:4] = 0.0
        layers.weight_hh_l0[2:4] = 0.0
        layers.weight_hh_l0[:, 2:4] *= fed_back
    result = ep.reduce(model, TOKENS)
    assert result.model.layers.hidden_size == (4 if fed_back else 3)
    assert relative(model(TOKENS), result.model(TOKENS)) < 1e-10


@pytest.mark.parametrize("bias", [True, False])
def test_constants_that_a_layer_reads_go_into_its_bias(bias):
    """Of eight channels before it one is a constant, one a copy, one not read."""
    torch.manual_seed(0)
    front = nn.Linear(3, 8)
    model = nn.Sequential(front, nn.Sigmoid(), nn.LSTM(8, 5, bias=bias)).double()
    with torch.no_grad():
        front.weight[1] = 0.0
        front.weight[3], front.bias[3] = front.weight[2], front.bias[2]
        model[2].weight_ih_l0[:, 5] = 0.0
    x = torch.rand(6, 4, 3, dtype=torch.float64)
    result = ep.reduce(model, x)
    assert result.model[2].input_size == result.model[0].out_features == (5 if bias else 6)
    assert relative(model(x)[0], result.model(x)[0]) < 1e-10
    assert relative(model(x)[1][1], result.model(x)[1][1]) < 1e-10


class FromInput(Tagger):
    """Starts from what it is given."""

    def forward(self, x, h):
        return self.head(self.layers(self.table(x), h)[0])


def test_a_given_initial_state_is_a_barrier():
    wide = widened(tagger(nn.GRU, "all", seed=8), seed=8)
    wide.__class__ = FromInput
    result = ep.reduce(wide, (TOKENS, torch.zeros(1, 7, 11, dtype=torch.float64)))
    assert result.model.layers.hidden_size == 11
    assert any("initial state" in reason for reason in result.report.barriers.values())


def test_a_projection_stays_smaller_than_what_it_projects():
    """Three live projections of one live unit and another: torch has no projection that does not shrink."""
    model = tagger(nn.LSTM, "all", seed=9, proj_size=3)
    with torch.no_grad():
        model.layers.weight_hr_l0[:, 2:] = 0.0
        model.layers.weight_hr_l0[2] = model.layers.weight_hr_l0[0] + model.layers.weight_hr_l0[1]
    result = ep.reduce(model, TOKENS)
    assert (result.model.layers.hidden_size, result.model.layers.proj_size) == (4, 3)
    assert relative(model(TOKENS), result.model(TOKENS)) < 1e-10


def test_the_narrow_module_is_a_module_of_torch():
    narrow = tagger(nn.LSTM, "all", seed=10, proj_size=2, **BOTH)
    wide = widened(narrow, seed=10)
    result = ep.reduce(wide, TOKENS)
    made = result.model.layers
    assert (made.input_size, made.hidden_size, made.proj_size) == (4, 5, 2)
    assert all(a is b for a, b in zip(made._flat_weights, made.parameters(), strict=True))
    fresh = nn.LSTM(4, 5, **options_of(made)).double()
    fresh.load_state_dict(made.state_dict())
    x = torch.rand(6, 7, 4, dtype=torch.float64)
    assert torch.equal(fresh(x)[0], made(x)[0])
    trained = result.model.train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    before = copy.deepcopy(trained.state_dict())
    trained(TOKENS).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items()
               if not name.startswith("table"))  # fmt: skip
    copy.deepcopy(trained)(TOKENS)


def test_a_plan_applies_to_the_wide_model_again(tmp_path):
    wide = widened(tagger(nn.LSTM, "last", seed=11, **BOTH), seed=11)
    result = ep.reduce(wide, TOKENS)
    result.plan.save(tmp_path / "plan.safetensors")
    again = ep.Plan.load(tmp_path / "plan.safetensors").apply(wide)
    assert torch.equal(again(TOKENS), result.model(TOKENS))
    assert ep.verify(wide, again, TOKENS).ok
    with torch.no_grad():
        again.layers.weight_hh_l1[0, 0] += 0.1
    assert not ep.verify(wide, again, TOKENS).ok
    ep.reduce_(wide, TOKENS)
    assert torch.equal(wide(TOKENS), result.model(TOKENS))


def test_the_report_counts_units():
    result = ep.reduce(widened(tagger(nn.LSTM, "all", seed=12, num_layers=2), seed=12), TOKENS)
    spaces = {space.name: space for space in result.report.spaces}
    for name in ("layers.l0", "layers.l1"):
        space = spaces[name]
        assert (space.before, space.after) == (11, 5)
        assert sum(space.gone.values()) == 6 and space.gone["null"] == 3
    protected = ep.reduce(widened(tagger(nn.LSTM, "all", seed=12), seed=12), TOKENS, protect=["layers"])
    assert protected.model.layers.hidden_size == 11


def test_multiply_accumulates_are_counted_in_every_precision():
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        for dtype in (torch.float32, torch.float64):
            layer = kind(5, 6, num_layers=2, batch_first=True).to(dtype)
            found = cost(layer, torch.rand(2, 7, 5, dtype=dtype)).macs
            assert found == 7 * gates * 6 * (5 + 6 + 6 + 6)


def test_a_broken_refinement_is_noticed(monkeypatch):
    """Without the rows of W_hh every check fails: the trial finds the difference and rolls back."""
    model = tagger(nn.RNN, "all", seed=13)
    with torch.no_grad():
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            model.layers.get_parameter(name)[:] = model.layers.get_parameter(name)[:1].clone()
    monkeypatch.setattr(algebra._Units, "same", lambda self, other: True)
    original = algebra._Layer._refined

    def blind(self, old, read, offsets, errors, back):
        return original(self, old, read, offsets, errors, (torch.zeros_like(back[0]), back[1]))

    monkeypatch.setattr(algebra._Layer, "_refined", blind)
    result = ep.reduce(model, TOKENS)
    assert result.model.layers.hidden_size == 5
    assert any("rolled back" in reason for space in result.report.spaces for reason in space.stayed)


class Flanked(nn.Module):
    """Layers that other commands may narrow, before and behind a recurrent one."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 4))
        self.layers = nn.LSTM(4, 6, num_layers=2)
        self.back = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.back(self.layers(self.front(x))[0])


def test_other_commands_leave_recurrent_layers_alone_and_say_so():
    torch.manual_seed(0)
    model, x = Flanked(), torch.rand(5, 8, 3)
    batches = [torch.rand(5, 8, 3) for _ in range(8)]
    fitted = ep.compress(model, x, calibration=batches, keep_macs=0.8)
    assert fitted.model.layers.hidden_size == 6
    assert fitted.model.back[0].out_features < 16
    assert "layers" in str(fitted.report) and "recurrent" in str(fitted.report)
    wide, report = ep.embed(model.double(), x.double(), full_output=True)
    assert wide.layers.hidden_size == 6 and wide.back[0].out_features == 24
    assert relative(model(x.double()), wide(x.double())) < 1e-10
    assert "recurrent" in report.left_alone["layers"]
    widths = ep.effective_width(model, x.double(), tol=1e-2)
    assert "recurrent" in str(widths)
    assert ep.why(model, x.double(), "layers.l1").space == "layers.l1"
    assert ep.reduce(model, x.double(), domain=(0, 1)).verification.ok


def test_an_embedding_around_a_recurrent_layer_is_undone():
    torch.manual_seed(1)
    model, x = Flanked().double(), torch.rand(5, 8, 3, dtype=torch.float64)
    wide = ep.embed(model, x)
    assert shapes(ep.reduce(wide, x).model) == shapes(model)


def test_units_join_as_layers_do():
    both = Units.join([Units(torch.tensor([1, -1, 0]), torch.ones(3), 2), Units.same(2)])
    assert both.source.tolist() == [1, -1, 0, 2, 3] and both.T.shape == (5, 4)
