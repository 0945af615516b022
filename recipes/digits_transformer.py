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

       compress         `ep_prune.compress`: chooses widths by layer, selects, refits
       magnitude        units of the smallest norm (L1 or L2, of all weights that write and read the unit) go;
                        4 of 8 heads and 128 of 256 hidden units in every block, or as many as `compress` kept
       least squares    of the same units (L2), what reads them is refitted by T = G_HP (G_PP + 1e-3 mean diag)^-1,
                        G the uncentred Gram matrix of what it reads, front to back on the narrow network's own
                        activations; without intercept, after GRAIL (2026)

Written are `results.json`, `results.md` and, with matplotlib, `accuracy.png`: accuracy over the share kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import ep_prune as ep
from ep_prune.cost import cost
from ep_prune.demo_model import CLASSES, digits_data
from recipes.train_digits import batches

OUT = Path("recipe-out") / "transformer"
OURS = "compress"
SHARE = 0.5
"""Kept of the counted multiply-accumulates."""
SHARES = (0.8, 0.65, SHARE, 0.35, 0.25)
"""Kept for the curve."""
RIDGE = 1e-3
"""Of the peer's least squares, as its authors have it."""


@dataclass(frozen=True)
class Settings:
    """All that decides the networks, besides the seed."""

    epochs: int = 80
    batch: int = 64
    rate: float = 2e-3
    weight_decay: float = 0.05


# ---- the network -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Heads of `head_dim`, queries, keys and values from one layer, as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
        return out


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and added to what comes in."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class DigitsTransformer(nn.Module):
    """Images (N, 1, 8, 8) in [0, 1] to class scores (N, 10)."""

    def __init__(self, depth: int = 4, width: int = 64, heads: int = 8, hidden: int = 256) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


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


# ---- what is counted -------------------------------------------------------------------------------------

Widths = list[tuple[int, int]]
"""(heads, hidden units) of every block."""


def widths_of(net: DigitsTransformer) -> Widths:
    return [(block.attention.num_heads, block.fc1.out_features) for block in net.blocks]


def counted(net: DigitsTransformer) -> int:
    """Multiply-accumulates of one image in the linear layers of attention and MLPs."""
    layers = [m for block in net.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    return sum(layer.weight.numel() for layer in layers) * net.positions.shape[1]


def even(net: DigitsTransformer, share: float) -> Widths:
    """The same share of heads and of hidden units everywhere, at least one head; the MLP makes up for the rounding
    of heads, so that the counted share is kept."""
    found = []
    for block in net.blocks:
        attention, width = block.attention, block.fc1.in_features
        heads = max(1, int(share * attention.num_heads))
        a_head = 4 * attention.head_dim * width
        whole = attention.num_heads * a_head + 2 * width * block.fc1.out_features
        found.append((heads, min(int(share * whole - heads * a_head) // (2 * width), block.fc1.out_features)))
    return found


# ---- the peers -------------------------------------------------------------------------------------------


def head_channels(attention: Attention, heads: Tensor) -> Tensor:
    """Where these heads stand among the inputs of `proj`."""
    return (heads.unsqueeze(1) * attention.head_dim + torch.arange(attention.head_dim)).reshape(-1)


@torch.no_grad()
def head_norms(attention: Attention, order: float) -> Tensor:
    """(H,) the norm of all weights that write and read a head."""
    written = attention.qkv.weight.reshape(3, attention.num_heads, -1).transpose(0, 1).flatten(1)
    read = attention.proj.weight.reshape(-1, attention.num_heads, attention.head_dim).transpose(0, 1).flatten(1)
    return torch.linalg.vector_norm(torch.cat([written, read], 1), order, dim=1)


@torch.no_grad()
def hidden_norms(block: Block, order: float) -> Tensor:
    return torch.linalg.vector_norm(torch.cat([block.fc1.weight, block.fc2.weight.T], 1), order, dim=1)


def largest(norms: Tensor, count: int) -> Tensor:
    return norms.topk(count).indices.sort().values


@torch.no_grad()
def pick_(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Leave these outputs, or inputs, of a layer."""
    if rows is not None:
        layer.weight, layer.bias = nn.Parameter(layer.weight[rows]), nn.Parameter(layer.bias[rows])
    if columns is not None:
        layer.weight = nn.Parameter(layer.weight[:, columns])
    layer.out_features, layer.in_features = layer.weight.shape


def keep_heads_(attention: Attention, heads: Tensor) -> None:
    channels = head_channels(attention, heads)
    rows = (torch.arange(3).unsqueeze(1) * attention.proj.in_features + channels).reshape(-1)
    pick_(attention.qkv, rows=rows)
    pick_(attention.proj, columns=channels)
    attention.num_heads = len(heads)


@torch.no_grad()
def refit_(net: nn.Module, reader: nn.Linear, kept: Tensor, images: Tensor) -> None:
    """Write what `reader` loses on its kept inputs: T = G_HP (G_PP + ridge)^-1 on what it reads."""
    read: list[Tensor] = []
    hook = reader.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, -2).double()))
    net(images)
    hook.remove()
    gram = read[0].T @ read[0]
    inner = gram[kept][:, kept]
    ridge = RIDGE * inner.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    through = torch.linalg.solve(inner + ridge, gram[kept]).T
    reader.weight[:, kept] = (reader.weight.double() @ through).to(reader.weight)


def peer(net: DigitsTransformer, widths: Widths, order: float, images: Tensor | None = None) -> DigitsTransformer:
    """Magnitude pruning to the given widths; with images, what reads the pruned units is refitted."""
    narrow = copy.deepcopy(net)
    for block, wide, (heads, hidden) in zip(narrow.blocks, net.blocks, widths, strict=True):
        attention = block.attention
        kept = largest(head_norms(wide.attention, order), heads)
        if images is not None:
            refit_(narrow, attention.proj, head_channels(attention, kept), images)
        keep_heads_(attention, kept)
        kept = largest(hidden_norms(wide, order), hidden)
        if images is not None:
            refit_(narrow, block.fc2, kept, images)
        pick_(block.fc1, rows=kept)
        pick_(block.fc2, columns=kept)
    return narrow


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


def compressed(net: DigitsTransformer, images: Tensor, share: float, seed: int) -> DigitsTransformer:
    """`compress` with the budget that leaves `share` of what is counted, and all that is not."""
    whole, own = cost(net, images[:2]).macs, counted(net)
    result = ep.compress(
        net, images[:2], [images], keep_macs=whole - own + int(share * own), seed=seed, progress=False
    )
    assert isinstance(result.model, DigitsTransformer)
    return result.model


def compared(
    net: DigitsTransformer, images: Tensor, share: float, seed: int
) -> dict[str, Callable[[], nn.Module]]:
    """Method -> what makes its network; `compress` is run at once, since others take over its widths."""
    ours = compressed(net, images, share, seed)
    own, same = widths_of(ours), even(net, share)
    return {
        OURS: lambda: ours,
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
    lines = ["| method | kept | accuracy, % | drop, points | largest drop | s |", "|---" * 6 + "|"]
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
    """The mean drop of every method over the shares."""
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
    """Mean accuracy over the share that is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
            rows += measured(net, network, draw, options.calibration, shares)
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
