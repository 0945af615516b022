"""The networks of the zoo are the ones that the README of the test material names: their accuracies say
so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import zoo
from torch import nn

pytestmark = [pytest.mark.data, zoo.needs_data]

Images = tuple[torch.Tensor, torch.Tensor]

# name: (network, images, accuracy that the README states, in per cent)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Images], float]] = {
    "resnet20": (
        lambda: zoo.load_cifar_resnet(20),
        lambda: zoo.cifar_test(zoo.IMAGENET_MEAN, zoo.IMAGENET_STD),
        91.5,
    ),
    "resnet56": (
        lambda: zoo.load_cifar_resnet(56),
        lambda: zoo.cifar_test(zoo.IMAGENET_MEAN, zoo.IMAGENET_STD),
        92.6,
    ),
    "nin": (zoo.load_nin, lambda: zoo.cifar_test(zoo.CIFAR_MEAN, zoo.CIFAR_STD), 85.5),
    "resnet8": (zoo.load_resnet8, lambda: zoo.cifar_test(std=(1 / 255,) * 3), 88.1),
}
for _name, _stated in {
    "mnist": 98.2,
    "cifar_small_8px": 31.2,
    "mnist_9_200": 95.0,
    "mnist_conv_small": 98.3,
    "cifar_cnn_a_adv": 70.3,
    "cifar_conv_small_sigmoid": 65.8,
    "resnet2b": 70.3,
}.items():
    NETWORKS[_name] = (partial(zoo.load_robust, _name), partial(zoo.robust_test, _name), _stated)

# The README states none for these; what the files gave here, so that the class can not drift.
MEASURED = {"cifar10_mlp_116_248": 50.2, "mnist_mlp_200_200": 98.07, "mnist_mlp_100_100": 97.89}


@pytest.mark.parametrize("name", NETWORKS)
def test_accuracy_is_the_stated_one(name: str) -> None:
    load, test_images, stated = NETWORKS[name]
    assert zoo.accuracy(load(), *test_images()) == pytest.approx(stated, abs=0.1)


@pytest.mark.parametrize("name", MEASURED)
def test_accuracy_of_the_leopp_mlps(name: str) -> None:
    x, y = zoo.mnist_test() if name.startswith("mnist") else zoo.cifar_test()
    assert zoo.accuracy(zoo.load_leopp(name), x, y) == pytest.approx(MEASURED[name], abs=0.1)


def test_the_cifar100_mlp_loads() -> None:
    """There are no CIFAR-100 images here to measure it on."""
    x, _ = zoo.cifar_test()
    with torch.no_grad():
        logits = zoo.load_leopp("cifar100_mlp_pruned")(x[:8])
    assert logits.shape == (8, 100)
    assert logits.std(dim=0).min() > 0


@pytest.mark.parametrize("name", zoo.RL_BOXES)
def test_the_states_of_a_policy_lie_in_its_box(name: str) -> None:
    low, high = zoo.policy_box(name)
    states = zoo.policy_states(name)
    assert (states >= low).all()
    assert (states <= high).all()


def test_mountaincar_policy_acts_with_the_momentum() -> None:
    """The known solution of MountainCar pushes the way the car moves; the policy agrees on most states."""
    states = zoo.policy_states("mountaincar")
    fast = states[states[:, 1].abs() > 0.02]
    with torch.no_grad():
        action = zoo.load_policy("mountaincar")(fast).argmax(dim=1) - 1
    assert (action == fast[:, 1].sign()).float().mean() > 0.9


def test_pendulum_policy_acts_in_its_range() -> None:
    with torch.no_grad():
        action = zoo.load_policy("pendulum")(zoo.policy_states("pendulum"))
    assert action.shape == (4000, 1)
    assert action.abs().max() <= 1
    assert action.std() > 0.1


def test_images_are_the_official_ones() -> None:
    x, y = zoo.mnist_test()
    assert x.shape == (10000, 1, 28, 28)
    assert y[:5].tolist() == [7, 2, 1, 0, 4]
    assert (float(x.min()), float(x.max())) == (0, 1)
    x, y = zoo.cifar_test()
    assert x.shape == (1000, 3, 32, 32)
    assert y.shape == (1000,)
