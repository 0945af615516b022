"""What was done, for a person: a table, a dict, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ep_prune.cost import Cost
from ep_prune.errors import EpPruneError
from ep_prune.verification import Verification

KINDS = ("null", "constant", "split", "scaled", "flipped", "linear")


@dataclass(frozen=True)
class SpaceRecord:
    """One space over all rounds: widths, how many channels went and as what, why the others stayed."""

    name: str
    producers: tuple[str, ...]
    before: int
    after: int
    gone: dict[str, int]
    stayed: dict[str, int]


@dataclass(frozen=True)
class Report:
    """The outcome of a reduction. `grade` is "exact" or "bounded"; `barriers`: place in the model -> reason.

    domain: the box on which the promise holds, "" where it holds everywhere.
    """

    spaces: tuple[SpaceRecord, ...]
    before: Cost
    after: Cost
    grade: str
    tol: float
    barriers: dict[str, str]
    untraced: tuple[str, ...]
    notes: tuple[str, ...]
    verification: Verification
    domain: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {
            "grade": self.grade,
            "tol": self.tol,
            "domain": self.domain,
            "parameters_before": self.before.parameters,
            "parameters_after": self.after.parameters,
            "macs_before": self.before.macs,
            "macs_after": self.after.macs,
            "spaces": [asdict(space) for space in self.spaces],
            "barriers": self.barriers,
            "untraced": list(self.untraced),
            "notes": list(self.notes),
            "verification": self.verification.to_dict(),
        }

    def print(self) -> None:
        """Print the table."""
        print(self)

    def __str__(self) -> str:
        header = ("space", "width", *KINDS, "why the rest stayed")
        body = [
            (
                space.name + (f" (+{len(space.producers) - 1})" if len(space.producers) > 1 else ""),
                f"{space.before} -> {space.after}" if space.after != space.before else f"{space.before}",
                *(str(space.gone.get(kind, 0) or "") for kind in KINDS),
                "; ".join(f"{count} {why}" for why, count in _sorted(space.stayed)),
            )
            for space in self.spaces
        ]
        widths = [max(len(row[k]) for row in (header, *body)) for k in range(len(header) - 1)]

        def line(row: tuple[str, ...]) -> str:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)]
            return "  ".join([*cells, row[-1]]).rstrip()

        lines = [line(header), line(tuple("-" * w for w in [*widths, len(header[-1])]))]
        lines += [line(row) for row in body]
        lines += [
            "",
            f"parameters  {change(self.before.parameters, self.after.parameters)}",
            f"MACs        {change(self.before.macs, self.after.macs)}",
            f"grade       {self.grade}"
            + (f", tol {self.tol:g}" if self.tol else "")
            + (f", on the declared domain {self.domain}" if self.domain else ""),
        ]
        lines += [f"note        {note}" for note in self.notes]
        for title, entries in (("barrier", self.barriers.items()), ("untraced", [(n, "") for n in self.untraced])):
            lines += [f"{title:<12}{place}" + (f": {why}" if why else "") for place, why in list(entries)[:12]]
            if len(entries) > 12:
                lines.append(f"{'':<12}... and {len(entries) - 12} more")
        return "\n".join([*lines, "", str(self.verification)])

    def plot(self, path: str | Path) -> None:
        """Draw the widths before and after, one bar a space. Needs matplotlib."""
        draw_widths(
            path,
            [(space.name, space.before, space.after) for space in self.spaces],
            f"{self.before.parameters:,} -> {self.after.parameters:,} parameters, "
            f"outputs equal to {self.verification.difference:.1e} (float64, relative)",
        )


def draw_widths(path: str | Path, widths: Sequence[tuple[str, int, int]], title: str) -> None:
    """Draw (name, before, after), one bar a space. Needs matplotlib."""
    figure = new_figure(8, height_of(widths))
    axes = figure.add_subplot()
    widths_on(axes, widths)
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, dpi=150)


def new_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, in inches. Raises `EpPruneError` where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EpPruneError("drawing needs matplotlib: pip install 'ep-prune[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _drawn(widths: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    return [row for row in widths if row[1] > 1]


def height_of(widths: Sequence[tuple[str, int, int]]) -> float:
    """Inches that `widths_on` takes."""
    return 1.2 + 0.3 * max(len(_drawn(widths)), 3)


def widths_on(axes: Any, widths: Sequence[tuple[str, int, int]]) -> None:
    """Draw (name, before, after), one bar a space of more than one channel."""
    shown = _drawn(widths)
    places = range(len(shown))
    axes.barh(places, [before for _, before, _ in shown], color="#d8dee9", label="wide")
    axes.barh(places, [after for _, _, after in shown], color="#3b6ea5", label="narrow", height=0.55)
    for place, (_, before, after) in enumerate(shown):
        text = f" {after}/{before}" if after < before else f" {before}"
        axes.text(before, place, text, va="center", fontsize=8)
    axes.set_yticks(list(places), [name for name, _, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("channels")
    axes.set_xlim(0, 1.12 * max((before for _, before, _ in shown), default=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)


def _sorted(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def change(before: int, after: int) -> str:
    """A count before and after, and the share that is left."""
    share = f" ({after / before:.1%})" if before else ""
    return f"{before:,} -> {after:,}{share}"
