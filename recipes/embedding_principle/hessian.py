"""Splitting neurons at a critical point adds zero and negative eigenvalues (arXiv 2105.14573, Fig. 3).

    python -m recipes.embedding_principle.hessian [--quick] [--out FOLDER] [--seed 0]

Two-layer networks sum_k a_k s(w_k x + b_k), mean of squares, full batch, float64. A network is trained from a
small initialization, points of its trajectory are polished to critical points (saddles included), one of these is
widened by splitting a neuron in equal shares, twice or three times, and the Hessian's eigenvalues are counted at
every width. The paper states negative eigenvalues 0 -> 1 -> 2 for (a) and 3 -> 5 -> 7 for (b), and one more zero
eigenvalue a step for both.

(a) 50 points equally spaced on [-15, 15], y = tanh(x + 7) + tanh(x) + tanh(x - 7), tanh, m = 2 -> 3 -> 4. All
    trials end at the same loss; the start is the best of them.
(b) Iris, 150 samples, 4 raw features, one-hot labels, sigmoid, Adam with rate .02, N(0, 1/m^6). The paper says
    neither width, nor whether there is a bias, nor how inputs and labels are coded. Fixed here: no bias anywhere,
    m = 3. The start is a saddle that training passes by, with one negative eigenvalue and none that is zero: of
    those found, the one of lowest loss. So the chain is 1 -> 3 -> 5 -> 7 for m = 3 -> 4 -> 5 -> 6, and the
    paper's three figures are its last three. All critical points that were found are in the table. The paper's
    run rests at its saddle after 500,000 epochs; ours only passes by (steps 160 to 240), and polishing goes there.

What a split must add. Write r for the residual at a sample, and split (w, a), with a a vector of k outputs, in
equal shares. In the directions (dw, -dw; da, -da), which leave the sum of the two neurons alone, the new part of
the Hessian is, up to positive factors,

    | A    B |        A = mean (r . a) s''(w x) x x^T     (d, d)
    | B^T  0 |        B = mean s'(w x) x r^T              (d, k),    B a = 0 since dL/dw = 0.

The vector a in da is the new zero eigenvalue. B has rank k - 1 in general, and gives k - 1 negative and k - 1
positive eigenvalues whatever A is; the rest is the inertia of A where B^T vanishes. So with one output a split
adds the inertia of A, and with three outputs exactly 2 negative eigenvalues if A is positive there, and more else.
The recipe splits the neuron that adds the fewest negative eigenvalues, the first of those.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.criticality import Inertia, criticality, hessian_inertia
from recipes.embedding_principle import common
from recipes.embedding_principle.critical_points import (
    at,
    draw,
    mean_square,
    polish,
    sample_1d,
    split,
    train,
    two_layer,
)

FINITE = 30.0
"""A larger parameter is one on its way to infinity, where sigmoid is flat, and no critical point."""


@dataclass(frozen=True)
class Case:
    """One row of the figure. `negative` eigenvalues of the start: None takes the lowest loss of all."""

    name: str
    x: Tensor
    y: Tensor
    width: int
    activation: nn.Module
    bias: bool
    deviation: float
    rate: float
    marks: list[int]
    trials: int
    negative: int | None
    splits: int
    paper: tuple[int, int, int]


def cases(quick: bool) -> list[Case]:
    x, y = sample_1d()
    iris, labels = iris_data()
    ends, passed = ([1_000], [200]) if quick else ([10_000], [160, 180, 200, 220, 240])
    few, many = (4, 8) if quick else (16, 48)
    return [
        Case("1-D", x, y, 2, nn.Tanh(), True, 2**-1.5, 0.02, ends, few, None, 2, (0, 1, 2)),
        Case("Iris", iris, labels, 3, nn.Sigmoid(), False, 3.0**-3, 0.02, passed, many, 1, 3, (3, 5, 7)),
    ]


def iris_data() -> tuple[Tensor, Tensor]:
    """(150, 4) features in cm, (150, 3) one-hot labels, float64."""
    from sklearn.datasets import load_iris

    data = load_iris()
    return torch.tensor(data.data, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[
        torch.tensor(data.target)
    ]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def start_of(case: Case, seed: int, steps: int) -> tuple[Tensor | None, list[dict[str, Any]]]:
    """The parameters of the critical point to begin with, and all critical points found, by loss."""
    model = two_layer(case.x.shape[1], case.width, case.y.shape[1], case.activation, case.bias)
    value = mean_square(model, case.x, case.y)
    begin = draw(model, case.trials, case.deviation, seed)
    taken = torch.cat(train(value, begin, case.marks, case.rate, case.name))
    points, norms = polish(value, taken, steps, 1e-15, f"{case.name}, polish")
    found = []
    for trial in ((norms < 1e-11) & (points.abs().amax(dim=1) < FINITE)).nonzero()[:, 0].tolist():
        inertia = hessian_inertia(at(model, points[trial]), loss, (case.x, case.y))
        step, index = case.marks[trial // case.trials], trial % case.trials
        reached = float(value(points[trial : trial + 1]))
        counts = (int(inertia.positive), int(inertia.zero), int(inertia.negative))
        found.append({"loss": reached, "inertia": counts, "trial": index, "step": step, "row": trial})
    found.sort(key=lambda entry: entry["loss"])
    right = [e for e in found if case.negative is None or e["inertia"][1:] == (0, case.negative)]
    return (points[right[0]["row"]] if right else None), found


def chain(case: Case, point: Tensor) -> list[dict[str, Any]]:
    """The figures at every width, from the start through all splits."""
    model = two_layer(case.x.shape[1], case.width, case.y.shape[1], case.activation, case.bias)
    model = at(model, point)
    first = model(case.x).detach()
    batch = (case.x, case.y)
    rows = [figures_of(model, batch, first, None)]
    for _ in range(case.splits):
        width = model[0].out_features
        options = [
            (hessian_inertia(split(model, neuron), loss, batch).negative, neuron) for neuron in range(width)
        ]
        neuron = min(options)[1]
        model = split(model, neuron)
        rows.append(figures_of(model, batch, first, neuron) | {"negative by neuron": [int(n) for n, _ in options]})
    return rows


def figures_of(model: nn.Sequential, batch: Any, first: Tensor, neuron: int | None) -> dict[str, Any]:
    """Loss, gradient norms, change of the output since the start, and the inertia with its spectrum."""
    found: Inertia = hessian_inertia(model, loss, batch)
    point = criticality(model, loss, batch)
    assert found.eigenvalues is not None
    return {
        "width": model[0].out_features,
        "split neuron": neuron,
        "loss": point.loss,
        "gradient L1": point.l1,
        "gradient L2": point.l2,
        "output change": float((model(batch[0]) - first).detach().abs().max()),
        "positive": int(found.positive),
        "zero": int(found.zero),
        "negative": int(found.negative),
        "tolerance": found.tolerance,
        "largest |zero|": found.largest_zero,
        "smallest |nonzero|": found.smallest_nonzero,
        "eigenvalues": found.eigenvalues.tolist(),
    }


def extend(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = common.parse("hessian", __doc__, argv, extend)
    state = args.out / "hessian.state"
    tensors, values = common.load_state(state, args) or ({}, {})
    figures: dict[str, Any] = {}
    for case in cases(args.quick):
        if case.name not in tensors:
            point, values[case.name] = start_of(case, args.seed, 160 if args.quick else 200)
            if point is None:
                raise SystemExit(
                    f"{case.name}: no critical point of the kind wanted was found: try another --seed"
                )
            tensors[case.name] = point
            common.save_state(state, args, tensors, values)
        figures[case.name] = {
            "paper, negative": case.paper,
            "critical points found": values[case.name],
            "widths": chain(case, tensors[case.name]),
        }
    common.write_json(args.out / "hessian.json", args, figures)
    common.save_figure(draw_figure(figures), args.out / "hessian.png")
    show(figures)
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    print("data  width  loss      gradient L1  negative  zero  positive  largest |zero|  smallest |nonzero|")
    for name, entry in figures.items():
        for row in entry["widths"]:
            zero = "-" if row["largest |zero|"] is None else f"{row['largest |zero|']:.1e}"
            counts = f"{row['negative']:>8}  {row['zero']:>4}  {row['positive']:>8}"
            print(
                f"{name:<4}  {row['width']:>5}  {row['loss']:.6f}  {row['gradient L1']:>11.1e}  {counts}"
                f"  {zero:>14}  {row['smallest |nonzero|']:>18.1e}"
            )


def draw_figure(figures: dict[str, Any]) -> Any:
    """|eigenvalues| on a logarithmic axis, by sign; a row for the data, a column for the width."""
    figure = common.new_figure(11, 5.5)
    columns = max(len(entry["widths"]) for entry in figures.values())
    grid = figure.subplots(len(figures), columns, sharey=True, squeeze=False)
    for line, (name, entry) in zip(grid, figures.items(), strict=True):
        for axes in line[len(entry["widths"]) :]:
            axes.set_visible(False)
        for axes, row in zip(line, entry["widths"], strict=False):
            values = torch.tensor(row["eigenvalues"], dtype=torch.float64)
            sizes, order = values.abs().clamp_min(1e-20).sort(descending=True)
            values = values[order]
            zero = values.abs() <= row["tolerance"]
            kinds = (
                ("positive", (values > 0) & ~zero, "o", "#3b6ea5"),
                ("negative", (values < 0) & ~zero, "v", "#c0392b"),
                ("zero", zero, "x", "#888888"),
            )
            places = torch.arange(1, len(values) + 1)
            for label, chosen, marker, color in kinds:
                text = f"{label}: {int(chosen.sum())}"
                axes.semilogy(places[chosen], sizes[chosen], marker, color=color, markersize=4, label=text)
            axes.axhline(row["tolerance"], color="#bbbbbb", linewidth=0.8, linestyle="--")
            title = f"{name}, m = {row['width']}, |gradient|$_1$ = {row['gradient L1']:.0e}"
            axes.set_title(title, fontsize=8, loc="left")
            axes.legend(fontsize=6.5, frameon=False, loc="center left")
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("|eigenvalue|")
    return figure


if __name__ == "__main__":
    main()
