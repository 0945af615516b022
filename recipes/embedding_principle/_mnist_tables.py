"""Table and figure of the MNIST recipe, from the figures of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.embedding_principle import common

KINDS = ("paper", "paper, retrained", "closed form", "fitted")
LOSS, AGREEMENT = 0.01, 0.995
"""The goal: relative change of the training loss, and share of test images with the same prediction."""


def line(run: dict[str, Any]) -> str:
    """One run in one line."""
    wide = run["wide"]
    return (
        f"{run['head']}, seed {run['seed']}: loss {wide['loss']:.3g} at epoch {wide['epoch']}, {run['live']} live "
        f"neurons in {run['groups at .9']} groups, narrowest within the goal: {narrowest(run, 'closed form')} "
        f"(closed form), {narrowest(run, 'fitted')} (fitted)"
    )


def change(run: dict[str, Any], row: dict[str, float]) -> float:
    """Relative change of the training loss."""
    return row["loss"] / run["wide"]["loss"] - 1


def within(run: dict[str, Any], row: dict[str, float]) -> bool:
    return abs(change(run, row)) <= LOSS and row["agreement"] >= AGREEMENT


def narrowest(run: dict[str, Any], kind: str) -> int | None:
    """The narrowest width that was tried and meets the goal."""
    return min((int(row["width"]) for row in run[kind] if within(run, row)), default=None)


def at_most(run: dict[str, Any], kind: str, width: int) -> dict[str, float] | None:
    """The widest row of at most this width."""
    rows = [row for row in run[kind] if row["width"] <= width]
    return max(rows, key=lambda row: row["width"]) if rows else None


def halves(run: dict[str, Any], *kinds: str) -> dict[float, bool]:
    """By the paper's cosine: is our excess loss at that width at most half of the paper's? Of several kinds, the
    last that was tried at a width counts."""
    base = run["wide"]["loss"]
    ours = {row["width"]: row["loss"] for kind in kinds for row in run[kind]}
    return {
        row["cosine"]: ours[row["width"]] - base <= (row["loss"] - base) / 2
        for row in run["paper"]
        if row["width"] in ours
    }


def not_halved(run: dict[str, Any]) -> list[int]:
    """The paper's widths at which the closed form has more than half of its excess loss."""
    good = halves(run, "closed form")
    return [int(row["width"]) for row in run["paper"] if not good.get(row["cosine"], True)]


def summary(runs: Sequence[dict[str, Any]], width: int) -> dict[str, Any]:
    """Over the seeds: the wide networks, every procedure at the paper's width or the next below, and the goal."""
    wide = [run["wide"] for run in runs]
    table: dict[str, Any] = {
        "seeds": len(runs),
        "loss": spread([row["loss"] for row in wide]),
        "epoch": spread([row["epoch"] for row in wide]),
        "accuracy": spread([row["accuracy"] for row in wide]),
        "live": spread([run["live"] for run in runs]),
        "groups at .9": spread([run["groups at .9"] for run in runs]),
    }
    for kind in KINDS:
        rows = [(run, at_most(run, kind, width)) for run in runs]
        have = [(run, row) for run, row in rows if row is not None]
        table[f"{kind}, at most {width}"] = {
            "runs": len(have),
            "width": spread([row["width"] for _, row in have]),
            "loss change": spread([change(run, row) for run, row in have]),
            "agreement": spread([row["agreement"] for _, row in have]),
            "within the goal": sum(within(run, row) for run, row in have),
        }
        table[f"{kind}, narrowest within the goal"] = [narrowest(run, kind) for run in runs]
    for kinds in (("closed form",), ("closed form", "fitted")):
        marks = [mark for run in runs for mark in halves(run, *kinds).values()]
        name = f"widths at which our excess loss is at most half the paper's, {', else '.join(reversed(kinds))}"
        table[name] = f"{sum(marks)} of {len(marks)}"
    return table


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, smallest and largest."""
    if not values:
        return None
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def figure(results: dict[str, list[dict[str, Any]]], width: int) -> Figure:
    """A row for each head: training, change of the loss over the width, disagreement over the width."""
    picture = common.new_figure(15, 4.2 * len(results))
    grid = picture.subplots(len(results), 3, squeeze=False)
    for axes, (head, runs) in zip(grid, results.items(), strict=True):
        _training(axes[0], head, runs)
        _over_width(axes[1], runs, width, lambda run, row: max(change(run, row), 1e-6), LOSS)
        axes[1].set(
            ylabel="relative change of the training loss",
            title="without labels but for retraining; negative: 1e-6",
        )
        _over_width(axes[2], runs, width, lambda run, row: max(1 - row["agreement"], 1e-5), 1 - AGREEMENT)
        axes[2].set(ylabel="test images with another prediction", title="agreement; none other: 1e-5")
        axes[1].legend(fontsize=8)
    return picture


def _training(axes: Axes, head: str, runs: Sequence[dict[str, Any]]) -> None:
    beside = axes.twinx()
    for run in runs:
        epoch, loss, _, count = zip(*run["curve (epoch, loss, live, groups)"], strict=True)
        axes.semilogy(epoch, loss, color="black", lw=0.8)
        beside.plot(epoch, count, color="tab:blue", lw=0.8)
    axes.set(xlabel="epoch", ylabel="training loss", title=f"{head} head, {len(runs)} seeds")
    beside.set_ylabel("groups at cosine .9", color="tab:blue")
    beside.set_ylim(0, None)


def _over_width(axes: Axes, runs: Sequence[dict[str, Any]], width: int, value: Any, goal: float) -> None:
    """All seeds as points; the line is the mean over seeds, of rows in the same place of their sweep."""
    for kind, color in zip(KINDS, ("tab:red", "tab:orange", "tab:green", "tab:blue"), strict=True):
        points: dict[float, list[tuple[float, float]]] = {}
        for run in runs:
            for row in run[kind]:
                points.setdefault(row.get("cosine", row["width"]), []).append((row["width"], value(run, row)))
        single = torch.tensor([pair for pairs in points.values() for pair in pairs])
        means = torch.tensor([pairs for pairs in points.values() if len(pairs) == len(runs)]).mean(1)
        means = means[means[:, 0].argsort()]
        axes.plot(single[:, 0], single[:, 1], ".", color=color, ms=3)
        axes.plot(means[:, 0], means[:, 1], color=color, label=kind)
    axes.axhline(goal, color="gray", ls=":", lw=1)
    axes.axvline(width, color="gray", ls=":", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="width kept")
