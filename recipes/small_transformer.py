"""A small vision transformer, what is counted of it, and two peers of `compress` that prune it.

What the comparison in `recipes.digits_transformer` is made of: magnitude pruning of heads and hidden units, and
the same followed by a least-squares fit of what reads them, after GRAIL (2026).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ep_prune.demo_model import CLASSES

RIDGE = 1e-3
"""Of the least squares, as its authors have it."""


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
