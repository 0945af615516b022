"""torch-pruning's own pruners and importances, as its documentation uses them.

*One ratio* in all layers: the largest that the budget lets through, one step. *Global*: channels of all
layers ranked together, taken off in small steps (torch-pruning's own "progressive pruning") until the budget
is met; in a single step it would leave a layer whole whose channels all fall under the threshold.

What has to be known about the host (torch-pruning 1.6.1):

* The classifier's outputs are never pruned. Where its pruned network does not run (the zero-padded shortcuts
  of the CIFAR ResNets, whose widths are numbers in the code), everything but the inner channels is ignored,
  and the result says so (`bench_note`).
* Taylor and Hessian importance need a loss. There are no labels here: the wide network's own predicted class
  stands in. `HessianImportance.accumulate_grad` looks parameters up by a key under which it never stores
  them, and so keeps the last sample alone; the mean of all samples' squared gradients is handed to it
  instead, which its scoring then uses unchanged.
* Dictionaries are fresh for each pruner, inputs a tuple, gradients switched on, the model a copy.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.cifar import chains
from benchmarks.cifar.budget import Prices, largest

STEPS = 200  # of progressive pruning: half a per cent of the channels each
BATCH = 128
SAMPLES_AT_ONCE = 32
INNER_ONLY = "inner channels only"

Gradients = dict[str, Tensor]
Importance = Callable[[], Any]


def uniform(importance: Importance, gradients: str | None = None) -> Callable[..., nn.Module]:
    """One ratio for all layers."""

    def run(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
        host = Host(model, images, importance, gradients)

        def pruned(share: float) -> nn.Module:
            narrow = host.copy()
            host.pruner(narrow, pruning_ratio=1 - share).step()
            return narrow

        share = largest(lambda share: host.prices.fits(pruned(share), keep_macs), steps=10)
        return host.finished(model if share == 1.0 else pruned(share), keep_macs)

    return run


def ranked(importance: Importance, gradients: str | None = None) -> Callable[..., nn.Module]:
    """Channels of all layers ranked together."""

    def run(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
        host = Host(model, images, importance, gradients)
        narrow = host.copy()
        pruner = host.pruner(narrow, pruning_ratio=1.0, global_pruning=True, iterative_steps=STEPS)
        for _ in range(STEPS):
            if host.prices.fits(narrow, keep_macs):
                break
            pruner.step()
        return host.finished(narrow, keep_macs)

    return run


class Host:
    """What a method hands to torch-pruning: copies of the model with gradients, and pruners of them."""

    def __init__(self, model: nn.Module, images: Tensor, importance: Importance, gradients: str | None) -> None:
        self.model, self.example, self.importance = model, images[:2], importance
        self.prices = Prices(model, images)
        self.gradients: Gradients = {}
        self.seconds_shared = 0.0
        if gradients is not None:
            self.gradients, self.seconds_shared = GRADIENTS.get(gradients, model, images)
        self.ignored, self.note = self._scope()

    def copy(self) -> nn.Module:
        narrow = copy.deepcopy(self.model)
        for name, parameter in narrow.named_parameters():
            parameter.requires_grad_(True)
            if name in self.gradients:
                parameter.grad = self.gradients[name].clone()
        return narrow

    def pruner(self, model: nn.Module, importance: Any = None, **options: Any) -> Any:
        return tp.pruner.MagnitudePruner(
            model,
            (self.example,),
            importance or self.importance(),
            ignored_layers=[model.get_submodule(name) for name in self.ignored],
            in_channel_groups={},
            out_channel_groups={},
            channel_groups={},
            num_heads={},
            **options,
        )

    def _scope(self) -> tuple[list[str], str]:
        """The layers whose outputs stay: the last one, or all but the inner channels' where that does not run."""
        layers = [name for name, module in self.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.ignored = self._classifiers(layers)
        trial = copy.deepcopy(self.model)
        try:
            self.pruner(trial, tp.importance.MagnitudeImportance(), pruning_ratio=0.3).step()
            with torch.no_grad():
                trial(self.example)
        except Exception as error:  # whatever the host or the pruned network raises
            inner = {chain.producer for chain in chains.find(self.model)}
            reason = str(error).strip().splitlines()[0][:80]
            return [name for name in layers if name not in inner], f"{INNER_ONLY} ({reason})"
        return self.ignored, ""

    def _classifiers(self, layers: list[str]) -> list[str]:
        """The layer that runs last, whose outputs are the classes."""
        order: list[str] = []
        hooks = [
            self.model.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
            for name in layers
        ]
        with torch.no_grad():
            self.model(self.example)
        for hook in hooks:
            hook.remove()
        return order[-1:]

    def finished(self, model: nn.Module, keep_macs: float) -> nn.Module:
        """The result, in evaluation mode and without gradients. Raises RuntimeError where the budget is missed."""
        narrow: Any = copy.deepcopy(model).eval()
        for parameter in narrow.parameters():
            parameter.grad = None
        if not self.prices.fits(narrow, keep_macs):
            left = self.prices.macs(narrow) / self.prices.wide
            raise RuntimeError(f"torch-pruning stops at {left:.2f} of the MACs, {keep_macs:.2f} were asked for")
        narrow.bench_note, narrow.bench_seconds = self.note, self.seconds_shared
        return narrow


def mean_gradient(model: nn.Module, images: Tensor) -> Gradients:
    """Gradient of the mean cross entropy against the network's own predicted classes, by parameter."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for part in images.split(BATCH):
        logits = model(part)
        (F.cross_entropy(logits, logits.argmax(1), reduction="sum") / len(images)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def mean_squared_gradient(model: nn.Module, images: Tensor) -> Gradients:
    """Mean over the images of each one's squared gradient of that loss, by parameter."""
    model = copy.deepcopy(model).eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(weights: Gradients, image: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), (image.unsqueeze(0),))
        return F.cross_entropy(logits, logits.detach().argmax(1))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for part in images.split(SAMPLES_AT_ONCE):
        for name, gradient in each(parameters, part).items():
            total[name] += gradient.square().sum(0)
    return {name: value / len(images) for name, value in total.items()}


class Cache:
    """The last network's gradients on the last draw of images, with the seconds that they took: budgets and
    methods share them, and each one's time counts them in."""

    makers: dict[str, Callable[[nn.Module, Tensor], Gradients]]

    def __init__(self) -> None:
        self.makers = {"first": mean_gradient, "squared": mean_squared_gradient}
        self.of: tuple[nn.Module, Tensor] | None = None
        self.made: dict[str, tuple[Gradients, float]] = {}

    def get(self, kind: str, model: nn.Module, images: Tensor) -> tuple[Gradients, float]:
        """The gradients, and the seconds that an earlier call spent on them."""
        if self.of is None or self.of[0] is not model or self.of[1] is not images:
            self.of, self.made = (model, images), {}
        if kind in self.made:
            return self.made[kind]
        start = time.perf_counter()
        gradients = self.makers[kind](model, images)
        self.made[kind] = gradients, time.perf_counter() - start
        return gradients, 0.0


GRADIENTS = Cache()


def _quiet() -> None:
    warnings.filterwarnings("ignore", module="torch_pruning.*")


_quiet()

RUNS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "L1": (uniform(lambda: tp.importance.MagnitudeImportance(p=1)), "magnitude, one ratio"),
    "global L1": (ranked(lambda: tp.importance.MagnitudeImportance(p=1)), "magnitude, ranked globally"),
    "FPGM": (uniform(lambda: tp.importance.FPGMImportance()), "geometric median, one ratio"),
    "Taylor": (uniform(lambda: tp.importance.TaylorImportance(), "first"), "first order, one ratio"),
    "global Taylor": (ranked(lambda: tp.importance.TaylorImportance(), "first"), "first order, ranked globally"),
    "LAMP": (ranked(lambda: tp.importance.LAMPImportance()), "layer-adaptive magnitude, ranked globally"),
    "Hessian": (uniform(lambda: tp.importance.HessianImportance(), "squared"), "optimal brain damage, one ratio"),
    "global Hessian": (
        ranked(lambda: tp.importance.HessianImportance(), "squared"),
        "optimal brain damage, ranked globally",
    ),
}
