"""Condensed or lazy: effective width over the scale of the initialization (phase diagram of arXiv 2007.07497).

    python -m recipes.embedding_principle.condensation [--quick] [--out FOLDER] [--seed 0]

f(x) = sum_k a_k relu(w_k x + b_k), a_k from N(0, s_a^2), (w_k, b_k) from N(0, s_w^2), with s_a s_w = m^-gamma and
s_a / s_w = m^-gamma'. As m grows, training is *condensed* (neurons gather in a few directions) if gamma > 1 and
gamma' < gamma - 1, and *lazy* (they stay where they were) if gamma < 1 or gamma' > gamma - 1. The figure shows,
after training, on a grid of (gamma, gamma') and the mean over seeds: the effective width at one tolerance, and
the number of directions that hold most of the layer's weight. At finite width the boundary is no sharp line.

Six points of a curve on [-1, 1], mean of squares, gradient descent on the full batch with a step that grows
while the loss falls and halves when it rises, until the loss is below 1e-4 of the variance or the steps run out.
Runs from the smallest weights may then still stand at a critical point of a narrower network: the means over a
phase leave them out and say how wide they are; the figure marks their cells with a star.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.effective_width import measure, set_up
from recipes.embedding_principle import common

TOL = 0.02
SAME = 0.999
"""Directions with a cosine of at least this count as one (2.6 degrees)."""

MOST = 0.95
FITTED = 1e-4
"""Training ends at this loss, relative to the variance of y."""

GAMMA = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
GAMMA_PRIME = (-0.5, 0.0, 0.5, 1.0)
X = torch.linspace(-1, 1, 6, dtype=torch.float64)
Y = torch.sin(3 * X) + 0.3 * torch.cos(7 * X)


def drawn(width: int, gamma: float, gamma_prime: float, seed: int) -> tuple[Tensor, Tensor]:
    """(m, 2) w and b, (m,) a."""
    draw = torch.Generator().manual_seed(seed)
    inner, outer = width ** (-(gamma - gamma_prime) / 2), width ** (-(gamma + gamma_prime) / 2)
    weights = torch.randn(width, 2, generator=draw, dtype=torch.float64) * inner
    return weights, torch.randn(width, generator=draw, dtype=torch.float64) * outer


def train(weights: Tensor, out: Tensor, steps: int) -> tuple[Tensor, Tensor, float, int]:
    """The trained weights, their loss relative to the variance of y, and the steps taken."""
    x = torch.stack([X, torch.ones_like(X)])
    variance = float(Y.var(correction=0))

    def loss(w: Tensor, a: Tensor) -> tuple[float, Tensor, Tensor]:
        hidden = (w @ x).clamp_min_(0.0)
        residual = (a @ hidden).sub_(Y)
        return float(residual.square().mean()) / variance, hidden, residual

    value, hidden, residual = loss(weights, out)
    rate, step = 1e-3, 0
    while step < steps and value > FITTED:
        step += 1
        back = residual * (2 / len(Y))
        by_weights = ((hidden > 0) * back) @ x.T * out.unsqueeze(1)
        by_out = hidden @ back
        new = weights - rate * by_weights, out - rate * by_out
        tried = loss(*new)
        if tried[0] <= value:
            (weights, out), (value, hidden, residual), rate = new, tried, 1.02 * rate
        else:
            rate /= 2
    return weights, out, value, step


def directions(weights: Tensor, out: Tensor) -> int:
    """How many directions, each with all within `SAME` of it, hold `MOST` of sum |a| |w|; the heaviest first."""
    size = weights.norm(dim=1)
    left = size * out.abs()
    unit = weights / size.clamp_min(1e-300).unsqueeze(1)
    wanted, found = (1 - MOST) * float(left.sum()), 0
    while float(left.sum()) > wanted:
        left = torch.where(unit @ unit[left.argmax()] >= SAME, 0.0, left)
        found += 1
    return found


def extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, help="default: 400, with --quick 50")
    parser.add_argument("--steps", type=int, help="at most; default: 20000, with --quick 1000")
    parser.add_argument("--seeds", type=int, help="default: 3, with --quick 1")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = common.parse("condensation", __doc__, argv, extend)
    args.width = args.width or (50 if args.quick else 400)
    args.steps = args.steps or (1_000 if args.quick else 20_000)
    args.seeds = args.seeds or (1 if args.quick else 3)
    gammas, primes = ((0.5, 2.0), (0.0,)) if args.quick else (GAMMA, GAMMA_PRIME)
    cells = list(itertools.product(gammas, primes, range(args.seed, args.seed + args.seeds)))
    model: Any = nn.Sequential(nn.Linear(1, args.width), nn.ReLU(), nn.Linear(args.width, 1, bias=False)).double()
    grid = torch.linspace(-1, 1, 201, dtype=torch.float64).unsqueeze(1)
    gauge = set_up(model, grid[:2], [grid])
    path = args.out / "condensation.state"
    found = common.load_state(path, args)
    rows: list[dict[str, Any]] = found[1]["rows"] if found is not None else []
    with common.progress(len(cells), "condensation") as bar:
        bar.update(len(rows))
        for gamma, prime, seed in cells[len(rows) :]:
            weights, out, loss, steps = train(*drawn(args.width, gamma, prime, seed), args.steps)
            with torch.no_grad():
                model[0].weight.copy_(weights[:, :1])
                model[0].bias.copy_(weights[:, 1])
                model[2].weight.copy_(out.unsqueeze(0))
            gauge.follow(model)
            curve = measure(gauge, [TOL], ["0"], refine=True).spaces["0"]
            rows.append(
                {
                    "gamma": gamma,
                    "gamma_prime": prime,
                    "seed": seed,
                    "condensed_in_theory": gamma > 1 and prime < gamma - 1,
                    "width": curve.widths[TOL],
                    "by_selection_alone": curve.selected[TOL],
                    "directions": directions(weights, out),
                    "loss": loss,
                    "steps": steps,
                }
            )
            bar.update()
            common.save_state(path, args, {}, {"rows": rows})
    return finish(args, rows, gammas, primes)


def finish(
    args: argparse.Namespace, rows: list[dict[str, Any]], gammas: tuple[float, ...], primes: tuple[float, ...]
) -> dict[str, Any]:
    """Means over seeds and over the two phases, strictly inside each; the table and the figure."""

    def mean(key: str, chosen: list[dict[str, Any]]) -> float:
        return sum(row[key] for row in chosen) / max(len(chosen), 1)

    edge = [row for row in rows if row["gamma"] == 1 or row["gamma_prime"] == row["gamma"] - 1]
    phases = {
        name: [row for row in rows if row["condensed_in_theory"] is inside and row not in edge]
        for name, inside in (("condensed", True), ("lazy", False))
    }
    table = {
        "tol": TOL,
        "phases": {
            name: {
                **{key: mean(key, [r for r in chosen if r["loss"] <= FITTED]) for key in ("width", "directions")},
                "runs": len(chosen),
                "still at a critical point": [r["width"] for r in chosen if r["loss"] > FITTED],
            }
            for name, chosen in phases.items()
        },
        "runs": rows,
    }
    common.write_json(args.out / "condensation.json", args, table)
    figure = common.new_figure(9.5, 3.6)
    panels = figure.subplots(1, 2)
    for panel, key, title in (
        (panels[0], "width", f"effective width at {TOL:g}"),
        (panels[1], "directions", f"directions that hold {MOST:.0%}"),
    ):
        cells = {
            (g, p): [r for r in rows if (r["gamma"], r["gamma_prime"]) == (g, p)] for g in gammas for p in primes
        }
        stuck = {cell for cell, chosen in cells.items() if any(r["loss"] > FITTED for r in chosen)}
        show(panel, {cell: mean(key, chosen) for cell, chosen in cells.items()}, stuck, gammas, primes)
        panel.set_title(title, fontsize=10)
    common.save_figure(figure, args.out / "condensation.png")
    (args.out / "condensation.state").unlink(missing_ok=True)
    for name, figures in table["phases"].items():
        print(f"{name}: {figures}")
    return table


def show(
    panel: Any,
    values: dict[tuple[float, float], float],
    stuck: set[tuple[float, float]],
    gammas: tuple[float, ...],
    primes: tuple[float, ...],
) -> None:
    """A map with its numbers, and the boundary in theory: gamma = 1 below gamma' = 0, then gamma' = gamma - 1."""
    panel.imshow([[values[g, p] for g in gammas] for p in primes], origin="lower", cmap="viridis", aspect="auto")
    for (column, g), (row, p) in itertools.product(enumerate(gammas), enumerate(primes)):
        text = f"{values[g, p]:.0f}" + ("*" if (g, p) in stuck else "")
        panel.text(column, row, text, ha="center", va="center", color="white", fontsize=9)
    if len(gammas) > 1 and len(primes) > 1:
        across, up = gammas[1] - gammas[0], primes[1] - primes[0]
        corner = (1 - gammas[0]) / across, -primes[0] / up
        far = (gammas[-1] - gammas[0]) / across, (gammas[-1] - 1 - primes[0]) / up
        panel.plot([corner[0], corner[0], far[0]], [-0.5, corner[1], far[1]], "--", color="#b5452c")
    panel.set_xticks(range(len(gammas)), [f"{g:g}" for g in gammas])
    panel.set_yticks(range(len(primes)), [f"{p:g}" for p in primes])
    panel.set_xlabel("gamma")
    panel.set_ylabel("gamma'")


if __name__ == "__main__":
    main()
