"""The CIFAR-10 networks of the benchmark, their images, and what accuracy their files are known to have.

Images are normalised as each network takes them. Calibration images are drawn by seed from the first 4,000
training images, without their labels; accuracy is that on the first 1,000 test images, which nothing else
looks at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import zoo

CALIBRATION = 1024
TOLERANCE = 0.05  # one image in 1,000 is 0.1 points


@dataclass(frozen=True)
class Case:
    """One network. stated: accuracy in per cent that `data/README.md` states (of the MLP: that was measured here);
    budgets: the shares of the wide network's MACs that are left."""

    name: str
    load: Callable[[], nn.Module]
    mean: Sequence[float]
    std: Sequence[float]
    stated: float
    budgets: tuple[float, ...] = (0.5,)

    def test(self) -> tuple[Tensor, Tensor]:
        """Images (1000, 3, 32, 32), normalised, and labels (1000,)."""
        return zoo.cifar_test(self.mean, self.std)

    def calibration(self, seed: int, count: int = CALIBRATION) -> Tensor:
        """`count` training images (count, 3, 32, 32), normalised, drawn without replacement by `seed`."""
        x, _ = zoo.cifar_train(self.mean, self.std)
        if count > len(x):
            raise ValueError(f"{count} calibration images asked for, {len(x)} are here: pass a smaller count")
        return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]]

    def checked(self) -> tuple[nn.Module, float]:
        """The wide network and its accuracy, which must be the stated one. Raises RuntimeError."""
        model = self.load()
        measured = zoo.accuracy(model, *self.test())
        if abs(measured - self.stated) > TOLERANCE:
            raise RuntimeError(
                f"{self.name} classifies {measured:.1f} % right and not the stated {self.stated:.1f} %: "
                "check its file, the images and their normalisation"
            )
        return model, measured


def _cases() -> list[Case]:
    none = ((0.0,) * 3, (1.0,) * 3)
    imagenet, cifar = (zoo.IMAGENET_MEAN, zoo.IMAGENET_STD), (zoo.CIFAR_MEAN, zoo.CIFAR_STD)
    several = (0.8, 0.7, 0.5, 0.3)
    robust = zoo.load_robust
    return [
        Case("resnet20", partial(zoo.load_cifar_resnet, 20), *imagenet, 91.5, several),
        Case("resnet56", partial(zoo.load_cifar_resnet, 56), *imagenet, 92.6, several),
        Case("nin", zoo.load_nin, *cifar, 85.5),
        Case("resnet8", zoo.load_resnet8, none[0], (1 / 255,) * 3, 88.1),
        Case("cnn_a_adv", partial(robust, "cifar_cnn_a_adv"), *cifar, 70.3),
        Case("conv_small_sigmoid", partial(robust, "cifar_conv_small_sigmoid"), *cifar, 65.8),
        Case("resnet2b", partial(robust, "resnet2b"), zoo.CIFAR_MEAN, zoo.RESNET2B_STD, 70.3),
        Case("cifar_small_8px", partial(robust, "cifar_small_8px"), zoo.IMAGENET_MEAN, (0.225,) * 3, 31.2),
        Case("leopp_mlp", partial(zoo.load_leopp, "cifar10_mlp_116_248"), *none, 50.2),
    ]


NETWORKS = {case.name: case for case in _cases()}
