"""Real speed before and after `ep_prune.compress` to half of the MACs: milliseconds a call, measured.

    python -m benchmarks.speed [--networks resnet56,wrn16_4] [--images N] [--threads 2] [--quick] [--out DIR]

The goal is 1.6x at half of the MACs with widths that are multiples of 8 (`round_to=8`), for one image and for
64, on two threads. Networks: the CIFAR ResNets of the test material, and wide ones with random weights: WRN-16-4,
WRN-16-8 and VGG-16 (`wide_networks.py`; the last two take much longer to compress). These are for timing only:
they are compressed with few images, of noise, and what they answer then means nothing.

Each network is compressed twice, with `round_to=8` and without rounding, and kept with its plan and its measured
curves in `--out` (`bench-out/speed`): timing can be repeated without compressing again (delete the files to
compress anew; files of other weights are not taken). "Seconds of compress" are those of a first run only for
`round_to=8`.

The wide and the narrow networks are then timed turn about, the wide one and that of `round_to=8` also with their
batch norms folded into the convolutions (what `compress` leaves with `fold_batch_norm=True`), contiguous and
channels-last, so that whatever else the machine does hits all of them. A turn is a call that is not timed, since
the caches hold another network by then, and a block of calls that is: blocks are long beside the slices in which a
busy machine deals out time, or else short calls would slip through whole, long ones would not, and the narrow
network would seem faster than it is. Speed-up: the wide network in its faster layout over the narrow one in its
own, medians over turns; beside it the quartiles of the same ratio turn by turn. Where the goal lies between these,
the figure decides nothing, and that is said. The folded narrow network is set against the wide one as it was given
and against the folded wide one. Where torch sees a GPU, it is timed, too.

With `--by-time 1.65` (as `make bench-speed` asks) each network is also compressed to that part of its own latency,
channels-last, for each batch: half of the MACs and milliseconds are both budgets, a table of layer times says
which channels go, and residual branches may go as a whole (`min_width=0`).

Written to `results.json` and `table.md` in `--out`. Where the goal is missed, that is said. Exit code 1 only for
what is wrong: more MACs than allowed, a narrowed width that is no multiple of 8, or outputs that are not finite.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import ep_prune
from benchmarks.cifar.networks import CALIBRATION, NETWORKS, zoo
from benchmarks.common import machine, names_of
from benchmarks.speed_table import BY_TIME, FOLDED, table
from benchmarks.wide_networks import noise, vgg16, wide_resnet
from ep_prune.cost import cost
from ep_prune.latency import latency_of
from ep_prune.modules import Constant
from ep_prune.norm_folding import fold_norms_, foldable
from ep_prune.plan import Plan, fingerprint
from ep_prune.trace import prepare, trace

GOAL = 1.6
KEEP = 0.5
ROUND = 8
BATCHES = (1, 64)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
TURNS = (7, 300)  # at least and at most
BLOCK = 0.05  # seconds, at least
FEW = 64  # images of noise
BATCH = 128
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Network:
    """One network. images: (seed, count) -> calibration images; count: as many by default; test: images and labels
    to tell its accuracy on, where it has one."""

    name: str
    load: Callable[[], nn.Module]
    images: Callable[[int, int], Tensor]
    count: int
    test: Callable[[], tuple[Tensor, Tensor]] | None = None


def _networks() -> dict[str, Network]:
    real = [NETWORKS[name] for name in ("resnet20", "resnet56")]
    found = [Network(case.name, case.load, case.calibration, CALIBRATION, case.test) for case in real]
    found.append(Network("vgg16", vgg16, noise, FEW))
    for depth, width in ((10, 2), (16, 4), (16, 8)):
        found.append(Network(f"wrn{depth}_{width}", partial(wide_resnet, depth, width), noise, FEW))
    return {network.name: network for network in found}


KNOWN = _networks()
CHOSEN = ("resnet56", "wrn16_4")
QUICK = {"networks": ["resnet20", "wrn10_2"], "images": 64, "seconds": 1.0}


@dataclass
class Narrow:
    """A narrow model's figures. macs, parameters: absolute; widths: (space, wide, exactly reduced, narrow);
    seconds: that `compress` took; agreement: share of equal decisions on held-out calibration images; accuracy: in
    per cent."""

    round_to: int
    macs: int
    parameters: int
    widths: list[tuple[str, int, int, int]]
    seconds: float
    images: int
    agreement: float | None
    accuracy: float | None = None


@dataclass
class Timing:
    """Milliseconds a call, by model ("wide", "round_to=8", "round_to=1") and layout, one figure a turn."""

    device: str
    batch: int
    times: dict[str, dict[str, list[float]]]

    @property
    def turns(self) -> int:
        return len(self.best("wide"))

    def best(self, model: str) -> list[float]:
        """Those of the layout with the smaller median."""
        return min(self.times[model].values(), key=statistics.median)

    def faster(self, model: str, than: str = "wide") -> float:
        """How many times faster than another model, the wide one, each in its own faster layout."""
        return statistics.median(self.best(than)) / statistics.median(self.best(model))

    def spread(self, model: str, than: str = "wide") -> tuple[float, float]:
        """The quartiles of the same ratio, turn by turn."""
        ratios = [wide / own for wide, own in zip(self.best(than), self.best(model), strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return low, high


@dataclass
class ByTime:
    """What `latency=` made, on the processor. asked: milliseconds; refused: why there is nothing."""

    batch: int
    asked: float
    macs: int | None = None
    accuracy: float | None = None
    branches: int = 0
    """Taken out whole."""
    timing: Timing | None = None
    refused: str = ""


@dataclass
class Measured:
    """All of one network."""

    network: str
    macs: int
    parameters: int
    accuracy: float | None
    narrow: list[Narrow] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    by_time: list[ByTime] = field(default_factory=list)


# ---- the narrow models --------------------------------------------------------------------------------------


def compressed(
    network: Network, wide: nn.Module, count: int, round_to: int, folder: Path
) -> tuple[nn.Module, Narrow]:
    """The narrow model and its figures, from the files of an earlier run where there are any."""
    path = folder / f"{network.name}-{count}-{round_to}.safetensors"
    told = path.with_suffix(".json")
    if path.is_file() and told.is_file():
        same = Plan.load(path).fingerprint == fingerprint(prepare(wide)[0].state_dict())
        if same:
            return ep_prune.load(network.load, path).eval(), Narrow(**json.loads(told.read_text()))
    images = network.images(0, count)
    start = time.perf_counter()
    result = ep_prune.compress(
        wide, images[:2], list(images.split(BATCH)), keep_macs=KEEP, round_to=round_to, samples=count,
        resume=_measured(network, wide, count, folder),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    exact = {space.name: space.after for space in result.reduced.report.spaces}
    report = result.report
    found = Narrow(
        round_to,
        report.after.macs,
        report.after.parameters,
        [(width.name, width.before, exact.get(width.name, width.before), width.after) for width in report.widths],
        seconds,
        report.samples_used,
        report.agreement,
        None if network.test is None else zoo.accuracy(result.model, *network.test()),
    )
    ep_prune.save(result, path)
    told.write_text(json.dumps(asdict(found)) + "\n")
    return result.model.eval(), found


def wrong(measured: Measured) -> list[str]:
    """What of the narrow models is not as it was asked for, in sentences."""
    lines = []
    for found in measured.narrow:
        name = f"{measured.network}, round_to={found.round_to}"
        if found.macs > KEEP * measured.macs:
            lines.append(f"{name}: {found.macs:,} MACs are left of {measured.macs:,}, {KEEP} of them are allowed")
        odd = [space for space, _, exact, now in found.widths if now != exact and now % found.round_to]
        if odd:
            lines.append(f"{name}: the width of {odd[0]} is no multiple of {found.round_to}")
    return lines


def folded(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy whose batch norms went into the layers before them, as `compress(fold_batch_norm=True)` leaves it."""
    working = prepare(model)[0]
    fold_norms_(working, foldable(working, trace(working, example)))
    return working


def _measured(network: Network, wide: nn.Module, count: int, folder: Path, branches: str = "") -> Path:
    """Where the curves of these weights are kept, which all of their narrow models begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = fingerprint(prepare(wide)[0].state_dict())
    return folder / f"{network.name}-{count}-{weights[:12]}{branches}.measured"


def by_time(
    network: Network, wide: nn.Module, batch: int, factor: float, count: int, seconds: float, folder: Path
) -> ByTime:
    """Compressed to half of the MACs and to `factor` times the speed, and timed."""
    last = torch.channels_last
    images, model = network.images(0, count), _placed(wide, "cpu", last)
    example = images[:batch].contiguous(memory_format=last)
    found = ByTime(batch, latency_of(model, example, seconds=2.0) / factor)
    try:
        result = ep_prune.compress(
            model, example, list(images.split(BATCH)), keep_macs=KEEP, latency=found.asked, round_to=ROUND,
            min_width=0, samples=count, fold_batch_norm=True,
            resume=_measured(network, wide, count, folder, "-branches"),
        )  # fmt: skip
    except ep_prune.InputError as error:
        found.refused = str(error)
        return found
    found.macs = result.report.after.macs
    found.accuracy = None if network.test is None else zoo.accuracy(result.model, *network.test())
    found.branches = sum(isinstance(module, Constant) for module in result.model.modules())
    models = {"wide": wide, f"wide{FOLDED}": folded(wide, images[:4]), BY_TIME: result.model}
    found.timing = timed(models, network.images(1, batch), "cpu", seconds)
    return found


# ---- the clock ----------------------------------------------------------------------------------------------


def turn_about(
    calls: dict[Key, Callable[[], Any]],
    seconds: float,
    turns: tuple[int, int] = TURNS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Milliseconds a call, means of blocks, by turn; each turn begins with another block. For about `seconds`."""

    def block(call: Callable[[], Any], size: int) -> float:
        begin = clock()
        for _ in range(size):
            call()
        return (clock() - begin) / size

    times: dict[Key, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    for call in calls.values():
        call()
    sizes = {
        key: math.ceil(BLOCK / max(min(block(call, 1) for _ in range(3)), 1e-6)) for key, call in calls.items()
    }
    start = clock()
    for turn in range(turns[1]):
        if turn >= turns[0] and clock() - start >= seconds:
            break
        first = turn % len(keys)
        for key in keys[first:] + keys[:first]:
            calls[key]()
            times[key].append(1e3 * block(calls[key], sizes[key]))
    return times


@torch.inference_mode()
def timed(models: dict[str, nn.Module], images: Tensor, device: str, seconds: float) -> Timing:
    """All models in all layouts, turn about. Raises ArithmeticError where an output is not finite."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, model in models.items():
        for layout, memory in LAYOUTS.items():
            placed = _placed(model, device, memory)
            x = images.to(device, memory_format=memory)
            _check(name, placed, x)
            calls[name, layout] = partial(_call, placed, x)
    times = turn_about(calls, seconds)
    return Timing(device, len(images), {name: {key: times[name, key] for key in LAYOUTS} for name in models})


def _check(name: str, model: nn.Module, x: Tensor) -> None:
    if not bool(model(x).isfinite().all()):
        raise ArithmeticError(f"the outputs of the model {name} are not finite")


def _placed(model: nn.Module, device: str, memory: torch.memory_format) -> nn.Module:
    with torch.inference_mode(False):  # parameters of a module are no inference tensors
        return copy.deepcopy(model).to(device, memory_format=memory)  # type: ignore[call-overload]


def _call(model: nn.Module, x: Tensor) -> None:
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(network: Network, count: int, seconds: float, out: Path, factor: float | None = None) -> Measured:
    """Compress, where that has not been done, and time."""
    wide = network.load()
    before = cost(wide, network.images(0, 4)[:1])
    accuracy = None if network.test is None else zoo.accuracy(wide, *network.test())
    found = Measured(network.name, before.macs, before.parameters, accuracy)
    models = {"wide": wide}
    for round_to in (ROUND, 1):
        narrow, figures = compressed(network, wide, count, round_to, out / "models")
        found.narrow.append(figures)
        models[f"round_to={round_to}"] = narrow
    example = network.images(0, 4)
    for name, model in models.items():
        _check(name, model, example)
    models |= {f"{name}{FOLDED}": folded(models[name], example) for name in ("wide", f"round_to={ROUND}")}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for batch in BATCHES:
            found.timings.append(timed(models, network.images(1, batch), device, seconds))
    for batch in BATCHES if factor is not None else ():
        found.by_time.append(by_time(network, wide, batch, factor, count, seconds, out / "models"))
    return found


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    parser.add_argument("--networks", type=names_of(KNOWN), default=list(CHOSEN), metavar="A,B")
    parser.add_argument("--images", type=int, help="calibration images; default: 1,024 real ones, 64 of noise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each network and batch")
    parser.add_argument("--by-time", type=float, metavar="F", help="compress to 1/F of the latency, too")
    parser.add_argument("--quick", action="store_true", help="ResNet-20 and a small wide ResNet, 64 images")
    parser.add_argument("--out", type=Path, default=Path("bench-out/speed"))
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return options


def run(networks: Iterable[Network], options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    setting = machine() | {"load": os.getloadavg()[0], "gpu": gpu}
    found: list[Measured] = []
    misses: list[str] = []
    for network in (progress := tqdm(list(networks), unit="network")):
        progress.set_description(network.name)
        try:
            count = options.images or network.count
            found.append(measure(network, count, options.seconds, options.out, options.by_time))
        except ArithmeticError as error:
            misses.append(f"{network.name}: {error}")
            continue
        misses += wrong(found[-1])
    text = table(found, setting, misses, GOAL)
    ratios = [
        {"network": one.network, "device": timing.device, "images": timing.batch, "turns": timing.turns,
         **{name: [timing.faster(name), *timing.spread(name)] for name in list(timing.times)[1:]}}
        for one in found
        for timing in one.timings
    ]  # fmt: skip
    document = {"machine": setting, "goal": GOAL, "wrong": misses, "speed-up and its quartiles": ratios}
    document["networks"] = [asdict(one) for one in found]
    (options.out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "table.md").write_text(text)
    print(text)
    return int(bool(misses))


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return run([KNOWN[name] for name in options.networks], options)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    raise SystemExit(main())
