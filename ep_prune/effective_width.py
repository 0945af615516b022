"""Effective width: how narrow a network computes what a wide one has learnt, space by space.

The complexity of the function that a network has learnt is not its width: it is the width of the narrowest network
that expresses it. Deciding that is NP-complete even for one hidden layer of tanh (Farrugia-Roberts, arXiv
2306.02834, for the *proximate* rank). What is measured here is an upper bound: a narrower network is written
down, by keeping channels and folding all others into them by least squares (`gauge`), and its outputs are
compared. Grade *fitted*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ep_prune.errors import EpPruneError, InputError
from ep_prune.gauge import Measurement, WidthGauge
from ep_prune.refine import refined_widths
from ep_prune.trace import random_state_kept


@dataclass(frozen=True)
class WidthCurve:
    """One space of `full` channels: widths by tolerance, and the outputs' change at every width that was tried.

    fixed: why all channels stay, or "". selected: the widths without refinement, from kept channels as they are.
    """

    name: str
    producers: tuple[str, ...]
    full: int
    fixed: str
    widths: Mapping[float, int]
    selected: Mapping[float, int]
    changes: Mapping[int, float]

    def at(self, tol: float) -> int:
        """The width at `tol`: the narrowest that was measured to keep the outputs within it."""
        return min((k for k, change in self.changes.items() if change <= tol), default=self.full)


@dataclass(frozen=True)
class EffectiveWidths:
    """What `effective_width` returns. samples: how many probes; synthetic: whether they were made up."""

    curves: tuple[WidthCurve, ...]
    tols: tuple[float, ...]
    samples: int
    synthetic: bool
    grade: str = "fitted"

    @property
    def spaces(self) -> dict[str, WidthCurve]:
        """The curves by the name of the first layer that writes to the space."""
        return {curve.name: curve for curve in self.curves}

    def at(self, tol: float) -> dict[str, int]:
        """Space -> width at `tol`. Exact for the tolerances asked for, else from what was measured for these."""
        return {curve.name: curve.at(tol) for curve in self.curves}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON; tolerances and widths that are keys become pairs."""
        return {
            "grade": self.grade,
            "tols": list(self.tols),
            "samples": self.samples,
            "synthetic": self.synthetic,
            "spaces": [
                {
                    "name": curve.name,
                    "producers": list(curve.producers),
                    "full": curve.full,
                    "fixed": curve.fixed,
                    "widths": [[tol, k] for tol, k in curve.widths.items()],
                    "selected": [[tol, k] for tol, k in curve.selected.items()],
                    "changes": [[k, change] for k, change in sorted(curve.changes.items())],
                }
                for curve in self.curves
            ],
        }

    def __str__(self) -> str:
        header = ("space", "full", *(f"{tol:.0e}" for tol in self.tols), "")
        body = [
            (
                curve.name + (f" (+{len(curve.producers) - 1})" if len(curve.producers) > 1 else ""),
                str(curve.full),
                *(str(curve.widths[tol]) for tol in self.tols),
                f"fixed: {curve.fixed}" if curve.fixed else "",
            )
            for curve in self.curves
        ]
        sizes = [max(len(row[k]) for row in (header, *body)) for k in range(len(header) - 1)]

        def line(row: tuple[str, ...]) -> str:
            cells = [row[0].ljust(sizes[0])]
            cells += [cell.rjust(size) for cell, size in zip(row[1:-1], sizes[1:], strict=True)]
            return "  ".join([*cells, row[-1]]).rstrip()

        probes = f"{self.samples} {'synthetic ' if self.synthetic else ''}probes"
        return "\n".join(
            [
                line(header),
                line((*("-" * size for size in sizes), "")),
                *map(line, body),
                "",
                f"{self.grade}, {probes}",
            ]
        )

    def plot(self, path: str | Path) -> None:
        """Draw the share of each space's channels that is needed, over the tolerance. Needs matplotlib."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise EpPruneError("drawing needs matplotlib: pip install 'ep-prune[plot]'") from error
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for curve in self.curves:
            if not curve.fixed:
                tols = sorted(curve.widths)
                label = f"{curve.name} ({curve.full})"
                axes.plot(tols, [curve.widths[tol] / curve.full for tol in tols], "o-", label=label, markersize=4)
        axes.set_xscale("log")
        axes.set_xlabel("largest change of an output, relative")
        axes.set_ylabel("share of channels needed")
        axes.set_ylim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8, ncols=max(1, len(axes.lines) // 16))
        figure.savefig(path, dpi=150)


def effective_width(
    model: nn.Module,
    example_inputs: Any,
    tol: float | Sequence[float] = (1e-1, 1e-2, 1e-3),
    *,
    probes: Iterable[Any] | None = None,
    spaces: Sequence[str] | None = None,
    refine: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> EffectiveWidths:
    """The narrowest width found for every space, all others as they are, that keeps the outputs within `tol`.

    An upper bound: the kept channels are chosen by a greedy order, since choosing the best is NP-complete
    (Farrugia-Roberts, arXiv 2306.02834). Every width that is returned was measured, end to end, in float64.

    Args:
        model: any `nn.Module` that torch.export takes. It is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as the model takes them.
        tol: the largest change of any output, relative to that output's largest absolute value on the probes; or
            several, for a curve.
        probes: the inputs that the function is judged on: batches like `example_inputs`, or a loader of
            (inputs, labels). There should be several times as many (positions of maps count) as the widest space
            has channels: every second one is fitted to, all are compared on. Without them, seeded synthetic
            ones.
        spaces: the names of the spaces to measure (each goes by the first layer that writes to it); all by
        default. refine: also move the kept channels' own incoming weights (Levenberg-Marquardt), where a plain
        linear layer
            writes the space: needed where neurons share a direction but not its length. Slower.
        seed: of synthetic probes, and of the projection by which outputs are weighed.
        progress: show a progress bar; by default on a terminal only.

    Raises:
        InputError: the model, the inputs or a tolerance cannot be used; the sentence says what to do.
        TraceError: the model cannot be exported.
    """
    tols = tolerances(tol)
    with tqdm(desc="effective width", disable=None if progress is None else not progress, leave=False) as bar:
        return measure(set_up(model, example_inputs, probes, seed), tols, spaces, refine, bar)


def set_up(
    model: nn.Module, example_inputs: Any, probes: Iterable[Any] | None = None, seed: int = 0
) -> WidthGauge:
    """A gauge for this model; the random state is as before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        return WidthGauge(model, example_inputs, probes, seed)


def tolerances(tol: float | Sequence[float]) -> tuple[float, ...]:
    """One or several tolerances, loosest first. Raises `InputError`."""
    tols = (float(tol),) if isinstance(tol, int | float) else tuple(sorted({float(t) for t in tol}, reverse=True))
    for each in tols:
        if not 0.0 <= each < 1.0:
            raise InputError(f"tol={each} is not in [0, 1): it is a relative change of the output")
    if not tols:
        raise InputError("tol is empty: give one relative change of the output, or several")
    return tols


def measure(
    gauge: WidthGauge,
    tols: Sequence[float],
    spaces: Sequence[str] | None = None,
    refine: bool = False,
    bar: Any = None,
) -> EffectiveWidths:
    """`effective_width` with a gauge that is set up already: of the weights that it follows."""
    curves = []
    with random_state_kept():
        for measurement in gauge.measurements(spaces):
            if bar is not None:
                bar.set_postfix_str(measurement.space.name)
                bar.update()
            curves.append(_curve(measurement, tols, refine))
    return EffectiveWidths(tuple(curves), tuple(tols), gauge.samples, gauge.synthetic)


def _curve(measurement: Measurement, tols: Sequence[float], refine: bool) -> WidthCurve:
    space = measurement.space
    selected = {tol: measurement.narrowest(tol) for tol in tols}
    widths = dict(selected)
    if refine and not space.fixed:
        widths = refined_widths(measurement, selected)
    changes = dict(measurement.changes)
    return WidthCurve(space.name, space.producers, space.width, space.fixed, widths, selected, changes)
