"""Seeded random narrow networks of seven families and seven activations, irreducible with probability 1.

Float64, eval mode, widths of 2 to 5. All weights, biases and batch-norm statistics are drawn from continuous
distributions, so no two channels coincide except by design; pre-activations cross 0 (and 6, for ReLU6).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "relu6": nn.ReLU6,
}
FAMILIES = ("mlp", "cnn", "resnet", "concat", "depthwise", "gated", "autoencoder")


class Draw:
    """Random choices of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def width(self) -> int:
        return self.integer(2, 5)

    def coin(self) -> bool:
        return self.integer(0, 1) == 1

    def fill_(self, model: nn.Module) -> None:
        """Weights, biases and statistics, from continuous distributions."""

        def normal(tensor: Tensor | None, scale: float) -> None:
            assert tensor is not None
            tensor.copy_(torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype) * scale)

        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                    normal(module.weight, 1.4 / module.weight[0].numel() ** 0.5)
                    if module.bias is not None:
                        normal(module.bias, 0.3)
                elif isinstance(module, nn.BatchNorm2d):
                    normal(module.weight, 0.3)
                    module.weight.add_(module.weight.sign() * 0.7)
                    normal(module.bias, 0.3)
                    normal(module.running_mean, 0.3)
                    assert module.running_var is not None
                    module.running_var.copy_(
                        torch.rand(module.running_var.shape, generator=self.generator, dtype=torch.float64) + 0.5
                    )


class Residual(nn.Module):
    """A basic block: two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = activation()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        z: Tensor = self.act(y + self.shortcut(x))
        return z


class Branches(nn.Module):
    """Two parallel branches and the input itself, joined: DenseNet and Inception in one."""

    def __init__(self, inputs: int, left: int, right: int, norm: bool, activation: type[nn.Module]) -> None:
        super().__init__()
        self.left = nn.Conv2d(inputs, left, 3, padding=1)
        self.right = nn.Conv2d(inputs, right, 1)
        self.norm = nn.BatchNorm2d(left + right) if norm else nn.Identity()
        self.act = activation()
        self.outputs = inputs + left + right

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return torch.cat([x, y], 1)


def _mlp(draw: Draw, act: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    sizes = [draw.integer(3, 5), *(draw.width() for _ in range(draw.integer(2, 3)))]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), act()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], draw.integer(2, 4))), torch.empty(8, sizes[0])


def _cnn(draw: Draw, act: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    channels = [3, *(draw.width() for _ in range(3))]
    layers: list[nn.Module] = []
    for k, (before, after) in enumerate(itertools.pairwise(channels)):
        norm = draw.coin()
        layers.append(nn.Conv2d(before, after, 3, padding=1, bias=not norm or draw.coin()))
        layers += [nn.BatchNorm2d(after)] * norm + [act()]
        if k < 2:
            layers += [[nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Identity()][draw.integer(0, 2)]]
    side = 1 if draw.coin() else 2
    layers += [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(channels[-1] * side**2, 3)]
    return nn.Sequential(*layers), torch.empty(4, 3, 8, 8)


def _resnet(draw: Draw, act: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    one, two = draw.width(), draw.width()
    return nn.Sequential(
        nn.Conv2d(3, one, 3, padding=1, bias=False),
        nn.BatchNorm2d(one),
        act(),
        Residual(one, draw.width(), one, 1, act),
        Residual(one, draw.width(), two, 2, act),
        Residual(two, draw.width(), two, 1, act),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(two, 3),
    ), torch.empty(4, 3, 8, 8)


def _concat(draw: Draw, act: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    stem = draw.width()
    first = Branches(stem, draw.width(), draw.width(), draw.coin(), act)
    second = Branches(first.outputs, draw.width(), draw.width(), draw.coin(), act)
    return nn.Sequential(
        nn.Conv2d(3, stem, 3, padding=1),
        act(),
        first,
        nn.AvgPool2d(2) if draw.coin() else nn.MaxPool2d(2),
        second,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second.outputs, 3),
    ), torch.empty(4, 3, 8, 8)


def _depthwise(draw: Draw, act: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    stem = draw.width()
    layers: list[nn.Module] = [nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), act()]
    before = stem
    for stride in (1, 2):
        inner, after = draw.width(), draw.width()
        layers += [nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner), act()]
        layers += [nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), act()]
        bends = draw.coin()
        after = after if bends else min(after, inner)  # else they would depend on each other
        layers += [nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after)] + [act()] * bends
        before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 3)]
    return nn.Sequential(*layers), torch.empty(4, 3, 8, 8)


class Gated(nn.Module):
    """down(act(gate(x)) * up(x)), as in the gated layers of transformers."""

    def __init__(self, inputs: int, inner: int, outputs: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Linear(inputs, inner)
        self.up = nn.Linear(inputs, inner)
        self.down = nn.Linear(inner, outputs)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return y


def _gated(draw: Draw, act: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    inputs, middle = draw.integer(3, 5), draw.width()
    layers = [Gated(inputs, draw.width(), middle, act), act(), Gated(middle, draw.width(), 3, act)]
    return nn.Sequential(*layers), torch.empty(8, inputs)


def _autoencoder(draw: Draw, act: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    one, two, three = draw.width(), draw.width(), draw.width()
    return nn.Sequential(
        nn.Conv2d(2, one, 3, padding=1),
        act(),
        nn.Conv2d(one, two, 2, stride=2),
        act(),
        nn.ConvTranspose2d(two, three, 2, stride=2),
        act(),
        nn.Conv2d(three, 2, 1),
    ), torch.empty(4, 2, 6, 6)


_MAKERS = (_mlp, _cnn, _resnet, _concat, _depthwise, _gated, _autoencoder)


def network(seed: int) -> tuple[nn.Module, Tensor, str]:
    """A narrow network, example inputs and a description: all 49 combinations in 49 consecutive seeds."""
    family, activation = seed % 7, list(ACTIVATIONS)[seed // 7 % 7]
    draw = Draw(seed)
    model, shape = _MAKERS[family](draw, ACTIVATIONS[activation])
    draw.fill_(model.double().eval())
    inputs = torch.randn(shape.shape, generator=draw.generator, dtype=torch.float64)
    return model, inputs, f"{FAMILIES[family]} with {activation}, seed {seed}"
