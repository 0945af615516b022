"""Networks of any width with random weights, for 32x32 images: to time what a width costs, and nothing else.

    wide_resnet(16, 8)     WRN-16-8 of Zagoruyko and Komodakis (BMVC 2016)
    vgg16()                VGG-16 with batch norm and one linear layer, as is usual for 32x32 images

A network fresh from its constructor is degenerate: all gains are one, all shifts zero, and the recorded moments
are not those of what comes through, so that depth makes outputs vanish or explode. So gains and shifts are
drawn, and moments are taken on images (`lively`). The images are noise; what is fitted to them means nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cifar.batch_norm import reestimated

CLASSES = 10
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max pool
MOMENT_IMAGES = 32


class Block(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU; a 1x1 convolution as shortcut where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(self.bn2(self.conv1(y)).relu())


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 blocks, of 16, 32 and 64 channels times `width`."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        if depth % 6 != 4:
            raise ValueError(f"a wide ResNet has 6 n + 4 layers, not {depth}")
        channels = 16
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        blocks = []
        for stage, base in enumerate((16, 32, 64)):
            for place in range((depth - 4) // 6):
                blocks.append(Block(channels, base * width, 2 if stage and not place else 1))
                channels = base * width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(self.blocks(self.conv1(x))).relu().mean((2, 3)))


def wide_resnet(depth: int, width: int) -> nn.Module:
    """A wide ResNet in evaluation mode, with the same random weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lively(WideResNet(depth, width))


def vgg16() -> nn.Module:
    """VGG-16 for 32x32 images, in evaluation mode, with the same random weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        channels = 3
        for size in VGG16:
            if size == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            convolution = nn.Conv2d(channels, size, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(size), nn.ReLU(inplace=True)]
            channels = size
        return lively(nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, CLASSES)))


def lively(model: nn.Module) -> nn.Module:
    """A copy with drawn gains and shifts of its batch norms, and the moments of what really comes through."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = torch.rand(module.num_features, generator=generator) + 0.5
            module.bias.data = torch.randn(module.num_features, generator=generator) / 2
    return reestimated(model, noise(2, MOMENT_IMAGES))


def noise(seed: int, count: int) -> Tensor:
    """Random images (count, 3, 32, 32): normal pixels about a normal mean for each image and colour, since white
    noise alone averages out in the pools."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(count, 3, 1, 1, generator=generator)
    return colours + torch.randn(count, 3, 32, 32, generator=generator)
