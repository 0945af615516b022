"""What `EffectiveWidthMonitor` costs at its default interval: the width-500 run with it and without it.

    python -m benchmarks.monitor [--steps 120000] [--quick] [--out bench-out/]

One run is cut into blocks of 100 steps, every second one watched: `monitor.step` after each step. The monitor's
clock stands still in the other blocks, so that its share is of the watched time alone. Reported: seconds of all
watched blocks over seconds of all plain ones, less 1, by the wall clock and in processor time; and the monitor's
own count. Asserted at the end, with exit code 1: the overhead by the wall clock, which is what the share is of, is
at most 5 %. Results go to `monitor.json` in `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ep_prune.monitor import EffectiveWidthMonitor
from recipes.embedding_principle.width500 import TOLS, start

BLOCK = 100
ALLOWED = 0.05


@dataclass
class Stopwatch:
    """Seconds that pass only while it runs; as a call, the monitor's clock."""

    wall: float = 0.0
    processor: float = 0.0
    _since: tuple[float, float] | None = None

    def __enter__(self) -> Stopwatch:
        self._since = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._since is not None
        self.wall += time.perf_counter() - self._since[0]
        self.processor += time.process_time() - self._since[1]
        self._since = None

    def __call__(self) -> float:
        return self.wall + (0.0 if self._since is None else time.perf_counter() - self._since[0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitor", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=120_000)
    parser.add_argument("--quick", action="store_true", help="10,000 steps")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    descent = start(500, 0.05, 0)
    plain, watched = Stopwatch(), Stopwatch()
    probes = [torch.linspace(-15, 15, 201).unsqueeze(1)]
    monitor = EffectiveWidthMonitor(descent.model, probes[0][:2], TOLS, probes=probes, refine=True, clock=watched)
    for _ in range(500):  # warm caches, before either counts
        descent.step()
    steps = 10_000 if args.quick else args.steps
    for first in range(0, steps, 2 * BLOCK):
        with plain:
            for _ in range(BLOCK):
                descent.step()
        with watched:
            for step in range(first, first + BLOCK):
                descent.step()
                monitor.step(step)
    result = {
        "steps in each kind of block": steps // 2,
        "plain": {"seconds": plain.wall, "processor seconds": plain.processor},
        "watched": {"seconds": watched.wall, "processor seconds": watched.processor},
        "overhead": watched.wall / plain.wall - 1,
        "overhead in processor time": watched.processor / plain.processor - 1,
        "overhead by the monitor's own count": monitor.spent / (watched.wall - monitor.spent),
        "share": monitor.share,
        "measurements": len(monitor.records) - 1,  # the first is part of the set-up
        "seconds of each": [round(record["seconds"], 4) for record in monitor.records],
        "made with": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "monitor.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return int(watched.wall / plain.wall - 1 > ALLOWED)


if __name__ == "__main__":
    raise SystemExit(main())
