"""The table of `benchmarks.families`: a line a family, totals, and every space that was missed, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.families_measure import LIMIT, Row

HEAD = (
    "family", "parameters", "exports", "spaces", "widened", "back exactly", "largest difference", "seconds",
    "reason if not",
)  # fmt: skip
GOAL = 0.9
SHOWN = 6  # names of spaces that a line of the details lists before it counts the rest


def summary(rows: Iterable[Row]) -> dict[str, Any]:
    """The totals."""
    rows = list(rows)
    tried = [row for row in rows if row.status != "skipped"]
    compared = [row for row in tried if row.differences]
    widened, back = sum(len(row.widened) for row in tried), sum(row.exact for row in tried)
    return {
        "families": len(rows),
        "skipped": len(rows) - len(tried),
        "export": sum(row.exports is True for row in tried),
        "compared": len(compared),
        "within the limit": sum(not row.wrong for row in compared),
        "largest difference": max((size for row in compared for size in row.differences.values()), default=None),
        "spaces": sum(row.spaces for row in tried),
        "widened": widened,
        "came back exactly": back,
        "share that came back": back / widened if widened else None,
        "all spaces back": sum(row.status == "done" and row.exact == len(row.widened) > 0 for row in tried),
        "failures": [failure for row in rows for failure in failures(row)],
    }


def failures(row: Row) -> list[str]:
    """What a family did not do, one sentence each; spaces that no rule opens are no failure of this kind."""
    found = []
    if row.status not in ("done", "skipped"):
        found.append(f"{row.name}: {row.status} at the step {row.phase!r}: {row.error}")
    found += [f"{row.name}: WRONG OUTPUT after {step}: {row.differences[step]:.1e}" for step in row.wrong]
    if row.lifeless:
        found.append(f"{row.name}: the output hardly depends on the input ({row.varies:.1e}): nothing is tested")
    return found + [f"{row.name}: {space} {why}" for space, why in row.missed.items()]


def reason(row: Row) -> str:
    """The last cell: why a family is not all it could be, in few words."""
    if row.status != "done":
        return row.error
    parts = []
    if row.missed:
        parts.append(
            f"{len(row.missed)} not back: {_counted(why.split(': ', 1)[-1] for why in row.missed.values())}"
        )
    if row.surplus:
        parts.append(f"{row.surplus:+,} parameters" + ("" if row.missed else " (biases that take up constants)"))
    if row.closed:
        count = sum(map(len, row.closed.values()))
        reasons = sorted(row.closed, key=lambda why: -len(row.closed[why]))
        parts.append(f"{count} not widened: " + "; ".join(f"{why} ({len(row.closed[why])})" for why in reasons))
    return "; ".join(parts)


def _counted(reasons: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for why in reasons:
        counts[why] = counts.get(why, 0) + 1
    return "; ".join(f"{why} ({count})" for why, count in sorted(counts.items(), key=lambda item: -item[1]))


def cells(row: Row) -> list[str]:
    """One line of the table."""
    tried = row.status != "skipped"
    exports = {True: "yes", False: "no", None: "-"}[row.exports]
    widened = f"{len(row.widened)}" if "embed" in row.differences else "-"
    back = f"{row.exact}" if row.back or (row.status == "done" and row.exports) else "-"
    difference = "-" if row.difference is None else f"{row.difference:.0e}"
    seconds = f"{sum(row.seconds.values()):.0f}" if tried else "-"
    spaces = f"{row.spaces}" if row.spaces else "-"
    found = [
        row.name,
        f"{row.parameters:,}" if row.parameters else "-",
        exports,
        spaces,
        widened,
        back,
        difference,
    ]
    return [*found, seconds, reason(row).replace("|", "\\|")]


def document(rows: Sequence[Row], setting: Mapping[str, str], unmeasured: Sequence[str] = ()) -> str:
    """The whole file; `unmeasured`: families that no run has come to yet."""
    lines = [
        "# Families",
        "",
        "Written by `python -m benchmarks.families`. What the columns say stands below.",
        "",
    ]
    lines += [f"* {key}: {value}" for key, value in setting.items()]
    lines += ["", *totals(rows)]
    if unmeasured:
        lines.append(f"* NOT MEASURED, and in none of these figures, {len(unmeasured)}: {', '.join(unmeasured)}")
    lines += ["", *table(rows), "", *LEGEND, ""]
    failed = [failure for row in rows for failure in failures(row)]
    lines += ["## Failures", "", *([f"* {failure}" for failure in failed] or ["None."]), ""]
    lines += ["## Spaces that were not widened", ""]
    for row in rows:
        for why, names in row.closed.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"* {row.name}: {', '.join(f'`{name}`' for name in names[:SHOWN])}{more}: {why}")
    return "\n".join(lines) + "\n"


def totals(rows: Sequence[Row]) -> list[str]:
    """The totals, as a list."""
    found = summary(rows)
    share = found["share that came back"]
    tried = found["families"] - found["skipped"]
    lines = [
        f"* families: {tried} measured, {found['skipped']} skipped",
        f"* export: {found['export']} of {tried}",
        f"* outputs within {LIMIT:g} after every step: {found['within the limit']} of {found['compared']}",
        f"* spaces (outputs apart): {found['spaces']}, of which {found['widened']} can be widened",
    ]
    if share is not None:
        met = "met" if share >= GOAL else "missed"
        lines.append(
            f"* widened spaces that came back exactly: {found['came back exactly']} of {found['widened']},"
            f" {share:.1%} (goal {GOAL:.0%}: {met})"
        )
    return [*lines, f"* families all of whose widened spaces came back: {found['all spaces back']}"]


def table(rows: Iterable[Row]) -> list[str]:
    """The rows in Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * 7 + "---|"]
    return lines + ["| " + " | ".join(cells(row)) + " |" for row in rows]


LEGEND = (
    "parameters: of the model, a small one of its kind; spaces: sets of channels that are narrowed together, the",
    "model's outputs apart; widened: those that `embed` opens, 1.5 times (a layer norm's by whole multiples);",
    "back exactly: of these, those that `reduce` brings to exactly the width from before; largest difference:",
    "of reduce, embed and reduce again, on fresh inputs, relative to the largest output; seconds: processor time",
    "of all steps.",
)
