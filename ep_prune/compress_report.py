"""What `compress` did, for a person: a table, a dict, a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ep_prune.cost import Cost
from ep_prune.report import change, height_of, new_figure, widths_on

COLLAPSED = 1.0
"""Nats between the answers from which on a model is called collapsed; so is one whose decisions mostly differ."""


@dataclass(frozen=True)
class Width:
    """One space, before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Point:
    """One narrower model: multiply-accumulates of one sample, parameters, divergence of its outputs."""

    macs: int
    parameters: int
    divergence: float


@dataclass(frozen=True)
class CompressReport:
    """The outcome. Grade *fitted*: `divergence` (`divergence.divergence`), `agreement` (share of equal
    decisions, None where the model gives no class scores) and `change` (largest of any output, relative) are
    measured on calibration samples that nothing was fitted on. errors: by weight, of its outputs on held-out
    rows, as a share of their variance. path: models from wide to the narrowest, with the divergence that the
    spaces' own curves add up to, before anything is fitted; trials: those that were fitted, with what was
    measured. reduced: the cost once what is exact is gone. Latencies in milliseconds a call on the example;
    memory in bytes, the peak of such a call (`memory.peak_memory_of`)."""

    budget: str
    widths: tuple[Width, ...]
    before: Cost
    reduced: Cost
    after: Cost
    divergence: float
    agreement: float | None
    change: float
    path: tuple[Point, ...]
    trials: tuple[Point, ...]
    errors: dict[str, float]
    samples_given: int
    samples_used: int
    evaluations: int
    latency_before: float
    latency_after: float
    memory_before: int
    memory_after: int
    untouched: dict[str, str]
    barriers: dict[str, str]
    notes: tuple[str, ...]
    seconds: float
    grade: str = "fitted"

    @property
    def collapsed(self) -> bool:
        """Whether the narrow model no longer answers like the wide one."""
        return not self.divergence < COLLAPSED or (self.agreement is not None and self.agreement < 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON; an infinite number is the text "Infinity"."""
        text = json.dumps({**asdict(self), "collapsed": self.collapsed})
        return dict(json.loads(text, parse_constant=str))

    def print(self) -> None:
        """Print the table."""
        print(self)

    def __str__(self) -> str:
        name = max([len(w.name) for w in self.widths] + [5])
        lines = [f"{'space':<{name}}  width"]
        lines += [
            f"{w.name:<{name}}  {w.before} -> {w.after}"
            if w.after != w.before
            else f"{w.name:<{name}}  {w.before}"
            for w in self.widths
        ]
        lines += [
            "",
            f"budget      {self.budget}",
            f"parameters  {change(self.before.parameters, self.after.parameters)}",
            f"MACs        {change(self.before.macs, self.after.macs)}",
            f"latency     {self.latency_before:.3g} -> {self.latency_after:.3g} ms a call on the example",
            f"memory      {self.memory_before / 1e6:.3g} -> {self.memory_after / 1e6:.3g} MB at its peak",
            f"grade       {self.grade}, on {self.samples_used} of {self.samples_given} samples",
            f"held out    divergence {self.divergence:.3g}"
            + (f", {self.agreement:.1%} equal decisions" if self.agreement is not None else "")
            + f", largest change {self.change:.2g}",
        ]
        if self.evaluations:
            lines.append(f"evaluated   {self.evaluations} times")
        if self.collapsed:
            lines.append("COLLAPSED   the narrow model no longer answers like the wide one: keep more")
        lines += [f"note        {note}" for note in self.notes]
        for title, entries in (("untouched", self.untouched.items()), ("barrier", self.barriers.items())):
            lines += [f"{title:<12}{place}: {why}" for place, why in list(entries)[:12]]
            if len(entries) > 12:
                lines.append(f"{'':<12}... and {len(entries) - 12} more")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the divergence over the budget, and the widths before and after. Needs matplotlib."""
        widths = [(w.name, w.before, w.after) for w in self.widths]
        figure = new_figure(12, max(height_of(widths), 4.0))
        curve, bars = figure.subplots(1, 2)
        whole = max(self.before.macs, 1)
        curve.plot(
            [p.macs / whole for p in self.path], [p.divergence for p in self.path], color="#9aa5b1",
            label="expected of each width, before the fit",
        )  # fmt: skip
        curve.plot(
            [p.macs / whole for p in self.trials], [p.divergence for p in self.trials], "o", color="#3b6ea5",
            label="fitted, on held-out samples",
        )  # fmt: skip
        curve.axvline(self.after.macs / whole, color="#3b6ea5", lw=0.8, ls=":")
        smallest = min((p.divergence for p in (*self.path, *self.trials) if p.divergence > 0), default=1e-6)
        curve.set_yscale("symlog", linthresh=max(smallest, 1e-6))
        curve.set_ylim(bottom=0)
        curve.set(xlabel="MACs kept", ylabel="divergence from the wide model", xlim=(0, 1.02))
        curve.spines[["top", "right"]].set_visible(False)
        curve.legend(frameon=False, fontsize=8)
        widths_on(bars, widths)
        figure.suptitle(
            f"MACs {self.after.macs / whole:.0%}, parameters "
            f"{self.after.parameters / max(self.before.parameters, 1):.0%}, "
            f"divergence {self.divergence:.3g} (held out)", fontsize=10,
        )  # fmt: skip
        figure.savefig(path, dpi=150)
