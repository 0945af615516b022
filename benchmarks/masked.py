"""Masked networks: `ep_prune.reduce` and torch-simplify on torchvision's classifiers with planted constants.

    python -m benchmarks.masked [--networks a,b] [--quick] [--stress] [--no-peers] [--out bench-out/]

How the networks are made, and how much of each is masked: `benchmarks/masked_networks.py`. Every network is
first asserted to depend on its input still (not in the stress case). Then `reduce` runs on it in float64, and
the outputs are compared on 64 random inputs at two sizes, of which `reduce` has seen the first alone.
torch-simplify gets the same network and the same inputs in a process of its own with a time limit, so that
its crashes cost one row; in float64, and in float32 where that fails.

Asserted at the end, with exit code 1 and one line for each failure: the largest relative difference is at
most 1e-10; there are never more parameters than before; and at most those of torch-simplify where that is
right (relative difference at most 1e-6, in float32 1e-4, at the size which it was given). A table `masked.md`
and all figures `masked.json` are written to `--out` after every network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.masked_networks import (
    LIVELY,
    NETWORKS,
    SIZES,
    STRESS_FRACTION,
    chosen_fraction,
    liveliness,
    masked_network,
    measured_fraction,
    outputs,
    random_inputs,
)

TOLERANCE = 1e-10  # ours: largest difference over the largest output, float64
PEER_IS_RIGHT = {"float64": 1e-6, "float32": 1e-4}  # the same for the peer; float32 rounds by up to 2e-5 here
PEER_SECONDS = 300
QUICK = ("resnet18", "squeezenet1_0", "mobilenet_v2", "shufflenet_v2_x0_5")
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Narrowed:
    """What one tool made of one network.

    Differences are relative, one for each size; None where it does not run or gives no finite output.
    """

    seconds: float
    parameters: int
    macs: int | None
    differences: list[float | None]
    dtype: str = "float64"

    @property
    def is_right(self) -> bool:
        """Whether the peer kept the output at the size that it was given."""
        return self.differences[0] is not None and self.differences[0] <= PEER_IS_RIGHT[self.dtype]


@dataclass
class Row:
    """One network: what it was, what it became, and where the peer stands (its result, or why there is
    none)."""

    network: str
    fraction: float
    liveliness: float
    sizes: tuple[int, ...]
    parameters: int
    macs: int
    ours: Narrowed
    peer: Narrowed | None = None
    peer_failure: str = ""
    failures: list[str] = field(default_factory=list)


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example[:1])
    return counter.get_total_flops() // 2


def relative_difference(wide: torch.Tensor, narrow: torch.Tensor) -> float | None:
    """The largest absolute difference over the largest absolute wide output; None where not finite."""
    if wide.shape != narrow.shape or not narrow.isfinite().all():
        return None
    return float((wide - narrow).abs().max() / wide.abs().max())


def measure(name: str, fraction: float, args: argparse.Namespace) -> Row:
    """Build one masked network, narrow it with ours and with the peer, and check what the module's text
    promises."""
    model = masked_network(name, fraction, args.seed, args.stress)
    inputs = [random_inputs(size, args.inputs, args.seed) for size in args.sizes[name]]
    wide = [outputs(model, x) for x in inputs]
    lively = min(liveliness(y) for y in wide)
    if not args.stress and lively < LIVELY:
        raise AssertionError(f"{name}: {fraction} masked, the output varies by {lively:.1e} of its scale only")
    row = Row(
        network=name,
        fraction=fraction,
        liveliness=lively,
        sizes=tuple(args.sizes[name]),
        parameters=count_parameters(model),
        macs=count_macs(model, inputs[0]),
        ours=narrow_by_ours(model, inputs, wide),
    )
    del model
    if args.peers:
        result = run_peer(name, fraction, args)
        row.peer, row.peer_failure = (result, "") if isinstance(result, Narrowed) else (None, result)
    row.failures = list(failures(row))
    return row


def narrow_by_ours(model: nn.Module, inputs: list[torch.Tensor], wide: list[torch.Tensor]) -> Narrowed:
    """`ep_prune.reduce` with an example of the first size; whatever it raises is raised."""
    import ep_prune as ep

    began = time.perf_counter()
    narrow = ep.reduce(model, inputs[0][:2]).model
    seconds = time.perf_counter() - began
    return Narrowed(
        seconds=seconds,
        parameters=count_parameters(narrow),
        macs=count_macs(narrow, inputs[0]),
        differences=[relative_difference(y, outputs(narrow, x)) for x, y in zip(inputs, wide, strict=True)],
    )


def failures(row: Row) -> Iterator[str]:
    """One sentence for each promise that a row breaks."""
    worst = max(float("inf") if d is None else d for d in row.ours.differences)
    if not worst <= TOLERANCE:
        yield f"{row.network}: outputs differ by {worst:.1e} of their scale, more than {TOLERANCE:.0e}"
    if row.ours.parameters > row.parameters:
        yield f"{row.network}: {row.ours.parameters:,} parameters, {row.parameters:,} before"
    if row.peer is not None and row.peer.is_right and row.ours.parameters > row.peer.parameters:
        yield (
            f"{row.network}: {row.ours.parameters:,} parameters,"
            f" and torch-simplify is right with {row.peer.parameters:,}"
        )


# The peer, in a process of its own.


def run_peer(name: str, fraction: float, args: argparse.Namespace) -> Narrowed | str:
    """torch-simplify's result in float64, else in float32, else why there is none."""
    first = ""
    for dtype in ("float64", "float32"):
        order = {
            "name": name,
            "fraction": fraction,
            "seed": args.seed,
            "stress": args.stress,
            "sizes": list(args.sizes[name]),
            "inputs": args.inputs,
            "threads": args.threads,
            "dtype": dtype,
        }
        answer = ask_peer(order)
        if isinstance(answer, Narrowed):
            return answer
        first = first or answer
        if answer.startswith("no answer"):
            break
    return first


def ask_peer(order: dict[str, Any]) -> Narrowed | str:
    """Start this module as the peer's process and read the last line of its output."""
    command = [sys.executable, "-m", "benchmarks.masked", "--peer-order", json.dumps(order)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PEER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {PEER_SECONDS} s"
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return f"process ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}"[:80]
    answer = json.loads(lines[-1])
    return answer["failure"] if "failure" in answer else Narrowed(**answer)


def peer_main(order: dict[str, Any]) -> None:
    """In the peer's process: narrow with torch-simplify and print one line of JSON, whatever it raises
    included."""
    torch.set_num_threads(order["threads"])
    warnings.simplefilter("ignore")
    dtype = getattr(torch, order["dtype"])
    model = masked_network(order["name"], order["fraction"], order["seed"], order["stress"])
    inputs = [random_inputs(size, order["inputs"], order["seed"]) for size in order["sizes"]]
    wide = [outputs(model, x) for x in inputs]
    torch.set_default_dtype(dtype)  # torch-simplify makes new modules without saying of which type
    try:
        answer: dict[str, Any] = asdict(narrow_by_simplify(model.to(dtype), inputs, wide))
    except Exception as error:
        answer = {"failure": f"{type(error).__name__}: {error}".replace("\n", " ")[:80]}
    print(json.dumps(answer))


def narrow_by_simplify(model: nn.Module, inputs: list[torch.Tensor], wide: list[torch.Tensor]) -> Narrowed:
    """torch-simplify as its README says, on zeros of the first size; the other size may fail alone."""
    import simplify  # here, since only this process may pay for what it does to torch

    size, dtype = inputs[0].shape[-1], next(model.parameters()).dtype
    began = time.perf_counter()
    with torch.no_grad():
        narrow = simplify.simplify(model, torch.zeros(1, 3, size, size, dtype=dtype), fuse_bn=True)
    seconds = time.perf_counter() - began
    given = outputs(narrow, inputs[0].to(dtype))
    if given.shape != wide[0].shape:
        raise ValueError(f"output of shape {tuple(given.shape)} instead of {tuple(wide[0].shape)}")
    differences = [relative_difference(wide[0], given)]
    for x, y in zip(inputs[1:], wide[1:], strict=True):
        try:
            differences.append(relative_difference(y, outputs(narrow, x.to(dtype))))
        except Exception:
            differences.append(None)
    try:
        macs = count_macs(narrow, inputs[0].to(dtype))
    except Exception:
        macs = None
    return Narrowed(seconds, count_parameters(narrow), macs, differences, str(dtype).removeprefix("torch."))


# The table.

HEAD = (
    "network",
    "masked",
    "varies by",
    "sizes",
    "parameters",
    "ours",
    "simplify",
    "MMACs",
    "ours",
    "simplify",
    "s, ours",
    "s, simplify",
    "difference, ours",
    "difference, simplify",
    "ours <= simplify where that is right",
)


def cells(row: Row) -> list[str]:
    """One line of the table."""

    def macs(count: int | None) -> str:
        return "" if count is None else f"{count / 1e6:.1f}"

    def differences(narrowed: Narrowed) -> str:
        dtype = "" if narrowed.dtype == "float64" else f" ({narrowed.dtype})"
        return ", ".join("fails" if d is None else f"{d:.0e}" for d in narrowed.differences) + dtype

    peer, ours = row.peer, row.ours
    if peer is None:
        verdict = ""
    elif not peer.is_right:
        verdict = "simplify is wrong"
    else:
        verdict = "yes" if ours.parameters <= peer.parameters else "NO"
    return [
        row.network,
        f"{row.fraction}",
        f"{row.liveliness:.1e}",
        ", ".join(map(str, row.sizes)),
        f"{row.parameters:,}",
        f"{ours.parameters:,}",
        f"{peer.parameters:,}" if peer else "",
        macs(row.macs),
        macs(ours.macs),
        macs(peer.macs) if peer else "",
        f"{ours.seconds:.1f}",
        f"{peer.seconds:.1f}" if peer else "",
        differences(ours),
        differences(peer) if peer else row.peer_failure.replace("|", "/"),
        verdict,
    ]


def setting(args: argparse.Namespace) -> dict[str, str]:
    """The machine, the versions and the choices which the figures belong to."""
    from importlib.metadata import version

    return {
        "date": time.strftime("%Y-%m-%d"),
        "case": "stress: gains masked independently" if args.stress else "gains masked as the convolution is",
        "processor": processor(),
        "threads": str(args.threads),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "torch-simplify": version("torch-simplify") if args.peers else "not run",
        "seed": str(args.seed),
        "inputs": f"{args.inputs} random at each size, float64",
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def write(rows: list[Row], args: argparse.Namespace) -> None:
    """`masked.md` and `masked.json` (`masked_stress.*` in the stress case) in the folder `--out`."""
    name = "masked_stress" if args.stress else "masked"
    lines = ["# Masked networks" + (", stress case" if args.stress else ""), ""]
    lines += [f"* {key}: {value}" for key, value in setting(args).items()]
    lines += ["", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    failed = [failure for row in rows for failure in row.failures]
    lines += ["", *(f"* FAILED: {failure}" for failure in failed)] if failed else []
    lines += [
        "",
        "masked: fraction of every convolution's output channels; varies by: standard deviation of the",
        "output over inputs / its largest value; MMACs: for one input at the first size; difference: max",
        "|narrow - wide| / max |wide| at each size, of which the tools were shown the first.",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    figures = {"setting": setting(args), "rows": [asdict(row) for row in rows]}
    (args.out / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


def progress(names: list[str]) -> tuple[Iterable[str], Callable[[str], None]]:
    """The names to walk over and a function to report one line: a bar on a terminal, else lines alone."""
    if not sys.stderr.isatty():
        return names, lambda line: print(line, flush=True)
    from tqdm import tqdm

    return tqdm(names, unit="network"), tqdm.write


def fraction_to_use(name: str, args: argparse.Namespace) -> float:
    """The fraction masked: fixed in the stress case, as cached in a quick run, else measured again and
    compared."""
    if args.stress:
        return STRESS_FRACTION
    cached = chosen_fraction(name, args.seed)
    if not args.quick:
        fraction, _ = measured_fraction(name, args.seed)
        if fraction != cached:
            raise AssertionError(
                f"{name}: {fraction} masked is the largest fraction now, masked_fractions.json says {cached}:"
                " run python -m benchmarks.masked_networks"
            )
    return cached


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masked", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="", help="names, comma between; default: all, --quick: four")
    parser.add_argument("--quick", action="store_true", help="8 inputs, one size, the cached fractions")
    parser.add_argument("--stress", action="store_true", help="mask .8 everywhere, gains independently")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="do not run torch-simplify")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-order", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    chosen = [name for name in args.networks.split(",") if name]
    args.names = chosen or list(QUICK if args.quick else NETWORKS)
    unknown = [name for name in args.names if name not in SIZES]
    if unknown:
        parser.error(f"no network {unknown[0]!r}: choose from {', '.join(NETWORKS)}")
    args.inputs = 8 if args.quick else 64
    args.sizes = {name: sizes[:1] if args.quick else sizes for name, sizes in SIZES.items()}
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. The exit code is 1 if a promise is broken."""
    args = parse(argv)
    if args.peer_order:
        peer_main(json.loads(args.peer_order))
        return 0
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    names, report = progress(args.names)
    for name in names:
        rows.append(measure(name, fraction_to_use(name, args), args))
        report("  ".join(cells(rows[-1])))
        write(rows, args)
    failed = [failure for row in rows for failure in row.failures]
    for failure in failed:
        print(f"FAILED: {failure}", file=sys.stderr)
    print(f"{len(rows)} networks, {len(failed)} failures; table in {args.out}/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
