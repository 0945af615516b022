"""The results of `benchmarks.speed` in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HEAD = """\
# Real speed at half of the MACs

Milliseconds a call, contiguous / channels-last: medians of blocks of calls, the models turn about. Speed-up: the
faster layout of the wide network over the faster one of the narrow network, by medians, and by the least of all
single calls; "by MACs": what the multiply-accumulates alone would promise. Where the two speed-ups differ much,
the machine had other work.
"""
TIMES = (
    "network", "device", "images", "turns", "wide, ms", "round_to=8, ms", "**speed-up**", "by least", "by MACs",
    "unrounded, ms", "speed-up", "by least", "by MACs",
)  # fmt: skip
MODELS = (
    "network", "round_to", "MACs kept", "parameters kept", "accuracy, %", "equal decisions, held out",
    "calibration images", "seconds of compress",
)  # fmt: skip
UNDECIDED = "not decided: repeat on a machine without other work"


def table(found: Iterable[Any], machine: Mapping[str, Any], misses: Sequence[str], goal: float) -> str:
    """What was timed, what the narrow networks are, and where the goal is missed."""
    found = list(found)
    parts = [HEAD, ", ".join(f"{key}: {value}" for key, value in machine.items() if value is not None), ""]
    parts += _head(TIMES)
    for one in found:
        promised = [one.macs / narrow.macs for narrow in one.narrow]
        for timing in one.timings:
            names = list(timing.times)
            cells = [one.network, timing.device, str(timing.batch), str(timing.turns), _pair(timing, names[0])]
            for place, (name, ratio) in enumerate(zip(names[1:], promised, strict=True)):
                mark = "" if place else "**"
                least = timing.faster(name, "least")
                cells += [
                    _pair(timing, name),
                    f"{mark}{timing.faster(name):.2f}x{mark}",
                    f"{least:.2f}x",
                    f"{ratio:.2f}x",
                ]
            parts.append(f"| {' | '.join(cells)} |")
    parts += ["", "The narrow networks:", ""]
    parts += _head(MODELS)
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
    """One line for every network, device and batch: whether rounded widths reach the goal."""
    lines = []
    for one in found:
        for timing in one.timings:
            name = list(timing.times)[1]
            median, least = timing.faster(name), timing.faster(name, "least")
            reached = {ratio >= goal for ratio in (median, least)}
            said = {True: "reached", False: "MISSED"}[reached.pop()] if len(reached) == 1 else UNDECIDED
            many = "1 image" if timing.batch == 1 else f"{timing.batch} images"
            place = f"{one.network}, {timing.device}, {many}"
            lines.append(f"* {place}: {median:.2f}x ({least:.2f}x by the least), goal of {goal}x {said}")
    return lines


def _pair(timing: Any, model: str) -> str:
    return " / ".join(f"{layout['median']:.4g}" for layout in timing.times[model].values())


def _head(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
