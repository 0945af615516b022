"""Residual branches that go as a whole, `min_width=0`: where nothing is lost, where they stay, and the plan."""

import copy
import json

import pytest
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor, nn

import ep_prune as ep
from ep_prune.cost import cost
from ep_prune.layer_times import LayerTimes
from ep_prune.modules import Constant, Shift
from ep_prune.structure import Structure


class Block(nn.Module):
    """A residual block; `before`: norms and ReLUs before the convolutions, none after the sum."""

    def __init__(self, width: int, inner: int, before: bool = False) -> None:
        super().__init__()
        self.before = before
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width if before else inner), nn.BatchNorm2d(inner if before else width)
        self.relu = nn.ReLU(inplace=not before)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class Units(nn.Module):
    """x + fc2(relu(fc1(x))), on the last axis."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


def images(blocks: int = 3, before: bool = False) -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(
        stem, *(Block(8, 8, before) for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def quiet(block: nn.Module) -> None:
    """A branch of which little but a constant is left, and which is not exactly one."""
    last = block.conv2 if isinstance(block, Block) else block.fc2
    with torch.no_grad():
        last.weight *= 1e-6


def pictures(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def without_one(model: nn.Module, x: Tensor, **asked: object) -> ep.Compressed:
    """Compressed so far that one branch of three must go, since all else has to stay."""
    whole = cost(model, x[:1]).macs
    block = 2 * 8 * 8 * 9 * 64
    others = ["0.0", "1.conv1", "3.conv1"]
    return ep.compress(
        model, x[:1], x, keep_macs=(whole - block) / whole, min_width=0, protect=others, progress=False, **asked
    )


@pytest.mark.parametrize("before", [False, True], ids=["norms after", "norms before"])
@pytest.mark.parametrize("fold", [False, True], ids=["as it is", "folded"])
def test_a_branch_that_does_nothing_goes(before: bool, fold: bool) -> None:
    model, x = images(before=before), pictures()
    quiet(model[2])
    found = without_one(model, x, fold_batch_norm=fold)
    assert isinstance(found.model[2], Shift) and found.model[2].rectified is not before
    assert isinstance(found.model[1], Block) and isinstance(found.model[3], Block)
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-3, atol=1e-4)
    assert [(w.before, w.after) for w in found.report.widths if "2.conv1" in w.name] == [(8, 0)]
    assert any(note == "residual branches taken out whole: 1 (2)" for note in found.report.notes)
    assert found.report.after.macs == cost(found.model, x[:1]).macs


def test_what_is_counted_is_what_is_left() -> None:
    model, x = images(), pictures()
    found = without_one(model, x)
    after = cost(found.model, x[:1])
    (trial,) = found.report.trials
    assert (trial.macs, trial.parameters) == (after.macs, after.parameters)
    assert after.parameters == sum(p.numel() for p in found.model.parameters())


def test_what_is_counted_in_a_bottleneck() -> None:
    """Its first space goes with its second, which the last weight reads."""
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 1, 1, 1], 10, width_per_group=8)
    model, x = model.eval(), torch.randn(16, 3, 16, 16)
    others = [f"layer{k}.0" for k in (1, 2, 3, 4)]
    block = cost(model.layer1[1], torch.randn(1, 256, 4, 4)).macs
    budget = 1 - 1.9 * block / cost(model, x[:1]).macs
    found = ep.compress(model, x[:1], x, keep_macs=budget, min_width=0, protect=others, progress=False)
    after = cost(found.model, x[:1])
    (trial,) = found.report.trials
    assert isinstance(found.model.layer1[1], Shift) and isinstance(found.model.layer1[2], Shift)
    assert (trial.macs, trial.parameters) == (after.macs, after.parameters)


def test_the_last_axis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), *(Units(8, 12) for _ in range(3)), nn.Linear(8, 4)).eval()
    quiet(model[2])
    x = torch.randn(64, 5, 6)
    rest = {"protect": ["0", "1.fc1", "3.fc1"], "progress": False}
    found = ep.compress(model, x[:1], x, keep_macs=1 - 192 / cost(model, x[0, :1]).macs, min_width=0, **rest)
    assert isinstance(found.model[2], Shift) and not found.model[2].rectified and found.model[2].after == 0
    assert found.report.divergence < 0.1


def test_the_mlp_of_a_transformer() -> None:
    """Its block holds attention, too: the MLP alone is a module."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).eval()
    first, second = (layer.mlp for layer in model.encoder.layers)
    with torch.no_grad():
        first[3].weight *= 1e-6
    x = torch.randn(64, 3, 32, 32)
    macs = cost(model, x[:1]).macs
    asked = {"min_width": {"encoder.layers.encoder_layer_0.mlp.0": 0}, "progress": False}
    asked["protect"] = [
        "encoder.layers.encoder_layer_1",
        "conv_proj",
        "encoder.layers.encoder_layer_0.self_attention",
    ]
    found = ep.compress(model, x[:1], x, keep_macs=1 - 17 * 2 * 16 * 32 / macs, **asked)
    kinds = [type(layer.mlp) for layer in found.model.encoder.layers]
    assert kinds == [Constant, type(second)]
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-3, atol=1e-4)


def test_a_branch_with_a_depthwise_layer() -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.mobilenet_v2(num_classes=5).eval(), torch.randn(8, 3, 32, 32)
    streams = ["features.0.0", "features.1.conv.1", "features.18.0"]
    streams += [f"features.{k}.conv.2" for k in (2, 4, 7, 11, 14, 17)]
    inner = [f"features.{k}.conv.0.0" for k in range(2, 18)]
    least = dict.fromkeys(streams, 10**6) | dict.fromkeys(inner, 0)
    deep = ep.compress(model, x[:1], x, keep_macs=0.25, min_width=least, progress=False)
    gone = [module for module in deep.model.features if isinstance(module, Shift)]
    assert gone and not any(module.rectified for module in gone)
    assert deep.model(x).isfinite().all()


def test_one_channel_is_left_unless_asked_otherwise() -> None:
    model, x = images(), pictures()
    quiet(model[2])
    found = ep.compress(model, x[:1], x, keep_macs=0.5, progress=False)
    assert not any(isinstance(module, Shift) for module in found.model.modules())
    one = ep.compress(model, x[:1], x, keep_macs=0.3, min_width={"1.conv1": 0}, progress=False)
    assert {n for n, m in one.model.named_modules() if isinstance(m, Shift)} <= {"1"}


def test_a_branch_that_reduce_leaves_one_channel_of() -> None:
    """It is no space that can be narrowed, and may go nevertheless."""
    model, x = images(), pictures()
    with torch.no_grad():
        model[2].conv2.weight.zero_()
    found = without_one(model, x)
    assert isinstance(found.model[2], Shift)
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-4, atol=1e-4)
    plain = ep.compress(model, x[:1], x, keep_macs=0.99, progress=False)
    assert plain.model[2].conv1.out_channels == 1


def test_plan(tmp_path) -> None:
    model, x = images(), pictures()
    quiet(model[2])
    found = without_one(model, x, fold_batch_norm=True)
    found.plan.save(tmp_path / "plan.safetensors")
    with safe_open(str(tmp_path / "plan.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["ep_prune.plan"])["version"] == 7
    again = ep.Plan.load(tmp_path / "plan.safetensors").apply(copy.deepcopy(model))
    assert isinstance(again[2], Shift)
    assert torch.equal(again(x), found.model(x))


def test_what_is_measured_is_kept_and_not_mixed_up(tmp_path) -> None:
    model, x = images(), pictures()
    file = tmp_path / "measured"
    first = without_one(model, x, resume=file)
    again = without_one(model, x, resume=file)
    assert torch.equal(first.model(x), again.model(x))
    with pytest.raises(ep.InputError, match="name another file"):
        ep.compress(model, x[:1], x, keep_macs=0.7, resume=file, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_and_layouts(dtype: torch.dtype) -> None:
    model, x = images(), pictures()
    quiet(model[2])
    model = model.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    found = without_one(model, x)
    shift = found.model[2]
    assert isinstance(shift, Shift) and shift.bias.dtype == dtype and not shift.bias.requires_grad
    inner = found.model[0](x)
    assert shift(inner).is_contiguous(memory_format=torch.channels_last)


class Curious(nn.Module):
    """Its code reads the size of a weight inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.body = images()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (1.0 if self.body[2].conv1.weight.shape[1] else 0.0)


def held_by_a_hook() -> nn.Module:
    model = images()
    model[2].register_forward_hook(lambda *_: None)
    return model


def shared() -> nn.Module:
    model = images()
    model[2].conv1.weight = model[3].conv1.weight
    return model


def twice() -> nn.Module:
    model = images()
    return nn.Sequential(*model[:3], model[2], *model[3:])


def hooked_inside() -> nn.Module:
    model = images()
    model[2].bn1.register_forward_hook(lambda *_: None)
    return model


class ReadsTwice(Block):
    """Changes its input, which its caller reads again."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return x


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = images()
        self.body[2].__class__ = ReadsTwice

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[1](self.body[0](x))
        return self.body[3:](self.body[2](x) + x)


class NormBehind(nn.Module):
    """A norm behind the branch, outside of its module, and one behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Identity(), Block(8, 8, before=True), nn.ReLU())
        self.norm, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.mlp = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)
        for norm in (self.norm, self.second):
            nn.init.uniform_(norm.weight, 1.5, 2.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.body(x))
        x = x + self.norm(self.mlp(x))
        return self.head(x.mean((2, 3)))


class InTraining(Block):
    """Has a head for training alone."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.aux = nn.Linear(8, 2)

    def forward(self, x: Tensor):
        y = super().forward(x)
        return (y, self.aux(y.mean((2, 3)))) if self.training else y


def trained() -> nn.Module:
    model = images()
    model[2] = InTraining().eval()
    return model


@pytest.fixture
def allowed(monkeypatch) -> list[str]:
    """The modules whose branches may go, as they were settled last."""
    found: list[str] = []
    original = Structure.allow

    def noted(self, branches) -> None:
        found[:] = [branch.module for branch in branches.values()]
        original(self, branches)

    monkeypatch.setattr(Structure, "allow", noted)
    return found


@pytest.mark.parametrize("make", [Curious, held_by_a_hook, hooked_inside, shared, twice, InPlace, trained])
def test_branches_that_stay(make, allowed) -> None:
    """Whatever the budget: the block is still there, and the model runs and answers as what was fitted."""
    model, x = make().eval(), pictures()
    found = ep.compress(model, x[:1], x, keep_macs=0.6, min_width=0, progress=False)
    body = getattr(found.model, "body", found.model)
    assert isinstance(body[2], Block)
    assert ("body.2" if body is not found.model else "2") not in allowed
    assert found.model(x).isfinite().all()


def test_branches_that_may_go(allowed) -> None:
    model, x = images(), pictures()
    ep.compress(model, x[:1], x, keep_macs=0.9, progress=False)
    assert not allowed
    ep.compress(model, x[:1], x, keep_macs=0.9, min_width=0, progress=False)
    assert allowed == ["1", "2", "3"]


def test_norms_outside_of_the_module() -> None:
    """Whatever goes: the norm behind the sum does not count, nor one that its module does not hold."""
    torch.manual_seed(0)
    model, x = NormBehind().eval(), pictures()
    found = ep.compress(model, x[:1], x, keep_macs=0.3, min_width=0, progress=False)
    assert isinstance(found.model.mlp, nn.Sequential)
    deep = ep.compress(model, x[:1], x, keep_macs=0.2, min_width={"body.2.conv1": 0}, progress=False)
    assert deep.model(x).isfinite().all()


@pytest.mark.parametrize(
    "asked", [{"protect": ["2.conv1"]}, {"protect": ["2.bn2"]}, {"min_width": {"2.conv1": 1}}]
)
def test_what_must_stay_stays(asked) -> None:
    model, x = images(), pictures()
    found = ep.compress(model, x[:1], x, keep_macs=0.6, **({"min_width": 0} | asked), progress=False)
    assert isinstance(found.model[2], Block)


def test_a_branch_inside_of_another() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.mid, self.last = (
                nn.Linear(8, 6),
                Units(6, 1),
                nn.Linear(6, 5),
                nn.Linear(5, 8),
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.mid(self.inner(self.first(x).relu())).relu())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Outer(), Units(8, 6), nn.Linear(8, 4)).eval()
    x = torch.randn(64, 6)
    found = ep.compress(model, x[:1], x, keep_macs=0.27, min_width=0, protect=["0"], progress=False)
    assert isinstance(found.model[1], Shift) and isinstance(found.model[2], Shift)
    assert found.model(x).isfinite().all()
    assert set(found.report.errors) == {"1.last.weight", "2.fc2.weight", "3.weight"}


def test_a_producer_outside_of_the_module() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.tail = nn.Linear(8, 12), nn.Sequential(nn.ReLU(), nn.Linear(12, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.tail(self.fc1(x))) * 2 + x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Apart(), nn.Linear(8, 4)).eval()
    x = torch.randn(64, 6)
    found = ep.compress(model, x[:1], x, keep_macs=0.5, min_width=0, progress=False)
    assert found.model[1].fc1.out_features >= 1


def test_a_plan_of_a_branch_alone_is_fitted(tmp_path) -> None:
    """Nothing behind the branch is refitted: it is no exact plan for all that."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), Units(8, 6), Units(8, 6)).eval(), torch.randn(64, 6)
    found = ep.compress(model, x[:1], x, keep_macs=0.6, min_width=0, protect=["0", "1.fc1"], progress=False)
    assert isinstance(found.model[2], Shift) and found.plan.fitted
    with pytest.raises(ep.InputError, match="only what reduce found"):
        ep.embed(found.model, x[:1], plan=found.plan)


def test_norms_folded_into_what_stays() -> None:
    """A pair whose norm lies in the module that goes, and whose layer does not."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.proj, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.mlp = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.mlp(self.proj(x)))

    torch.manual_seed(0)
    model, x = Split().eval(), torch.randn(64, 6)
    asked = {"min_width": {"mlp.1": 0}, "fold_batch_norm": True, "progress": False, "protect": ["stem", "proj"]}
    found = ep.compress(model, x[:1], x, keep_macs=0.45, **asked)
    assert isinstance(found.model.mlp, Constant) and found.model(x).isfinite().all()


def test_a_projected_shortcut_is_no_constant() -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(8, 3, 32, 32)
    found = ep.compress(model, x[:1], x, keep_macs=0.05, min_width=0, progress=False)
    gone = {n for n, m in found.model.named_modules() if isinstance(m, Shift)}
    assert gone and gone <= {"layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"}
    assert found.model(x).isfinite().all()


def test_what_is_not_there_takes_no_milliseconds() -> None:
    grid = torch.tensor([[2.0, 4.0, 6.0, 8.0]])
    times = LayerTimes(grid, grid, torch.full((1, 4, 4), 3.0))
    widths = torch.tensor([[1.0], [0.0]])
    assert times.at(widths, torch.ones(2, 1)).tolist() == [3.0, 0.0]
    assert times.at(torch.ones(2, 1), widths).tolist() == [3.0, 0.0]


def test_what_is_left_is_a_model_like_any_other() -> None:
    """It exports, its streams go on being narrowed, and it is reduced and compressed again."""
    model, x = images(), pictures()
    quiet(model[2])
    found = without_one(model, x)
    torch.export.export(found.model, (x[:2],))
    assert ep.reduce(found.model, x[:2], progress=False).report.grade == "exact"
    again = ep.compress(found.model, x[:1], x, keep_macs=0.4, progress=False)
    stream = again.model[0][0].out_channels
    assert stream < 8 and len(again.model[2].bias) == stream
    assert not any("taken out" in note for note in again.report.notes)


def test_a_constant_in_any_shape() -> None:
    bias = torch.arange(5.0)
    images_, tokens = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last), torch.randn(2, 7, 3)
    made = Constant(bias, 2)(images_)
    assert made.is_contiguous(memory_format=torch.channels_last) and made.shape == images_.shape
    assert torch.equal(made[1, :, 2, 1], bias)
    assert torch.equal(Constant(bias, 0)(tokens), bias.expand(2, 7, 5))
