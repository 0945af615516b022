"""What memory `reduce` takes: its peak over the model's float32 weights, and seconds, on a GPT-2-medium shape.

    python -m benchmarks.memory [--layers 24] [--width 1024] [--quick] [--out bench-out/]

The network is GPT-2's: token and position embeddings, blocks with layer norm in front, attention, a GELU MLP of
four times the width, and a head tied to the token embeddings; 355 M parameters at 24 layers of 1,024. Its weights
are random; of each MLP's hidden units a sixteenth is unread and a sixteenth is a copy of others, which share its
outgoing weights, so that `reduce` has something to do in every layer. The example is of 16 tokens.

It runs in a child process, which is warm (a small network of this kind went through `reduce`, so that all that
is imported is there) and holds the model. Its largest resident size while `reduce` runs, as the kernel has it,
less the size before the model was there, over the bytes of the model's parameters in float32, is the figure: so
the model itself is counted, as 1. Beside it: the same without the model, from what is resident as `reduce`
begins, and what is held when it is done, the model and its narrow copy among it. Exit code 1 where the figure is
above `--limit`, or where an MLP is not of the width that was planted. Results go to `memory.json` in `--out`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ep_prune
from benchmarks.common import machine

LIMIT = 3.0
NULL = SPLIT = 16  # one in so many hidden units is unread, and as many are copies


class Attention(nn.Module):
    """Causal attention over `heads` heads, q, k and v from one layer, as GPT-2 has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """x + attention, x + MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Decoder(nn.Module):
    """GPT-2's shape; the head is tied to the token embeddings."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


@torch.no_grad()
def planted(layers: int, width: int, vocabulary: int, positions: int, seed: int = 0) -> tuple[Decoder, int]:
    """The network, and the width that its MLPs have without what is unread and without copies."""
    torch.manual_seed(seed)
    model = Decoder(layers, width, max(width // 64, 1), vocabulary, positions)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    hidden = 4 * width
    null, split = hidden // NULL, hidden // SPLIT
    for block in model.blocks:
        assert isinstance(block, Block)
        order = torch.randperm(hidden)
        unread, copies, leaders = order[:null], order[null : null + split], order[null + split : null + 2 * split]
        block.up.weight[copies], block.up.bias[copies] = block.up.weight[leaders], block.up.bias[leaders]
        block.down.weight[:, unread] = 0.0
    return model.eval(), hidden - null - split


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process that are in memory now (VmRSS), or were at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit("benchmarks.memory reads /proc, and so runs on Linux alone")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All figures of one run, in this process."""
    torch.set_num_threads(options.threads)
    tokens = torch.randint(64, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    ep_prune.reduce(planted(1, 128, 64, options.tokens)[0], tokens, progress=False)
    gc.collect()
    empty = resident()
    shape = options.layers, options.width, options.vocabulary, options.positions
    model, width = planted(*shape)
    tokens = torch.randint(options.vocabulary, tokens.shape, generator=torch.Generator().manual_seed(1))
    parameters = sum(p.numel() for p in model.parameters())
    weights = 4 * parameters
    gc.collect()
    begin = resident()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start, processor = time.perf_counter(), time.process_time()
    result = ep_prune.reduce(model, tokens, progress=False)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    peak = resident("VmHWM")
    gc.collect()
    return {
        "shape": dict(zip(("layers", "width", "vocabulary", "positions"), shape, strict=True)),
        "tokens": options.tokens,
        "parameters": parameters,
        "megabytes of float32 weights": round(weights / 1e6, 1),
        "peak over weights": round((peak - empty) / weights, 3),
        "peak over weights, the model not counted": round((peak - begin) / weights, 3),
        "held at the end over weights": round((resident() - empty) / weights, 3),
        "megabytes before the model": round(empty / 1e6, 1),
        "seconds": round(seconds, 1),
        "processor seconds": round(processor, 1),
        "planted width": width,
        "widths": sorted({block.up.weight.shape[0] for block in result.model.blocks}),  # type: ignore[union-attr]
        "rounds": len(result.plan.rounds),
        "difference in float64": result.verification.difference,
        "difference in float32": result.verification.stored_difference,
        "made with": machine() | {"load": os.getloadavg()[0]},
    }


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16, help="of the example")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="of the peak over the weights")
    parser.add_argument(
        "--quick", action="store_true", help="about an eighth of the size: 12 layers of 512, 12,565 tokens"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.width, options.vocabulary = 12, 512, 12565
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.child:
        print(json.dumps(measure(options)))
        return 0
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        "--child",
        *(sys.argv[1:] if arguments is None else arguments),
    ]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1]) | {"limit": options.limit}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return int(found["peak over weights"] > options.limit or found["widths"] != [found["planted width"]])


if __name__ == "__main__":
    raise SystemExit(main())
