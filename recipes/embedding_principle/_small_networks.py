"""Small narrow networks in float64, with weights from continuous distributions: no neuron repeats by chance."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Residual(nn.Module):
    """A stem, one residual block with batch norm, and a linear head."""

    def __init__(self, stream: int, inner: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, stream, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(stream)
        self.conv1 = nn.Conv2d(stream, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, stream, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stream)
        self.head = nn.Linear(stream, 2)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.bn0(self.stem(x)).relu()
        inner = self.bn1(self.conv1(stream)).relu()
        stream = (stream + self.bn2(self.conv2(inner))).relu()
        return self.head(stream.mean(dim=(2, 3)))


def dense(widths: tuple[int, ...], activation: str, seed: int) -> nn.Sequential:
    """Linear layers of these widths, inputs first and outputs last, with the activation between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return fill(nn.Sequential(*layers[:-1]), seed)


def convolutional(activation: str, seed: int) -> nn.Sequential:
    """Two 3x3 convolutions of widths 2 and 3, and a linear head on the mean of every channel."""
    act = ACTIVATIONS[activation]
    first, second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
    return fill(
        nn.Sequential(first, act(), second, act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), seed
    )


def residual(seed: int) -> Residual:
    """A stream of two channels and a block of two."""
    return fill(Residual(2, 2), seed)


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Weights N(0, 2 / fan-in), biases and means N(0, .3^2), gains and variances away from 0; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.copy_(normal(module.weight) * (2 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(normal(module.bias) * 0.3)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(normal(module.weight) * 0.3 + 1)
                module.bias.copy_(normal(module.bias) * 0.3)
                module.running_mean.copy_(normal(module.running_mean) * 0.3)
                module.running_var.copy_(normal(module.running_var).abs() + 0.5)
    return model


def inputs_of(model: nn.Module, count: int, seed: int) -> Tensor:
    """`count` standard normal inputs: vectors for linear layers, images (2, 6, 6) for convolutions."""
    first = next(module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    shape = (first.in_features,) if isinstance(first, nn.Linear) else (first.in_channels, 6, 6)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deeper() -> list[tuple[str, nn.Module]]:
    """What the recipes try beyond two layers."""
    return [
        ("3 layers, tanh", dense((3, 3, 4, 2), "tanh", 1)),
        ("3 layers, ReLU", dense((3, 3, 4, 2), "relu", 2)),
        ("4 layers, tanh", dense((3, 2, 3, 2, 2), "tanh", 3)),
        ("4 layers, ReLU", dense((3, 2, 3, 2, 2), "relu", 4)),
        ("CNN, tanh", convolutional("tanh", 5)),
        ("CNN, ReLU", convolutional("relu", 6)),
        ("residual, batch norm", residual(7)),
    ]
