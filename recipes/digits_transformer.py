"""A small vision transformer on scikit-learn's digits, compressed to half of its MLPs' and heads' MACs.

    python -m recipes.digits_transformer              # some minutes; writes recipe-out/transformer/
    python -m recipes.digits_transformer --quick      # seconds, to see that it runs

What is done, all of it, in this order:

1. *Data.* `digits_data("train")`: 1,437 images, each moved by -1, 0 or 1 pixels along each axis, anew in every
   epoch. The test images serve for the accuracies of the table alone: nothing is chosen by them.
2. *Network.* 2x2 patches give 16 tokens of width 64; 4 blocks of attention (8 heads of 8) and an MLP (256, GELU),
   each behind a layer norm; the mean over the tokens is read by a linear layer. Trained from three seeds by AdamW
   with one cycle of the learning rate. The first try, of 40 epochs, left 4 % of its own training images wrong; 80
   were then taken, and nothing else was tried.
3. *Budget.* Counted are the multiply-accumulates of one image in the linear layers of attention and MLPs: `qkv`,
   `proj`, `fc1`, `fc2` of every block. Half of them may stay. The patches' embedding, the layer norms and the last
   layer are outside of the count, and so are the products of queries with keys and of weights with values, which
   shrink with the heads and are not credited.
4. *Methods.* All are given the same calibration images, drawn without labels from the training images by three
   seeds; nothing is fine-tuned.

       compress         `ep_prune.compress`: chooses widths by layer, selects, refits; a second time with half of
                        the heads' and half of the MLPs' multiply-accumulates each, one after the other
       magnitude        units of the smallest norm (L1 or L2, of all weights that write and read the unit) go;
                        4 of 8 heads and 128 of 256 hidden units in every block, or as many as `compress` kept
       least squares    of the same units (L2), what reads them is refitted by T = G_HP (G_PP + 1e-3 mean diag)^-1,
                        G the uncentred Gram matrix of what it reads, front to back on the narrow network's own
                        activations; without intercept, after GRAIL (2026)

Written are `results.json`, `results.md` and, with matplotlib, `accuracy.png`: accuracy over the share kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import ep_prune as ep
from ep_prune.cost import cost
from ep_prune.demo_model import digits_data
from recipes.small_transformer import DigitsTransformer, counted, even, peer, widths_of
from recipes.train_digits import batches

OUT = Path("recipe-out") / "transformer"
OURS, EACH = "compress", "compress, heads and MLPs each"
SHARE = 0.5
"""Kept of the counted multiply-accumulates."""
SHARES = (0.8, 0.65, SHARE, 0.35, 0.25)
"""Kept for the curve, on the first network with the first draw."""


@dataclass(frozen=True)
class Settings:
    """All that decides the networks, besides the seed."""

    epochs: int = 80
    batch: int = 64
    rate: float = 2e-3
    weight_decay: float = 0.05


# ---- training ---------------------------------------------------------------------------------------------


def train(settings: Settings, seed: int, x: Tensor, y: Tensor) -> DigitsTransformer:
    """AdamW with one cycle of the learning rate; the network in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = DigitsTransformer().train()
    optimizer = torch.optim.AdamW(net.parameters(), settings.rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(y) / settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, steps, pct_start=0.1)
    for _ in tqdm(range(settings.epochs), desc=f"training, seed {seed}", unit="epoch", disable=None):
        for images, classes in batches(x, y, settings.batch, generator):
            optimizer.zero_grad()
            F.cross_entropy(net(images), classes).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images whose highest score is that of their class, in per cent."""
    return 100 * float((net(x).argmax(1) == y).double().mean())


# ---- the comparison --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One narrow network. kept: of the counted multiply-accumulates; drop: of the test accuracy, in points."""

    network: int
    calibration: int
    share: float
    method: str
    kept: float
    accuracy: float
    drop: float
    widths: list[tuple[int, int]]
    seconds: float


def compressed(
    net: DigitsTransformer, images: Tensor, share: float, seed: int, own: int, protect: Sequence[str] = ()
) -> DigitsTransformer:
    """`compress` with the budget that leaves `share` of `own`, and all other multiply-accumulates."""
    budget = cost(net, images[:2]).macs - own + int(share * own)
    result = ep.compress(net, images[:2], [images], keep_macs=budget, protect=protect, seed=seed, progress=False)
    assert isinstance(result.model, DigitsTransformer)
    return result.model


def compressed_each(net: DigitsTransformer, images: Tensor, share: float, seed: int) -> DigitsTransformer:
    """First the heads, then the MLPs, each to `share` of their own, summed up over the blocks."""
    names = [name for name, _ in net.named_modules()]
    heads, mlps = (
        [n for n in names if n.rpartition(".")[2] in part] for part in (("qkv", "proj"), ("fc1", "fc2"))
    )
    for mine, others in ((heads, mlps), (mlps, heads)):
        weights = [net.get_parameter(f"{name}.weight") for name in mine]
        own = sum(weight.numel() for weight in weights) * net.positions.shape[1]
        net = compressed(net, images, share, seed, own, others)
    return net


def compared(
    net: DigitsTransformer, images: Tensor, share: float, seed: int
) -> dict[str, Callable[[], nn.Module]]:
    """Method -> what makes its network; `compress` is run at once, since others take over its widths."""
    ours = compressed(net, images, share, seed, counted(net))
    own, same = widths_of(ours), even(net, share)
    return {
        OURS: lambda: ours,
        EACH: lambda: compressed_each(net, images, share, seed),
        "magnitude, L1": lambda: peer(net, same, 1),
        "magnitude, L2": lambda: peer(net, same, 2),
        "least squares": lambda: peer(net, same, 2, images),
        "magnitude, L2, widths of compress": lambda: peer(net, own, 2),
        "least squares, widths of compress": lambda: peer(net, own, 2, images),
    }


def trained(settings: Settings, seed: int, folder: Path) -> DigitsTransformer:
    """The network of a seed; an earlier run's is read again."""
    path = folder / f"network-{seed}-{settings.epochs}.safetensors"
    if path.is_file():
        net = DigitsTransformer()
        net.load_state_dict(load_file(path))
        return net.eval()
    found = train(settings, seed, *digits_data("train"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found.state_dict(), path)
    return found


def measured(
    net: DigitsTransformer, network: int, calibration: int, count: int, shares: tuple[float, ...]
) -> list[Row]:
    """All methods on one network with one draw of calibration images."""
    (pool, _), test = digits_data("train"), digits_data("test")
    images = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(calibration))[:count]]
    base = accuracy(net, *test)
    rows = []
    for share in shares:
        start = time.perf_counter()
        for method, make in compared(net, images, share, calibration).items():
            narrow = make()
            seconds, start = time.perf_counter() - start, time.perf_counter()
            assert isinstance(narrow, DigitsTransformer)
            kept = counted(narrow) / counted(net)
            assert kept <= share, f"{method} keeps {kept:.3f}, and {share} was asked for"
            found = accuracy(narrow, *test)
            rows.append(
                Row(network, calibration, share, method, kept, found, base - found, widths_of(narrow), seconds)
            )
    return rows


# ---- what is written -------------------------------------------------------------------------------------


def mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


def draws(rows: list[Row]) -> list[float]:
    """Of every draw of calibration images, the drop's mean over the networks."""
    seeds = sorted({row.calibration for row in rows})
    return [statistics.fmean([row.drop for row in rows if row.calibration == seed]) for seed in seeds]


def table(rows: list[Row], share: float) -> str:
    """The drops at one share: mean over networks and draws, the draws' spread, and the largest of all."""
    wide = statistics.fmean([row.accuracy + row.drop for row in rows if row.share == share])
    lines = ["| method | kept | accuracy, % | drop, points | largest drop | s |", "|---" * 6 + "|"]
    lines.append(f"| the wide networks | 1 | {wide:.2f} | | | |")
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method and row.share == share]
        kept, found, seconds = (
            statistics.fmean([getattr(r, k) for r in own]) for k in ("kept", "accuracy", "seconds")
        )
        lines.append(
            f"| {method} | {kept:.3f} | {found:.2f} | {mean_and_spread(draws(own))} | "
            f"{max(row.drop for row in own):.2f} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def curves(rows: list[Row]) -> str:
    """The drop of every method over the shares, on the first network with the first draw."""
    rows = [row for row in rows if (row.network, row.calibration) == (0, 0)]
    shares = sorted({row.share for row in rows}, reverse=True)
    lines = [
        f"| drop, points, at a share of | {' | '.join(f'{s:g}' for s in shares)} |",
        "|---" * (len(shares) + 1) + "|",
    ]
    for method in dict.fromkeys(row.method for row in rows):
        own = [[row.drop for row in rows if row.method == method and row.share == share] for share in shares]
        lines.append(f"| {method} | {' | '.join(f'{statistics.fmean(drops):.2f}' for drops in own)} |")
    return "\n".join(lines)


def kept_widths(rows: list[Row], share: float) -> str:
    """What `compress` kept, heads and hidden units by block, a line a network (of the first draw)."""
    own = [row for row in rows if row.method == OURS and row.share == share]
    first = min(row.calibration for row in own)
    return "\n".join(
        f"* network {row.network}: " + ", ".join(f"{heads} heads and {hidden}" for heads, hidden in row.widths)
        for row in own
        if row.calibration == first
    )


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy over the share that is kept, of the first network with the first draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if (row.network, row.calibration) == (0, 0)]
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(row.method for row in rows):
        shares = sorted({row.share for row in rows})
        means = [
            statistics.fmean([r.accuracy for r in rows if r.method == method and r.share == s]) for s in shares
        ]
        style = {"color": "black", "linewidth": 2.5} if method == OURS else {"linewidth": 1.2}
        axis.plot(shares, means, marker=".", label=method, **style)
    axis.axhline(statistics.fmean([row.accuracy + row.drop for row in rows]), color="grey", linewidth=0.8)
    axis.set_xlabel("share of the MACs of attention and MLP layers")
    axis.set_ylabel("accuracy, %")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compress small vision transformers on scikit-learn's digits.")
    parser.add_argument("--quick", action="store_true", help="one network, one draw, two epochs, half alone")
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--draws", type=int, default=3, help="of calibration images")
    parser.add_argument("--calibration", type=int, default=512, help="images in a draw")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    shares = SHARES
    if options.quick:
        options.networks, options.draws, options.epochs, shares = 1, 1, 2, (SHARE,)
    torch.set_num_threads(1)
    rows = []
    for network in range(options.networks):
        net = trained(Settings(epochs=options.epochs), network, options.out)
        print(f"network {network}: {accuracy(net, *digits_data('test')):.2f} % on the test images", flush=True)
        for draw in range(options.draws):
            own = shares if (network, draw) == (0, 0) else (SHARE,)
            rows += measured(net, network, draw, options.calibration, own)
            print(
                table([row for row in rows if (row.network, row.calibration) == (network, draw)], SHARE),
                flush=True,
            )
    told = [table(rows, SHARE), kept_widths(rows, SHARE)] + ([curves(rows)] if len(shares) > 1 else [])
    (options.out / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (options.out / "results.md").write_text("\n\n".join(told) + "\n")
    print("\n" + "\n\n".join(told))
    try:
        plot(rows, options.out / "accuracy.png")
    except ImportError:
        print("no picture: matplotlib is missing")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
