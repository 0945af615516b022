"""Small attention blocks of many makes, behind a layer norm and beside a residual, with planted heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_prune.trace import trace

E = 12
"""Width of the stream."""


class Attention(nn.Module):
    """Queries, keys, values and outputs of their own layers; `how` they meet is a function (q, k, v, self)."""

    def __init__(self, how: Callable[..., Tensor], heads: int = 4, size: int = 3, shared: int = 0) -> None:
        super().__init__()
        self.how = how
        self.num_heads, self.num_kv_heads, self.head_dim = heads, shared or heads, size
        self.n_rep = heads // self.num_kv_heads
        self.q, self.o = nn.Linear(E, heads * size), nn.Linear(heads * size, E)
        self.k, self.v = (nn.Linear(E, self.num_kv_heads * size) for _ in range(2))
        self.scale = size**-0.5
        self.table = nn.Embedding(20, heads)
        self.register_buffer("seen", torch.ones(9, 9).tril())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, count, self.head_dim).transpose(1, 2)
            for part, count in ((self.q, self.num_heads), (self.k, self.num_kv_heads), (self.v, self.num_kv_heads))
        )
        out: Tensor = self.o(self.how(q, k, v, self).transpose(1, 2).reshape(batch, length, -1))
        return out


class Packed(nn.Module):
    """Queries, keys and values of one layer, cut as `how` says: "reshape" (3, H, d) or "chunk"."""

    def __init__(self, how: str, heads: int = 4, size: int = 3) -> None:
        super().__init__()
        self.how, self.num_heads, self.head_dim = how, heads, size
        self.qkv, self.o = nn.Linear(E, 3 * heads * size), nn.Linear(heads * size, E)
        self.scale = size**-0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.how == "reshape":
            parts = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
            q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
            )
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm, self.attention, self.head = (
            nn.Linear(5, E),
            nn.LayerNorm(E),
            attention,
            nn.Linear(E, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        out: Tensor = self.head(x + self.attention(self.norm(x)))
        return out


def repeated(part: Tensor, times: int) -> Tensor:
    batch, heads, length, size = part.shape
    return part[:, :, None].expand(batch, heads, times, length, size).reshape(batch, heads * times, length, size)


def turned(x: Tensor) -> Tensor:
    """Rotary positions, of heads of 4."""
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    angle = torch.cat([angle, angle], -1)
    return x * angle.cos() + torch.cat([-x[..., 2:], x[..., :2]], -1) * angle.sin()


def by_hand(q: Tensor, k: Tensor, v: Tensor, m: Attention) -> Tensor:
    k, v = (repeated(part, m.n_rep) if m.n_rep > 1 else part for part in (k, v))
    return (q @ k.transpose(-1, -2) * m.scale).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, m: Attention) -> Tensor:
    """A bias for every head and distance, as in T5."""
    place = torch.arange(q.shape[2])
    bias = m.table(place[None, :] - place[:, None] + 10).permute(2, 0, 1)[None]
    return (q @ k.transpose(-1, -2) * m.scale + bias).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor, m: Attention) -> Tensor:
    hidden = m.seen[: q.shape[2], : q.shape[2]] == 0
    return (q @ k.transpose(-1, -2) * m.scale).masked_fill(hidden, -math.inf).softmax(-1) @ v


def batched(q: Tensor, k: Tensor, v: Tensor, m: Attention) -> Tensor:
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / math.sqrt(m.head_dim)
    return torch.einsum("bhij,bhjk->bhik", scores.softmax(-1), v)


WAYS: dict[str, Callable[..., Tensor]] = {
    "fused": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v),
    "fused, causal": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=m.scale),
    "fused, grouped": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "by hand": by_hand,
    "size of the keys": lambda q, k, v, m: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v,
    "causal by hand": causal,
    "einsum": batched,
    "bias by distance": biased,
    "rotary": lambda q, k, v, m: F.scaled_dot_product_attention(
        turned(q), turned(repeated(k, m.n_rep) if m.n_rep > 1 else k), repeated(v, m.n_rep) if m.n_rep > 1 else v
    ),
}


class Single(nn.Module):
    """One head, by products of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.bmm(self.q(x), self.k(x).transpose(1, 2)).softmax(-1)
        out: Tensor = self.o(torch.bmm(weights, self.v(x)))
        return out


def operators() -> frozenset[str]:
    """All that these blocks are traced to."""
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    blocks = [block(Attention(way, size=4)) for way in WAYS.values()]
    graphs = [trace(model, x) for model in [*blocks, block(Packed("reshape")), block(Single())]]
    return frozenset(node.op for graph in graphs for node in graph.nodes)


def block(attention: nn.Module, seed: int = 0) -> Block:
    """A random block in float64."""
    torch.manual_seed(seed)
    model = Block(attention).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def rows(layer: nn.Linear, head: int, size: int) -> list[Tensor]:
    """The weight and the bias of one head, to be written to."""
    return [part.data[head * size : (head + 1) * size] for part in (layer.weight, layer.bias)]
