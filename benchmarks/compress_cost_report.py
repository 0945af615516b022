"""The results of `benchmarks.compress_cost` in Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import head

HEAD = """\
# What `compress` costs, to half of the MACs

Memory: the high-water mark of the process's resident set, and what of it came after loading. Passes: whole passes
of one image through the traced network; those while widths are chosen in brackets. Load: of the machine, when the
measurement began (its own threads not among it).
"""
TITLES = {"limits": "Held against the limits", "images": "Calibration images", "width": "Width"}
COLUMNS = (
    "network", "images", "threads", "seconds", "processor seconds", "memory, GB", "passes", "MACs kept",
    "held-out divergence", "load",
)  # fmt: skip


def table(series: Mapping[str, Sequence[Any]], misses: Sequence[str]) -> str:
    """Two tables for each series, of `Row`s, and what does not hold."""
    parts = [HEAD]
    for name, rows in series.items():
        parts += [f"## {TITLES[name]}", "", *head(COLUMNS), *(_line(row) for row in rows), ""]
        done = [row for row in rows if not row.error]
        stages = stages_of(done)
        if stages:
            parts += ["Seconds by stage:", "", *head(["network", "images", *stages])]
            for row in done:
                cells = [f"{row.stages.get(stage, 0.0):.1f}" for stage in stages]
                parts.append(f"| {row.network} | {row.images} | {' | '.join(cells)} |")
            parts.append("")
    fine = "All limits hold." if "limits" in series else "Nothing failed; the limits were not measured."
    parts += [f"* {line}" for line in misses] or [fine]
    return "\n".join(parts) + "\n"


def stages_of(rows: Sequence[Any]) -> list[str]:
    """The stages in the order in which they run, `other` last."""
    found = dict.fromkeys(stage for row in rows for stage in row.stages if stage != "other")
    return [*found, "other"] if found else []


def _line(row: Any) -> str:
    if row.error:
        return f"| {row.network} | {row.images} | {row.threads} | {row.error} |" + " |" * (len(COLUMNS) - 4)
    used = f"{row.images}" if row.used == row.images else f"{row.images} ({row.used} used)"
    return (
        f"| {row.network} | {used} | {row.threads} | {row.seconds:.1f} | {row.processor_seconds:.1f} | "
        f"{row.peak / 1e9:.2f} (+{(row.peak - row.loaded) / 1e9:.2f}) | "
        f"{sum(row.passes.values()):,.0f} ({row.choosing:,.0f}) | {row.macs:.3f} | {row.divergence:.3g} | "
        f"{row.load:.1f} |"
    )


def plot(series: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Seconds by stage above, memory below; one column a series of several measurements."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: [row for row in rows if not row.error] for name, rows in series.items() if len(rows) > 1}
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        return
    stages = stages_of([row for rows in shown.values() for row in rows])
    figure, axes = pyplot.subplots(
        2, len(shown), figsize=(5.5 * len(shown), 6), squeeze=False, height_ratios=(2, 1), layout="constrained"
    )
    for column, (name, rows) in enumerate(shown.items()):
        labels = [f"{row.images}" if name == "images" else row.network for row in rows]
        above, below = axes[:, column]
        floor = [0.0] * len(rows)
        for place, stage in enumerate(stages):
            heights = [row.stages.get(stage, 0.0) for row in rows]
            above.bar(labels, heights, bottom=floor, label=stage, color=pyplot.cm.tab20(place % 20))
            floor = [a + b for a, b in zip(floor, heights, strict=True)]
        above.set_title(f"{rows[0].network}, by calibration images" if name == "images" else
                        f"{rows[0].images} images, by width")  # fmt: skip
        above.set_ylabel("seconds")
        below.bar(labels, [row.loaded / 1e9 for row in rows], color="lightgrey", label="loaded")
        added = [(row.peak - row.loaded) / 1e9 for row in rows]
        below.bar(labels, added, bottom=[row.loaded / 1e9 for row in rows], color="grey", label="peak")
        below.set_ylabel("memory, GB")
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
