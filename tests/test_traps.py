"""Cases in which other tools give a wrong network: each has its name here."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ep_prune as ep
from tests import families
from tests.planted import generator, inputs, kept, plant_, plant_layer_, randomize_, relative

IMAGE = (2, 7, 7)


def same(wide: nn.Module, narrow: nn.Module, *batches: Tensor) -> None:
    """Outputs equal to 1e-10 relative."""
    with torch.no_grad():
        for batch in batches:
            assert relative(wide(batch), narrow(batch)) <= 1e-10


def reduced(model: nn.Module, shape: tuple[int, ...], **options: Any) -> ep.Result:
    """Reduce at a batch of 3; check the outputs there, at another batch size and at batch 1."""
    options.setdefault("verify_result", False)
    result = ep.reduce(model, inputs(shape, 3), **options)
    same(model, result.model, *(inputs(shape, batch, seed=batch) for batch in (3, 5, 1)))
    return result


def mlp(roles: str, act: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    width = len(roles.split())
    model = nn.Sequential(nn.Linear(4, width), act(), nn.Linear(width, 3))
    randomize_(model, seed)
    plant_layer_(model[0], roles)
    return model


def cnn(roles: str, padding: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    width = len(roles.split())
    model = nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=padding, bias=bias))
    randomize_(model, seed)
    plant_layer_(model[0], roles)
    return model


# ---- what is alive --------------------------------------------------------------------------------------------


def test_a_filter_whose_sum_is_zero_is_alive() -> None:
    model = randomize_(nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Conv1d(3, 2, 1)))
    with torch.no_grad():
        model[0].weight[1] = torch.tensor([[1.0, -1.0]])
        model[0].bias[1] = 0.0
        model[0].weight[2] = 0.0
    result = reduced(model, (1, 6))
    assert kept(model[0], result.model[0]) == [0, 1]


def test_outgoing_weights_that_cancel_are_dead_together() -> None:
    model = mlp("a b a c")
    with torch.no_grad():
        model[2].weight[:, 2] = -model[2].weight[:, 0]
    result = reduced(model, (4,))
    assert kept(model[0], result.model[0]) == [1, 3]


def test_a_layer_that_nobody_needs_keeps_one_channel() -> None:
    model = mlp("a b c")
    with torch.no_grad():
        model[2].weight.zero_()
    result = reduced(model, (4,))
    assert result.model[0].out_features == 1


@pytest.mark.parametrize("distance", [1e-4, 1e-6])
@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_near_equal_neurons_with_large_opposite_weights_are_not_merged(distance: float, tol: float) -> None:
    """(s(w x + d v x) - s(w x)) / d is a derivative: the pair is the function."""
    model = mlp("a a b")
    with torch.no_grad():
        model[0].weight[1] += distance * torch.tensor([1.0, -1.0, 0.5, 0.3])
        model[2].weight[:, 0] = torch.tensor([1.0, -2.0, 0.5]) / distance
        model[2].weight[:, 1] = -model[2].weight[:, 0]
    result = ep.reduce(model, inputs((4,), 3), tol=tol, probes=[inputs((4,), 64, seed=1)] if tol else None)
    x = inputs((4,), 64, seed=2)
    assert relative(model(x), result.model(x)) <= (tol * 3 if tol else 1e-10)
    assert kept(model[0], result.model[0]) == [0, 1, 2]


def test_near_equal_neurons_in_float32() -> None:
    """A distance of 1e-6 is rounding in float32, but not with weights of 1e6 behind it."""
    model = mlp("a a b").float()
    with torch.no_grad():
        model[0].weight[1] *= 1 + 1e-6
        model[2].weight[:, 0] = 1e6
        model[2].weight[:, 1] = -1e6
    x = inputs((4,), 64, seed=2).float()
    result = ep.reduce(model, x[:3])
    assert result.verification.ok
    wide, narrow = copy.deepcopy(model).double(), copy.deepcopy(result.model).double()
    assert relative(wide(x.double()), narrow(x.double())) <= result.verification.limit
    assert relative(model(x), result.model(x)) <= result.verification.stored_limit


def test_copies_up_to_float32_rounding_are_merged() -> None:
    model = mlp("a b 3a -2a", nn.ReLU).float()
    result = ep.reduce(model, inputs((4,), 3).float())
    assert result.model[0].out_features == 3
    assert result.verification.ok


# ---- constants ------------------------------------------------------------------------------------------------


def test_a_constant_in_front_of_zero_padding_is_kept() -> None:
    model = cnn("a b k.5", padding=1)
    result = reduced(model, IMAGE)
    assert kept(model[0], result.model[0]) == [0, 1, 2]


def test_constants_in_front_of_zero_padding_are_led_by_one_of_them() -> None:
    model = cnn("k.5 a k.75 b k.25", padding=1)
    result = reduced(model, IMAGE)
    assert kept(model[0], result.model[0]) == [1, 2, 3]


def test_a_constant_without_padding_goes_into_a_new_bias() -> None:
    model = cnn("a b k.5", padding=0, bias=False)
    result = reduced(model, IMAGE)
    assert result.model[0].out_channels == 2
    assert result.model[2].bias is not None


def test_constants_that_cancel_tap_by_tap_go() -> None:
    model = cnn("a k.5 b k.25", padding=1)
    with torch.no_grad():
        model[2].weight[:, 3] = -2 * model[2].weight[:, 1]
    result = reduced(model, IMAGE)
    assert kept(model[0], result.model[0]) == [0, 2]


def test_constants_that_cancel_in_the_sum_alone_stay() -> None:
    model = cnn("a k.5 b", padding=1)
    with torch.no_grad():
        model[2].weight[:, 1] -= model[2].weight[:, 1].mean((1, 2), keepdim=True)
    result = reduced(model, IMAGE)
    assert kept(model[0], result.model[0]) == [0, 1, 2]


def test_a_constant_read_at_the_center_tap_alone_goes() -> None:
    model = cnn("a k.5 b", padding=1)
    with torch.no_grad():
        center = model[2].weight[:, 1, 1, 1].clone()
        model[2].weight[:, 1] = 0.0
        model[2].weight[:, 1, 1, 1] = center
    result = reduced(model, IMAGE)
    assert kept(model[0], result.model[0]) == [0, 2]


def test_a_constant_goes_into_the_mean_of_the_batch_norm_that_follows() -> None:
    model = randomize_(
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        )
    )  # fmt: skip
    plant_layer_(model[0], "a k.5 b")
    result = reduced(model, IMAGE)
    assert kept(model[0], result.model[0]) == [0, 2]
    assert result.model[2].bias is None


def test_a_constant_through_an_average_that_counts_its_padding() -> None:
    def make(count: bool) -> nn.Sequential:
        model = nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.AvgPool2d(3, 2, 1, count_include_pad=count),
            nn.Flatten(),
            nn.Linear(27, 2),
        )
        randomize_(model)
        plant_layer_(model[0], "a k.5 b")
        return model

    assert reduced(make(False), IMAGE).model[0].out_channels == 2
    assert reduced(make(True), IMAGE).model[0].out_channels == 3


def test_a_constant_through_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.ConvTranspose2d(3, 2, 3, stride=2))
    randomize_(model)
    plant_layer_(model[0], "a k.5 b")
    result = reduced(model, IMAGE)
    assert kept(model[0], result.model[0]) == [0, 1, 2]


def test_another_resolution_after_the_reduction() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    randomize_(model)
    plant_layer_(model[0], "a k.5 b 2a k.75 a")
    result = reduced(model, IMAGE)
    assert kept(model[0], result.model[0]) == [0, 2, 4]
    same(model, result.model, inputs((2, 11, 5), 2), inputs((2, 3, 3), 1))


def test_batch_size_one_as_the_example() -> None:
    model = cnn("a b 2a", padding=1)
    result = ep.reduce(model, inputs(IMAGE, 1))
    assert result.model[0].out_channels == 2
    same(model, result.model, inputs(IMAGE, 4), inputs(IMAGE, 1))


# ---- deep copies ----------------------------------------------------------------------------------------------


def test_scaled_copies_in_a_deep_network_that_no_cosine_sees() -> None:
    """Copies in the second layer read copies of the first with weights of their own: not parallel at all."""
    model = randomize_(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), seed=3
    )
    plant_layer_(model[0], "a b c 2a 3b .5c")
    scales = torch.tensor([1, 1, 1, 2, 3, 0.5], dtype=torch.float64)
    with torch.no_grad():
        weight = model[2].weight
        for place, source, factor in ((3, 0, 2.0), (4, 1, 0.25), (5, 2, 1.0)):
            net = (weight[source] * scales).reshape(2, 3).sum(0) * factor
            # the same net weights, split at random between the copies
            weight[place, 3:] = torch.randn(3, generator=generator(place), dtype=torch.float64)
            weight[place, :3] = net - weight[place, 3:] * scales[3:]
            model[2].bias[place] = model[2].bias[source] * factor
    cosines = F.cosine_similarity(weight[:3], weight[3:]).abs().detach()
    assert float(cosines.min()) < 0.9
    result = reduced(model, (4,))
    assert (result.model[0].out_features, result.model[2].out_features) == (3, 3)


# ---- parameters with several names or uses --------------------------------------------------------------------


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.inner = nn.Linear(6, 5)
        self.back = nn.Linear(5, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.head(self.back(torch.tanh(self.inner(h))) + h)


def tied() -> TiedLanguageModel:
    model = randomize_(TiedLanguageModel())
    plant_layer_(model.inner, "a b a -b c")
    with torch.no_grad():
        for place, source in ((4, 0), (5, 1)):  # a stream with copies
            model.table.weight[:, place] = model.table.weight[:, source]
            model.back.weight[place] = model.back.weight[source]
            model.back.bias[place] = model.back.bias[source]
    return model


def test_an_embedding_tied_to_the_head_stays_tied() -> None:
    model = tied()
    x = inputs((5,), 3, tokens=True)
    result = ep.reduce(model, x)
    narrow = result.model
    assert narrow.head.weight is narrow.table.weight
    assert narrow.inner.out_features == 3
    assert narrow.head.in_features == narrow.table.embedding_dim == narrow.table.weight.shape[1]
    same(model, narrow, inputs((5,), 4, seed=1, tokens=True))


class Shared(nn.Module):
    """Two linear layers with one weight, and a layer of its own behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(4, 5)
        self.second.weight = self.first.weight
        self.a = nn.Linear(5, 2)
        self.b = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.first(x))) + self.b(torch.tanh(self.second(x * x)))


def test_a_tied_table_is_known_to_have_another_reader() -> None:
    """Not left to the check on outputs, which rolls the stream back and blames a size in the code."""
    result = ep.reduce(tied(), inputs((5,), 3, tokens=True), verify_result=False)
    assert "rolled back" not in str(result.report)


def test_two_layers_with_one_weight() -> None:
    model = randomize_(Shared())
    plant_layer_(model.first, "a b a c a")
    with torch.no_grad():  # the last channel is a copy in the first layer alone
        model.second.bias.copy_(model.first.bias)
        model.second.bias[4] += 1.0
    result = reduced(model, (4,))
    assert result.model.first.weight is result.model.second.weight
    assert kept(model.second, result.model.second) == [0, 1, 3, 4]
    assert result.model.first.out_features == result.model.second.out_features == 4


class Twice(nn.Module):
    def __init__(self, equal: bool) -> None:
        super().__init__()
        self.equal = equal
        self.stem = nn.Linear(4, 6)
        self.layer = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        other = h if self.equal else torch.tanh(h.flip(0) * 0.5)
        return self.head(torch.tanh(self.layer(h)) + torch.sigmoid(self.layer(other)))


@pytest.mark.parametrize("equal", [True, False])
def test_a_module_called_twice(equal: bool) -> None:
    model = randomize_(Twice(equal))
    plant_layer_(model.stem, "a b a c d b")
    plant_layer_(model.layer, "a b c a b", seed=1)
    result = reduced(model, (4,))
    assert result.model.layer.out_features == 3
    assert result.model.stem.out_features == 4
    assert result.model.layer.in_features == 4


def test_a_module_called_twice_where_copies_differ_at_one_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.head(torch.tanh(self.one(x)))) + self.head(torch.tanh(self.two(x)))

    model = randomize_(Model())
    plant_layer_(model.one, "a a b")
    plant_layer_(model.two, "a c b", seed=1)
    result = reduced(model, (4,))
    assert result.model.one.out_features == result.model.two.out_features == result.model.head.in_features == 3


def test_a_tensor_joined_with_itself() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 4, 2)
            self.head = nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.stem(x))
            return self.head(torch.cat([h, h], 1))

    model = randomize_(Model())
    plant_layer_(model.stem, "a b 2a c")
    with torch.no_grad():  # c is read on the left alone, b on the right alone
        model.head.weight[:, 7] = 0.0
        model.head.weight[:, 1] = 0.0
    result = reduced(model, IMAGE)
    assert kept(model.stem, result.model.stem) == [0, 1, 3]
    assert result.model.head.in_channels == 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.one = nn.Conv2d(6, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.two(F.relu(self.one(x)))))
        return self.head(x.mean((2, 3)))


def test_a_residual_stream_with_dead_biased_channels() -> None:
    """Channels 1 and 4 are constants in both branches, 2 in one of them alone."""
    model = randomize_(Residual())
    with torch.no_grad():
        for norm, dead in ((model.norm, (1, 2, 4)), (model.norm2, (1, 4))):
            norm.weight[list(dead)] = 0.0
            norm.bias[list(dead)] = 0.5
        model.norm.bias[4] = 0.8
    result = reduced(model, IMAGE)
    narrow = result.model
    # In front of the padding of `one`, 2 leads the constants: it stays in any case.
    assert kept(model.stem, narrow.stem) == [0, 2, 3, 5]
    assert narrow.two.out_channels == narrow.norm2.num_features == narrow.head.in_features == 4


# ---- parameters that are no layer's ----------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3)
        self.gamma = nn.Parameter(torch.empty(1, 5, 1, 1))
        self.register_buffer("shift", torch.empty(5, 1, 1))
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.stem(x)) * self.gamma + self.shift)


def test_a_bare_parameter_and_a_buffer_follow() -> None:
    model = randomize_(Bare())
    plant_layer_(model.stem, "a b 2a k.5 c")
    with torch.no_grad():
        model.gamma[0, 4] = 0.0
    result = reduced(model, IMAGE)
    assert kept(model.stem, result.model.stem) == [0, 1]
    assert result.model.gamma.shape == (1, 2, 1, 1)
    assert result.model.shift.shape == (2, 1, 1)
    assert isinstance(result.model.gamma, nn.Parameter)
    assert "shift" in dict(result.model.named_buffers())


class Caching(nn.Module):
    """Keeps what it once computed of a parameter in a dict, as LeViT does its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.offset = nn.Parameter(torch.randn(8))
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "offset" not in self.cache:
            self.cache["offset"] = (2 * self.offset).detach()
        return self.second((self.first(x) + self.cache["offset"]).relu())


def test_a_tensor_that_is_no_parameter_or_buffer_keeps_its_size() -> None:
    torch.manual_seed(0)
    model, x = Caching().eval(), torch.randn(3, 6)
    with torch.no_grad():
        model.first.weight[3] = 0.0
    for _ in range(2):  # without what is kept, and with it
        result = ep.reduce(model, x, progress=False)
        assert result.model.first.out_features == 8
        assert "no parameter or buffer" in str(result.report)
        model(x)


@pytest.mark.parametrize("frozen", ["all", "some"])
def test_frozen_parameters_are_narrowed_and_stay_frozen(frozen: str) -> None:
    model = mlp("a b a k.5")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = frozen == "some" and name != "0.weight"
    result = reduced(model, (4,))
    assert result.model[0].out_features == 2
    flags = {name: parameter.requires_grad for name, parameter in result.model.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_hooks_are_kept() -> None:
    model = mlp("a b a")
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)) and None)
    result = reduced(model, (4,))
    seen.clear()
    result.model(inputs((4,), 3))
    assert seen == [(3, 2)]


def test_a_hook_that_changes_the_output_is_part_of_the_function() -> None:
    model = mlp("a b a", nn.ReLU)
    shift = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    model[0].register_forward_hook(lambda module, args, output: output + shift)
    result = reduced(model, (4,))
    assert result.model[0].out_features == 3


class Auxiliary(nn.Module):
    """A second head that is read in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)
        self.auxiliary = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.stem(x))
        y = self.head(torch.tanh(self.inner(h)))
        return (y, self.auxiliary(h)) if self.training else y


def test_an_auxiliary_head_still_works_in_training_mode() -> None:
    model = randomize_(Auxiliary())
    plant_layer_(model.stem, "a b a c b")
    plant_layer_(model.inner, "a b a c", seed=1)
    result = reduced(model, (4,))
    assert result.model.inner.out_features == 3
    x = inputs((4,), 3)
    wide, narrow = copy.deepcopy(model).train()(x), copy.deepcopy(result.model).train()(x)
    assert relative(wide[0], narrow[0]) <= 1e-10
    assert relative(wide[1], narrow[1]) <= 1e-10
    assert set(result.report.untraced) == {"auxiliary.weight", "auxiliary.bias"}


# ---- sizes in the user's code ---------------------------------------------------------------------------------


class Literal(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.channels = 8
        self.stem = nn.Conv2d(2, 8, 2)
        self.inner = nn.Conv2d(8, 6, 1)
        inputs = {"slice": 4 * 36, "view": 6 * 36, "quarter": 6 * 36, "batch": 6 * 36}[kind]
        self.head = nn.Linear(inputs, 3)
        self.gate = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        if self.kind == "slice":
            return self.head(h[:, :4].flatten(1)) + self.gate(h[:, 4:].mean((2, 3)))
        if self.kind == "quarter":
            groups = h.view(h.shape[0], 4, self.channels // 4, 6, 6)
            h = groups.flip(2).flatten(1, 2)
        h = F.relu(self.inner(h))
        if self.kind == "view":
            return self.head(h.view(-1, 216))
        return self.head(h.flatten(1))


@pytest.mark.parametrize("kind", ["view", "slice", "quarter"])
def test_a_size_in_the_code_is_rolled_back_and_named(kind: str) -> None:
    model = randomize_(Literal(kind))
    plant_layer_(model.stem, "a b 2a 2b c d e f" if kind == "quarter" else "a b 2a c d 2d e 3e")
    plant_layer_(model.inner, "a b a 2b c d", seed=1)
    result = reduced(model, IMAGE)
    narrow = result.model
    space = "inner" if kind == "view" else "stem"
    free = "stem" if kind == "view" else "inner"
    assert narrow.get_submodule(space).out_channels == model.get_submodule(space).out_channels
    if kind != "slice":
        assert narrow.get_submodule(free).out_channels == {"stem": 5, "inner": 4}[free]
    record = next(record for record in result.report.spaces if record.name == space)
    assert "size" in " ".join(record.stayed)
    assert "written in the code" in str(result.report)


# ---- forms of inputs and outputs ------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Output)


class Forms(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem = nn.Linear(4, 6)
        self.inner = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.stem(x))
        hidden = torch.tanh(self.inner(h))
        logits = self.head(hidden)
        if self.form == "dict":
            return {"logits": logits, "hidden": hidden}
        if self.form == "tuple":
            return logits, (hidden, [logits + 1])
        return Output(logits, hidden)


@pytest.mark.parametrize("form", ["dict", "tuple", "dataclass"])
def test_structured_outputs(form: str) -> None:
    model = randomize_(Forms(form))
    plant_layer_(model.stem, "a b a b c -c")
    plant_layer_(model.inner, "a b a a b", seed=1)
    result = ep.reduce(model, inputs((4,), 3))
    assert result.model.stem.out_features == 3
    assert result.model.inner.out_features == 5  # an output
    x = inputs((4,), 5)
    wide, narrow = model(x), result.model(x)
    assert type(wide) is type(narrow)
    if form == "dict":
        assert wide.keys() == narrow.keys()
        pairs = [(wide[key], narrow[key]) for key in wide]
    elif form == "tuple":
        pairs = [(wide[0], narrow[0]), (wide[1][0], narrow[1][0]), (wide[1][1][0], narrow[1][1][0])]
    else:
        pairs = [(wide.logits, narrow.logits), (wide.hidden, narrow.hidden)]
    assert all(relative(a, b) <= 1e-10 for a, b in pairs)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 5)
        self.right = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.tanh(self.left(x) + scale * self.right(y)))


@pytest.mark.parametrize("named", [False, True])
def test_two_inputs(named: bool) -> None:
    model = randomize_(TwoInputs())
    plant_layer_(model.left, "a b a -b c")
    plant_layer_(model.right, "a b a -b a", seed=1)
    x, y = inputs((4,), 3), inputs((3,), 3, seed=1)
    result = ep.reduce(model, {"x": x, "y": y} if named else (x, y))
    assert result.model.left.out_features == result.model.right.out_features == 3
    x, y = inputs((4,), 5, seed=2), inputs((3,), 5, seed=3)
    assert relative(model(x, y), result.model(x=x, y=y)) <= 1e-10


# ---- what comes after -----------------------------------------------------------------------------------------


def test_the_narrow_model_trains() -> None:
    model = cnn("a b 2a k.5", padding=1)
    narrow = reduced(model, IMAGE).model.train()
    optimizer = torch.optim.SGD(narrow.parameters(), lr=1e-2)
    x = inputs(IMAGE, 4)
    losses = []
    for _ in range(3):
        loss = narrow(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in narrow.parameters()]
        assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_gradients_by_the_input_and_of_unmerged_parameters_are_equal() -> None:
    model = mlp("a b a -b")
    narrow = reduced(model, (4,)).model
    grads = []
    for network in (model, narrow):
        x = inputs((4,), 5).requires_grad_()
        network(x).square().sum().backward()
        grads.append((x.grad, network[2].bias.grad))
    for wide, small in zip(*grads, strict=True):
        assert relative(wide, small) <= 1e-10


def plan_models() -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    return {
        "mlp": (lambda: mlp("a b a -b k.5"), inputs((4,), 3)),
        "tied": (tied, inputs((5,), 3, tokens=True)),
        "residual": (lambda: planted_residual(), inputs(IMAGE, 3)),
        "new bias": (lambda: cnn("a b k.5", 0, bias=False), inputs(IMAGE, 3)),
        "shared": (lambda: planted_shared(), inputs((4,), 3)),
    }


def planted_residual() -> nn.Module:
    model = randomize_(Residual())
    with torch.no_grad():
        for norm in (model.norm, model.norm2):
            norm.weight[1] = norm.bias[1] = 0.0
    plant_layer_(model.one, "a b 2a b")
    return model


def planted_shared() -> nn.Module:
    model = randomize_(Shared())
    plant_layer_(model.first, "a b a c a")
    with torch.no_grad():
        model.second.bias.copy_(model.first.bias)
    return model


@pytest.mark.parametrize("name", list(plan_models()))
def test_plans_and_files(name: str, tmp_path: Path) -> None:
    """A plan gives the same narrow weights on a fresh copy, from memory and from a file, and no other weights."""
    make, x = plan_models()[name]
    result = ep.reduce(make(), x, verify_result=False)
    narrow = result.model.state_dict()
    assert sum(t.numel() for t in narrow.values()) < sum(t.numel() for t in make().state_dict().values())

    assert relative(make()(x), result.model(x)) <= 1e-10

    def check(other: nn.Module) -> None:
        assert other.state_dict().keys() == narrow.keys()
        assert all(torch.equal(value, narrow[key]) for key, value in other.state_dict().items())
        assert torch.equal(other(x), result.model(x))
        shared = [[a is b for b in other.parameters()] for a in other.parameters()]
        assert shared == [[a is b for b in result.model.parameters()] for a in result.model.parameters()]

    check(result.plan.apply(make()))
    result.plan.save(tmp_path / "plan.safetensors")
    check(ep.Plan.load(tmp_path / "plan.safetensors").apply(make()))

    other = randomize_(make(), seed=99)
    with pytest.raises(ep.PlanError, match="weights"):
        result.plan.apply(other)
    result.plan.apply(copy.deepcopy(make()), recheck=x)

    ep.save(result, tmp_path / "model.safetensors")
    check(ep.load(lambda: randomize_(make(), seed=98), tmp_path / "model.safetensors"))
    assert not (tmp_path / "model.safetensors.partial").exists()


def test_files_that_hold_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"no safetensors")
    with pytest.raises(ep.PlanError, match="is not a safetensors file"):
        ep.load(lambda: mlp("a"), path)
    with pytest.raises(ep.PlanError, match="is not a safetensors file"):
        ep.load(lambda: mlp("a"), tmp_path / "absent")
    with pytest.raises(ep.PlanError, match="is not a safetensors file"):
        ep.Plan.load(path)
    result = ep.reduce(mlp("a b a"), inputs((4,), 3), verify_result=False)
    ep.save(result, path)
    with pytest.raises(ep.PlanError, match="another model"):
        ep.load(lambda: cnn("a b a", 0), path)


def test_reduce_in_place() -> None:
    model = mlp("a b a -b k.5")
    wide = copy.deepcopy(model)
    result = ep.reduce_(model, inputs((4,), 3), verify_result=False)
    assert result.model is model
    assert model[0].out_features == 2
    same(wide, model, inputs((4,), 5))


@pytest.mark.parametrize("seed", [1, 2, 4])  # more of them in test_rules
def test_a_second_reduction_changes_nothing(seed: int) -> None:
    model, x, _ = families.network(seed)
    with torch.no_grad():  # something to do for the first one
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        weights = [weight for weight in weights if weight.shape[1] > 1]
        for weight in weights[1:]:
            weight[:, -1] = 0.0
    first = ep.reduce(model, x, verify_result=False)
    second = ep.reduce(first.model, x, verify_result=False)
    assert not second.plan.rounds
    before, after = first.model.state_dict(), second.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_report() -> None:
    model = mlp("a b a -b k.5 n")
    with torch.no_grad():
        model[2].weight[:, 5] = 0.0
    result = reduced(model, (4,))
    text = str(result.report)
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["space", "width"]
    assert any(line.startswith("0 ") and "6 -> 2" in line for line in lines)
    assert "parameters" in text and "MACs" in text and "exact" in text
    known = result.report.to_dict()
    known = json.loads(json.dumps(known, allow_nan=False))
    gone = known["spaces"][0]["gone"]
    assert gone == {"null": 1, "constant": 1, "split": 1, "scaled": 0, "flipped": 1, "linear": 0}
    assert known["spaces"][0]["after"] == 2
    assert known["parameters_after"] == sum(p.numel() for p in result.model.parameters())


def test_the_report_counts_channels_that_go_together() -> None:
    model = randomize_(Literal("quarter"))
    result = reduced(model, IMAGE)
    record = next(record for record in result.report.spaces if record.name == "stem")
    assert (record.before, record.after) == (8, result.model.stem.out_channels)


def test_protect_keeps_a_layer() -> None:
    model = randomize_(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)))
    plant_layer_(model[0], "a b a b c")
    plant_layer_(model[2], "a b a b c", seed=1)
    result = reduced(model, (4,), protect=["0"])
    assert (result.model[0].out_features, result.model[2].out_features) == (5, 3)
    assert "protected" in str(result.report)


def test_nothing_to_do() -> None:
    model = mlp("a b c")
    result = reduced(model, (4,))
    assert not result.plan.rounds
    assert all(torch.equal(result.model.state_dict()[key], value) for key, value in model.state_dict().items())


def test_a_model_without_channels() -> None:
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    assert reduced(model, IMAGE).report.before.parameters == 0


def test_columns_of_a_bare_weight() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 5))
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(x @ self.weight))

    model = randomize_(Model())
    plant_(model.weight.detach().T, None, "a b 2a b c")
    assert reduced(model, (4,)).model.weight.shape == (4, 3)


def test_a_bias_that_is_broadcast_over_rows_is_no_bias_of_a_channel() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(5, 3)
            self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(1, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(torch.addmm(self.bias, torch.tanh(self.first(x)), self.weight)))

    result = ep.reduce(Broadcast().double(), torch.randn(3, 4, dtype=torch.float64))
    assert "its bias is not one number an output" in str(result.report)


def test_a_model_of_two_types_is_loaded_as_it_was_saved(tmp_path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3).double()
            self.first.weight.data[1], self.first.bias.data[1] = self.first.weight[0], self.first.bias[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)).double())

    result = ep.reduce(Mixed(), torch.randn(3, 4))
    ep.save(result, tmp_path / "mixed.safetensors")
    loaded = ep.load(Mixed, tmp_path / "mixed.safetensors")
    for name, tensor in result.model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
