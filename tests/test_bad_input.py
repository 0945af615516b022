"""What cannot be used is refused in one sentence that says where and what to do; nothing of the user's changes."""

from __future__ import annotations

import copy
import re
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ep_prune as ep
from ep_prune import pipeline, trial
from tests.planted import inputs, plant_layer_, randomize_, relative


def model_of(roles: str = "a b a k.5") -> nn.Sequential:
    width = len(roles.split())
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    randomize_(model)
    plant_layer_(model[0], roles)
    return model


X = inputs((4,), 3)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a reduction must leave alone."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        "grads": [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
        ],
        "attributes": [
            {key: value for key, value in vars(m).items() if isinstance(value, int | str | float | tuple)}
            for m in model.modules()
        ],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "default": torch.get_default_dtype(),
    }


def unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert before["state"].keys() == after["state"].keys()
    for name, tensor in before["state"].items():
        bits = [t.reshape(-1).contiguous().view(torch.uint8) for t in (tensor, after["state"][name])]
        assert tensor.shape == after["state"][name].shape and torch.equal(*bits), name
    assert torch.equal(before["random"], after["random"])
    for (flag, grad), (flag_after, grad_after) in zip(before["grads"], after["grads"], strict=True):
        assert flag == flag_after
        assert (grad is None) == (grad_after is None)
        assert grad is None or torch.equal(grad, grad_after)
    for key in ("identity", "training", "hooks", "attributes", "grad mode", "default"):
        assert before[key] == after[key], key


def refused(
    model: Any, example: Any, *parts: str, error: type[ep.EpPruneError] = ep.InputError, **options: Any
) -> str:
    """Raises `error` in one sentence that has all `parts`; the model is as before."""
    before = snapshot(model) if isinstance(model, nn.Module) and not _has_no_data(model) else None
    with pytest.raises(error) as caught:
        ep.reduce(model, example, **options)
    text = str(caught.value)
    for part in parts:
        assert part in text, text
    assert "\n" not in text
    assert not re.search(r"\.\s+[A-Z]", text), f"more than one sentence: {text}"
    assert len(text) < 700
    if before is not None:
        unchanged(before, model)
    return text


def _has_no_data(model: nn.Module) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return any(t.is_meta or isinstance(t, nn.UninitializedParameter) for t in tensors)


# ---- inputs and options ---------------------------------------------------------------------------------------


def test_inputs_of_the_wrong_shape_name_the_layer() -> None:
    refused(model_of(), inputs((5,), 3), "at layer 0", "example_inputs", "pass inputs")


def test_inputs_of_the_wrong_shape_deep_inside() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(8, 4), nn.Linear(3, 2))).double()
    refused(model, torch.zeros(2, 8, dtype=torch.float64), "at layer 1.1", "pass inputs")


def test_inputs_of_the_wrong_type() -> None:
    refused(model_of(), X.float(), "at layer 0", "pass inputs of the shape, type")


def test_too_many_inputs() -> None:
    refused(model_of(), (X, X), "pass inputs")


@pytest.mark.parametrize("probes", [[], (), iter([])])
def test_empty_probes(probes: Any) -> None:
    refused(model_of(), X, "probes is empty", "at least one batch", tol=1e-3, probes=probes)


def test_probes_of_the_wrong_shape() -> None:
    refused(model_of(), X, "layer 0", tol=1e-3, probes=[inputs((5,), 3)])


@pytest.mark.parametrize("tol", [-1e-3, 1.0, 2.0, float("nan"), float("inf")])
def test_tolerance_out_of_range(tol: float) -> None:
    refused(model_of(), X, "tol=", "[0, 1)", tol=tol)


def test_protect_names_what_is_not_there() -> None:
    refused(model_of(), X, "'head'", "named_modules()", protect=["head"])


# ---- models that cannot be used -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda x: x, nn.Linear, "resnet18", None, {"weight": torch.zeros(2)}])
def test_no_module(model: Any) -> None:
    refused(model, X, "expected an nn.Module", "pass the model itself")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_weights_that_are_not_finite(value: float, name: str) -> None:
    model = model_of()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = value
    refused(model, X, f"'{name}'", "NaN or infinite", "reload")


def test_buffers_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    model[1].running_var[0] = float("nan")
    refused(model, X, "'1.running_var'", "NaN or infinite")


def test_a_layer_of_zero_width() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)).double()
    refused(model, X, "'0.weight'", "zero width", "remove this layer")


def test_a_model_on_the_meta_device() -> None:
    refused(model_of().to("meta"), X, "'0.weight'", "meta device", "load the weights")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_model_on_another_device_than_the_inputs() -> None:
    refused(model_of().cuda(), X, "at layer 0", "device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_model_on_an_accelerator_stays_there() -> None:
    model = model_of().cuda()
    narrow = ep.reduce(model, X.cuda()).model
    assert narrow[0].weight.is_cuda and narrow[0].out_features == 2


def test_a_scripted_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model_of())
        inner = nn.Sequential(torch.jit.script(nn.Linear(4, 4).double()), nn.Linear(4, 3).double())
    refused(scripted, X, "is scripted", "eager module")
    refused(inner, X, "layer '0' is scripted", "eager module")


def test_a_quantized_model() -> None:
    class Quantized(nn.Linear):
        pass

    Quantized.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"
    refused(
        nn.Sequential(nn.Linear(4, 5), Quantized(5, 3)).double(), X, "layer '1' is quantized", "before quantizing"
    )


def test_a_dynamically_quantized_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = torch.ao.quantization.quantize_dynamic(model_of().float(), {nn.Linear}, dtype=torch.qint8)
        except (RuntimeError, AttributeError) as error:
            pytest.skip(f"no dynamic quantization here: {error}")
    with pytest.raises(ep.InputError, match=r"layer '0' is quantized: .* before quantizing"):
        ep.reduce(model, X.float())


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_model() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)).double()
    refused(model, X, "'0.weight'", "is not initialized", "run the model once")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if h.sum() > 0:
            h = -h
        return self.head(h)


def test_a_model_that_cannot_be_exported() -> None:
    line = Branching.forward.__code__.co_firstlineno + 2
    refused(
        randomize_(Branching()),
        X,
        "cannot be exported",
        f"{__file__}:{line}",
        "reduce a submodule",
        error=ep.TraceError,
    )


def test_a_model_that_cannot_be_copied() -> None:
    model = model_of()
    model.cache = [model[0](X)]
    with pytest.raises(ep.InputError, match=r"cannot be copied .*: detach tensors") as caught:
        ep.reduce(model, X)
    assert "\n" not in str(caught.value)


# ---- models that look strange and can be used -----------------------------------------------------------------


def test_training_mode_is_kept() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
    )  # fmt: skip
    randomize_(model)
    plant_layer_(model[0], "a b c d e f")
    with torch.no_grad():
        model[1].weight[2] = 0.0
    model.train()
    model[1].eval()
    before = snapshot(model)
    result = ep.reduce(model, X)
    unchanged(before, model)
    assert result.model[0].out_features == 5
    assert [m.training for m in result.model.modules()] == [m.training for m in model.modules()]
    assert result.model.training and not result.model[1].training
    assert relative(copy.deepcopy(model).eval()(X), copy.deepcopy(result.model).eval()(X)) <= 1e-10


def test_gradients_and_no_grad_are_left_alone() -> None:
    model = model_of()
    model(X).sum().backward()
    before = snapshot(model)
    with torch.no_grad():
        ep.reduce(model, X)
        assert not torch.is_grad_enabled()
    unchanged(before, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = model_of("a b a -a k.5").to(dtype)
    result = ep.reduce(model, X.to(dtype))
    assert result.model[0].out_features == 2
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.verification.ok


def test_data_parallel() -> None:
    model = nn.DataParallel(model_of())
    before = snapshot(model)
    result = ep.reduce(model, X)
    unchanged(before, model)
    assert isinstance(result.model, nn.Sequential)
    assert result.model[0].out_features == 2
    assert "DataParallel unwrapped" in str(result.report)


def test_a_compiled_model() -> None:
    model = torch.compile(model_of())
    result = ep.reduce(model, X)
    assert isinstance(result.model, nn.Sequential)
    assert result.model[0].out_features == 2
    assert "torch.compile unwrapped" in str(result.report)


def _weight_norm(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


def _spectral_norm(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(layer)
        layer.train()(torch.zeros(1, 4, dtype=torch.float64))
        layer.eval()


def _mask(layer: nn.Linear) -> None:
    from torch.nn.utils import prune

    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0], [1.0], [1.0], [0.0]]).expand(4, 4))


PARAMETRIZED = {
    "weight norm, old": _weight_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm, old": _spectral_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "mask": _mask,
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_layers(kind: str) -> None:
    """Baked into plain weights in the narrow model, and left as they are in the user's."""
    model = model_of("a b a c")
    PARAMETRIZED[kind](model[0])
    model.eval()
    wide = model(X).detach()
    before = snapshot(model)
    result = ep.reduce(model, X)
    unchanged(before, model)
    assert torch.equal(model(X), wide)
    assert result.model[0].out_features == (2 if kind == "mask" else 3)  # the masked row is a constant
    assert type(result.model[0].weight) is nn.Parameter
    assert relative(wide, result.model(X)) <= 1e-10
    assert "baked in" in str(result.report)
    if kind == "mask":
        assert set(dict(model[0].named_parameters())) == {"weight_orig", "bias"}
        assert "weight_mask" in dict(model[0].named_buffers())
    with pytest.raises(ep.InputError, match="in place"):
        ep.reduce_(model, X)
    unchanged(before, model)


def test_a_norm_of_zero_is_named() -> None:
    model = model_of("a k.5 b")
    nn.utils.parametrizations.weight_norm(model[0])
    refused(model, X, "'0.weight'", "NaN or infinite")


# ---- the user's model, whatever happens -----------------------------------------------------------------------


def busy_model() -> nn.Module:
    """Hooks, gradients, flags, training mode: everything that could be lost."""
    model = model_of("a b a -b k.5")
    model[0].register_forward_hook(lambda *_: None)
    model[2].register_forward_pre_hook(lambda *_: None)
    model[2].bias.requires_grad = False
    model(X).sum().backward()
    model.train()
    model[1].eval()
    return model


@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_the_model_is_not_changed(tol: float) -> None:
    model = busy_model()
    before = snapshot(model)
    result = ep.reduce(model, X, tol=tol)
    unchanged(before, model)
    assert result.model[0].out_features == 2
    shared = {id(p) for p in model.parameters()} & {id(p) for p in result.model.parameters()}
    assert not shared
    pointers = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}
    assert not pointers


@pytest.mark.parametrize(
    "stage", ["trace", "number_channels", "select", "to_round", "apply_round_", "cost", "verify"]
)
@pytest.mark.parametrize("place", ["reduce", "reduce_"])
def test_the_model_is_not_changed_by_a_failure(stage: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        torch.rand(1)
        raise RuntimeError("half way")

    model = busy_model()
    before = snapshot(model)
    monkeypatch.setattr(trial if stage in ("apply_round_", "number_channels") else pipeline, stage, fail)
    with pytest.raises(RuntimeError, match="half way"):
        getattr(ep, place)(model, X)
    unchanged(before, model)


def test_in_place_the_model_is_not_changed_where_the_narrow_one_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = busy_model()
    before = snapshot(model)

    class Different:
        def raise_if_different(self) -> None:
            raise ep.VerificationError("the narrow model differs from the wide one at 'output'")

    monkeypatch.setattr(pipeline, "verify", lambda *args, **options: Different())
    with pytest.raises(ep.VerificationError, match="'output'"):
        ep.reduce_(model, X)
    unchanged(before, model)


def test_a_wrong_rewrite_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong in the prover, the narrow model is compared to the wide one before it is returned."""
    honest = trial.apply_round_

    def wrong(model: nn.Module, step: Any) -> None:
        honest(model, step)
        with torch.no_grad():
            model[2].weight[0, 0] += 1e-6

    model = model_of()
    monkeypatch.setattr(trial, "apply_round_", wrong)
    try:
        result = ep.reduce(model, X)
    except ep.VerificationError as error:
        assert "differs" in str(error)
    else:
        assert relative(model(X), result.model(X)) <= 1e-10
        assert not result.plan.rounds


def test_modules_of_the_result_are_the_users_classes() -> None:
    model = model_of()
    model.note = types.SimpleNamespace(author="user")
    narrow = ep.reduce(model, X).model
    assert [type(m) for m in narrow.modules()] == [type(m) for m in model.modules()]
    assert narrow.note.author == "user"
