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
