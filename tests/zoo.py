"""The real networks and images of `../shared/data`, which tests use and the project does not ship.

The folder is found in `$EP_PRUNE_DATA` or as `../shared/data` from the project's root; its README says where
every file comes from. Classes are written from the key names and shapes of the files. Every `load_*` returns
the network in eval mode and float32, loaded with `weights_only=True` and `strict=True`; `tests/test_zoo.py`
holds their accuracies.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

MNIST_NORM = (0.1307, 0.3081)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # akamaster's ResNets
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # NIN, CNN-A, conv_small_sigmoid
RESNET2B_STD = (0.2471, 0.2435, 0.2616)


def data_dir() -> Path | None:
    """The folder of the test material, or None where it is not."""
    named = os.environ.get("EP_PRUNE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


needs_data = pytest.mark.skipif(
    data_dir() is None,
    reason="the real networks and images are not here: neither in ../shared/data nor in $EP_PRUNE_DATA",
)


def data_file(name: str) -> Path:
    """The path of one file of the test material. Raises FileNotFoundError where the folder or the file is
    missing."""
    folder = data_dir()
    if folder is None or not (folder / name).is_file():
        raise FileNotFoundError(f"no file {name} in the test material: mark the test with zoo.needs_data")
    return folder / name


def weights(name: str) -> Any:
    """What one checkpoint holds, on the CPU."""
    return torch.load(data_file(name), map_location="cpu", weights_only=True)


def loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """`model` with the weights of `state`, every key of both used, in eval mode."""
    model.load_state_dict(state, strict=True)
    return model.eval()


# Images.


def images(name: str, mean: Sequence[float], std: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) float32 as (x / 255 - mean) / std for each colour, and labels (N,) int64."""
    with np.load(data_file(name)) as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    x = (x.unsqueeze(-1) if x.ndim == 3 else x).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1), y


def cifar_test(
    mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 1,000 test images of CIFAR-10, (x / 255 - mean) / std, and their labels. Never tune on
    these."""
    return images("cifar10/test_1000.npz", mean, std)


def cifar_train(
    mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 4,000 training images of CIFAR-10, (x / 255 - mean) / std, and their labels: to calibrate
    on."""
    return images("cifar10/train_4000.npz", mean, std)


def mnist_test(mean: float = 0.0, std: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The 10,000 test images of MNIST (N, 1, 28, 28), (x / 255 - mean) / std, and their labels."""
    return images("mnist/test_10000.npz", (mean,), (std,))


def mnist_train(mean: float = 0.0, std: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 5,000 training images of MNIST (N, 1, 28, 28), (x / 255 - mean) / std, and their labels."""
    return images("mnist/train_5000.npz", (mean,), (std,))


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int = 250) -> float:
    """The share of images that `model` classifies right, in per cent."""
    guesses = torch.cat([model(part).argmax(dim=1) for part in x.split(batch)])
    return 100 * int((guesses == y).sum()) / len(y)


# ResNet-20 and ResNet-56 of akamaster/pytorch_resnet_cifar10.


class LambdaLayer(nn.Module):
    """A function of the caller's as a module."""

    def __init__(self, lambd: Any) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lambd(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; option A (every second pixel, zero channels around) at a stage's
    start."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = LambdaLayer(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """Three stages of 16, 32, 64 channels on 32x32 images, average pool over what is left, one linear
    layer."""

    def __init__(self, num_blocks: Sequence[int], num_classes: int = 10) -> None:
        super().__init__()
        self.in_planes = 16
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(16, num_blocks[0], stride=1)
        self.layer2 = self._make_layer(32, num_blocks[1], stride=2)
        self.layer3 = self._make_layer(64, num_blocks[2], stride=2)
        self.linear = nn.Linear(64, num_classes)

    def _make_layer(self, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for block_stride in [stride] + [1] * (num_blocks - 1):
            layers.append(BasicBlock(self.in_planes, planes, block_stride))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


CIFAR_RESNET_FILES = {
    20: "cifar10-resnet20/resnet20-12fca82f.th",
    56: "cifar10-resnet56/resnet56-4bfd9763.th",
}


def cifar_resnet(depth: int) -> CifarResNet:
    """The CIFAR ResNet of 6 n + 2 layers, randomly initialised."""
    if depth % 6 != 2:
        raise ValueError(f"a CIFAR ResNet has 6 n + 2 layers, not {depth}")
    return CifarResNet([(depth - 2) // 6] * 3)


def load_cifar_resnet(depth: int) -> nn.Module:
    """ResNet-20 or -56 for `cifar_test(IMAGENET_MEAN, IMAGENET_STD)`: 91.5 % and 92.6 %."""
    state = weights(CIFAR_RESNET_FILES[depth])["state_dict"]
    return loaded(cifar_resnet(depth), {key.removeprefix("module."): value for key, value in state.items()})


# Network in Network of 666DZY666/micronet.


class ConvBnRelu(nn.Module):
    """Convolution, batch norm, ReLU: the unit of `Nin`; the first one rectifies its input, too."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0, first: bool = False
    ) -> None:
        super().__init__()
        self.first = first
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            x = self.relu(x)
        return self.relu(self.bn(self.conv(x)))


class Nin(nn.Module):
    """Network in Network with batch norm.

    The ReLU behind the first batch norm has no place in the keys' numbers: the first unit brings it. Max pool
    first, average pool (padding counted in) second. Other orders of pools or of ReLUs give 8 to 80 %, this
    one 85.5 %.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tnn_bin = nn.Sequential(
            nn.Conv2d(3, 192, 5, padding=2),
            nn.BatchNorm2d(192),
            ConvBnRelu(192, 160, 1, first=True),
            ConvBnRelu(160, 96, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
            ConvBnRelu(96, 192, 5, padding=2),
            ConvBnRelu(192, 192, 1),
            ConvBnRelu(192, 192, 1),
            nn.AvgPool2d(3, stride=2, padding=1),
            ConvBnRelu(192, 192, 3, padding=1),
            ConvBnRelu(192, 192, 1),
            nn.Conv2d(192, 10, 1),
            nn.BatchNorm2d(10),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tnn_bin(x)
        return x.view(x.size(0), -1)


def nin() -> Nin:
    """The Network in Network, randomly initialised."""
    return Nin()


def load_nin() -> nn.Module:
    """Network in Network for `cifar_test(CIFAR_MEAN, CIFAR_STD)`: 85.5 %."""
    return loaded(nin(), weights("cifar10-nin/nin.pth")["state_dict"])


# ResNet-8 of mlcommons/tiny, converted from Keras.


def same_padded(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution behind TensorFlow's "same" padding, which at stride 2 on an even size pads the end
    alone."""
    padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
    return nn.Sequential(nn.ZeroPad2d(padding), nn.Conv2d(in_channels, out_channels, 3, stride=stride))


class ResNet8(nn.Module):
    """Three residual blocks of 16, 32, 64 channels, 1x1 shortcuts without batch norm, convolutions with
    bias."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.ModuleList(
            [
                same_padded(3, 16, 1),
                same_padded(16, 16, 1),
                same_padded(16, 16, 1),
                same_padded(16, 32, 2),
                same_padded(32, 32, 1),
                nn.Conv2d(16, 32, 1, stride=2),
                same_padded(32, 64, 2),
                same_padded(64, 64, 1),
                nn.Conv2d(32, 64, 1, stride=2),
            ]
        )
        self.b = nn.ModuleList([nn.BatchNorm2d(width, eps=1e-3) for width in (16, 16, 16, 32, 32, 64, 64)])
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c, b = self.c, self.b
        x = F.relu(b[0](c[0](x)))
        x = F.relu(x + b[2](c[2](F.relu(b[1](c[1](x))))))
        x = F.relu(c[5](x) + b[4](c[4](F.relu(b[3](c[3](x))))))
        x = F.relu(c[8](x) + b[6](c[7](F.relu(b[5](c[6](x))))))
        return self.fc(x.mean(dim=(2, 3)))


def resnet8() -> ResNet8:
    """The ResNet-8, randomly initialised."""
    return ResNet8()


def load_resnet8() -> nn.Module:
    """ResNet-8 for raw images, `cifar_test(std=(1 / 255,) * 3)`: 88.1 %. Keras's epsilon, 1e-3, in the batch
    norms."""
    return loaded(resnet8(), weights("cifar10-resnet8/resnet8_cifar10_torch.pt"))


# MLPs of yuxwind/ExactCompression (LEO++).


class LeoppMlp(nn.Module):
    """ReLU MLP with two hidden layers on flattened pixels in [0, 1]; dropout (of no effect here) as the keys
    say."""

    def __init__(self, inputs: int, first: int, second: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(inputs, first),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Dropout(),
        )
        self.classifier = nn.Sequential(nn.Linear(second, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x.flatten(1)))


LEOPP_WIDTHS = {
    "cifar10_mlp_116_248": (3072, 116, 248, 10),
    "cifar100_mlp_pruned": (3072, 170, 380, 100),
    "mnist_mlp_200_200": (784, 200, 200, 10),
    "mnist_mlp_100_100": (784, 100, 100, 10),
}


def load_leopp(name: str) -> nn.Module:
    """One of `LEOPP_WIDTHS`, for `cifar_test()` or `mnist_test()`: pixels in [0, 1], no other norm."""
    state = weights(f"leopp/{name}.pt")
    state = {key.replace(".module.", "."): value for key, value in state.items()}
    return loaded(LeoppMlp(*LEOPP_WIDTHS[name]), state)


# Robust networks of locuslab/convex_adversarial and Verified-Intelligence/alpha-beta-CROWN.


def conv_small(channels: int, size: int, padding: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two 4x4 convolutions at stride 2 (16, 32), a hidden linear layer of 100, 10 outputs; on size x size
    images."""
    for _ in range(2):
        size = (size + 2 * padding - 4) // 2 + 1
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=padding),
        activation(),
        nn.Conv2d(16, 32, 4, stride=2, padding=padding),
        activation(),
        nn.Flatten(),
        nn.Linear(32 * size * size, 100),
        activation(),
        nn.Linear(100, 10),
    )


def mnist_9_200() -> nn.Sequential:
    """Flatten, 8 hidden layers of 200 with ReLU, 10 outputs."""
    widths = [784] + [200] * 8
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(200, 10))


class Resnet2bBlock(nn.Module):
    """Two 3x3 convolutions without batch norm; a 1x1 shortcut where the shape changes."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut.append(nn.Conv2d(in_planes, planes, 1, stride=stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        out += self.shortcut(x)
        return F.relu(out)


class Resnet2b(nn.Module):
    """Stem at stride 2, one stage of two blocks, two linear layers.

    The second block has stride 1 and no 1x1 shortcut: its file has none, and 1,024 inputs of `linear1` are 16
    x 8 x 8.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Resnet2bBlock(8, 16, 2), Resnet2bBlock(16, 16, 1))
        self.linear1 = nn.Linear(1024, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer1(F.relu(self.conv1(x)))
        return self.linear2(F.relu(self.linear1(torch.flatten(x, 1))))


ROBUST = {
    "mnist": "robust/mnist.pth",
    "cifar_small_8px": "robust/cifar_small_8px.pth",
    "mnist_9_200": "robust/mnist_9_200_nat.pth",
    "mnist_conv_small": "robust/mnist_conv_small_nat.pth",
    "cifar_cnn_a_adv": "robust/cifar_cnn_a_adv.model",
    "cifar_conv_small_sigmoid": "robust/cifar_conv_small_sigmoid.pth",
    "resnet2b": "robust/resnet2b.pth",
}


def robust(name: str) -> nn.Module:
    """One of `ROBUST`, randomly initialised."""
    makers = {
        "mnist": lambda: conv_small(1, 28, 1),
        "cifar_small_8px": lambda: conv_small(3, 32, 1),
        "mnist_9_200": mnist_9_200,
        "mnist_conv_small": lambda: conv_small(1, 28, 0),
        "cifar_cnn_a_adv": lambda: conv_small(3, 32, 1),
        "cifar_conv_small_sigmoid": lambda: conv_small(3, 32, 0, nn.Sigmoid),
        "resnet2b": Resnet2b,
    }
    return makers[name]()


def load_robust(name: str) -> nn.Module:
    """One of `ROBUST` with its weights, for the images of `robust_test(name)`."""
    state = weights(ROBUST[name])
    if "state_dict" in state:
        state = state["state_dict"]
    return loaded(robust(name), state[0] if isinstance(state, list) else state)


def robust_test(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Test images, normalised as the network `name` of `ROBUST` takes them, and labels."""
    if name in ("mnist", "mnist_9_200"):
        return mnist_test()
    if name == "mnist_conv_small":
        return mnist_test(*MNIST_NORM)
    if name == "cifar_small_8px":
        return cifar_test(IMAGENET_MEAN, (0.225, 0.225, 0.225))
    return cifar_test(CIFAR_MEAN, RESNET2B_STD if name == "resnet2b" else CIFAR_STD)


def robust_box(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in [0, 1], normalised as the network `name` of `ROBUST` takes them: the box of all images."""
    if name in ("mnist", "mnist_9_200"):
        mean, std = (0.0,), (1.0,)
    elif name == "mnist_conv_small":
        mean, std = MNIST_NORM[:1], MNIST_NORM[1:]
    elif name == "cifar_small_8px":
        mean, std = IMAGENET_MEAN, (0.225, 0.225, 0.225)
    else:
        mean, std = CIFAR_MEAN, RESNET2B_STD if name == "resnet2b" else CIFAR_STD
    low, high = (torch.tensor([(end - m) / s for m, s in zip(mean, std, strict=True)]) for end in (0.0, 1.0))
    slack = 1e-6  # the images are normalised in float32
    return (low.double() - slack).reshape(-1, 1, 1), (high.double() + slack).reshape(-1, 1, 1)


# Policies of DLR-RM/rl-trained-agents.


def mountaincar_policy() -> nn.Sequential:
    """The Q network of DQN MountainCar (position, velocity): 2-256-256-3; the action is the argmax."""
    return nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))


def pendulum_policy() -> nn.Sequential:
    """The actor of DDPG Pendulum (cos, sin, speed): 3-400-300-1, tanh at the end."""
    return nn.Sequential(
        nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 1), nn.Tanh()
    )


RL_BOXES = {
    "mountaincar": ((-1.2, -0.07), (0.6, 0.07)),
    "pendulum": ((-1.0, -1.0, -8.0), (1.0, 1.0, 8.0)),
}


def load_policy(name: str) -> nn.Module:
    """The acting network of "mountaincar" or "pendulum"."""
    policy = {"mountaincar": mountaincar_policy, "pendulum": pendulum_policy}[name]()
    return loaded(policy, weights(f"rl/{name}-policy.pt"))


def policy_states(name: str) -> torch.Tensor:
    """Observations (N, 2 or 3) float32 of 20 episodes of "mountaincar" or "pendulum"."""
    with np.load(data_file(f"rl/{name}-states.npz")) as file:
        return torch.from_numpy(file["obs"])


def policy_box(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The declared domain of the observations: the lower and the upper corner of the box."""
    low, high = RL_BOXES[name]
    return torch.tensor(low), torch.tensor(high)
