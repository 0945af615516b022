"""Operands of different rank, tables read at fixed places, and other shapes in which networks add up tensors."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor, nn

import ep_prune as ep
from ep_prune import pipeline, trial
from tests.planted import randomize_, relative

F64 = torch.float64


class Added(nn.Module):
    """relu(one(x) + two(y)), read by a head; x and y may have different ranks and batches of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.relu(self.one(x) + self.two(y)))


def added() -> Added:
    """Six channels in the stream, of which 0, 1 and 4 are needed: 2 = 2 * 0, 3 = 1, 5 is read by nobody."""
    model = Added()
    randomize_(model)
    with torch.no_grad():
        for layer in (model.one, model.two):
            for part in (layer.weight, layer.bias):
                part[2], part[3] = 2 * part[0], part[1]
        model.head.weight[:, 5] = 0
    return model


_SHAPES = ((2, 5, 3), (5, 3), (1, 5, 3), (2, 1, 3), (3,), (1, 3), (2, 1, 5, 3))


@pytest.mark.parametrize("one, two", [pair for pair in itertools.permutations(_SHAPES, 2) if len(pair[0]) > 1])
def test_operands_of_different_rank(one: tuple[int, ...], two: tuple[int, ...]) -> None:
    model = added()
    inputs = (torch.randn(one, dtype=F64), torch.randn(two, dtype=F64))
    result = ep.reduce(model, inputs)
    assert result.model.head.in_features == 3
    assert relative(model(*inputs), result.model(*inputs)) < 1e-12


class Positions(nn.Module):
    """Tokens plus positions, which come from `how`; hidden channels as in `added`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.token, self.place, self.head = nn.Linear(3, 6), nn.Embedding(7, 6), nn.Linear(6, 2)
        self.register_buffer("ids", torch.arange(7).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        if self.how == "arange":
            places = self.place(torch.arange(size))
        elif self.how == "arange as long, unsqueezed":
            places = self.place((torch.arange(0, size, dtype=torch.float32) + 1).long().unsqueeze(0))
        elif self.how == "buffer":
            places = self.place(self.ids[:, :size])
        elif self.how == "parameter":
            places = self.place.weight[torch.arange(size)]
        else:
            places = self.place(torch.zeros(size, dtype=torch.long) + 2)
        return self.head(torch.relu(self.token(x) + places))


@pytest.mark.parametrize("how", ["arange", "arange as long, unsqueezed", "buffer", "parameter", "zeros"])
def test_lookups_at_fixed_places(how: str) -> None:
    model = Positions(how)
    randomize_(model)
    with torch.no_grad():
        for part in (model.token.weight, model.token.bias, model.place.weight.T):
            part[2], part[3] = 2 * part[0], part[1]
        model.head.weight[:, 5] = 0
    x = torch.randn(2, 5, 3, dtype=F64)
    result = ep.reduce(model, x)
    assert result.model.head.in_features == 3 and result.model.place.embedding_dim == 3
    for length in (3, 5, 6):  # what was claimed holds for other lengths
        x = torch.randn(4, length, 3, dtype=F64)
        assert relative(model(x), result.model(x)) < 1e-12


@pytest.mark.parametrize("how", ["arange", "parameter"])
def test_positions_that_differ_only_at_other_lengths_are_told_apart(how: str) -> None:
    model = Positions(how)
    randomize_(model)
    with torch.no_grad():
        for part in (model.token.weight, model.token.bias, model.place.weight[:5].T):
            part[2] = 2 * part[0]
    result = ep.reduce(model, torch.randn(2, 5, 3, dtype=F64))
    assert result.model.head.in_features == 6


def test_positions_that_follow_the_batch_stay_unknown() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.table, self.head = nn.Linear(3, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.one(x) + self.table(torch.arange(x.shape[0]))))

    model = Rows()
    randomize_(model)
    result = ep.reduce(model, torch.randn(2, 3, dtype=F64))
    x = torch.randn(7, 3, dtype=F64)
    assert relative(model(x), result.model(x)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_flattened_input_is_embedded_in_linear_time(bias: bool) -> None:
    """2048 inputs behind a flatten took a minute with a dense pseudo-inverse, whose time grows as their cube."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(32 * 64, 8, bias=bias), nn.Tanh(),
        nn.Linear(8, 2),
    )  # fmt: skip
    randomize_(model)
    x = torch.randn(3, 1, 8, 8, dtype=F64)
    start = time.perf_counter()
    wide, report = ep.embed(model, x, widths={"0": 48}, critical=False, full_output=True)
    assert time.perf_counter() - start < 20
    assert not report.left_alone and wide[0].out_channels == 48
    assert relative(model(x), wide(x)) < 1e-11


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight has the inputs first, and which reads its own width."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = x.size()[:-1] + (self.nf,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(8, 4), Conv1D(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c_proj(new_gelu(self.c_fc(x)))


def test_the_mlp_of_gpt_2_is_reduced_and_embedded() -> None:
    model = Mlp()
    randomize_(model)
    with torch.no_grad():
        model.c_fc.weight[:, 3], model.c_fc.bias[3] = model.c_fc.weight[:, 1], model.c_fc.bias[1]
        model.c_fc.weight[:, 5] = 0
        model.c_proj.weight[6] = 0
    x = torch.randn(2, 5, 4, dtype=F64)
    result = ep.reduce(model, x)
    assert (result.model.c_fc.nf, result.model.c_fc.nx) == (5, 4)
    assert (result.model.c_proj.nf, result.model.c_proj.nx) == (4, 5)
    assert relative(model(x), result.model(x)) < 1e-12
    wide = ep.embed(result.model, x, widths={"c_fc": 9})
    assert wide.c_fc.nf == 9 and wide.c_proj.nx == 9
    assert relative(model(x), wide(x)) < 1e-11


class Twice(nn.Module):
    """One weight without a bias reads two layers, whose third channels are two different constants."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.one(x))).abs() + self.head(torch.tanh(self.two(x)))


def test_a_constant_that_no_bias_can_take_is_named_so() -> None:
    model = Twice()
    randomize_(model)
    with torch.no_grad():
        model.one.weight[2] = model.two.weight[2] = 0
    x = torch.randn(5, 3, dtype=F64)
    result = ep.reduce(model, x)
    assert relative(model(x), result.model(x)) < 1e-12
    (space,) = (space for space in result.report.spaces if space.name == "one")
    assert space.stayed == {
        "distinct and read": 3,
        "a constant that no bias can take: zero padding follows, or there is no bias": 1,
    }


class Distances(nn.Module):
    """A bias by distance whose bucket is computed of places alone, as in T5: chosen, negated, cast."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lin, self.head = nn.Embedding(9, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        far = torch.arange(5) - 2
        near = torch.where(far > 0, far, -far)
        bucket = near.masked_fill(near > 1, 7)
        return self.head(torch.relu(self.lin(x) + self.table(bucket)))


def test_choices_and_signs_of_known_tensors() -> None:
    model = Distances()
    randomize_(model)
    with torch.no_grad():
        model.head.weight[:, 4] = 0
    x = torch.randn(2, 5, 3, dtype=F64)
    result = ep.reduce(model, x)
    assert relative(model(x), result.model(x)) < 1e-12
    assert result.model.lin.out_features == 5


def test_a_round_that_no_rollback_mends_is_given_up_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is tried differs: nothing is taken, nothing is raised, and every space says why."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2))
    randomize_(model)
    with torch.no_grad():  # copies whose weights cancel, and their constants: folded even where all channels stay
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[2].weight[:, 1] = -model[2].weight[:, 0]
    x = torch.randn(5, 3, dtype=F64)
    assert ep.reduce(model, x).model[0].out_features == 3
    for module in (pipeline, trial):
        monkeypatch.setattr(module, "attempt_round", lambda *_: "the output would change by 1.0e+00")
    result = ep.reduce(model, x)
    assert not result.plan.rounds
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), result.model.parameters(), strict=True))
    assert "rolled back" in str(result.report)


class Scalars(nn.Module):
    """A layer of one channel for one sample without a batch, and numbers without axes made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.first(x)
        return z.sum().abs(), torch.relu(z.squeeze())


def test_numbers_without_axes() -> None:
    model, x = Scalars().double(), torch.randn(3, dtype=F64)
    narrow = ep.reduce(model, x).model
    assert all(torch.equal(a, b) for a, b in zip(model(x), narrow(x), strict=True))
