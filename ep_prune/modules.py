"""Modules that can hold what `reduce` and `compress` leave, in exchange for those that cannot.

`nn.MultiheadAttention` has as many channels in its heads as its inputs have in all. `HeadAttention` computes the
same with four `nn.Linear`, whose sizes are free. `replace_` exchanges the one for the other, same weights. A
residual branch that has no channels left is a `Constant`, its block a `Shift`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadAttention(nn.Module):
    """`nn.MultiheadAttention` with heads of any number and size.

    Takes and returns what that does: query (L, E), (L, N, E) or, batch first, (N, L, E), and key and value alike;
    masks as there (True: not seen). Returns (output, weights or None).
    """

    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False
    """As `nn.TransformerEncoderLayer` asks for them, in front of a fast path of its own."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self.embed_dim, self.batch_first, self.dropout = original.embed_dim, original.batch_first, original.dropout
        self.scale = float(original.head_dim**-0.5)
        joined: Tensor | None = original.in_proj_weight
        bias: Tensor | None = original.in_proj_bias
        apart = original.q_proj_weight, original.k_proj_weight, original.v_proj_weight
        weights = tuple(part.detach() for part in (apart if joined is None else joined.chunk(3)))
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        parts = (joined,) * 3 if joined is not None else apart
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias, part.requires_grad)
            for weight, bias, part in zip(weights, biases, parts, strict=True)
        )
        out = original.out_proj
        kept = None if out.bias is None else out.bias.detach()
        self.out_proj = _linear(out.weight.detach(), kept, out.weight.requires_grad)
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        single = query.ndim == 2
        if single:
            query, key, value = (part.unsqueeze(0) for part in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = (
            layer(part).reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2)
            for layer, part in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = None if attn_mask is None else _added(attn_mask, q)
        if mask is not None and mask.ndim == 3:
            mask = mask.reshape(-1, self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            scores = scores if mask is None else scores + mask
            weights = nn.functional.dropout(scores.softmax(-1), self.dropout, self.training)
            seen = weights @ v
        else:  # zeros where all is hidden, as there
            dropped = self.dropout if self.training else 0.0
            seen = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropped, scale=self.scale)
        out = self.out_proj(seen.transpose(1, 2).flatten(2))
        if single:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is None:
            return out, None
        shown = weights.mean(1) if average_attn_weights else weights
        return out, shown.squeeze(0) if single else shown


class Constant(nn.Module):
    """bias, at every place of x: a residual branch that reads nothing.

    bias (C,): along the axis of channels, which `after` others follow."""

    def __init__(self, bias: Tensor, after: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.after = after
        self.shape = [-1] + [1] * after

    def forward(self, x: Tensor) -> Tensor:
        bias, axis = self.bias.reshape(self.shape), x.ndim - 1 - self.after
        if x.shape[axis] == self.bias.numel():  # in the layout of x, too
            return torch.empty_like(x).copy_(bias)
        return bias.expand(x.shape[:axis] + bias.shape[:1] + x.shape[axis + 1 :]).clone()

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, after={self.after}"


class Shift(Constant):
    """x + bias, or relu(x + bias): a residual block whose branch is a constant."""

    def __init__(self, bias: Tensor, after: int, rectified: bool) -> None:
        super().__init__(bias, after)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        shifted = x + self.bias.reshape(self.shape)
        return shifted.relu_() if self.rectified else shifted

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rectified={self.rectified}"


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    layer = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype
    )
    layer.weight = nn.Parameter(weight.clone(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=trained)
    assert isinstance(layer, nn.Linear)
    return layer


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """What a mask adds to the scores."""
    return (
        torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
        if mask.dtype == torch.bool
        else mask
    )


def fixed_attentions(model: nn.Module) -> list[str]:
    """The names of all `nn.MultiheadAttention`, every name of one that has several."""
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if isinstance(module, nn.MultiheadAttention)]


def replace_(model: nn.Module) -> list[str]:
    """Exchange every `nn.MultiheadAttention` that has no keys of its own; notes on what was exchanged, and not.

    A subclass may compute something else, and a hook would be lost: such modules are kept.
    """
    notes = []
    made: dict[int, HeadAttention] = {}
    for name in fixed_attentions(model):
        original = model.get_submodule(name)
        assert isinstance(original, nn.MultiheadAttention)
        if original.bias_k is not None or original.add_zero_attn:
            notes.append(f"{name} kept: nn.MultiheadAttention with keys of its own (add_bias_kv, add_zero_attn)")
            continue
        if type(original) is not nn.MultiheadAttention:
            notes.append(f"{name} kept: {type(original).__name__} may compute something else")
            continue
        if original._forward_hooks or original._forward_pre_hooks:
            notes.append(f"{name} kept: an nn.MultiheadAttention with forward hooks")
            continue
        if not name:
            notes.append("the model itself is an nn.MultiheadAttention, which is kept: wrap it in a module")
            continue
        model.set_submodule(name, made.setdefault(id(original), HeadAttention(original)))
        notes.append(f"{name} exchanged: nn.MultiheadAttention for ep_prune.modules.HeadAttention")
    return notes
