"""On a GPU, where there is one: the model stays there, also in half precision, and gets the same widths."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import ep_prune as ep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def masked_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(0, 0.3)
                module.weight[torch.rand(len(module.weight)) < 0.5] = 0
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reduces_on_the_device(dtype: torch.dtype) -> None:
    model = masked_resnet()
    x = torch.randn(2, 3, 64, 64)
    cpu = ep.reduce(model.double(), x.double(), verify_result=False)
    wide = copy.deepcopy(model).to("cuda", dtype)
    result = ep.reduce(wide, x.to("cuda", dtype))
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.verification.ok
    assert result.report.after.parameters == cpu.report.after.parameters < cpu.report.before.parameters


class Attending(nn.Module):
    """A batch-normed convolution, attention and a recurrent layer, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).relu().transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: torch.Tensor = self.head(self.recurrent(x)[0][:, -1])
        return out


def test_widens_and_comes_back_on_the_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).eval()
    model, x = model.cuda().double(), torch.randn(4, 3, 8, 8, device="cuda", dtype=torch.float64)
    wide = ep.embed(model, x, critical=False)
    assert {p.device.type for p in wide.parameters()} == {"cuda"}
    back = ep.reduce(wide, x).model
    assert [p.shape for p in back.parameters()] == [p.shape for p in model.parameters()]
    torch.testing.assert_close(back(x), model(x), rtol=1e-10, atol=1e-10)


def test_attention_and_recurrent_layers_on_the_device() -> None:
    torch.manual_seed(0)
    model, x = Attending().eval().double(), torch.randn(4, 3, 10, dtype=torch.float64)
    with torch.no_grad():
        model.conv.weight[5:], model.conv.bias[5:] = model.conv.weight[:3], model.conv.bias[:3]
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            gates = getattr(model.recurrent, name).reshape(4, 6, -1)
            gates[:, 4] = gates[:, 1]
    here = ep.reduce(model, x)
    there = ep.reduce(copy.deepcopy(model).cuda(), x.cuda())
    assert there.verification.ok
    assert there.model.recurrent.hidden_size == here.model.recurrent.hidden_size == 5
    assert there.report.after.parameters == here.report.after.parameters < here.report.before.parameters


def test_compresses_on_the_device() -> None:
    torch.manual_seed(0)
    model, x = masked_resnet().cuda(), torch.randn(48, 3, 32, 32, device="cuda")
    found = ep.compress(model, x[:2], calibration=list(x.split(16)), keep_macs=0.4, progress=False)
    assert {p.device.type for p in found.model.parameters()} == {"cuda"}
    assert found.report.after.macs <= 0.4 * found.report.before.macs
    assert found.model(x).isfinite().all()
