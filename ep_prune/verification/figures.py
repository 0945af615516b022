"""The figures of a comparison: running maxima by output, and the result that they make."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ep_prune.errors import VerificationError
from ep_prune.verification.trees import gap_of


@dataclass(frozen=True)
class OutputDifference:
    """What was measured on one output tensor, of `shape` on the example inputs; `name` is its path.

    The differences and the wide model's `rounding` are relative to its largest |value|, `scale`; for integer
    and bool tensors `difference` is the share of unequal elements. `probe` gave the largest difference;
    `reason` says why `difference` is inf where it was not measured.
    """

    name: str
    shape: tuple[int, ...]
    difference: float
    stored_difference: float | None
    rounding: float | None
    scale: float
    probe: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify`; differences are relative, the worst over the outputs.

    `difference` is in float64, judged by `limit`; `stored_difference` and the wide model's own `rounding` are
    in `dtype`, the first judged by `stored_limit`, and None if `dtype` could not be run. `samples`: inputs
    evaluated. `reached`: share of the wide model's parameter elements with a nonzero gradient on some probe;
    `unreached`: that share by parameter, worst first. `nonfinite`: elements not compared, because the wide
    model gave NaN or inf. `synthetic`: the user gave no probes.
    `beyond`: the largest difference on probes that the limit is no promise about, and which these are.
    """

    difference: float
    stored_difference: float | None
    rounding: float | None
    limit: float
    stored_limit: float
    dtype: str
    per_output: tuple[OutputDifference, ...]
    worst_probe: str
    samples: int
    reached: float | None
    unreached: dict[str, float]
    nonfinite: int
    notes: tuple[str, ...]
    synthetic: bool
    beyond: float = 0.0
    beyond_probe: str = ""

    @property
    def ok(self) -> bool:
        """True if both figures are within their limits (one that could not be measured is not judged)."""
        return self.difference <= self.limit and (self.stored_difference or 0.0) <= self.stored_limit

    def raise_if_different(self) -> None:
        """Raise VerificationError, one sentence that names the output, unless `ok`."""
        if self.ok:
            return
        worst = max(self.per_output, key=lambda output: (output.difference, output.stored_difference or 0.0))
        why = f"{self.difference:.2g} relative in float64 on probe '{worst.probe}', limit {self.limit:.2g}"
        if self.difference <= self.limit:
            worst = max(self.per_output, key=lambda output: output.stored_difference or 0.0)
            why = f"{self.stored_difference:.2g} relative in {self.dtype}, limit {self.stored_limit:.2g}"
        text = f"the narrow model differs from the wide one at '{worst.name}' ({worst.reason or why})"
        raise VerificationError(f"{text}: keep the wide model, or pass a larger limit if this is wanted")

    def to_dict(self) -> dict[str, Any]:
        """All fields and `ok` as plain values for json; an infinite number is the text "Infinity"."""
        text = json.dumps({"ok": self.ok, **dataclasses.asdict(self)})
        return dict(json.loads(text, parse_constant=str))

    def __str__(self) -> str:
        stored = "not measured" if self.stored_difference is None else f"{self.stored_difference:.2e}"
        lines = [
            f"{'same' if self.ok else 'DIFFERENT'} on {self.samples} samples"
            f"{' (synthetic probes)' if self.synthetic else ''}",
            f"  float64   {self.difference:.2e}  limit {self.limit:.2e}  worst probe {self.worst_probe}",
            f"  {self.dtype:<9} {stored}  limit {self.stored_limit:.2e}  rounding {self.rounding or 0:.2e}",
        ]
        if self.beyond_probe:
            lines += [f"  beyond the promise: {self.beyond:.2e} on probes '{self.beyond_probe}'"]
        lines += [f"  {o.name} {[*o.shape]}  {o.difference:.2e}  {o.reason}".rstrip() for o in self.per_output]
        if self.reached is not None:
            least = ", ".join(f"{name} ({share:.1%})" for name, share in list(self.unreached.items())[:4])
            lines += [f"  probes reach {self.reached:.2%} of the weights" + (f", least: {least}" if least else "")]
        if self.nonfinite:
            lines += [f"  {self.nonfinite} elements not compared: the wide model gives NaN or inf there"]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass
class Record:
    """Running maxima for one output tensor (for integers: counts of unequal and of all elements)."""

    shape: tuple[int, ...] = ()
    gap: float = 0.0
    scale: float = 0.0
    stored_gap: float = 0.0
    stored_scale: float = 0.0
    rounding_gap: float = 0.0
    finite: int = 0
    worst: float = -1.0
    probe: str = ""
    beyond: float = 0.0
    beyond_probe: str = ""
    reason: str = ""

    def add(self, probe: str, wide: Tensor, narrow: Tensor, judged: bool) -> None:
        gap, scale, finite = gap_of(wide, narrow)
        if not judged:
            if gap > self.beyond:
                self.beyond, self.beyond_probe = gap, probe
            return
        if gap > self.worst:
            self.worst, self.probe = gap, probe
        join = max if wide.is_floating_point() else sum
        self.gap, self.scale, self.finite = (
            join((self.gap, gap)),
            join((self.scale, scale)),
            self.finite + finite,
        )

    def add_stored(self, wide64: Tensor, wide: Tensor, narrow: Tensor) -> None:
        if not wide.is_floating_point():
            return  # an argmax may flip by rounding: it is judged in float64 alone
        gap, scale, _ = gap_of(wide, narrow)
        self.stored_gap, self.stored_scale = max(self.stored_gap, gap), max(self.stored_scale, scale)
        both = wide64.isfinite() & wide.isfinite()  # an overflow of the dtype is no measure of its rounding
        if not both.all():
            wide64, wide = wide64[both], wide[both]
        self.rounding_gap = max(self.rounding_gap, gap_of(wide64, wide)[0])

    def finish(self, name: str, own: bool) -> OutputDifference:
        if not self.reason and self.scale == 0 and self.gap > 0:
            self.reason = "the wide model's output is 0 on every probe, the narrow model's is not"
        if not self.reason and not self.finite:
            self.reason = "the wide model gives no finite number on any probe"
        scales = (self.scale or math.inf, self.stored_scale or math.inf)
        gaps = (math.inf, math.inf) if self.reason else (self.gap / scales[0], self.stored_gap / scales[1])
        stored, rounding = (gaps[1], self.rounding_gap / scales[0]) if own else (None, None)
        return OutputDifference(name, self.shape, gaps[0], stored, rounding, self.scale, self.probe, self.reason)
