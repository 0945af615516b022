"""What `ep_prune.compress` itself costs: seconds of its stages, peak memory, and images run through the network.

    python -m benchmarks.compress_cost [--series limits,images,width] [--threads 2] [--quick] [--out DIR]

All to half of the MACs, with two threads:

    limits   ResNet-56 on 1,024 images, held against what is promised: at most 150 seconds, 4 GB, and 15,000
             whole passes while widths are chosen
    images   ResNet-20 on 64, 256, 1,024 and 4,000 images
    width    WRN-10 of 1, 2 and 4 times the plain width, random weights, 256 images of noise (`wide_networks.py`)

Each measurement has a process of its own. Memory is the high-water mark of its resident set, beside the mark that
stood when the network and the images were loaded and nothing was done yet. Stages are timed by wrapping the
functions that make them up (`STAGES`); what is left is `other`. Passes: operators of the traced network times
images, over the operators that there are; so a run through the last third counts as a third. Runs of the finished
modules themselves (to check them, to time them) are not counted.

Results are appended to `results.jsonl` in `--out` (`bench-out/cost`) as they come, so an interrupted run goes on
where it ended (what failed is tried again); delete the file to start anew. At the end: `results.json`, `table.md`,
`plot.png`. Exit code 1 if a limit is exceeded, too many MACs were left, or a measurement failed. Seconds are those
of the clock: `load` tells whether the machine had other work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

import ep_prune
from benchmarks.cifar.networks import NETWORKS
from benchmarks.common import Log, machine, names_of
from benchmarks.compress_cost_report import plot, table
from benchmarks.wide_networks import noise, wide_resnet
from ep_prune.calibrate import Program

ROOT = Path(__file__).resolve().parents[1]
KEEP = 0.5
BATCH = 128
SECONDS, BYTES, PASSES = 150.0, 4e9, 15_000
SERIES: dict[str, list[tuple[str, int]]] = {
    "limits": [("resnet56", 1024)],
    "images": [("resnet20", count) for count in (64, 256, 1024, 4000)],
    "width": [(f"wrn10_{width}", 256) for width in (1, 2, 4)],
}
QUICK: dict[str, list[tuple[str, int]]] = {
    "images": [("resnet20", count) for count in (64, 128)],
    "width": [(f"wrn10_{width}", 64) for width in (1, 2)],
}
STAGES = {
    "reduce": "ep_prune.compress:reduce",
    "prepare": "ep_prune.narrowing:Work.of",
    "covariances": "ep_prune.measurements:moments",
    "importances": "ep_prune.measurements:importances",
    "curves": "ep_prune.measurements:curves",
    "elimination": "ep_prune.curves:eliminate",
    "allocation": "ep_prune.narrowing:descend",
    "fit": "ep_prune.narrowing:fitted",
    "check": "ep_prune.narrowing:Work._fit",
    "report": "ep_prune.compress:_report",
}
"""Where each stage is called from. A stage inside of another one counts on its own."""


@dataclass
class Row:
    """One measurement. seconds: of the whole call, and by stage; processor_seconds: of all threads; peak, loaded:
    bytes; passes: of one image through the whole network, by stage; macs: the share that is left. Where `error` is
    set, the figures are None."""

    network: str
    images: int
    threads: int
    used: int | None = None
    seconds: float | None = None
    processor_seconds: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)
    peak: int | None = None
    loaded: int | None = None
    macs: float | None = None
    wide_macs: int | None = None
    divergence: float | None = None
    agreement: float | None = None
    load: float | None = None
    error: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        return self.network, self.images, self.threads

    @property
    def choosing(self) -> float:
        """Whole passes that it took to choose the widths."""
        return sum(self.passes.get(stage, 0.0) for stage in ("curves", "elimination", "allocation"))


# ---- in the child -------------------------------------------------------------------------------------------


def case(network: str, images: int) -> tuple[nn.Module, Tensor]:
    """The network and its calibration images, by name: one of `benchmarks/cifar`, or wrnDEPTH_WIDTH."""
    if network in NETWORKS:
        found = NETWORKS[network]
        return found.load(), found.calibration(0, images)
    depth, width = network.removeprefix("wrn").split("_")
    return wide_resnet(int(depth), int(width)), noise(0, images)


def high_water() -> int:
    """The most bytes that this process has had in memory.

    Linux carries `ru_maxrss` over from the process that started this one, so there it is asked elsewhere.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Seconds and passes by stage: those of a stage that runs inside of another are not that one's, too."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: Counter[str] = Counter()
        self.passes: Counter[str] = Counter()
        self._running = ["other"]
        self._since = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.lap()
        self._running.append(name)
        try:
            yield
        finally:
            self.lap()
            self._running.pop()

    def lap(self) -> None:
        """Book the time since the last lap to the stage that runs."""
        now = self.clock()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def count(self, passes: float) -> None:
        self.passes[self._running[-1]] += passes

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return call


@contextmanager
def watched() -> Iterator[Stopwatch]:
    """A stopwatch that runs along with every `compress` inside of the block."""
    watch = Stopwatch()
    call = Program.call

    def counted(program: Program, node: Any, values: Any) -> Any:
        shape = program.inputs[0].shape  # all chunks are of the traced size
        watch.count((shape[0] if shape else 1) / len(program.nodes))
        return call(program, node, values)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Program, "call", counted))
        for name, place in STAGES.items():
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)  # the package's own `compress` hides the module's name
            *parts, attribute = path.split(".")
            for part in parts:
                owner = getattr(owner, part)
            found = watch.wrapped(name, getattr(owner, attribute))
            if isinstance(vars(owner)[attribute], staticmethod):
                found = staticmethod(found)  # type: ignore[assignment]
            stack.enter_context(mock.patch.object(owner, attribute, found))
        yield watch
        watch.lap()


def measure(row: Row) -> Row:
    """Compress once, in this process, whose memory must not have been higher before; fills in the row."""
    model, images = case(row.network, row.images)
    row.load = os.getloadavg()[0]
    row.loaded = high_water()
    processor, start = time.process_time(), time.perf_counter()
    with watched() as watch:
        result = ep_prune.compress(
            model, images[:2], list(images.split(BATCH)), keep_macs=KEEP, samples=row.images, progress=False
        )
    row.seconds = time.perf_counter() - start
    row.processor_seconds = time.process_time() - processor
    row.peak = high_water()
    row.stages, row.passes = dict(watch.seconds), dict(watch.passes)
    report = result.report
    row.used, row.wide_macs = report.samples_used, report.before.macs
    row.macs = report.after.macs / report.before.macs
    row.divergence, row.agreement = report.divergence, report.agreement
    return row


# ---- in the parent ------------------------------------------------------------------------------------------


def in_child(row: Row) -> Row:
    """`measure` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(row.threads)}
    command = [sys.executable, "-m", "benchmarks.compress_cost", "--measure", json.dumps(asdict(row))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return Row(**json.loads(lines[-1]))
    told = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    row.error = f"the process ended with {done.returncode}: {told[-1][:200]}"
    return row


def broken(series: dict[str, list[Row]]) -> list[str]:
    """What does not hold, in sentences."""
    found = []
    for row in {row.key: row for rows in series.values() for row in rows}.values():
        if row.error:
            found.append(f"{row.network} on {row.images} images: {row.error}")
        elif row.macs is not None and row.macs > KEEP:
            found.append(f"{row.network} on {row.images} images keeps {row.macs:.4f} of the MACs, {KEEP} allowed")
    for row in series.get("limits", []):
        for what, value, limit, unit in (
            ("takes", row.seconds, SECONDS, "s"),
            ("needs", None if row.peak is None else row.peak / 1e9, BYTES / 1e9, "GB"),
            ("chooses widths with", row.choosing, PASSES, "whole passes"),
        ):
            if value is not None and value > limit:
                found.append(
                    f"{row.network} on {row.images} images {what} {value:,.1f} {unit}, {limit:,g} promised"
                )
    return found


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compress_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    parser.add_argument("--series", type=names_of(SERIES), default=list(SERIES), metavar="A,B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small networks, few images, without the limits")
    parser.add_argument("--out", type=Path, default=Path("bench-out/cost"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.measure:
        row = Row(**json.loads(options.measure))
        torch.set_num_threads(row.threads)
        print(json.dumps(asdict(measure(row))))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "results.jsonl", lambda found: Row(**found), lambda row: row.key)
    chosen = QUICK if options.quick else SERIES
    wanted = {name: chosen[name] for name in options.series if name in chosen}
    runs = list(dict.fromkeys(run for series in wanted.values() for run in series))
    for network, images in (progress := tqdm(runs, unit="run")):
        progress.set_description(f"{network}, {images} images")
        row = Row(network, images, options.threads)
        if row.key not in log.rows or log.rows[row.key].error:
            log.add(in_child(row))
    series = {name: [log.rows[network, images, options.threads] for network, images in runs_]
              for name, runs_ in wanted.items()}  # fmt: skip
    misses = broken(series)
    text = table(series, misses)
    document = {name: [asdict(row) for row in rows] for name, rows in series.items()}
    (options.out / "results.json").write_text(json.dumps({"machine": machine(), **document}, indent=1) + "\n")
    (options.out / "table.md").write_text(text)
    plot(series, options.out / "plot.png")
    print(text)
    for line in misses:
        print(line, file=sys.stderr)
    return int(bool(misses))


if __name__ == "__main__":
    raise SystemExit(main())
