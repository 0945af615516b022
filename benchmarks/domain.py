"""What `reduce` takes off real networks at grade exact on the box of inputs that they are made for.

    python -m benchmarks.domain [--only NAME ...] [--out bench-out/]

The networks of the test material (`tests/zoo.py` says where the folder is): LEO++'s MLPs on pixels in [0, 1], the
verification networks on images of pixels in [0, 1] in their own normalisation, and two policies on the boxes of
their observations. For each: widths without and with the declared domain, parameters, seconds, the change of the
outputs on real inputs and on random ones in the box (float64, absolute) beside what float32 rounding does to the
wide network, and the share of equal decisions (argmax) on the real inputs, where there are several outputs.
Written to `domain.json` and `domain.md` in `--out`. Exit code 1 if a change exceeds the rounding by more than 16
times, or a decision differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ep_prune as ep

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo

RANDOM = 10_000
ALLOWED = 16.0


@dataclass(frozen=True)
class Row:
    """One network. widths: of its hidden layers; without: with no domain declared."""

    name: str
    domain: str
    before: list[int]
    without: list[int]
    after: list[int]
    parameters_before: int
    parameters_after: int
    seconds: float
    change: float
    rounding: float
    decisions: float


def cases() -> dict[str, Callable[[], tuple[nn.Module, Tensor, tuple[Any, Any]]]]:
    """Name -> (network, real inputs, domain)."""

    def leopp(name: str) -> tuple[nn.Module, Tensor, tuple[Any, Any]]:
        x, _ = zoo.mnist_test() if name.startswith("mnist") else zoo.cifar_test()
        return zoo.load_leopp(name), x, (0.0, 1.0)

    def robust(name: str) -> tuple[nn.Module, Tensor, tuple[Any, Any]]:
        return zoo.load_robust(name), zoo.robust_test(name)[0], zoo.robust_box(name)

    def policy(name: str) -> tuple[nn.Module, Tensor, tuple[Any, Any]]:
        return zoo.load_policy(name), zoo.policy_states(name), zoo.policy_box(name)

    def bound(make: Callable[[str], Any], name: str) -> Callable[[], Any]:
        return lambda: make(name)

    found = {name: bound(leopp, name) for name in zoo.LEOPP_WIDTHS}
    found |= {f"robust {name}": bound(robust, name) for name in zoo.ROBUST}
    return found | {f"policy {name}": bound(policy, name) for name in zoo.RL_BOXES}


def measure(name: str, net: nn.Module, real: Tensor, domain: tuple[Any, Any]) -> Row:
    """Reduce with and without the domain, and compare."""
    example = real[:2]
    without = ep.reduce(net, example, verify_result=False, progress=False)
    start = time.perf_counter()
    result = ep.reduce(net, example, domain=domain, progress=False)
    seconds = time.perf_counter() - start
    low, high = (torch.as_tensor(end, dtype=torch.float64).expand(real.shape[1:]) for end in domain)
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(RANDOM, *real.shape[1:], generator=generator)
    random = (low + share * (high - low)).to(real.dtype)
    change = rounding = 0.0
    same = []
    with torch.no_grad():
        for x in (real, random):
            for part in x.split(1000):
                stored = net(part), result.model(part)
                wide, narrow = net.double()(part.double()), result.model.double()(part.double())
                net.float(), result.model.float()
                change = max(change, float((wide - narrow).abs().max()))
                rounding = max(rounding, float((wide - stored[0]).abs().max()))
                if x is real and wide.shape[1] > 1:
                    same.append(stored[0].argmax(1) == stored[1].argmax(1))
    report = result.report
    return Row(
        name,
        report.domain,
        [space.before for space in report.spaces[:-1]],
        [space.after for space in without.report.spaces[:-1]],
        [space.after for space in report.spaces[:-1]],
        report.before.parameters,
        report.after.parameters,
        seconds,
        change,
        rounding,
        float(torch.cat(same).double().mean()) if same else 1.0,
    )


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| network | declared domain | hidden widths | without a domain | on the domain | parameters | seconds | "
        "change | float32 rounding | same decisions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        widths = ["/".join(map(str, part)) for part in (row.before, row.without, row.after)]
        count = f"{row.parameters_before:,} -> {row.parameters_after:,}"
        lines.append(
            f"| {row.name} | {row.domain} | {' | '.join(widths)} | {count} | {row.seconds:.1f} | "
            f"{row.change:.1e} | {row.rounding:.1e} | {row.decisions:.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args()
    rows = []
    for name, make in cases().items():
        if not options.only or any(part in name for part in options.only):
            rows.append(measure(name, *make()))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "domain.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    (options.out / "domain.md").write_text(table(rows) + "\n")
    print("\n" + table(rows))
    return int(any(row.change > ALLOWED * row.rounding or row.decisions < 1.0 for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
