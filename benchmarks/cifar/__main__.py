"""Accuracy over multiply-accumulates kept, of every method on the same networks, images and machine.

    python -m benchmarks.cifar [--networks a,b] [--methods x,y] [--budgets .7,.5] [--seeds 0,1,2]
                               [--images 1024] [--quick] [--out bench-out/cifar]

No fine-tuning and no labels: a method gets the network, calibration images drawn by seed from the first 4,000
training images of CIFAR-10, and the share of multiply-accumulates that may be left. Accuracy is that on the
first 1,000 test images, on which nothing is tuned. `tests/zoo.py` says where the networks and images are
looked for.

Before anything else each network must have the accuracy that its source states. Every result is appended to
`results.jsonl` in `--out` as it comes, so an interrupted run goes on where it ended (what failed is tried
again); delete the file to start anew. At the end, and for what is there by then: `results.json`, `table.md`,
`plot.png`. Exit code 1 if a network is not the stated one, or a method left more MACs than it was allowed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.cifar.batch_norm import has_batch_norm, reestimated
from benchmarks.cifar.methods import METHODS, Method
from benchmarks.cifar.networks import CALIBRATION, NETWORKS, Case, zoo
from benchmarks.cifar.plot import plot
from benchmarks.cifar.table import table
from benchmarks.common import Log, machine, names_of
from ep_prune.cost import cost

SEEDS = (0, 1, 2)
SLACK = 1e-9  # a share is a quotient of integers
QUICK = {"networks": ["resnet20"], "budgets": [0.7, 0.5], "seeds": [0]}


@dataclass
class Row:
    """One run. accuracy in per cent; macs, parameters: shares of the wide network's that are left; seconds: of the
    method alone. Where `error` is set, the figures are None."""

    network: str
    method: str
    budget: float
    seed: int
    images: int
    accuracy: float | None = None
    macs: float | None = None
    parameters: float | None = None
    seconds: float | None = None
    note: str = ""
    error: str = ""

    @property
    def key(self) -> tuple[str, str, float, int, int]:
        return self.network, self.method, self.budget, self.seed, self.images


@dataclass
class Setting:
    """What the methods are run on."""

    case: Case
    model: nn.Module
    test: tuple[Tensor, Tensor]
    calibration: Tensor
    budget: float
    seed: int

    def row(self, method: Method) -> Row:
        return Row(self.case.name, method.name, self.budget, self.seed, len(self.calibration))

    def measured(self, method: Method, narrow: nn.Module, seconds: float) -> Row:
        """The row of a method's result."""
        row = self.row(method)
        example = self.test[0][:1]
        before, after = cost(self.model, example), cost(narrow, example)
        row.accuracy = zoo.accuracy(narrow, *self.test)
        row.macs = after.macs / before.macs
        row.parameters = after.parameters / before.parameters
        row.seconds = seconds + getattr(narrow, "bench_seconds", 0.0)
        row.note = getattr(narrow, "bench_note", "")
        return row

    def failed(self, method: Method, error: Exception) -> Row:
        row = self.row(method)
        row.error = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
        return row


def lacks(log: Log[Row], row: Row) -> bool:
    return row.key not in log.rows or bool(log.rows[row.key].error)


def run(setting: Setting, methods: Iterable[Method], log: Log[Row]) -> None:
    """The rows that `log` lacks. A method and its re-estimated twin share one narrowing."""
    wanted = [method for method in methods if lacks(log, setting.row(method))]
    for base in {method.base or method.name: None for method in wanted}:
        asked = [method for method in wanted if base in (method.name, method.base)]
        try:
            start = time.perf_counter()
            narrow = METHODS[base](setting.model, setting.calibration, setting.budget, setting.seed)
            seconds = time.perf_counter() - start
        except Exception as error:  # a method that crashes is a row of the table
            for method in asked:
                log.add(setting.failed(method, error))
            continue
        for method in asked:
            try:
                start, result = time.perf_counter(), narrow
                if method.base is not None:
                    result = reestimated(narrow, setting.calibration)
                log.add(setting.measured(method, result, seconds + time.perf_counter() - start))
            except Exception as error:  # so is one whose result does not run
                log.add(setting.failed(method, error))


def write(log: Log[Row], images: int, bases: dict[str, float], out: Path) -> str:
    """The JSON file, the table and the plot of all rows that are there with this many calibration images, also of
    networks that were not asked for this time; returns the table."""
    rows = [row for row in log.rows.values() if row.images == images]
    bases = {name: case.stated for name, case in NETWORKS.items()} | bases
    text = table(rows, bases)
    document = {"machine": machine(), "base accuracy": bases, "rows": [asdict(row) for row in rows]}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "table.md").write_text(text)
    plot(rows, bases, out / "plot.png")
    return text


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    parser.add_argument("--networks", type=names_of(NETWORKS), default=list(NETWORKS), metavar="A,B")
    parser.add_argument("--methods", type=names_of(METHODS), default=list(METHODS), metavar="X,Y")
    parser.add_argument("--budgets", type=lambda text: [float(part) for part in text.split(",")], metavar="F,F",
                        help="shares of MACs kept; default: each network's own")  # fmt: skip
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=list(SEEDS))
    parser.add_argument("--images", type=int, default=CALIBRATION, help="calibration images")
    parser.add_argument("--quick", action="store_true", help="ResNet-20, budgets .7 and .5, seed 0")
    parser.add_argument("--out", type=Path, default=Path("bench-out/cifar"))
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "results.jsonl", lambda found: Row(**found), lambda row: row.key)
    cases = [NETWORKS[name] for name in options.networks]
    loaded = {case.name: case.checked() for case in cases}
    bases = {name: accuracy for name, (_, accuracy) in loaded.items()}
    methods = [METHODS[name] for name in options.methods]
    runs = [
        (case, seed, budget)
        for case in cases
        for seed in options.seeds
        for budget in options.budgets or case.budgets
    ]
    draw: tuple[Any, Tensor] | None = None
    for case, seed, budget in (progress := tqdm(runs, unit="budget")):
        progress.set_description(f"{case.name} seed {seed} keep {budget:.2f}")
        model = loaded[case.name][0]
        if draw is None or draw[0] != (case.name, seed):
            draw = (case.name, seed), case.calibration(seed, options.images)
        applicable = [method for method in methods if method.base is None or has_batch_norm(model)]
        for method in tqdm(applicable, leave=False, unit="method"):
            if method.base in options.methods:
                continue  # comes with its base
            pair = [method] + [twin for twin in applicable if twin.base == method.name]
            run(Setting(case, model, case.test(), draw[1], budget, seed), pair, log)
    print(write(log, options.images, bases, options.out))
    over = [row for row in log.rows.values() if row.macs is not None and row.macs > row.budget + SLACK]
    for row in over:
        print(f"{row.method} left {row.macs:.3f} of {row.network}'s MACs, {row.budget} allowed", file=sys.stderr)
    return int(bool(over))


if __name__ == "__main__":
    raise SystemExit(main())
