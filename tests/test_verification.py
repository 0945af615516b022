import copy
import itertools
import json
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ep_prune.errors import InputError, VerificationError
from ep_prune.verification import Verification, verify

QUICK = {"count": 4, "ascent_steps": 0, "reach": False}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.second(torch.relu(self.first(x)))))
        return self.head(x.mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))


def cnn() -> nn.Module:
    convs = (
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, 2),
        nn.BatchNorm2d(8),
    )
    return nn.Sequential(*convs, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(weights=None)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS = {
    "mlp": (mlp, (4, 7)),
    "cnn": (cnn, (4, 3, 10, 10)),
    "residual": (Residual, (4, 3, 8, 8)),
    "mobilenet": (mobilenet, (2, 3, 64, 64)),
    "transformer": (transformer, (3, 5, 16)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for parameter in model.parameters():
        if not parameter.any():  # a bias of zeros has no scale to be a thousandth of
            nn.init.normal_(parameter, 0, 0.1)
    return model, torch.randn(shape, dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """|gradient| of a random projection, by hand, with what is rounding of an exact zero set to zero."""
    model = copy.deepcopy(model)
    output = model(x.clone())
    (output * torch.randn(output.shape, dtype=output.dtype)).sum().backward()
    slopes = {name: p.grad.abs() for name, p in model.named_parameters() if p.grad is not None}
    floor = 1e-12 * max(slope.max() for slope in slopes.values())
    return {name: torch.where(slope > floor, slope, 0) for name, slope in slopes.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_one_weight_off_by_a_thousandth_fails(name):
    model, x = build(name)
    slopes = gradients(model, x)
    places = [(key, i) for key, slope in slopes.items() for i in slope.flatten().nonzero().flatten().tolist()]
    generator = torch.Generator().manual_seed(1)
    assert verify(model, copy.deepcopy(model), x, **QUICK).difference == 0
    for pick in torch.randint(len(places), (20,), generator=generator).tolist():
        key, i = places[pick]
        other = copy.deepcopy(model)
        weight = other.get_parameter(key).data.view(-1)
        weight[i] += 1e-3 * weight.abs().max()
        result = verify(model, other, x, **QUICK)
        assert not result.ok, f"{key}[{i}] off by 1e-3 passes: {result.difference}"
        with pytest.raises(VerificationError, match=r"output.*limit 1e-10"):
            result.raise_if_different()


def test_equal_models_pass_with_all_figures():
    model, x = build("cnn")
    result = verify(model, copy.deepcopy(model), x)
    assert result.ok and result.difference == result.stored_difference == 0
    assert result.samples == 4 + 3 * 32 + 4 and result.synthetic and result.limit == 1e-10
    assert result.reached == 1 and result.unreached == {} and result.notes == ()
    result.raise_if_different()
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True
    assert "same on 104 samples" in str(result) and "probes reach 100.00%" in str(result)


def test_an_exact_merge_of_twins_passes_and_is_seen_as_rounding_only():
    wide, x = build("mlp")
    with torch.no_grad():
        wide[0].weight[3], wide[0].bias[3] = wide[0].weight[2], wide[0].bias[2]
    kept = [i for i in range(12) if i != 3]
    narrow = copy.deepcopy(wide)
    narrow[0], narrow[2] = nn.Linear(7, 11).double(), nn.Linear(11, 9).double()
    with torch.no_grad():
        narrow[0].weight.copy_(wide[0].weight[kept])
        narrow[0].bias.copy_(wide[0].bias[kept])
        outgoing = wide[2].weight.clone()
        outgoing[:, 2] += outgoing[:, 3]
        narrow[2].weight.copy_(outgoing[:, kept])
        narrow[2].bias.copy_(wide[2].bias)
    assert verify(wide, narrow, x).ok
    for dtype in (torch.float32, torch.bfloat16):
        low = [copy.deepcopy(model).to(dtype) for model in (wide, narrow)]
        assert verify(*low, x.to(dtype)).ok
    with torch.no_grad():
        narrow[2].weight[:, 2] -= outgoing[:, 3] / 50
    assert not verify(wide, narrow, x).ok
    assert not verify(wide.float(), narrow.float(), x.float()).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_has_both_figures_and_a_corrupted_layer_fails(dtype):
    model, x = build("mlp")
    model, x = model.to(dtype), x.to(dtype)
    eps = torch.finfo(dtype).eps
    equal = verify(model, copy.deepcopy(model), x)
    assert equal.ok and equal.dtype == str(dtype)[6:]
    assert eps / 100 < equal.rounding < 10 * eps and equal.limit <= 0.1
    other = copy.deepcopy(model)
    other[2].weight.data *= 1 + max(0.3, 100 * eps)
    result = verify(model, other, x)
    assert not result.ok and result.difference > 4 * eps and result.stored_difference > 4 * eps


def test_a_user_limit_judges_the_float64_figure():
    model, x = build("mlp")
    other = copy.deepcopy(model)
    other[4].bias.data += 1e-5
    difference = verify(model, other, x).difference
    assert 1e-6 < difference < 1e-3
    assert verify(model, other, x, limit=2 * difference).ok
    assert not verify(model, other, x, limit=difference / 2).ok


def test_the_difference_is_the_definition():
    model, x = nn.Linear(3, 2).double(), torch.ones(1, 3, dtype=torch.float64)
    other = copy.deepcopy(model)
    other.bias.data[1] += 0.25
    result = verify(model, other, {"input": x.bool().double()}, probes=[{"input": 1000 * x}], ascent_steps=0)
    assert result.difference == pytest.approx(0.25 / model(1000 * x).abs().max().item(), rel=1e-12)
    assert not result.synthetic and result.per_output[0].shape == (1, 2)


def test_ascent_finds_what_random_probes_hardly_show():
    class Bump(nn.Module):
        def __init__(self, height: float):
            super().__init__()
            self.height = nn.Parameter(torch.tensor(height, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return 1 + self.height * torch.exp(x.sum(1) - 10)

    x = torch.randn(8, 16, dtype=torch.float64)
    without = verify(Bump(0.0), Bump(1e-6), x, ascent_steps=0)
    found = verify(Bump(0.0), Bump(1e-6), x, ascent_steps=16)
    assert found.worst_probe == "ascent" and found.difference > 5 * without.difference


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(3, 4).double(), change
        self.linear.weight.data.fill_(0.5)
        self.linear.bias.data.fill_(0.1)

    def forward(self, x):
        return self.change(self.linear(x))


def sometimes_nan(y: Tensor) -> Tensor:
    return torch.where(y > 1, torch.nan, y)


@pytest.mark.parametrize(
    ("wide", "narrow", "reason"),
    [
        (lambda y: y, lambda y: y[:, :2], r"float64\[2, 4\] in the wide model, float64\[2, 2\]"),
        (lambda y: y, lambda y: (y, y), "the wide model returns output, the narrow one"),
        (lambda y: {"a": y}, lambda y: {"b": y}, r"output\.a, the narrow one output\.b"),
        (lambda y: y, lambda y: y > 0, "bool"),
        (lambda y: y, lambda y: None, "no tensor"),
        (lambda y: y, lambda y: y @ y, "the narrow model raises RuntimeError"),
        (lambda y: y * torch.nan, lambda y: y * torch.nan, "no finite number"),
        (lambda y: y * 0, lambda y: y * 1e-20, "is 0 on every probe"),
        (lambda y: None, lambda y: None, "no tensor"),
    ],
)
def test_what_cannot_be_compared_is_different_and_says_why(wide, narrow, reason):
    result = verify(Returns(wide), Returns(narrow), torch.ones(2, 3, dtype=torch.float64), count=2, ascent_steps=2)
    assert not result.ok and result.difference == float("inf")
    with pytest.raises(VerificationError, match=reason):
        result.raise_if_different()
    assert result.to_dict()["difference"] == "Infinity" and str(result)


def test_nan_and_infinities():
    x = torch.randn(4, 3, dtype=torch.float64)
    for broken in (sometimes_nan, lambda y: torch.where(y > 1, torch.inf, y)):
        assert verify(Returns(lambda y: y), Returns(broken), x).difference == float("inf")
        result = verify(Returns(broken), Returns(broken), x)
        assert result.ok and result.nonfinite > 0
    masked = Returns(lambda y: torch.where(y > 1, -torch.inf, y))
    assert not verify(masked, Returns(lambda y: torch.where(y > 1, torch.inf, y)), x).ok


def test_integer_outputs_count_unequal_elements():
    x = build("mlp")[1]
    wide, narrow = (
        Returns(lambda y: y.argmax(1)),
        Returns(lambda y: (y + torch.tensor([0, 9, 0, 0])).argmax(1)),
    )
    assert verify(wide, copy.deepcopy(wide), x[:, :3]).ok
    result = verify(wide, narrow, x[:, :3])
    assert result.difference == 1 and not result.ok
    assert result.reached is None and any("reached" in note for note in result.notes)


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, ids, mask, extra=None, scale=1.0):
        h = (self.embedding(ids) * mask.unsqueeze(-1)).sum(1) * scale + extra["bias"][0]
        return Answer(self.head(h).float(), (h, h.argmax(1)))


def test_keyword_inputs_with_nested_values_and_dataclass_outputs():
    torch.manual_seed(0)
    model = Keywords().double()
    inputs = {
        "ids": torch.randint(0, 11, (4, 5)),
        "mask": torch.rand(4, 5) > 0.3,
        "extra": {"bias": [torch.randn(4, 6)]},
        "scale": 0.5,
    }
    kept = copy.deepcopy(inputs)
    result = verify(model, copy.deepcopy(model), inputs, probes=[{**inputs, "labels": torch.zeros(4)}])
    assert result.ok and result.notes == () and result.samples == 4 + 4 + 3 * 32 + 4
    names = [output.name for output in result.per_output]
    assert names == ["output.logits", "output.hidden[0]", "output.hidden[1]"]
    assert torch.equal(inputs["ids"], kept["ids"]) and torch.equal(
        inputs["extra"]["bias"][0], kept["extra"]["bias"][0]
    )
    other = copy.deepcopy(model)
    other.head.weight.data[0, 0] += 1e-7  # .float() in the model would hide less than 1e-7 of float64
    assert 1e-9 < verify(model, other, inputs).difference < 1e-6
    assert not verify(model, other, inputs).ok


def test_float64_is_float64_although_the_model_asks_for_float32():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.offset = torch.full((3,), 0.1)

        def forward(self, x):
            start = torch.zeros(3) + self.offset
            y = (self.linear(x).to(torch.float32) @ torch.eye(3, dtype=torch.float32)).float()
            return y + start

    torch.manual_seed(0)
    model = Casting().double()
    other = copy.deepcopy(model)
    other.linear.bias.data += 1e-12
    result = verify(model, other, torch.randn(2, 3, dtype=torch.float64), ascent_steps=0)
    assert 1e-14 < result.difference < 1e-11
    assert verify(Casting(), Casting(), torch.randn(2, 3)).ok is False  # two seeds: other weights


def test_random_state_training_flags_gradients_and_parameters_are_untouched():
    model, x = build("cnn")
    model.train()
    model[0].eval()
    model[3].weight.requires_grad_(False)
    model[8](torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    x.requires_grad_(True)

    def snapshot():
        return (
            [module.training for module in model.modules()],
            [
                (p.requires_grad, None if p.grad is None else p.grad.clone(), p._version)
                for p in model.parameters()
            ],
            copy.deepcopy(model.state_dict()),
            [len(module._forward_hooks) for module in model.modules()],
            torch.get_rng_state(),
            x.detach().clone(),
        )

    class Noisy(nn.Module):
        def forward(self, x):
            return torch.rand(2, 3) @ x  # raises, after it has drawn

    def same(a, b):
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    before = snapshot()
    other = copy.deepcopy(model)
    other[8].bias.data += 1e-3
    verify(model, other, x, count=4, probes=DataLoader(TensorDataset(x.detach()), shuffle=True))
    assert same(before, snapshot()) and x.grad is None
    assert verify(model, Noisy(), x, count=4).difference == float("inf")
    assert same(before, snapshot())
    with pytest.raises(InputError, match="does not take the example inputs"):
        verify(Noisy(), model, x)
    assert same(before, snapshot())
    with torch.inference_mode():
        assert verify(model, model, x.detach(), count=4).reached == 1
    assert same(before, snapshot())


def test_dropout_and_forward_noise_do_not_count_as_a_difference():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    model.append(Returns(lambda y: y + torch.rand_like(y)))
    assert verify(model, copy.deepcopy(model), torch.randn(4, 4).double()).difference == 0


def test_user_probes_of_a_loader_are_used_and_streamed():
    model, x = build("mlp")
    y = torch.zeros(12, dtype=torch.long)
    loader = DataLoader(TensorDataset(torch.randn(12, 7, dtype=torch.float64), y), batch_size=4)
    result = verify(model, copy.deepcopy(model), x, probes=loader)
    assert result.ok and not result.synthetic and result.samples == 4 + 12 + 96 + 4
    endless = ((10 * x, None) for _ in itertools.count())
    other = copy.deepcopy(model)
    other[4].weight.data += 1e-3
    result = verify(model, other, x, probes=endless, **QUICK)
    assert result.worst_probe == "user" and "64 batches" in result.notes[0]
    assert next(endless)[0] is not None  # not exhausted


@pytest.mark.parametrize(
    ("probes", "text"),
    [
        ([], "holds no batch"),
        (iter(()), "holds no batch"),
        (torch.ones(2, 7), "iterable of batches"),
        ([{"x": torch.ones(2, 7)}], "not like the example"),
        ([torch.ones(2, 5)], "does not take the user inputs"),
    ],
)
def test_unusable_probes_are_refused(probes, text):
    model, x = build("mlp")
    with pytest.raises(InputError, match=text):
        verify(model, model, x, probes=probes)


def test_unusable_options_and_models_are_refused():
    model, x = build("mlp")
    for options in ({"count": 0}, {"ascent_steps": -1}, {"limit": -1.0}, {"limit": float("nan")}):
        with pytest.raises(InputError, match="at least"):
            verify(model, model, x, **options)
    model.register_forward_hook(lambda *_: None)
    model.cache = model[0].weight * 2  # a tensor with a history has no deep copy
    with pytest.raises(InputError, match="the narrow model cannot be copied"):
        verify(mlp().double(), model, x)


def test_dead_units_are_named_as_unreached():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    model[0].bias.data[:2] = -1e3
    result = verify(model, copy.deepcopy(model), torch.randn(3, 4, dtype=torch.float64))
    assert result.ok and list(result.unreached)[:1] == ["0.bias"]
    assert result.unreached == {"0.bias": 0.75, "0.weight": 0.75, "2.weight": 0.75}
    assert result.reached == pytest.approx(1 - (2 + 8 + 4) / (40 + 18))
    assert "least: 0.bias (75.0%)" in str(result)
    assert verify(model, model, torch.randn(3, 4).double(), reach=False).reached is None


def test_a_key_bias_has_no_gradient_but_rounding():
    model, x = build("transformer")
    unreached = verify(model, model, x).unreached
    assert unreached == {f"layers.{i}.self_attn.in_proj_bias": pytest.approx(2 / 3) for i in range(2)}


def test_inputs_without_a_batch_dimension_keep_their_shape():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 3).double()  # takes one image of (3, height, width)
    x = torch.randn(3, 6, 6, dtype=torch.float64)
    result = verify(model, copy.deepcopy(model), x)
    assert result.ok and result.samples == 1 + 3 * 4 + 4 and result.reached == 1
    assert any("'normal' were skipped" in note for note in result.notes)

    class Scaled(nn.Linear):
        def forward(self, x, t):
            return super().forward(x) * t

    scaled = Scaled(3, 2).double()
    assert verify(scaled, copy.deepcopy(scaled), (torch.randn(5, 3).double(), torch.tensor(0.5).double())).ok


def test_the_result_is_a_function_of_the_seed():
    model, x = build("mlp")
    other = copy.deepcopy(model)
    other[0].weight.data += 1e-4
    results = [verify(model, other, x, seed=seed, ascent_steps=0) for seed in (0, 0, 1)]
    assert results[0] == results[1] and results[0].difference != results[2].difference
    assert isinstance(results[0], Verification)


def test_complex_scalar_empty_and_opaque_values():
    class Opaque:
        pass

    wide = Returns(lambda y: {"a": torch.complex(y, y), "n": 3, "f": 0.5, "s": Opaque(), "none": None})
    x = torch.randn(3, 3, dtype=torch.float64)
    result = verify(wide, copy.deepcopy(wide), x, count=2)
    assert result.ok and any("output.s is not compared" in note for note in result.notes)
    assert [output.name for output in result.per_output] == ["output.a", "output.n", "output.f"]
    other = copy.deepcopy(wide)
    other.linear.bias.data[0] += 1e-6
    assert not verify(wide, other, x, count=2).ok
    without = nn.Sequential(nn.Flatten())
    assert verify(without, without, torch.zeros(2, 3)).reached == 1


def test_a_stored_overflow_of_the_narrow_model_fails_although_float64_agrees():
    class Scale(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factors = nn.Parameter(torch.tensor([factor, 1 / factor], dtype=torch.float16))

        def forward(self, x):
            return x * self.factors[0] * self.factors[1]

    x = torch.rand(4, 3).half() + 1
    assert verify(Scale(2.0), Scale(4.0), x).ok
    result = verify(Scale(1.0), Scale(2.0**15), 8 * x)  # 8 * 2**15 is inf in float16
    assert result.difference < 1e-3 < result.limit and not result.ok
    with pytest.raises(VerificationError, match="inf relative in float16"):
        result.raise_if_different()


def test_token_models_get_random_integers_and_no_ascent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    ids = torch.tensor([[0, 3, 8], [1, 1, 2]])
    result = verify(model, copy.deepcopy(model), ids)
    assert result.ok and result.samples == 2 + 32 and result.notes == () and result.reached == 1
    other = copy.deepcopy(model)
    other[0].weight.data[5] += 1e-6  # a token that the example does not hold
    assert verify(model, other, ids).worst_probe == "integer"


def test_float32_is_judged_in_float64_too():
    model, x = build("mlp")
    other = copy.deepcopy(model.float())
    other[4].bias.data += 1e-6
    result = verify(model, other, x.float(), limit=1e-8)
    assert result.limit < result.difference < result.stored_limit and not result.ok
    assert result.stored_difference < result.stored_limit
    with pytest.raises(VerificationError, match=r"in float64 on probe .* limit 1e-08"):
        result.raise_if_different()


def test_a_model_that_writes_into_its_input_does_not_change_the_users():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    x, probe = -torch.ones(2, 3).double(), -torch.ones(4, 3).double()
    other = copy.deepcopy(model)
    other[1].bias.data += 1e-3
    result = verify(model, other, x, probes=[probe])
    assert not result.ok and result.notes == () and result.worst_probe
    assert x.max() == -1 and probe.max() == -1
