"""The results as a picture: accuracy over MACs kept, one panel a network."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.cifar.methods import METHODS, OURS


def plot(rows: list[Any], bases: dict[str, float], path: Path) -> None:
    """Lines where a network has several budgets, bars where it has one. A method with and without batch-norm
    re-estimation or REPAIR has one colour, with it is drawn solid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.accuracy is not None]
    networks = list(dict.fromkeys(row.network for row in rows))
    if not networks:
        return
    families = list(dict.fromkeys(method.family for method in METHODS.values()))
    colours = {name: pyplot.cm.tab20(place % 20) for place, name in enumerate(families)}
    columns = min(3, len(networks))
    lines = math.ceil(len(networks) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(7 * columns, 5.5 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(networks) :]:
        axis.set_visible(False)
    for axis, network in zip(axes.flat, networks, strict=False):
        own = [row for row in rows if row.network == network]
        names = [name for name in METHODS if any(row.method == name for row in own)]
        means = {name: _means([row for row in own if row.method == name]) for name in names}
        base = bases.get(network)
        axis.set_title(network + (f" (base {base:.1f} %)" if base is not None else ""))
        if len({row.budget for row in own}) == 1:
            _bars(axis, means, colours, base)
        else:
            _curves(axis, means, colours, base)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _means(rows: list[Any]) -> list[tuple[float, float]]:
    """(MACs kept, accuracy), the mean over seeds at each budget."""
    budgets = sorted({row.budget for row in rows})
    groups = [[row for row in rows if row.budget == budget] for budget in budgets]
    return [
        (statistics.mean(r.macs for r in group), statistics.mean(r.accuracy for r in group)) for group in groups
    ]


def _curves(
    axis: Any, means: dict[str, list[tuple[float, float]]], colours: dict[str, Any], base: float | None
) -> None:
    for name, points in means.items():
        family = METHODS[name].family
        style: dict[str, Any] = {"color": colours[family], "marker": ".", "linewidth": 1.2}
        if name == family and any(METHODS[other].family == name and other != name for other in means):
            style |= {"linestyle": ":", "linewidth": 0.8}
        if name == OURS:
            style |= {"color": "black", "linewidth": 2.5, "marker": "o"}
        axis.plot(*zip(*points, strict=True), label=name, **style)
    if base is not None:
        axis.axhline(base, color="grey", linewidth=0.8)
    axis.set_xlabel("MACs kept")
    axis.set_ylabel("accuracy, %")
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _bars(
    axis: Any, means: dict[str, list[tuple[float, float]]], colours: dict[str, Any], base: float | None
) -> None:
    names = list(means)[::-1]
    shades = ["black" if name == OURS else colours[METHODS[name].family] for name in names]
    axis.barh(names, [means[name][0][1] for name in names], color=shades)
    if base is not None:
        axis.axvline(base, color="grey", linewidth=0.8)
    axis.tick_params(axis="y", labelsize=6)
    axis.set_xlabel("accuracy, %")
