"""Float64 without copies: what comes out is what `model.double()` gives, and the user's weights are left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ep_prune
from benchmarks import memory
from ep_prune import find
from ep_prune import sharing as shared_copies
from ep_prune.numbering import contraction, number_channels, uses
from ep_prune.selection import select
from ep_prune.sharing import copy_of, prepare_and_run
from ep_prune.trace import trace
from ep_prune.verification import compare, sharing, verify, widened
from ep_prune.verification.float64 import InFloat64, Slopes, weights_cast_again


class Everything(nn.Module):
    """Casts, dtypes that are asked for, tensors born in forward, buffers, a plain attribute, a tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.linspace(0, 1, 8))
        self.plain = torch.full((8,), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.table(x).float()) + torch.arange(8) / 3 + torch.zeros(8).to(self.inner.weight.dtype)
        y = F.linear(y.to(torch.float32), self.inner.weight.half().T, self.inner.bias) * self.shift + self.plain
        if y.dtype == torch.float32:
            y = y + 1
        y = (
            torch.cat([y, self.inner.weight[:1].expand_as(y).type_as(y)], 1)
            * torch.finfo(self.inner.bias.dtype).eps
        )
        parts = torch.einsum("bti,oi->bto", y, self.inner.weight.view(8, 8))
        return self.head(parts + self.inner.weight.new_ones(8) + torch.full((8,), 0.1, dtype=torch.float32))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True), nn.GRU(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.layer = nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.attention(x, x, x)[0])


def convolutions() -> nn.Module:
    parts = nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.BatchNorm2d(6), nn.PReLU(6), nn.ConvTranspose2d(6, 4, 2)
    model = nn.Sequential(*parts, nn.GroupNorm(2, 4), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(4, 3, 5, 5))
    return model


ZOO = {
    "everything": (Everything, lambda: torch.randint(11, (3, 4))),
    "recurrent": (Recurrent, lambda: torch.randn(2, 3, 5)),
    "attention": (Attention, lambda: torch.randn(3, 2, 8)),
    "convolutions": (convolutions, lambda: torch.randn(2, 3, 5, 5)),
}


def case(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, draw = ZOO[name]
    x = draw()
    return build().to(dtype).eval(), x.double() if x.is_floating_point() else x


def same(x: Tensor, y: Tensor, name: str) -> bool:
    """Bit by bit; the products in a GRU depend on how memory happens to be aligned, in the last bits."""
    last = 1e-15 if name == "recurrent" else 0.0
    return x.dtype == y.dtype == torch.float64 and bool((x - y).abs().max() <= last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_outputs_and_gradients_are_those_of_a_model_in_float64(name: str, dtype: torch.dtype) -> None:
    model, x = case(name, dtype)
    x.requires_grad_(x.is_floating_point())
    double = widened(model)
    shared = widened(model, share=True)
    assert all(p.dtype == torch.float64 for p in double.parameters())
    assert [p.data_ptr() for p in shared.parameters()] == [p.data_ptr() for p in model.parameters()]
    with torch.no_grad(), InFloat64():
        assert same(shared(x), double(x), name)

    found: dict[int, Tensor] = {}
    slopes, casts = Slopes(lambda p, slope: found.__setitem__(id(p), slope)), {}
    with weights_cast_again(casts), InFloat64(slopes, casts):
        ours = shared(x)
    with InFloat64():
        wanted = double(x)
    assert same(ours, wanted, name)
    mine = [x] if x.requires_grad else []
    expected = torch.autograd.grad(wanted.square().sum(), [*mine, *double.parameters()], allow_unused=True)
    slopes.climb(ours.square().sum(), [*mine, *shared.parameters()])
    for p, slope in zip([*mine, *shared.parameters()], expected, strict=True):
        assert (slope is None) == (id(p) not in found)
        if slope is not None:
            assert found[id(p)].dtype == torch.float64
            torch.testing.assert_close(found[id(p)], slope, rtol=1e-13, atol=1e-15 * float(slope.abs().max()))


def test_without_casts_the_outputs_are_others() -> None:
    """The check above can fail: in float32 the outputs differ."""
    model, x = case("convolutions", torch.float32)
    assert not torch.equal(model(x.float()).double(), widened(model)(x))


def test_autograd_saves_no_weight_in_float64() -> None:
    model, x = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4))), torch.randn(2, 300).double()
    kept: list[int] = []

    def size(saved: Tensor) -> Tensor:
        kept.append(saved.numel() if saved.dtype == torch.float64 else 0)
        return saved

    shared, casts = widened(model, share=True), {}
    slopes = Slopes(lambda *_: None)
    with torch.autograd.graph.saved_tensors_hooks(size, size), InFloat64(slopes):
        shared(x)
    assert max(kept) == 300 * 300
    with weights_cast_again(casts), InFloat64(slopes, casts):
        y = shared(x)
    saved = [getattr(y.grad_fn, name) for name in dir(y.grad_fn) if name.startswith("_raw_saved")]
    assert saved
    assert not casts


def test_reach_is_the_same_in_one_pass_and_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = case("everything", torch.float32)
    model.inner.weight.data[:, 2] = 0.0
    once = verify(model, copy.deepcopy(model), x, share=True)
    monkeypatch.setattr(compare, "REACH_ROOM", 0)
    twice = verify(model, copy.deepcopy(model), x, share=True)
    monkeypatch.undo()
    copied = verify(model, copy.deepcopy(model), x)
    assert once.reached is not None
    assert once.reached == copied.reached
    assert once.unreached == copied.unreached
    assert twice.reached == once.reached
    assert once.per_output == copied.per_output


class Clipping(nn.Module):
    """Writes into its weight as it runs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table, self.linear = how, nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "table":
            return self.linear(self.table(x))
        if self.how == "data":
            self.linear.weight.data.clamp_(-0.1, 0.1)
        elif self.how == "view":
            with torch.no_grad():
                self.linear.weight.view(-1)[:3].mul_(0.5)
        return self.linear(F.one_hot(x, 4).float())


@pytest.mark.parametrize("how", ["table", "data", "view"])
def test_a_model_that_writes_into_its_weights_is_copied(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_copies, "SMALL", 0)
    model, x = Clipping(how), torch.tensor([0, 1, 3])
    before = copy.deepcopy(model.state_dict())
    working, _, shares = prepare_and_run(model, x)
    assert not shares
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(
        torch.cat([p.reshape(-1) for p in working.parameters()]),
        torch.cat([p.reshape(-1) for p in model.parameters()]),
    )
    assert prepare_and_run(Clipping("not"), x)[2]


@pytest.mark.parametrize("small", [0, shared_copies.SMALL])
def test_the_narrow_model_has_memory_of_its_own(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_copies, "SMALL", small)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].weight.data[:, 3] = 0.0
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 4)
    assert prepare_and_run(model, x)[2] == (small == 0)
    result = ep_prune.reduce(model, x)
    assert result.model[0].out_features == 7
    assert result.model[4].weight is not model[4].weight
    with torch.no_grad():
        for p in result.model.parameters():
            p.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_share_parameters_and_keep_ties() -> None:
    model = Everything()
    for copied in (sharing(model), copy_of(model, share=True)):
        assert copied.head.weight is copied.table.weight
        assert copied.head.weight is not model.head.weight
        assert copied.head.weight.data_ptr() == model.head.weight.data_ptr()
        assert copied.shift.data_ptr() != model.shift.data_ptr()
    assert copy_of(model, share=False).head.weight.data_ptr() != model.head.weight.data_ptr()


@pytest.mark.parametrize("name", ["decoder", "convolutions"])
def test_nothing_depends_on_the_room(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are cast again in blocks of a few numbers give the same selection and nearly the same rows."""
    if name == "decoder":
        model, inputs = memory.planted(2, 128, 50, 16)[0], torch.randint(50, (2, 6))
    else:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.Sigmoid(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()
        )
        with torch.no_grad():
            model[0].weight[3], model[0].bias[3] = -model[0].weight[1], -model[0].bias[1]
            model[0].weight[4] = 0.0
            model[2].weight[2] = 0.0
        inputs = torch.randn(2, 2, 6, 6)
    graph = trace(model.eval(), inputs)
    kept = select(number_channels(graph))
    monkeypatch.setattr(uses, "ROOM", 0)
    for module in (find, contraction, uses):
        monkeypatch.setattr(module, "BLOCK", 100)
    n = number_channels(graph)
    assert not any(port.use.keep for port in n.ports)
    assert max(len(port.use.blocks()) for port in n.ports) > 1
    again = select(n)
    assert torch.equal(kept.kept, again.kept)
    assert int(kept.kept.sum()) < len(kept.kept)
    for old, new in zip(kept.numbering.ports, n.ports, strict=True):
        assert torch.equal(old.sends.sent, new.sends.sent)
        assert torch.equal(old.out.rows.atoms, new.out.rows.atoms)
        torch.testing.assert_close(old.net, new.net, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(old.size, new.size, rtol=1e-14, atol=0.0)


def test_the_benchmark_runs(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--layers", "1", "--width", "128", "--vocabulary", "64", "--positions", "16", "--threads", "1"]
    assert memory.main([*shape, "--limit", "1e9", "--out", str(tmp_path)]) == 0
    assert '"planted width": 448' in (tmp_path / "memory.json").read_text()
