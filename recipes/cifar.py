"""Compress a CIFAR-10 classifier to a share of its multiply-accumulates, and evaluate it on the test set.

    python -m recipes.cifar --model package.module:factory --weights checkpoint.pt --keep-macs 0.5
                            [--data data/] [--download] [--calibration 1024] [--seed 0]
                            [--mean .4914,.4822,.4465] [--std .2470,.2435,.2616] [--save narrow.safetensors]

No fine-tuning, and no labels but for the evaluation: `ep_prune.compress` gets `--calibration` training
images, drawn by `--seed` and not augmented. The network goes by what makes it, `package.module:factory`,
found from the current folder; its weights are a safetensors file or a checkpoint that
`torch.load(weights_only=True)` takes, so nothing in it is executed. The normalisation must be that of the
training.

The images are read by `torchvision.datasets.CIFAR10`, whose own format is Python pickles: what is unpickled
there is the official data set, of which torchvision checks the checksums. Nothing is downloaded without
`--download`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms
from tqdm import tqdm

import ep_prune
from ep_prune.cli_models import load_weights_, make_model
from ep_prune.cost import cost
from ep_prune.errors import EpPruneError

BATCH = 128


def data_set(options: argparse.Namespace, train: bool) -> datasets.CIFAR10:
    """One half of CIFAR-10, normalised. Exits with one sentence where it is missing."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(options.mean, options.std)])
    try:
        return datasets.CIFAR10(str(options.data), train=train, transform=transform, download=options.download)
    except RuntimeError as error:
        raise SystemExit(f"CIFAR-10 is not in {options.data} ({error}): name its folder with --data") from error


def calibration_batches(images: datasets.CIFAR10, count: int, seed: int) -> list[Tensor]:
    """`count` images drawn without replacement by `seed`, in batches, without their labels."""
    if not 0 < count <= len(images):
        raise SystemExit(f"--calibration is {count}, and there are {len(images)} training images")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return [x for x, _ in DataLoader(Subset(images, chosen.tolist()), batch_size=BATCH)]


@torch.no_grad()
def accuracy(model: nn.Module, images: datasets.CIFAR10, name: str) -> float:
    """The share of images that `model` classifies right, in per cent."""
    device = next(model.parameters()).device
    right = 0
    for x, y in tqdm(DataLoader(images, batch_size=BATCH), desc=f"{name} network", leave=False):
        right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    return 100 * right / len(images)


def compressed(model: nn.Module, batches: list[Tensor], keep_macs: float) -> Any:
    """What `ep_prune.compress` makes of the model."""
    compress = getattr(ep_prune, "compress", None)
    if compress is None:
        raise SystemExit("this version of ep_prune has no compress: install a newer one")
    return compress(model, batches[0][:2], calibration=batches, keep_macs=keep_macs)


def numbers(text: str) -> tuple[float, ...]:
    """`a,b,c` as three numbers."""
    values = tuple(float(part) for part in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not one number for each of the three colours")
    return values


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="MODULE:FACTORY")
    parser.add_argument("--model-args", metavar="JSON", help="keyword arguments of the factory")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--keep-macs", type=float, required=True, metavar="SHARE", help="0.5 leaves half")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="FOLDER")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the data set")
    parser.add_argument("--calibration", type=int, default=1024, metavar="IMAGES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean", type=numbers, default=(0.4914, 0.4822, 0.4465))
    parser.add_argument("--std", type=numbers, default=(0.2470, 0.2435, 0.2616))
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the narrow network, as safetensors")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    try:
        model = make_model(options.model, options.model_args, options.seed).eval()
        load_weights_(model, options.weights)
        test = data_set(options, train=False)
        batches = calibration_batches(data_set(options, train=True), options.calibration, options.seed)
        start = time.perf_counter()
        result = compressed(model, batches, options.keep_macs)
        seconds = time.perf_counter() - start
        if options.save is not None:
            ep_prune.save(result, options.save)
    except EpPruneError as error:
        raise SystemExit(str(error)) from error
    before, after = (cost(net, batches[0][:1]) for net in (model, result.model))
    print(f"MACs        {before.macs:,} -> {after.macs:,} ({after.macs / before.macs:.1%})")
    print(
        f"parameters  {before.parameters:,} -> {after.parameters:,} ({after.parameters / before.parameters:.1%})"
    )
    print(f"seconds     {seconds:.0f}")
    wide, narrow = accuracy(model, test, "wide"), accuracy(result.model, test, "narrow")
    print(f"accuracy    {wide:.2f} % -> {narrow:.2f} % on {len(test):,} test images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
