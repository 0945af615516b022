"""What the package does with the architectures that people have: exports, reduces, and takes off what was planted.

    python -m benchmarks.families [--only NAME ...] [--quick] [--limit 300] [--out bench-out/]

For every family (`families_networks.py`, `families_libraries.py`) a random float64 model in which nothing is
trivially zero is reduced, widened 1.5 times by `ep_prune.embed` (compatible, forward condition) in every space
that it opens, and reduced again. Counted: the widened spaces that come back to exactly the widths from before.
Outputs are compared on fresh inputs after each of the three steps (`families_measure.py`). What does not export,
what no rule is there for, and every space that is not widened or does not come back, is named with its reason.

timm and transformers are optional (`pip install ".[families]"`); without them their families are skipped, and the
table says so. Every family has a process of its own, which is stopped after `--limit` seconds or above `--memory`
GB. Rows are appended to `families.jsonl` in `--out`, and an interrupted run goes on where it ended (stopped and
skipped families are tried again; delete the file to start anew). `families.json` and `families.md` are of all rows
that are there. Seconds are of processor time, of one thread. Exit code 1 for a wrong output (a change above 1e-10
of the largest output) or a crash of the package; a refusal, a limit or a miss is a line of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common import Log
from benchmarks.families_measure import Row, measure
from benchmarks.families_networks import Family, families
from benchmarks.families_table import document, summary

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("tuple output", "two inputs, two outputs", "dncnn (denoiser)", "lstm language model", "vit_b_16")
FINAL = ("done", "refused", "crashed", "unbuilt")
"""What a second run takes over from the first."""


def in_a_process(family: Family, seed: int, limit: float, memory: float) -> Row:
    """The row of one family, measured in a process of its own that is stopped at a limit."""
    with tempfile.TemporaryDirectory() as folder:
        written, said = Path(folder) / "row.json", Path(folder) / "stderr"
        command = [sys.executable, "-m", "benchmarks.families", "--child", family.name, "--seed", str(seed)]
        last, spent, stopped = time.perf_counter(), 0.0, ""
        with said.open("w") as errors:
            child = subprocess.Popen(
                [*command, "--row", str(written)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            try:
                while child.poll() is None and not stopped:
                    time.sleep(0.1)
                    now = time.perf_counter()
                    spent, last = spent + min(now - last, 1.0), now  # where both are suspended, no time passes
                    if spent > limit:
                        stopped = f"stopped after {limit:.0f} s"
                    elif resident(child.pid) > memory:
                        stopped = f"stopped above {memory:g} GB"
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
        row = Row(family.name, family.group)
        if written.is_file():
            row = Row.read(json.loads(written.read_text()))
        if stopped:
            row.status, row.error = "stopped", f"{stopped}, at the step: {row.phase}"
            row.wall = spent
        elif child.returncode:
            last = (said.read_text(errors="replace").strip() or "no message").splitlines()[-1][:300]
            row.status = "crashed" if child.returncode < 0 else "unbuilt"  # a signal, or a fault of the benchmark
            row.error = f"exit code {child.returncode} at the step: {row.phase}: {last}"
    return row


def resident(pid: int) -> float:
    """GB of memory that a process holds; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def child(name: str, seed: int, written: Path) -> None:
    """Measure one family; the row, as far as it has come, is always in the file."""

    def note(row: Row) -> None:
        part = written.with_suffix(".part")
        part.write_text(json.dumps(asdict(row)))
        part.replace(written)

    note(measure(families()[name], seed, note))


def setting() -> dict[str, str]:
    """What the figures were made with."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"processor": platform.processor() or platform.machine(), "threads": "1, float64"}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="families whose names have one of these"
    )
    parser.add_argument("--quick", action="store_true", help=", ".join(QUICK))
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one family")
    parser.add_argument("--memory", type=float, default=6, metavar="GB", help="for one family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--here", action="store_true", help="in this process, without limits")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = list(families())
    options.names = [
        name
        for name in known
        if any(part in name for part in options.only)
        or (not options.only and (name in QUICK or not options.quick))
    ]
    if not options.names:
        parser.error(f"no family has {options.only[0]!r} in its name; there are {', '.join(known)}")
    return options


def lacks(log: Log[Row], name: str) -> bool:
    return name not in log.rows or log.rows[name].status not in FINAL


def write(log: Log[Row], seed: int, out: Path) -> str:
    """The JSON file and the table of all rows that are there, in the order of the registry; returns the table."""
    rows = [log.rows[name] for name in families() if name in log.rows]
    unmeasured = [name for name in families() if name not in log.rows]
    figures = {
        "made with": setting(),
        "seed": seed,
        "totals": summary(rows),
        "not measured": unmeasured,
        "rows": [row.public() for row in rows],
    }
    (out / "families.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = document(rows, setting() | {"seed": str(seed)}, unmeasured)
    (out / "families.md").write_text(text, encoding="utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    torch.set_num_threads(1)
    if options.child:
        child(options.child, options.seed, options.row)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "families.jsonl", Row.read, lambda row: row.name)
    wanted = [name for name in options.names if lacks(log, name)]
    for name in (bar := tqdm(wanted, unit="family", disable=None)):
        bar.set_description(name)
        family = families()[name]
        if family.needs and importlib.util.find_spec(family.needs) is None:
            row = Row(name, family.group, "skipped", error=f"{family.needs} is not installed")
        elif options.here:
            row = measure(family, options.seed)
        else:
            row = in_a_process(family, options.seed, options.limit, options.memory)
        log.add(row)
        tqdm.write(row.line())
        write(log, options.seed, options.out)
    print(write(log, options.seed, options.out))
    return int(any(row.broken for row in log.rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
