"""The results of `benchmarks.speed` in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.common import head

HEAD = """\
# Real speed at half of the MACs

Milliseconds a call, contiguous / channels-last: medians over turns, the models turn about. Speed-up: the faster
layout of the wide network over the faster one of the narrow network, in brackets the quartiles turn by turn; "by
MACs": what the multiply-accumulates alone would promise.
"""
TIMES = (
    "network", "device", "images", "turns", "wide, ms", "round_to=8, ms", "speed-up", "by MACs",
    "unrounded, ms", "speed-up", "by MACs",
)  # fmt: skip
FOLDED = ", folded"
"""What stands behind the name of a model whose batch norms are folded."""
FOLDED_TIMES = (
    "network", "device", "images", "wide, ms", "wide folded, ms", "round_to=8 folded, ms", "over the given wide",
    "over the folded wide",
)  # fmt: skip
BY_TIME = "latency="
TIMED = (
    "network", "images", "asked, ms", "MACs kept", "branches gone", "accuracy, %", "wide, ms", "wide folded, ms",
    "latency=, ms", "over the given wide", "over the folded wide",
)  # fmt: skip
MODELS = (
    "network", "round_to", "MACs kept", "parameters kept", "accuracy, %", "equal decisions, held out",
    "calibration images", "seconds of compress",
)  # fmt: skip


def table(found: Iterable[Any], machine: Mapping[str, Any], misses: Sequence[str], goal: float) -> str:
    """What was timed, what the narrow networks are, and where the goal is missed."""
    found = list(found)
    parts = [HEAD, ", ".join(f"{key}: {value}" for key, value in machine.items() if value is not None), ""]
    parts += head(TIMES)
    for one in found:
        promised = [one.macs / narrow.macs for narrow in one.narrow]
        for timing in one.timings:
            names = [name for name in timing.times if not name.endswith(FOLDED)]
            cells = [one.network, timing.device, str(timing.batch), str(timing.turns), _pair(timing, names[0])]
            for name, ratio in zip(names[1:], promised, strict=True):
                low, high = timing.spread(name)
                cells += [
                    _pair(timing, name),
                    f"{timing.faster(name):.2f}x ({low:.2f}–{high:.2f})",
                    f"{ratio:.2f}x",
                ]
            parts.append(f"| {' | '.join(cells)} |")
    parts += ["", "With batch norms folded into the convolutions, `fold_batch_norm=True`:", ""]
    parts += head(FOLDED_TIMES)
    for one in found:
        for timing in one.timings:
            wide, narrow = (f"{name}{FOLDED}" for name in list(timing.times)[:2])
            cells = [one.network, timing.device, str(timing.batch)]
            cells += [_pair(timing, name) for name in ("wide", wide, narrow)]
            for than in ("wide", wide):
                low, high = timing.spread(narrow, than)
                cells.append(f"{timing.faster(narrow, than):.2f}x ({low:.2f}–{high:.2f})")
            parts.append(f"| {' | '.join(cells)} |")
    if any(one.by_time for one in found):
        parts += [
            "",
            "Half of the MACs and milliseconds asked for: `latency=`, `round_to=8`, `min_width=0`, norms folded:",
            "",
            *head(TIMED),
        ]
        parts += [f"| {' | '.join(_timed(one, made))} |" for one in found for made in one.by_time]
    parts += ["", "The narrow networks:", ""]
    parts += head(MODELS)
    for one in found:
        for narrow in one.narrow:
            accuracy = "" if narrow.accuracy is None else f"{one.accuracy:.1f} -> {narrow.accuracy:.1f}"
            agreement = "" if narrow.agreement is None else f"{narrow.agreement:.1%}"
            parts.append(
                f"| {one.network} | {narrow.round_to} | {narrow.macs / one.macs:.3f} | "
                f"{narrow.parameters / one.parameters:.3f} | {accuracy} | {agreement} | {narrow.images} | "
                f"{narrow.seconds:.0f} |"
            )
    parts += ["", *verdicts(found, goal), *(f"* WRONG: {line}" for line in misses)]
    return "\n".join(parts) + "\n"


def verdicts(found: Iterable[Any], goal: float) -> list[str]:
    """Lines for every network, device and batch: whether rounded widths reach the goal, as they are, folded, and
    asked for in milliseconds."""
    lines = []

    def verdict(network: str, timing: Any, model: str, than: str, which: str) -> None:
        many = "1 image" if timing.batch == 1 else f"{timing.batch} images"
        ratio, (low, high) = timing.faster(model, than), timing.spread(model, than)
        said = "reached" if ratio >= goal else "MISSED"
        if low < goal < high:
            said += ", within the spread of the turns: repeat on a machine without other work"
        lines.append(f"* {network}, {timing.device}, {many}{which}: {ratio:.2f}x, goal of {goal}x {said}")

    for one in found:
        for timing in one.timings:
            wide, narrow = list(timing.times)[:2]
            verdict(one.network, timing, narrow, wide, "")
            if narrow + FOLDED in timing.times:
                verdict(one.network, timing, narrow + FOLDED, wide, ", folded")
                verdict(one.network, timing, narrow + FOLDED, wide + FOLDED, ", both folded")
        for made in one.by_time:
            if made.timing is not None:
                for than, which in (("wide", f", {BY_TIME}"), (f"wide{FOLDED}", f", {BY_TIME}, both folded")):
                    verdict(one.network, made.timing, BY_TIME, than, which)
    return lines


def _timed(one: Any, made: Any) -> list[str]:
    cells = [one.network, str(made.batch), f"{made.asked:.4g}"]
    if made.timing is None:
        return [*cells, *[""] * (len(TIMED) - len(cells) - 1), made.refused]
    accuracy = "" if made.accuracy is None else f"{one.accuracy:.1f} -> {made.accuracy:.1f}"
    cells += [f"{made.macs / one.macs:.3f}", str(made.branches), accuracy]
    cells += [_pair(made.timing, name) for name in made.timing.times]
    for than in ("wide", f"wide{FOLDED}"):
        low, high = made.timing.spread(BY_TIME, than)
        cells.append(f"{made.timing.faster(BY_TIME, than):.2f}x ({low:.2f}–{high:.2f})")
    return cells


def _pair(timing: Any, model: str) -> str:
    return " / ".join(f"{statistics.median(layout):.4g}" for layout in timing.times[model].values())
