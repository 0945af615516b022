"""An embedded network is found again by a front-to-back sweep, and not by clustering each layer's neurons.

    python -m recipes.embedding_principle.recovery [--quick] [--out FOLDER] [--seed 0]

A tanh network with hidden widths (3, 4), 3 inputs and 2 outputs, float64, random weights, is embedded in widths
(10, 14) by a random general compatible embedding (arXiv 2111.15527, Def. 4.3): copies with either sign, nulls, and
outgoing weights that are any solution of the forward condition, or of the backward condition as well ("critical").
The pull-back map of the embedding says which wide neurons are copies of one narrow neuron.

Why the layers must be done in order. Layer 1 computes x' = T x + t, and copies i, i' of one narrow neuron of layer
2 have rows with W'_i T = +- W'_i' T: only these sums over the copies in layer 1 agree. W'_i itself is free in all
directions that T takes to 0, 7 of 10 here, so the angle between two copies says little. What is compared:

    sweep          `ep_prune.reduce`: merge layer 1, sum the columns, fold the constants, then compare layer 2;
    each layer     groups by |cos| of the rows (w, b) of the wide network, in both layers at once. A neuron joins
                   the first group to all members of which its |cos| reaches the threshold; the group's first
                   neuron gets the sum of their outgoing weights, with the signs of the cosines;
    in order       the same rule, but layer 2 is grouped after layer 1 has been merged and its columns summed.

A neuron that reads nothing is a constant, and both clusterings fold it into the next bias: in layer 1 all nulls
are seen, in layer 2 they read weights that cancel, and only the second sees them. So merging in order is what
counts; the sweep's own part is that it has no threshold, and goes beyond linear layers. Errors are
max |f' - f| / max |f| over 200 standard normal inputs, f the narrow network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ep_prune as ep
from ep_prune.widen import embed
from recipes.embedding_principle import common
from recipes.embedding_principle._small_networks import deeper, dense, inputs_of

NARROW, WIDE = (3, 4), (10, 14)
THRESHOLDS = (0.5, 0.65, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
BINS = 25
NOTHING = 1e-10
"""Weights below this share of their layer's largest row read nothing."""


def difference(model: nn.Module, narrow: nn.Module, x: Tensor) -> float:
    """max |f' - f| / max |f|."""
    with torch.no_grad():
        wanted = narrow(x)
        return float((model(x) - wanted).abs().max() / wanted.abs().max())


def rows_of(layer: nn.Module) -> Tensor:
    """(n, inputs [+ 1]): what every neuron reads, with its bias."""
    weight, bias = layer.weight.detach().flatten(1), layer.bias
    return weight if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)


def cosines(rows: Tensor) -> Tensor:
    """(n, n), signed."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return unit @ unit.T


def pairs(channel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(n, n) bool: pairs i < j of copies of one narrow channel, and of two; pairs with a null are neither."""
    pi = torch.tensor(channel)
    both = ((pi >= 0)[:, None] & (pi >= 0)).triu(1)
    same = pi[:, None] == pi
    return both & same, both & ~same


def grouped(similar: Tensor, live: Tensor, threshold: float) -> list[list[int]]:
    """Groups of the neurons `live` in which every |cos| reaches the threshold, each led by its first."""
    found: list[list[int]] = []
    for neuron in live.tolist():
        for group in found:
            if bool((similar[neuron, group].abs() >= threshold).all()):
                group.append(neuron)
                break
        else:
            found.append([neuron])
    return found


def clustered(wide: nn.Sequential, threshold: float, in_order: bool) -> nn.Sequential:
    """The network after grouping by cosine, tanh between its linear layers."""
    layers = [layer for layer in wide if isinstance(layer, nn.Linear)]
    parts = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in layers]
    for k in range(len(parts) - 1):
        (weight, bias), (after, after_bias) = parts[k], parts[k + 1]
        rows = torch.cat([weight, bias[:, None]], 1) if in_order else rows_of(layers[k])
        reads = rows[:, :-1].abs().amax(1) > NOTHING * rows.abs().max()
        similar = cosines(rows)
        after_bias = after_bias + after[:, ~reads] @ torch.tanh(bias[~reads])
        groups = grouped(similar, reads.nonzero()[:, 0], threshold)
        summed = [(after[:, group] * similar[group[0], group].sign()).sum(1) for group in groups]
        leaders = [group[0] for group in groups]
        parts[k], parts[k + 1] = (weight[leaders], bias[leaders]), (torch.stack(summed, 1), after_bias)
    modules: list[nn.Module] = []
    for weight, bias in parts:
        layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
        layer.load_state_dict({"weight": weight, "bias": bias})
        modules += [layer, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def widths_of(model: nn.Sequential) -> list[int]:
    return [layer.out_features for layer in model if isinstance(layer, nn.Linear)][:-1]


def trial(seed: int, critical: bool) -> dict[str, Any]:
    """One narrow network, embedded and looked for."""
    narrow = dense((3, *NARROW, 2), "tanh", seed)
    x = inputs_of(narrow, 200, seed + 1)
    widths = {"0": WIDE[0], "2": WIDE[1]}
    wide, report = embed(narrow, x, widths=widths, critical=critical, seed=seed, full_output=True)
    assert isinstance(wide, nn.Sequential)
    swept = ep.reduce(wide, x).model
    assert isinstance(swept, nn.Sequential)
    layers = []
    for space in report.spaces:
        similar = cosines(rows_of(wide.get_submodule(space.name))).abs()
        copies, distinct = pairs(space.channel)
        layers.append({
            "copies": space.copies,
            "nulls": space.nulls,
            "|cos| of true copies": sorted(similar[copies].tolist()),
            "|cos| of distinct neurons": sorted(similar[distinct].tolist()),
        })  # fmt: skip
    found = {}
    for name, in_order in (("each layer", False), ("in order", True)):
        models = [clustered(wide, threshold, in_order) for threshold in THRESHOLDS]
        found[name] = [{"widths": widths_of(model), "error": difference(model, narrow, x)} for model in models]
    return {
        "seed": seed,
        "embedding error": difference(wide, narrow, x),
        "sweep": {"widths": widths_of(swept), "error": difference(swept, narrow, x)},
        **found,
        "layers": layers,
    }


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures over all seeds."""
    layers = []
    for k in range(len(NARROW)):
        values = {
            kind: torch.tensor(
                [c for t in trials for c in t["layers"][k][f"|cos| of {kind}"]], dtype=torch.float64
            )
            for kind in ("true copies", "distinct neurons")
        }
        layers.append({
            kind: {
                "pairs": len(cos),
                "mean": float(cos.mean()),
                "median": float(cos.median()),
                "largest": float(cos.max()),
                "share at or above": {str(t): float((cos >= t - 1e-12).double().mean()) for t in THRESHOLDS},
                "histogram": torch.histc(cos, BINS, 0, 1 + 1e-9).long(),
            }
            for kind, cos in values.items()
        })  # fmt: skip
    for t in trials:
        for layer in t["layers"]:
            del layer["|cos| of distinct neurons"]  # long; the histogram keeps them
    methods: dict[str, Any] = {"sweep": over([t["sweep"] for t in trials])}
    for name in ("each layer", "in order"):
        methods[name] = {str(t): over([trial[name][k] for trial in trials]) for k, t in enumerate(THRESHOLDS)}
    return {"layers": layers, "methods": methods}


def over(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Widths and errors of one method over the seeds."""
    errors = torch.tensor([entry["error"] for entry in found], dtype=torch.float64)
    widths = torch.tensor([entry["widths"] for entry in found], dtype=torch.float64)
    return {
        "mean widths": widths.mean(0),
        "least widths": widths.amin(0),
        "most widths": widths.amax(0),
        "seeds exact": sum(e["widths"] == list(NARROW) and e["error"] <= NOTHING for e in found),
        "least error": float(errors.min()),
        "median error": float(errors.median()),
        "largest error": float(errors.max()),
    }


def other_networks(seed: int, quick: bool) -> list[dict[str, Any]]:
    """Deeper networks and other families: the sweep, and how far apart true copies are in every space."""
    rows = []
    for name, narrow in deeper()[:: 3 if quick else 1]:
        x = inputs_of(narrow, 32, seed + 1)
        wide, report = embed(narrow, x, factor=2.5, critical=False, seed=seed, full_output=True)
        result = ep.reduce(wide, x)
        spaces = []
        for space in report.spaces:
            similar = cosines(rows_of(wide.get_submodule(space.name))).abs()[pairs(space.channel)[0]]
            spaces.append({
                "space": space.name,
                "narrow": space.before,
                "wide": space.after,
                "sweep": len(result.model.get_submodule(space.name).weight),
                "true copies": len(similar),
                "mean |cos|": float(similar.mean()) if len(similar) else None,
                "largest |cos|": float(similar.max()) if len(similar) else None,
            })  # fmt: skip
        rows.append({"network": name, "spaces": spaces, "error": difference(result.model, narrow, x)})
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = common.parse("recovery", __doc__, argv)
    seeds = range(args.seed, args.seed + (3 if args.quick else 20))
    figures: dict[str, Any] = {"narrow": NARROW, "wide": WIDE, "thresholds": THRESHOLDS}
    for name, critical in (("forward", False), ("critical", True)):
        trials = []
        with common.progress(len(seeds), name) as bar:
            for seed in seeds:
                trials.append(trial(seed, critical))
                bar.update()
        figures[name] = summary(trials) | {"trials": trials}
    figures["other networks"] = other_networks(args.seed, args.quick)
    common.write_json(args.out / "recovery.json", args, figures)
    common.save_figure(draw_figure(figures), args.out / "recovery.png")
    show(figures)
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print the tables."""
    for kind in ("forward", "critical"):
        entry = figures[kind]
        seeds = len(entry["trials"])
        print(f"{kind}: {seeds} embeddings of {figures['narrow']} in {figures['wide']}")
        for k, layer in enumerate(entry["layers"], 1):
            for name, cos in layer.items():
                shares = cos["share at or above"].items()
                above = "  ".join(f"{share:.0%} >= {t}" for t, share in list(shares)[::3])
                print(
                    f"  layer {k}, {name:<16}  |cos| mean {cos['mean']:.2f}, most {cos['largest']:.4f}:  {above}"
                )
        print("  method      threshold  mean widths   exact  least error  median error  largest error")
        rows = [("sweep", "-", entry["methods"]["sweep"])]
        rows += [(m, t, row) for m in ("each layer", "in order") for t, row in entry["methods"][m].items()]
        for method, threshold, row in rows:
            widths = ", ".join(f"{float(w):5.2f}" for w in row["mean widths"])
            print(
                f"  {method:<10}  {threshold:>9}  ({widths})  {row['seeds exact']:>2}/{seeds:<2}"
                f"  {row['least error']:>11.1e}  {row['median error']:>12.1e}  {row['largest error']:>13.1e}"
            )
    print("network, space: narrow -> wide -> sweep, |cos| of true copies (mean, most), error of the sweep")
    for row in figures["other networks"]:
        for space in row["spaces"]:
            cos = (
                "no copies"
                if space["mean |cos|"] is None
                else "{mean |cos|:.2f}, {largest |cos|:.2f}".format(**space)
            )
            widths = f"{space['narrow']} -> {space['wide']} -> {space['sweep']}"
            print(f"  {row['network']:<22}  {space['space']:<6}  {widths:<13}  {cos:<10}  {row['error']:.1e}")


def draw_figure(figures: dict[str, Any]) -> Any:
    """Left: how parallel true copies are. Right: what is recovered, and at what error."""
    figure = common.new_figure(11, 6)
    grid = figure.subplots(2, 2)
    for k, axes in enumerate(grid[:, 0]):
        draw_cosines(axes, [figures[kind]["layers"][k] for kind in ("forward", "critical")])
        axes.set_title(f"layer {k + 1} of the wide network, as it is", fontsize=9, loc="left")
    draw_methods(*grid[:, 1], figures["forward"]["methods"], [str(t) for t in figures["thresholds"]])
    found = f"forward condition: mean width found, of {figures['wide']}; {figures['narrow']} is right"
    grid[0, 1].set_title(found, fontsize=9, loc="left")
    grid[1, 1].set_title("relative error of the output at these widths", fontsize=9, loc="left")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_cosines(axes: Any, layers: list[dict[str, Any]]) -> None:
    """Histograms of |cos| in one layer, of `forward` and of `critical` embeddings."""
    edges = [k / BINS for k in range(BINS + 1)]
    for layer, kind, text, look in (
        (layers[0], "distinct neurons", "distinct neurons", {"color": "#cccccc", "fill": True}),
        (layers[0], "true copies", "true copies, forward condition", {"color": "#3b6ea5", "linewidth": 1.6}),
        (layers[1], "true copies", "true copies, both conditions", {"color": "#c0392b", "linestyle": "--"}),
    ):
        pairs_found = layer[kind]["pairs"]
        shares = [int(count) / pairs_found for count in layer[kind]["histogram"]]
        axes.stairs(shares, edges, label=f"{text}: {pairs_found} pairs", **look)
    axes.set(xlabel="|cos| of the incoming rows (w, b)", ylabel="share of pairs", xlim=(0, 1.01))
    axes.margins(y=0.15)
    axes.legend(fontsize=7.5, frameon=False, loc="upper center")


def draw_methods(widths: Any, errors: Any, methods: dict[str, Any], names: list[str]) -> None:
    """Widths and errors over the threshold; the sweep has none, and is a level."""
    blue = "#3b6ea5"
    for name, color, marker in (("each layer", "#c0392b", "o"), ("in order", "#e0a030", "s")):
        rows = [methods[name][t] for t in names]
        look = {"color": color, "marker": marker, "markersize": 4}
        widths.plot(
            names, [float(row["mean widths"][1]) for row in rows], label=f"clustering {name}, layer 2", **look
        )
        errors.semilogy(names, [row["largest error"] for row in rows], label=f"clustering {name}, largest", **look)
        errors.semilogy(names, [row["median error"] for row in rows], ":", label="median", **look)
    first = [float(methods["each layer"][t]["mean widths"][0]) for t in names]
    widths.plot(
        names, first, ":", color="#777777", marker="o", markersize=4, label="clustering of either kind, layer 1"
    )
    sweep = methods["sweep"]
    widths.axhline(float(sweep["mean widths"][1]), color=blue, label="sweep, layer 2")
    widths.axhline(float(sweep["mean widths"][0]), color=blue, linestyle=":", label="sweep, layer 1")
    widths.set_ylim(0, None)
    errors.axhline(sweep["largest error"], color=blue, label="sweep, largest")
    errors.set_ylim(1e-17, 1e10)
    errors.set_yticks([1e-16, 1e-12, 1e-8, 1e-4, 1])
    for axes in (widths, errors):
        axes.set_xlabel("threshold of |cos|")
    widths.legend(fontsize=7.5, frameon=False, loc="center right")
    errors.legend(fontsize=7.5, frameon=False, loc="upper right", ncols=2)


if __name__ == "__main__":
    main()
