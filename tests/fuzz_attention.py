"""Seeded random attention blocks with planted heads and ranks of a known minimum, which `reduce` must reach.

python tests/fuzz_attention.py --seeds 300 --start 0
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ep_prune as ep

E = 9
"""Width of the stream."""
LIMIT = 1e-10
CORES = ("fused", "fused, causal", "fused, scale", "hand", "size of the keys", "filled", "einsum", "distance",
         "rotary")  # fmt: skip
LAYOUTS = ("apart", "reshape", "chunk", "split")
RANKS = ("null", "split", "low")
"""How a rank is planted: rows of zeros, parallel rows, a product of thin factors."""


@dataclass(frozen=True)
class Case:
    """heads: by group of shared keys, what each query head is: "own", "null", or "copy" (of the group's first).
    groups: the same for each set of keys and values. size, value: channels of a head; ranks: theirs."""

    core: str
    layout: str
    groups: tuple[str, ...]
    heads: tuple[str, ...]
    size: int
    value: int
    ranks: tuple[int, int]
    how: tuple[str, str]
    bias: tuple[bool, bool]
    memory: bool
    padding: bool
    units: int
    seed: int

    @property
    def expected(self) -> dict[str, int]:
        """The narrowest widths."""
        groups = max(self.groups.count("own"), 1)
        heads = groups * max(self.heads.count("own"), 1)
        size, value = (self.size, self.value) if self.core == "rotary" else self.ranks
        if self.size == self.value:  # one number in the code stands for both
            size = value = max(size, value)
        return {
            "q": heads * size,
            "k": groups * size,
            "v": groups * value,
            "o": heads * value,
            "up": 6 - self.units,
        }


class Attention(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.core, self.layout, size, value = case.core, case.layout, case.size, case.value
        self.num_kv_heads, self.n_rep, self.head_dim = len(case.groups), len(case.heads), size
        self.num_heads, self.scale = self.num_kv_heads * self.n_rep, size**-0.5
        self.shared = self.n_rep > 1
        self.q_size, self.kv_size = self.num_heads * size, self.num_kv_heads * size
        widths = self.q_size, self.kv_size, self.num_kv_heads * value
        if case.layout == "apart":
            self.q, self.k, self.v = (nn.Linear(E, width, bias=case.bias[0]) for width in widths)
        else:
            self.qkv = nn.Linear(E, sum(widths), bias=case.bias[0])
        self.o = nn.Linear(self.num_heads * value, E, bias=case.bias[1])
        self.table = nn.Embedding(24, self.num_heads)
        self.register_buffer("seen", torch.ones(12, 12).tril())

    def parts(self, x: Tensor, y: Tensor) -> Sequence[Tensor]:
        if self.layout == "apart":
            cut = self.q(x), self.k(y), self.v(y)
        elif self.layout == "reshape":
            joined = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
            return joined.permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "chunk":
            cut = self.qkv(x).chunk(3, -1)
        else:
            cut = self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], -1)
        counts = self.num_heads, self.num_kv_heads, self.num_kv_heads
        return [part.unflatten(-1, (count, -1)).transpose(1, 2) for part, count in zip(cut, counts, strict=True)]

    def forward(self, x: Tensor, y: Tensor, hidden: Tensor | None) -> Tensor:
        q, k, v = self.parts(x, y)
        length, known = q.shape[2], k.shape[2]
        if self.core.startswith("fused"):
            seen = None if hidden is None else ~hidden[:, None, None, :]
            told = {"scale": self.scale} if self.core == "fused, scale" else {}
            causal = self.core == "fused, causal"
            out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=self.shared, **told)
            return self.o(out.transpose(1, 2).flatten(2))
        if self.shared:
            k, v = (repeated(part, self.n_rep) for part in (k, v))
        if self.core == "rotary":
            out = F.scaled_dot_product_attention(turned(q), turned(k), v)
            return self.o(out.transpose(1, 2).flatten(2))
        if self.core == "einsum":
            scores = torch.einsum("bhik,bhjk->bhij", q, k) / math.sqrt(self.head_dim)
        elif self.core == "size of the keys":
            scores = q @ k.mT / math.sqrt(q.shape[-1])
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
        if self.core == "distance":
            place = torch.arange(known)[None, :] - torch.arange(length)[:, None]
            scores = scores + self.table(place + 12).permute(2, 0, 1)[None]
        if self.core == "filled":
            scores = scores.masked_fill(self.seen[:length, :known] == 0, -math.inf)
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        out = torch.einsum("bhij,bhjk->bhik", weights, v) if self.core == "einsum" else weights @ v
        return self.o(out.transpose(1, 2).flatten(2))


def repeated(x: Tensor, times: int) -> Tensor:
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rate = torch.tensor([1.0, 0.3, 0.1], dtype=x.dtype)[:half]
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * rate
    angle = torch.cat([angle, angle], -1)
    return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


class Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.inner, self.norm, self.attention = nn.Linear(5, E), nn.LayerNorm(E), Attention(case)
        self.other = nn.Sequential(nn.Linear(4, E), nn.LayerNorm(E)) if case.memory else None
        self.second, self.up, self.down, self.head = (
            nn.LayerNorm(E), nn.Linear(E, 6), nn.Linear(6, E), nn.Linear(E, 3)
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        x = self.inner(x)
        seen = self.norm(x)
        x = x + self.attention(seen, seen if self.other is None else self.other(y), hidden)
        return self.head(x + self.down(F.gelu(self.up(self.second(x)))))


def generate(seed: int) -> Case:
    """The case of a seed."""
    draw = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    def choice(items: Sequence[Any]) -> Any:
        return items[integer(0, len(items) - 1)]

    core, layout = choice(CORES), choice(LAYOUTS)
    shared = layout == "apart" and integer(0, 1) == 1
    groups = ("own", *(choice(("own", "null", "copy")) for _ in range(integer(0, 3))))
    heads = ("own", *(choice(("own", "null", "copy")) for _ in range(integer(1, 2)))) if shared else ("own",)
    size = 2 * integer(1, 3) if core == "rotary" else integer(2, 4)
    value = size if layout != "apart" or core == "rotary" else choice((size, integer(2, 4)))
    ranks = integer(1, size), integer(1, value)
    if size != value:  # of one alone: widths that become equal on the way are kept equal
        ranks = (ranks[0], value) if integer(0, 1) else (size, ranks[1])
    memory = layout == "apart" and core in ("fused", "fused, scale", "hand", "size of the keys", "einsum")
    memory = memory and integer(0, 1) == 1
    padding = core != "fused, causal" and core != "rotary" and integer(0, 2) == 0
    bias = bool(integer(0, 2)), bool(integer(0, 2))
    how = choice(RANKS), choice(RANKS)
    return Case(core, layout, groups, heads, size, value, ranks, how, bias, memory, padding, integer(0, 3), seed)


def _low(part: Tensor, rank: int, how: str, draw: torch.Generator) -> None:
    """Make rows (d, p) of this rank."""
    size = len(part)
    if rank == size:
        return
    if how == "null":
        part[torch.randperm(size, generator=draw)[rank:]] = 0
        return
    mixing = torch.randn(size, rank, generator=draw, dtype=torch.float64)
    if how == "split":
        mixing = torch.zeros_like(mixing)
        mixing[torch.arange(size), torch.arange(size) % rank] = torch.linspace(1.0, 2.0, size).double()
    part.copy_(mixing @ part[:rank].clone())


def build(case: Case) -> tuple[Block, tuple[Tensor, ...]]:
    """The block with everything planted, and an example."""
    torch.manual_seed(case.seed)
    draw = torch.Generator().manual_seed(case.seed)
    model = Block(case).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    model.down.weight.data[:, 6 - case.units :] = 0
    part, count = model.attention, len(case.groups) * len(case.heads)
    sizes = [count * case.size, len(case.groups) * case.size, len(case.groups) * case.value]
    if case.layout == "apart":
        layers = [[p.data for p in layer.parameters()] for layer in (part.q, part.k, part.v)]
    else:
        layers = list(zip(*(p.data.split(sizes) for p in part.qkv.parameters()), strict=True))
    full = [[p.reshape(-1, width, *p.shape[1:]) for p in layer]
            for layer, width in zip(layers, (case.size, case.size, case.value), strict=True)]  # fmt: skip
    out = part.o.weight.data.reshape(E, count, case.value)
    repeats = len(case.heads)
    if case.core != "rotary":
        by_query = bool(torch.randint(2, (1,), generator=draw)) and repeats == 1
        for group in range(len(case.groups)):
            _plant(full[0] if by_query else full[1], group, case.ranks[0], case.how[0], draw, both=by_query)
            _plant(full[2], group, case.ranks[1], case.how[1], draw, both=case.padding)
    for group, what in enumerate(case.groups):
        for head in range(group * repeats, (group + 1) * repeats):
            self_ = case.heads[head % repeats]
            if self_ == "null" or what == "null":
                out[:, head] = 0
            source = head % repeats if what == "copy" else head
            source = source // repeats * repeats if self_ == "copy" else source
            for p in full[0]:
                p[head] = p[source]
            part.table.weight.data[:, head] = part.table.weight.data[:, source]
        if what == "copy":
            for place, factor in ((1, 1.0), (2, -1.5)):
                for p in full[place]:
                    p[group] = factor * p[0]
    return model, example(case, 2, 6, 5)


def _plant(parts: list[Tensor], head: int, rank: int, how: str, draw: torch.Generator, both: bool) -> None:
    """both: the bias counts, as one more column."""
    if both and len(parts) > 1:
        joined = torch.cat([parts[0][head], parts[1][head].unsqueeze(1)], 1)
        _low(joined, rank, how, draw)
        parts[0][head], parts[1][head] = joined[:, :-1], joined[:, -1]
    else:
        _low(parts[0][head], rank, how, draw)


def example(case: Case, batch: int, length: int, other: int) -> tuple[Tensor, ...]:
    """Inputs."""
    draw = torch.Generator().manual_seed(case.seed + 31 * length + batch)
    x = torch.randn(batch, length, 5, generator=draw, dtype=torch.float64)
    other = other if case.memory else length
    y = torch.randn(batch, other, 4, generator=draw, dtype=torch.float64)
    if not case.padding:
        return (x, y) if case.memory else (x,)
    hidden = torch.rand(batch, other, generator=draw) < 0.3
    hidden[:, 0] = False
    return x, y, hidden


def check(case: Case) -> str:
    """What is wrong, or ""."""
    wide, inputs = build(case)
    try:
        result = ep.reduce(wide, inputs, verify_result=False, progress=False)
    except Exception as error:  # whatever goes wrong is a finding
        return f"crash: {type(error).__name__}: {error}"
    for batch, length, other in ((2, 6, 5), (1, 4, 8), (3, 9, 3)):
        x = example(case, batch, length, other)
        with torch.no_grad():
            a, b = wide(*x), result.model(*x)
        if not float((a - b).abs().max() / a.abs().max()) <= LIMIT:
            return f"wrong output at {batch, length, other}: {float((a - b).abs().max()):.1e}"
    part = result.model.attention
    if case.layout == "apart":
        found = {name: len(getattr(part, name).weight) for name in "qkv"}
    else:
        width = sum(case.expected[name] for name in "qkv")
        found = {name: case.expected[name] for name in "qkv"}
        if len(part.qkv.weight) != width:
            found["q"] += len(part.qkv.weight) - width
    found |= {"o": part.o.in_features, "up": result.model.up.out_features}
    return "" if found == case.expected else f"not the narrowest: {found}, expected {case.expected}"


def main() -> int:
    """Run seeds; 1 if any failed."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seeds", type=int, default=300)
    options.add_argument("--start", type=int, default=0)
    asked = options.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for seed in tqdm(range(asked.start, asked.start + asked.seeds), disable=None):
        if problem := check(generate(seed)):
            failed += 1
            tqdm.write(f"seed {seed}: {problem}\n  {generate(seed)}")
    print(f"seeds {asked.start} to {asked.start + asked.seeds - 1}: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
