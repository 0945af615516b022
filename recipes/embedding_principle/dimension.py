"""The dimension of the critical manifold on which an embedding puts a network: the formula beside a measured rank.

    python -m recipes.embedding_principle.dimension [--quick] [--out FOLDER] [--seed 0]

A critical point of the narrow network stays critical for every choice of what a critical embedding leaves free
(arXiv 2105.14573, Thm. 2; arXiv 2111.15527 for general embeddings). The papers count these dimensions as
K + sum over l of K_l K_{l-1}, with K_l the neurons that layer l gained; that is proved for two layers and
heuristic for more. Here

    gained        the shares of the copies, and the constants of nulls that a bias behind them can take;
    mixed         K_l K_{l-1} for every weight, times the taps of a convolution;
    symmetries    scales that the activation admits, which the papers call trivial: one for every neuron with ReLU.

The rank is that of the tangent directions: the free numbers are moved at random, both ways, and the singular
values of the moves of all trainable weights are counted. `gap`: the smallest that counts and the largest that does
not, relative to the largest.

What the formula leaves out, "batch norm" in the table. A null neuron under a batch norm is gain * 0 + shift, and
it is so in two ways. Its filter reads nothing: then its gain is free, one dimension more. Or its gain is 0: then
nothing comes through, and its filter is wholly free instead of in the K_{l-1} directions of every tap that the
narrow channels do not see; with k narrow inputs that is k dimensions more for every tap. Formula and batch norm
together are the rank.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.widen import KINDS, embed
from ep_prune.widen_report import EmbedReport
from recipes.embedding_principle import common
from recipes.embedding_principle._small_networks import deeper, inputs_of

ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.ReLU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Softplus)
SEEDS_OF_BATCH_NORM = (0, 2, 3)
"""The first has no null at all, the others have some with free gains and one whose gain is 0."""


def two_layers(seed: int) -> tuple[nn.Module, Tensor, str]:
    """A random network with 2 to 4 inputs, neurons and outputs, data for it, and the kind of embedding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs, width, outputs = (int(size) for size in torch.randint(2, 5, (3,)))
        activation = ACTIVATIONS[seed % 7]
        # A null that cannot vanish needs a bias behind it: sigmoid and softplus are not 0 at 0.
        bias = seed % 4 > 0 or activation in (nn.Sigmoid, nn.Softplus)
        first, last = nn.Linear(inputs, width, bias=seed % 3 > 0), nn.Linear(width, outputs, bias=bias)
        x = torch.randn(8, inputs, dtype=torch.float64)
    return nn.Sequential(first, activation(), last).double(), x, KINDS[seed // 7 % len(KINDS)]


def under_batch_norm(narrow: nn.Module, wide: nn.Module, report: EmbedReport) -> int:
    """Dimensions that nulls under the batch norms of the residual network have beyond the formula."""
    channel = {space.name: space.channel for space in report.spaces}
    found = 0
    for layer, norm, space in (("stem", "bn0", "stem"), ("conv1", "bn1", "conv1"), ("conv2", "bn2", "stem")):
        gains = wide.get_submodule(norm).weight
        filters = narrow.get_submodule(layer).weight
        for j, source in enumerate(channel[space]):
            if source < 0:
                found += filters[0].numel() if gains[j] == 0 else 1
    return found


def figures_of(
    name: str, narrow: nn.Module, x: Tensor, kind: str, seed: int, factor: float = 2.0
) -> dict[str, Any]:
    """One network, embedded and counted."""
    wide, report = embed(narrow, x, kind=kind, factor=factor, seed=seed, full_output=True)
    found = report.dimension()
    norms = any(isinstance(module, nn.BatchNorm2d) for module in narrow.modules())
    return {
        "network": name,
        "kind": kind,
        "widths": {space.name: (space.before, space.after) for space in report.spaces},
        "copies": sum(space.copies for space in report.spaces),
        "nulls": sum(space.nulls for space in report.spaces),
        "left alone": report.left_alone,
        "gained": found.gained,
        "mixed": found.mixed,
        "symmetries": found.symmetries,
        "formula": found.formula,
        "batch norm": under_batch_norm(narrow, wide, report) if norms else 0,
        "rank": found.rank,
        "gap": found.gap,
    }


def two_layer_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    with common.progress(count, "two layers") as bar:
        for number in range(seed, seed + count):
            model, x, kind = two_layers(number)
            name = f"two layers, {type(model[1]).__name__}"
            rows.append(figures_of(name, model, x, kind, number))
            bar.update()
    return rows


def deeper_rows(quick: bool, seed: int) -> list[dict[str, Any]]:
    networks = [(name, model, seed, 2.0) for name, model in deeper()[:-1]]
    name, model = deeper()[-1]
    networks += [(name, model, seed + number, 1.5) for number in SEEDS_OF_BATCH_NORM]
    rows = []
    with common.progress(len(networks), "deeper") as bar:
        for name, model, number, factor in (networks[0], networks[-2]) if quick else networks:
            rows.append(figures_of(name, model, inputs_of(model, 8, 0), "compatible", number, factor))
            bar.update()
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = common.parse("dimension", __doc__, argv)
    figures = {
        "two layers": two_layer_rows(6 if args.quick else 50, args.seed),
        "deeper": deeper_rows(args.quick, args.seed),
    }
    common.write_json(args.out / "dimension.json", args, figures)
    common.save_figure(draw_figure(figures), args.out / "dimension.png")
    show(figures)
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print the table of the deeper networks, and how many agree."""
    print("network               widths              nulls  K  mixed  symmetries  formula  batch norm  rank  gap")
    for row in figures["deeper"]:
        widths = " ".join(f"{before}->{after}" for before, after in row["widths"].values())
        print(
            f"{row['network']:<20}  {widths:<18}  {row['nulls']:>5}  {row['gained']}  {row['mixed']:>5}"
            f"  {row['symmetries']:>10}  {row['formula']:>7}  {row['batch norm']:>10}  {row['rank']:>4}"
            f"  {row['gap'][0]:.1e}, {row['gap'][1]:.1e}"
        )
    for name, rows in figures.items():
        equal = sum(row["rank"] == row["formula"] for row in rows)
        with_norm = sum(row["rank"] == row["formula"] + row["batch norm"] for row in rows)
        above, below = min(row["gap"][0] for row in rows), max(row["gap"][1] for row in rows)
        print(
            f"{name}: rank = formula in {equal} of {len(rows)}, formula + batch norm in {with_norm}; singular"
            f" values that count are {above:.1e} or more of the largest, the others {below:.1e} or less"
        )


def draw_figure(figures: dict[str, Any]) -> Any:
    """Left: the rank over the formula for two layers. Right: what the rank of the deeper networks is made of."""
    figure = common.new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    rows = figures["two layers"]
    most = max(max(row["rank"], row["formula"]) for row in rows) + 2
    left.plot([0, most], [0, most], color="#bbbbbb", linewidth=1, zorder=0)
    for (formula, rank), count in Counter((row["formula"], row["rank"]) for row in rows).items():
        left.scatter(formula, rank, s=20 + 14 * count, color="#3b6ea5", linewidth=0)
        left.annotate(f"{count}", (formula, rank), (9, -9), textcoords="offset points", fontsize=7)
    equal = sum(row["rank"] == row["formula"] for row in rows)
    left.set_title(f"two layers: equal in {equal} of {len(rows)} (numbers: networks)", fontsize=9, loc="left")
    left.set(xlabel="formula: K + symmetries", ylabel="measured rank")

    rows = figures["deeper"][::-1]
    starts = [0] * len(rows)
    parts = (
        ("gained", "K", "#3b6ea5"),
        ("mixed", "sum K$_l$ K$_{l-1}$ taps", "#8fb3d9"),
        ("symmetries", "symmetries", "#cccccc"),
        ("batch norm", "batch norm, not in the formula", "#e0a030"),
    )
    for key, text, color in parts:
        sizes = [row[key] for row in rows]
        right.barh(range(len(rows)), sizes, 0.6, starts, color=color, label=text)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    right.plot([row["rank"] for row in rows], range(len(rows)), "k|", markersize=11, label="measured rank")
    names = [f"{row['network']} ({row['nulls']} null)" if row["nulls"] else row["network"] for row in rows]
    right.set_yticks(range(len(rows)), names, fontsize=8)
    right.set_ylim(-0.6, len(rows) + 1.7)
    right.set_xlabel("dimension")
    right.set_title("deeper networks", fontsize=9, loc="left")
    right.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
