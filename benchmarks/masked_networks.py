"""Masked networks: torchvision's classifiers with planted constants, for tests and benchmarks.

A network is built with random weights, all its biases and batch norms are randomised, and a fraction of the
output channels of every convolution is masked with `torch.nn.utils.prune.random_structured`, made permanent.
The convolution's bias stays as it is, so a masked channel is a *constant* and not zero: at the border of the
next zero-padded convolution that is the case which tools get wrong. The batch norm that reads the convolution
gets its gains zeroed by the same mask (in the *stress* case by a mask of its own), so behind it the channel
is its shift.

The more is masked the less the output depends on the input, and a network whose output no longer depends on
its input tests nothing. So the fraction of each network is the largest of .8, .7, ... .1 at which the output
still has `LIVELY` (1e-2) of its scale as standard deviation over inputs (`liveliness`), at every size that is
used.

Weights are drawn in float32 and then widened, so that a float32 copy of a network has the same weights
exactly.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn
from torch.nn.utils import prune

LIVELY = 1e-2
FRACTIONS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
STRESS_FRACTION = 0.8
FRACTIONS_FILE = Path(__file__).with_name("masked_fractions.json")
MOMENTS = {"bias": 0.1, "shift": 0.3, "running_mean": 0.1}  # standard deviations of what is drawn around zero

# The two input sizes of the benchmark, and the one of the tests: small, for speed, but leaving a few pixels
# for the last pool. Adaptive pools make all networks independent of the input's size (inception_v3: from 75
# up). At 64 pixels alexnet and mobilenet_v3_small keep one pixel, and their outputs vary too little.
SIZES: dict[str, tuple[int, int]] = {
    "alexnet": (96, 128),
    "vgg11_bn": (64, 96),
    "vgg16_bn": (64, 96),
    "resnet18": (96, 128),
    "resnet50": (96, 128),
    "squeezenet1_0": (96, 128),
    "densenet121": (96, 128),
    "inception_v3": (96, 139),
    "googlenet": (96, 128),
    "shufflenet_v2_x0_5": (96, 128),
    "mobilenet_v2": (96, 128),
    "mobilenet_v3_small": (96, 128),
    "resnext50_32x4d": (96, 128),
    "wide_resnet50_2": (96, 128),
    "mnasnet1_0": (96, 128),
}
TEST_SIZES = dict.fromkeys(SIZES, 64) | {"inception_v3": 80, "alexnet": 96, "mobilenet_v3_small": 96}
NETWORKS = tuple(SIZES)

# The auxiliary heads of these two do not run in inference and are not built; nor is scipy's slow
# initialisation.
ARGUMENTS = {name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")}


def random_inputs(size: int, count: int = 64, seed: int = 0) -> torch.Tensor:
    """`count` random images (count, 3, size, size) in float64, the same for the same seed.

    Normal pixels about a normal mean for each image and colour: white noise alone averages out in the global
    pools.
    """
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)
    return colours + torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def outputs(model: nn.Module, inputs: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """The model's outputs (N, classes) on `inputs`, in batches to bound the memory."""
    return torch.cat([model(part) for part in inputs.split(batch)])


def masked_network(name: str, fraction: float, seed: int = 0, stress: bool = False) -> nn.Module:
    """The torchvision network `name` with random weights and masked channels, float64, in eval mode.

    `fraction` of the output channels of every convolution is masked (weights to zero, bias kept); the gains
    of its batch norm by the same mask or, if `stress`, as many of them by an independent one. Masks of one
    seed are nested: a larger fraction masks all that a smaller one does. The global random state is left as
    it was.
    """
    return masked(randomised_network(name, seed), TEST_SIZES[name], fraction, seed, stress)


def randomised_network(name: str, seed: int) -> nn.Module:
    """The network before anything is masked, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(torchvision.models, name)(weights=None, **ARGUMENTS.get(name, {})).eval()
        randomise_(model)
    return model


def masked(model: nn.Module, size: int, fraction: float, seed: int, stress: bool) -> nn.Module:
    """`model`, a float32 one which takes images of `size`, masked in place and widened to float64."""
    norms = batch_norms_of_convolutions(model, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for convolution in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
            mask_(convolution, norms.get(convolution), fraction, stress)
    return model.double()


@torch.no_grad()
def randomise_(model: nn.Module) -> None:
    """Draw anew, in place, every bias and every batch norm's gain, shift and running moments.

    Weights of convolutions are drawn by He's rule (fan in), since some of torchvision's own initialisations
    fade out within the depth of the network and would leave no signal to test.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.normal_(0, MOMENTS["bias"])
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, MOMENTS["shift"])
            module.running_mean.normal_(0, MOMENTS["running_mean"])
            module.running_var.uniform_(0.5, 1.5)


@torch.no_grad()
def batch_norms_of_convolutions(model: nn.Module, size: int) -> dict[nn.Module, nn.BatchNorm2d]:
    """For every convolution the batch norm that reads exactly its output, by data flow: {convolution: batch
    norm}.

    The same tensor object, unchanged (in-place operations count its version up), of as many channels.
    DenseNet's convolutions before a concatenation and networks without batch norm have none.
    """
    # Holds the tensors, so that no id is used twice.
    written: dict[int, tuple[nn.Module, torch.Tensor, int]] = {}
    norms: dict[nn.Module, nn.BatchNorm2d] = {}

    def note_output(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        written[id(output)] = (module, output, output._version)

    def note_input(module: nn.BatchNorm2d, inputs: Any) -> None:
        if id(inputs[0]) not in written:
            return
        convolution, tensor, version = written[id(inputs[0])]
        if tensor._version != version or convolution.out_channels != module.num_features:
            return
        if norms.setdefault(convolution, module) is not module:
            raise AssertionError(f"two batch norms read the convolution before {module}")

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note_output))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(note_input))
    try:
        model(torch.zeros(1, 3, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    return norms


@torch.no_grad()
def mask_(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, fraction: float, stress: bool) -> None:
    """Mask output channels of `convolution` and gains of `norm`, in place and for good (see
    `masked_network`)."""
    prune.random_structured(convolution, "weight", amount=fraction, dim=0)
    kept = convolution.weight_mask.flatten(1)[:, 0]
    prune.remove(convolution, "weight")
    independent = torch.rand(len(kept))  # drawn in both cases, so that both mask the same channels
    if norm is None:
        return
    if stress:
        kept = torch.ones_like(kept)
        kept[independent.argsort()[: round(fraction * len(kept))]] = 0
    norm.weight.mul_(kept)


def liveliness(wide: torch.Tensor) -> float:
    """How much outputs (N, classes) depend on the input: standard deviation over inputs (root mean square
    over classes) over the scale of the output, which is its largest absolute value."""
    return float(wide.std(dim=0).square().mean().sqrt() / wide.abs().max())


def measured_fraction(name: str, seed: int = 0) -> tuple[float, float]:
    """The largest of `FRACTIONS` at which the network is lively, and its liveliness there (the least of its
    sizes).

    Takes up to a minute. Raises AssertionError where no fraction leaves an output that depends on the input.
    """
    whole = randomised_network(name, seed)
    for fraction in FRACTIONS:
        model = masked(copy.deepcopy(whole), TEST_SIZES[name], fraction, seed, stress=False)
        lively = min(liveliness(outputs(model, random_inputs(size, seed=seed))) for size in SIZES[name])
        if lively >= LIVELY:
            return fraction, lively
    raise AssertionError(f"{name} (seed {seed}): at {FRACTIONS[-1]} masked the output depends on no input")


def chosen_fraction(name: str, seed: int = 0) -> float:
    """The fraction of `measured_fraction`, from `masked_fractions.json` where that has it."""
    cached = read_fractions().get(str(seed), {})
    return cached[name]["fraction"] if name in cached else measured_fraction(name, seed)[0]


def read_fractions() -> dict[str, dict[str, dict[str, float]]]:
    """{seed: {network: {"fraction": ..., "liveliness": ...}}} as measured before; empty without the file."""
    return json.loads(FRACTIONS_FILE.read_text()) if FRACTIONS_FILE.exists() else {}


def main() -> None:
    """Measure the fractions of all networks at seed 0 anew and write them to `masked_fractions.json`."""
    torch.set_num_threads(1)
    found = read_fractions()
    for name in NETWORKS:
        fraction, lively = measured_fraction(name)
        print(f"{name:20s} {fraction} {lively:.4f}", flush=True)
        found.setdefault("0", {})[name] = {"fraction": fraction, "liveliness": round(lively, 5)}
        FRACTIONS_FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
