"""The results in Markdown: accuracy by method and budget, then what was reached and what it took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.cifar.methods import METHODS

HEAD = """\
# Width compression without fine-tuning and without labels, CIFAR-10

Accuracy in % on 1,000 test images; mean over draws of calibration images ± standard deviation, where there are
several. "+ BN": batch-norm moments taken anew on the calibration images. "after ...": a short implementation
of this project, written from the paper. Taylor and Hessian take the wide network's predicted class for a label.
"""


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(rows: Iterable[Any], bases: dict[str, float]) -> str:
    """Two tables and the notes for each network, of `Row`s."""
    rows = list(rows)
    parts = [HEAD]
    for network in dict.fromkeys(row.network for row in rows):
        parts.append(_section(network, [row for row in rows if row.network == network], bases.get(network)))
    about = [f"* {method.name}: {method.about}" for method in METHODS.values() if method.base is None]
    return "\n".join([*parts, "## Methods", "", *about, ""])


def _section(network: str, rows: list[Any], base: float | None) -> str:
    budgets = sorted({row.budget for row in rows}, reverse=True)
    methods = [name for name in METHODS if any(row.method == name for row in rows)]
    title = f"## {network}" + (f", base {base:.1f} %" if base is not None else "")
    images = ", ".join(str(count) for count in sorted({row.images for row in rows}))
    seeds = len({row.seed for row in rows})

    def grid(cell: Callable[[list[Any]], str], of: list[str]) -> list[str]:
        lines = [
            f"| method | {' | '.join(f'{budget:.2f}' for budget in budgets)} |",
            "|---" * (len(budgets) + 1) + "|",
        ]
        for name in of:
            found = [[r for r in rows if r.method == name and r.budget == budget] for budget in budgets]
            lines.append(f"| {name} | {' | '.join(cell(group) for group in found)} |")
        return lines

    lines = [
        title,
        "",
        f"{images} calibration images, {seeds} draws. Accuracy by MACs kept:",
        "",
        *grid(_accuracy, methods),
    ]
    lines += ["", "MACs kept / parameters kept / seconds:", "", *grid(_reached, methods), ""]
    notes = [(row.method, row.error or row.note) for row in rows if row.error or row.note]
    by_text: dict[str, list[str]] = {}
    for name, text in notes:
        if name not in by_text.setdefault(text, []):
            by_text[text].append(name)
    lines += [f"* {', '.join(names)}: {text}" for text, names in by_text.items()]
    return "\n".join(lines) + "\n"


def _figures(group: list[Any], name: str) -> list[float]:
    return [getattr(row, name) for row in group if getattr(row, name) is not None]


def _accuracy(group: list[Any]) -> str:
    values = _figures(group, "accuracy")
    if values:
        return spread(values, 1)
    return "error" if any(row.error for row in group) else ""


def _reached(group: list[Any]) -> str:
    if not _figures(group, "macs"):
        return ""
    macs, parameters = (statistics.mean(_figures(group, name)) for name in ("macs", "parameters"))
    return f"{macs:.3f} / {parameters:.3f} / {spread(_figures(group, 'seconds'), 0)}"
