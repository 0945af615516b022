"""The network of `ep-prune demo`: a small residual CNN for 8x8 digits, wider than what it computes.

The problem: a demonstration needs a *trained* network whose training has left channels null or
constant by itself, that fits into the package, and whose data need no download. This one reads
scikit-learn's copy of the UCI optical digits (1,797 greyscale images of 8x8) and was trained by
`recipes/train_digits.py`, whose docstring says how.

    images (N, 1, 8, 8)
      -> stem          conv 3x3, norm, ReLU                    stream A: 32 channels, 8x8
      -> block1        32 inner channels                       stream A
      -> block2        32 inner channels                       stream A
      -> block3        64 inner channels, stride 2, shortcut   stream B: 64 channels, 4x4
      -> mean over the plane -> head -> scores (N, 10)

What it leaves out: the weights in `ep_prune/data/digits.safetensors` are a teaching example and
not a digit reader for real use.
"""

from __future__ import annotations

from importlib import resources
from typing import Literal

import torch
from safetensors.torch import load
from torch import Tensor, nn

CLASSES = 10
WEIGHTS = "digits.safetensors"
SPLIT_SEED = 0
TRAIN_SAMPLES = 1437  # of 1,797: four fifths, the other 360 are for the test


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: `relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))`.

    Args:
        wide_in: channels of the input, shape (N, wide_in, H, W).
        inner: channels between the two convolutions.
        wide_out: channels of the output, shape (N, wide_out, H / stride, W / stride).
        stride: stride of the first convolution; the shortcut is a 1x1 convolution with norm
            where the shape changes, else the identity.
    """

    def __init__(self, wide_in: int, inner: int, wide_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, inner, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, wide_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or wide_in != wide_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Residual CNN: images (N, 1, 8, 8) in [0, 1] to class scores (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.block1 = ResidualBlock(32, 32, 32)
        self.block2 = ResidualBlock(32, 32, 32)
        self.block3 = ResidualBlock(32, 64, 64, stride=2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.block3(self.block2(self.block1(self.stem(x))))
        scores: Tensor = self.head(stream.mean((2, 3)))
        return scores


def digits_net() -> DigitsNet:
    """The untrained network, initialised from torch's global generator."""
    return DigitsNet()


def load_digits_net() -> DigitsNet:
    """The trained network, in evaluation mode; its weights are read from safetensors, never from a pickle."""
    net = DigitsNet()
    net.load_state_dict(load((resources.files("ep_prune") / "data" / WEIGHTS).read_bytes()))
    return net.eval()


def digits_data(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8), float32 in [0, 1], and classes (N,), int64, of one part of the digits.

    The split is one seeded permutation: 1,437 images to train with and 360 to test.

    Raises:
        ImportError: scikit-learn, which ships the images, is not installed.
        ValueError: `split` is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f"digits_data: split is {split!r}, but must be 'train' or 'test'")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is missing: pip install ep-prune[demo]"
        ) from error
    digits = load_digits()
    x = torch.from_numpy(digits.images).to(torch.float32).div_(16).unsqueeze_(1)
    y = torch.from_numpy(digits.target).to(torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = order[:TRAIN_SAMPLES] if split == "train" else order[TRAIN_SAMPLES:]
    return x[rows], y[rows]
