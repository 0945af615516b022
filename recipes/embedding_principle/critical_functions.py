"""The critical functions of narrow tanh networks on a 1-D target (arXiv 2105.14573, Fig. 4).

    python -m recipes.embedding_principle.critical_functions [--quick] [--out FOLDER] [--seed 0]

f(x) = sum_k a_k tanh(w_k x + b_k), m = 1, 2, 3 neurons, 200 trials of each, all parameters from N(0, 1/m^3); 50
points equally spaced on [-15, 15], y = tanh(x + 7) + tanh(x) + tanh(x - 7), mean of squares, Adam. A critical
point is a gradient of L2 norm under 1e-10 in float64, a critical function the output at one. Two sets of them:

* *end*: what polishing makes of the last point of each trial. These are the paper's;
* *passed*: what it makes of earlier points of the trajectories. Polishing is indifferent to the sign of curvature,
  so these are saddles that training passes by; embedded ones among them.

Points are taken for one function where their outputs differ by less than 1e-6 at every sample. m0 is the narrowest
width at which a function was found, 0 for f = 0. The degeneracy is counted twice at width 3, as the zero
eigenvalues of the Hessian: at the points of width 3 that the search found, and at the narrowest point split to
width 3 in equal shares. By theorem 2 of the paper a critical manifold of dimension 3 - m0 passes through either;
a point found that is critical to 1e-10 and no better can show a small eigenvalue in place of a zero.

Not counted as critical: points on their way to infinity. A tanh that is steeper than the samples are dense is a
step, whose gradient dies off like exp(-2 |w| distance): it falls under any bound without ever being zero. All
points with a |w| of more than 8 over the spacing of the samples are set aside, and how many there are is reported.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.criticality import hessian_inertia
from recipes.embedding_principle import common
from recipes.embedding_principle.critical_points import (
    at,
    draw,
    mean_square,
    outputs,
    polish,
    sample_1d,
    split,
    train,
    two_layer,
)

WIDTHS = (1, 2, 3)
RATE = 0.02
CRITICAL = 1e-10
SAME = 1e-6
STEEP = 8.0


@dataclass
class Function:
    """One critical function: its values at the samples, and the points at which it was found."""

    values: Tensor
    loss: float
    points: dict[int, list[Tensor]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    passed: dict[int, int] = field(default_factory=dict)


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=None, help="of each width (default 200, 6 if --quick)")
    parser.add_argument("--steps", type=int, default=None, help="of Adam (default 10,000, 1,000 if --quick)")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = common.parse("critical_functions", __doc__, argv, extend)
    args.trials = args.trials or (6 if args.quick else 200)
    args.steps = args.steps or (1_000 if args.quick else 10_000)
    x, y = sample_1d()
    state = args.out / "critical_functions.state"
    tensors, _ = common.load_state(state, args) or ({}, {})
    for width in WIDTHS:
        if f"{width} norms" not in tensors:
            tensors |= search(args, width, x, y)
            common.save_state(state, args, tensors, {})
    functions, lost = collect(tensors, x, y)
    rows = [describe(function, x, y) for function in functions]
    figures = {"functions": rows, "trials": lost, "expected": "losses .11, .07 twice, 1e-5; degeneracy 2, 1, 1, 0"}
    common.write_json(args.out / "critical_functions.json", args, figures)
    common.save_figure(draw_figure(functions, rows, x, y), args.out / "critical_functions.png")
    show(rows, lost)
    return figures


def search(args: argparse.Namespace, width: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Trajectories of all trials of one width, and the critical points near some points of each.

    `points` (marks, trials, p) and `norms` (marks, trials) of the gradient there; the last mark is the end.
    """
    model = two_layer(1, width, 1, nn.Tanh())
    value = mean_square(model, x, y)
    start = draw(model, args.trials, width**-1.5, 1000 * args.seed + width)
    marks = sorted({args.steps, *(k for k in (100, 300, 1_000, 3_000) if k < args.steps)})
    taken = train(value, start, marks, RATE, f"width {width}")
    polished, norms = polish(value, torch.cat(taken), 100 if args.quick else 300, 1e-14, f"width {width}, polish")
    shape = (len(marks), args.trials)
    return {f"{width} points": polished.reshape(*shape, -1), f"{width} norms": norms.reshape(shape)}


def collect(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[list[Function], list[dict[str, int]]]:
    """The critical functions in descending order of loss, and how the points of each width came out."""
    functions: list[Function] = []
    counts = []
    for width in WIDTHS:
        model = two_layer(1, width, 1, nn.Tanh())
        points, norms = tensors[f"{width} points"], tensors[f"{width} norms"]
        steep = points[..., :width].abs().amax(-1) > STEEP / float(x[1] - x[0])  # w comes first in a point
        critical = (norms < CRITICAL) & ~steep
        counts.append(
            {
                "width": width,
                "points": norms.numel(),
                "critical": int(critical.sum()),
                "to infinity": int((steep & (norms < CRITICAL)).sum()),
                "not polished": int((norms >= CRITICAL).sum()),
                "trials": norms.shape[1],
                "trials that end critical": int(critical[-1].sum()),
            }
        )
        last = torch.zeros_like(critical)
        last[-1] = True
        values = outputs(model, points[critical], x)[..., 0]
        for point, f, end in zip(points[critical], values, last[critical].tolist(), strict=True):
            found = next((g for g in functions if (g.values - f).abs().max() < SAME), None)
            if found is None:
                found = Function(f, float((f - y[:, 0]).square().mean()))
                functions.append(found)
            found.points.setdefault(width, []).append(point)
            tally = found.ends if end else found.passed
            tally[width] = tally.get(width, 0) + 1
    return sorted(functions, key=lambda function: -function.loss), counts


def describe(function: Function, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The figures of one function: loss, m0, where it was found, its inertia at m0 and at width 3."""
    narrowest, widest = min(function.points), max(WIDTHS)
    nothing = bool(function.values.abs().max() < SAME)  # no neuron at all

    def inertia(model: nn.Module) -> tuple[int, int, int]:
        found = hessian_inertia(model, lambda m, b: (m(b[0]) - b[1]).square().mean(), (x, y))
        return int(found.positive), int(found.zero), int(found.negative)

    model = at(two_layer(1, narrowest, 1, nn.Tanh()), function.points[narrowest][0])
    own = inertia(model)
    while model[0].out_features < widest:
        model = split(model, model[0].out_features - 1)
    wide = two_layer(1, widest, 1, nn.Tanh())
    seen = [inertia(at(wide, point)) for point in function.points.get(widest, [])]
    tally: dict[tuple[int, int, int], int] = {}
    for counts in seen:
        tally[counts] = tally.get(counts, 0) + 1
    return {
        "loss": function.loss,
        "m0": 0 if nothing else narrowest,
        "ends": function.ends,
        "passed": function.passed,
        "inertia where narrowest": own,
        "inertia split to 3": inertia(model),
        "inertia found at 3": [{"inertia": key, "points": count} for key, count in sorted(tally.items())],
        "f": function.values,
    }


def show(rows: list[dict[str, Any]], counts: list[dict[str, int]]) -> None:
    """Print the table."""
    print("loss       m0  trials that end there  points nearby  (+, 0, -) narrowest  split to 3  found at 3")
    for row in rows:
        ends, passed = (" ".join(f"m={m}:{n}" for m, n in sorted(row[key].items())) for key in ("ends", "passed"))
        found = " ".join(f"{tuple(entry['inertia'])}x{entry['points']}" for entry in row["inertia found at 3"])
        narrow, at_3 = tuple(row["inertia where narrowest"]), tuple(row["inertia split to 3"])
        print(
            f"{row['loss']:<9.3g}  {row['m0']:>2}  {ends or '-':<21}  {passed or '-'}  {narrow}  {at_3}  {found}"
        )
    for entry in counts:
        print(", ".join(f"{key} {value}" for key, value in entry.items()))


def draw_figure(functions: list[Function], rows: list[dict[str, Any]], x: Tensor, y: Tensor) -> Any:
    """Left: the functions at which training ends. Right: the saddles passed by."""
    figure = common.new_figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title in ((left, "where training ends"), (right, "passed by on the way")):
        axes.plot(x, y, ".", color="#888888", markersize=4, label="target")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("x")
    for function, row in zip(functions, rows, strict=True):
        axes = left if function.ends else right
        trials = ", ".join(f"{n} of m = {m}" for m, n in sorted((function.ends or function.passed).items()))
        zeros = row["inertia split to 3"][1]
        label = f"loss {function.loss:.2g}, $m_0$ = {row['m0']}, degeneracy {zeros} ({trials})"
        axes.plot(x, function.values, label=label, linewidth=1.2)
    for axes in (left, right):
        axes.legend(fontsize=6.5, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
