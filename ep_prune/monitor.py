"""Effective width over training: how narrow the function is that a network has learnt so far.

    monitor = EffectiveWidthMonitor(model, example, tol=0.05)
    for step, batch in enumerate(loader):
        ...; optimizer.step()
        monitor.step(step, loss=loss)
    monitor.plot("widths.png")

The model is traced once. A measurement takes as long as it takes (tens of milliseconds for a small network,
seconds for a large one), so by default the interval follows it: measurements add at most `share` to the time that
training takes. When none is due, `step` counts, or reads a clock. Training is not disturbed: weights are read from
a private copy, in evaluation mode; gradients, modes and random state are as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ep_prune.effective_width import EffectiveWidths, measure, set_up, tolerances
from ep_prune.errors import EpPruneError, InputError
from ep_prune.refine import warm_up

MEASURED = 0.625
"""The part of the share that measurements get: the rest is for `step` itself and for caches left cold."""

IDLE = 1000
"""The most steps for which the clock is not read."""


class EffectiveWidthMonitor:
    """Records effective widths while a model trains.

    Args:
        model: the model in training; it may be moved, and changed in place, but not widened or narrowed.
        example_inputs, tol, probes, spaces, refine, seed: as for `effective_width`.
        every: measure at steps that are multiples of this; None: as often as `share` allows.
        share: what measurements may add, from the first step on, to the time that training takes, in (0, 1).
        clock: seconds, from any origin; for tests.

    `records` holds one dict for each measurement: step, loss (or None), widths {space: {tol: width}}, seconds,
    note (why the weights could not be measured, or ""). Where the interval adapts, the first is of the initial
    weights, at step 0, and part of the set-up: it tells what one costs. Raises `InputError` and `TraceError`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        tol: float | Sequence[float],
        *,
        every: int | None = None,
        share: float = 0.05,
        probes: Iterable[Any] | None = None,
        spaces: Sequence[str] | None = None,
        refine: bool = False,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every is not None and every < 1:
            raise InputError(f"every={every} is no interval: pass a number of steps, or None to adapt it")
        if not 0.0 < share < 1.0:
            raise InputError(
                f"share={share} is not in (0, 1): it is what measuring may add to the time of training"
            )
        self.model, self.tols = model, tolerances(tol)
        self.every, self.share = every, share
        self.names, self.refine = spaces, refine
        self.records: list[dict[str, Any]] = []
        self.last: EffectiveWidths | None = None
        self._gauge = set_up(model, example_inputs, probes, seed)
        self._clock = clock
        self._spent = 0.0
        self._worst = 0.0
        self._started: float | None = None
        self._elapsed = 0.0
        self._looked = 0.0
        self._idle, self._idled = 0, 1
        if refine:
            warm_up()
        if every is None:
            self.measure(0)
            self._spent = 0.0

    def step(self, step: int, loss: float | Tensor | None = None) -> EffectiveWidths | None:
        """Call after each step of the optimizer; measures where it is due. The measurement, or None."""
        if self._idle > 0:  # amid training, even reading a clock costs microseconds
            self._idle -= 1
            return None
        return self.measure(step, loss) if self._is_due(step) else None

    def _is_due(self, step: int) -> bool:
        """Whether one more measurement, as long as the longest of late, would keep to the share.

        If not, the next steps are idle: an eighth of those that are missing, at the pace since the last look.
        """
        if self.every is not None:
            return step % self.every == 0
        now = self._clock()
        if self._started is None:
            self._started = self._looked = now
        elapsed = now - self._started + self._elapsed
        missing = (self._spent + self._worst) / (MEASURED * self.share) - (elapsed - self._spent)
        pace = (now - self._looked) / self._idled
        self._looked = now
        self._idle = min(int(missing / (8 * pace)), IDLE) if missing > 0 and pace > 0 else 0
        self._idled = self._idle + 1
        return missing <= 0

    def measure(self, step: int, loss: float | Tensor | None = None) -> EffectiveWidths | None:
        """Measure now, due or not. None, and a note in the record, where the weights cannot be measured."""
        begin = self._clock()
        found, note = None, ""
        try:
            self._gauge.follow(self.model)
            found = measure(self._gauge, self.tols, self.names, self.refine)
        except EpPruneError as error:  # a run that has diverged goes on as it would without us
            note = str(error)
        seconds = self._clock() - begin
        self._spent += seconds
        self._looked = begin + seconds
        self._worst = max(seconds, 0.5 * self._worst)
        widths = {name: dict(curve.widths) for name, curve in found.spaces.items()} if found is not None else {}
        value = None if loss is None else float(loss)
        self.records.append({"step": step, "loss": value, "widths": widths, "seconds": seconds, "note": note})
        self.last = found
        return found

    @property
    def spent(self) -> float:
        """Seconds that measuring has taken, over all runs of a resumed training."""
        return self._spent

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values, ready for JSON."""
        elapsed = self._elapsed + (0.0 if self._started is None else self._clock() - self._started)
        return {"records": _listed(self.records), "spent": self._spent, "worst": self._worst, "elapsed": elapsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, also after a way through JSON. Raises `InputError`."""
        try:
            records = [
                {**r, "widths": {n: {float(t): k for t, k in w} for n, w in r["widths"]}} for r in state["records"]
            ]
            numbers = [float(state[key]) for key in ("spent", "worst", "elapsed")]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no state of a monitor ({error!r}): pass what state_dict gave") from error
        self.records = records
        self._spent, self._worst, self._elapsed = numbers
        self._started = None
        self._idle, self._idled = 0, 1

    def to_dict(self) -> dict[str, Any]:
        """All records as plain values, ready for JSON."""
        return {"tols": list(self.tols), "spent": self._spent, "records": _listed(self.records)}

    def plot(self, path: str | Path) -> None:
        """Draw loss and widths over steps, widths at the loosest tolerance. Needs matplotlib."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise EpPruneError("drawing needs matplotlib: pip install 'ep-prune[plot]'") from error
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        losses = [(r["step"], r["loss"]) for r in self.records if r["loss"] is not None]
        if losses:
            above.plot(*zip(*losses, strict=True), color="#3b6ea5")
            if all(loss > 0 for _, loss in losses):
                above.set_yscale("log")
        above.set_ylabel("loss")
        tol = self.tols[0]
        measured = [r for r in self.records if r["widths"]]
        free = {space.name for space in self._gauge.spaces if not space.fixed}
        for name in dict.fromkeys(name for r in measured for name in r["widths"] if name in free):
            points = [(r["step"], r["widths"][name][tol]) for r in measured if name in r["widths"]]
            below.plot(*zip(*points, strict=True), drawstyle="steps-post", label=name)
        below.set_ylabel(f"effective width at {tol:g}")
        below.set_xlabel("step")
        if below.lines:
            below.legend(frameon=False, fontsize=8)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def _listed(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records with the tolerances, which are no keys of JSON, as pairs."""
    return [
        {
            **record,
            "widths": [
                [name, [list(pair) for pair in widths.items()]] for name, widths in record["widths"].items()
            ],
        }
        for record in records
    ]
