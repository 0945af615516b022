"""`ep-prune embed`: write a wider model that computes the same.

The file is one of `ep_prune.load`, which makes the factory's model and widens it to the shapes in the file; so
`verify` and --weights of the other commands take it too. What is verified is what stands in the file: it is read
again, compared with the model that was given, and only then moved into its place.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ep_prune.cli_files import check_targets, publish
from ep_prune.cli_models import given
from ep_prune.errors import InputError, VerificationError
from ep_prune.storage import holds_plan, load, save_wide
from ep_prune.trace import run
from ep_prune.verification import Verification, verify
from ep_prune.widen import KINDS, embed


def add_options(added: argparse.ArgumentParser) -> None:
    """The options that `embed` alone has."""
    added.add_argument(
        "--width", action="append", default=[], metavar="SPACE=WIDTH",
        help="widen this space, named by the first layer that writes to it; may be repeated (default: all)",
    )  # fmt: skip
    added.add_argument(
        "--factor", type=float, metavar="F",
        help="without --width: every space of k channels gets max(k + 1, round(F * k)) (default: 1.5)",
    )  # fmt: skip
    added.add_argument(
        "--kind", default="compatible", metavar="KIND", help=f"{', '.join(KINDS)} (default: compatible)"
    )
    added.add_argument(
        "--no-critical", dest="critical", action="store_false",
        help="keep the output alone: critical points need not stay critical",
    )  # fmt: skip
    added.add_argument(
        "--out", type=Path, metavar="FILE", required=True,
        help="the wide model (.safetensors); ep_prune.load(factory, FILE) reads it",
    )  # fmt: skip
    added.add_argument("--force", action="store_true", help="replace a file that exists")


def run_embed(options: argparse.Namespace) -> None:
    """Widen, write, read again, compare, and print the report."""
    check_targets([options.out], options.force)
    asked = _asked(options)
    model, inputs, probes = given(options)
    if options.weights is not None and holds_plan(options.weights):
        raise InputError(
            f"{options.weights} was written by reduce, compress or embed, and no file tells of two such steps: "
            "widen the model that it came from, or use ep_prune.embed in Python"
        )
    run(model, inputs)  # wrong inputs are named by the layer that they do not fit
    wide, report = embed(
        model, inputs, kind=options.kind, critical=options.critical, seed=options.seed, full_output=True, **asked
    )
    if not report.spaces:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.left_alone.items())
        raise InputError(
            f"nothing was widened ({reasons or 'no space can be'}): ask for wider spaces, another kind"
        )
    found: list[Verification] = []

    def write(path: Path) -> None:
        save_wide(wide, model, path)
        found.append(_checked(model, load(lambda: model, path), inputs, probes, options))

    publish({options.out: write})
    print(report)
    print(str(found[0]).splitlines()[0].replace("same", "verified: same output"))
    print(f"wrote {options.out}")


def _checked(
    model: nn.Module, wide: nn.Module, inputs: Any, probes: Any, options: argparse.Namespace
) -> Verification:
    """The comparison that `ep-prune verify` makes, so that no file is written which it refuses."""
    checked = verify(model, wide, inputs, probes=probes, seed=options.seed)
    if not checked.ok:
        advice = "choose another --seed or --kind" if options.double else "widen in float64 with --double"
        raise VerificationError(
            f"the wide model differs from the one given, by {checked.difference:.2g} relative in float64 "
            f"(limit {checked.limit:.2g}): {advice}"
        )
    return checked


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Widths or a factor, as keyword arguments of `embed`."""
    if options.factor is not None and (options.width or options.kind == "threefold"):
        other = "--width" if options.width else "--kind threefold"
        raise InputError(f"--factor and {other} both say how wide: give one of them")
    if options.width:
        return {"widths": _widths(options.width)}
    factor = 1.5 if options.factor is None else options.factor
    if not 1 < factor < math.inf:
        raise InputError(f"--factor {factor} does not widen: give a finite one above 1")
    return {"factor": factor}


def _widths(texts: Sequence[str]) -> dict[str, int]:
    widths: dict[str, int] = {}
    for text in texts:
        name, _, width = text.rpartition("=")
        if not name or not width.isdecimal():
            raise InputError(f"--width {text!r} is no width: write SPACE=WIDTH, as in layer1=96")
        if name in widths:
            raise InputError(f"--width names the space {name!r} twice: give it one width")
        widths[name] = int(width)
    return widths
