"""Batch norms folded into the layers before them: the same outputs, and only where nothing else can notice."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import ep_prune as ep
from ep_prune.norm_folding import fold_norms_, foldable
from ep_prune.plan import Plan
from ep_prune.trace import prepare, trace


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode and float64, with moments and gains that are all different."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1, 2)
                nn.init.normal_(module.bias)
    return model.double().eval()


def folded(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, tuple[tuple[str, str], ...]]:
    wide, _ = prepare(model)
    pairs = foldable(wide, trace(wide, x))
    narrow = copy.deepcopy(wide)
    fold_norms_(narrow, pairs)
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-11, atol=1e-11)
    return narrow, pairs


LAYERS = {
    "linear": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (5, 4, 8)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (5, 4, 8, 8)),
    "plain numbers": (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False), (5, 4, 8, 8)),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (5, 4, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (5, 4, 5, 5)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (5, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str) -> None:
    first, norm, shape = LAYERS[kind]
    first.requires_grad_(False)
    model = awake(nn.Sequential(copy.deepcopy(first), copy.deepcopy(norm), nn.ReLU()))
    narrow, pairs = folded(model, torch.randn(shape, dtype=torch.float64))
    assert pairs == (("0", "1"),) and isinstance(narrow[1], nn.Identity)
    assert not any(p.requires_grad for p in narrow.parameters())


@pytest.mark.parametrize(("name", "count"), [("resnet18", 20), ("mobilenet_v2", 52), ("densenet121", 59)])
def test_torchvision(name: str, count: int) -> None:
    """densenet121: half of its norms stand before their convolutions, and stay."""
    model = awake(torchvision.models.get_model(name, weights=None))
    assert len(folded(model, torch.randn(2, 3, 64, 64, dtype=torch.float64))[1]) == count


class Case(nn.Module):
    """Something that reads what a fold would change."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        if kind == "tied":
            self.second = nn.Conv2d(3, 3, 1)
            self.second.weight = self.conv.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        out: torch.Tensor = self.norm(y)
        if self.kind == "read twice":
            out = out + y
        elif self.kind == "called twice":
            out = self.norm(self.conv(out))
        elif self.kind == "norm of two":
            out = self.norm(out.relu())
        elif self.kind == "tied":
            out = self.second(out.relu())
        elif self.kind == "weight read":
            out = out + self.norm.weight[:, None, None]
        elif self.kind == "by hand":
            out = out.relu()
            other = self.other
            assert other.running_mean is not None and other.running_var is not None
            out = nn.functional.conv2d(out, self.conv.weight)
            out = nn.functional.batch_norm(out, other.running_mean, other.running_var)
        return out


@pytest.mark.parametrize("kind", ["read twice", "called twice", "norm of two", "tied", "weight read", "by hand"])
def test_what_something_else_reads_stays(kind: str) -> None:
    assert folded(awake(Case(kind)), torch.randn(2, 3, 4, 4, dtype=torch.float64))[1] == ()


class Halved(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_subclasses_and_the_wrong_axis_stay() -> None:
    model = awake(nn.Sequential(nn.Conv2d(3, 4, 1), Halved(4)))
    assert folded(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))[1] == ()
    model = awake(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    assert folded(model, torch.randn(2, 6, 4, dtype=torch.float64))[1] == ()


def test_compress_folds_and_its_plan_and_file_do_so_too(tmp_path) -> None:
    def factory() -> nn.Module:
        torch.manual_seed(1)
        body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
        return awake(nn.Sequential(*body, nn.Flatten(), nn.Linear(128, 10))).float()

    model, x = factory(), torch.randn(24, 3, 8, 8)
    result = ep.compress(model, x[:2], x.split(8), keep_macs=0.7, fold_batch_norm=True)
    plain = ep.compress(model, x[:2], x.split(8), keep_macs=0.7)
    assert not [m for m in result.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any("2 batch norms folded" in note for note in result.report.notes)
    assert result.report.after.macs == plain.report.after.macs
    with torch.no_grad():
        expected = plain.model(x)
        torch.testing.assert_close(result.model(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        result.plan.save(tmp_path / "plan.safetensors")
        again = Plan.load(tmp_path / "plan.safetensors").apply(factory())
        torch.testing.assert_close(again(x), result.model(x), rtol=0, atol=0)
        ep.save(result, tmp_path / "model.safetensors")
        torch.testing.assert_close(ep.load(factory, tmp_path / "model.safetensors")(x), again(x), rtol=0, atol=0)


def test_a_plan_of_another_model_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(ep.PlanError, match="no batch norm"):
        fold_norms_(model, [("0", "1")])
    with pytest.raises(ep.PlanError, match="no layers"):
        fold_norms_(model, [("0", "7")])
