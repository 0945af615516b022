"""Where attention's algebra ends: masks that hide all keys, softmax over other axes, modules that look alike."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ep_prune as ep
from ep_prune.modules import HeadAttention, replace_
from tests.attention import WAYS, Attention, Packed, block, rows

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def apart(wide: nn.Module, narrow: nn.Module, length: int) -> float:
    x = torch.randn(3, length, 5, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    with torch.no_grad():
        return float((wide(x) - narrow(x)).abs().max())


def masked(q: Tensor, k: Tensor, v: Tensor, m: Attention) -> Tensor:
    length = q.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask[:length, :length])


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
@pytest.mark.parametrize("query", [2, 7])
def test_a_table_of_masks_that_hides_a_query_keeps_constant_values(kind: torch.dtype, query: int) -> None:
    """Query 7 is beyond the example's length: all of the table is looked at."""
    attention = Attention(masked)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    attention.register_buffer(
        "mask", mask if kind == torch.bool else torch.zeros(9, 9).masked_fill(~mask, -torch.inf)
    )
    seen = block(attention)
    for head in range(4):
        rows(attention.v, head, 3)[0][1] = 0
        for part in rows(attention.q, head, 3):
            part[1] = 0
    narrow = ep.reduce(seen, X).model
    assert (narrow.attention.v.out_features, narrow.attention.q.out_features) == (8, 8)
    assert max(apart(seen, narrow, length) for length in (4, 6, 9)) < 1e-10
    attention.mask[query] = False if kind == torch.bool else -torch.inf
    result = ep.reduce(seen, X)
    assert result.model.attention.v.out_features == 12
    assert "rolled back" not in str(result.report)
    assert max(apart(seen, result.model, length) for length in (4, 6, 9)) < 1e-10


def test_a_head_that_sees_nothing_is_no_copy_of_one_that_sees_everything() -> None:
    attention = Attention(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m.mask))
    attention.register_buffer("mask", torch.tensor([True, True, True, False]).reshape(1, 4, 1, 1))
    wide = block(attention)
    for layer in (attention.q, attention.k, attention.v):
        for new, old in zip(rows(layer, 3, 3), rows(layer, 0, 3), strict=True):
            new.copy_(old)
    result = ep.reduce(wide, X)
    assert "rolled back" not in str(result.report)
    assert apart(wide, result.model, 6) < 1e-10


def test_weights_that_sum_up_to_one_over_the_queries_keep_constant_values() -> None:
    wide = block(Attention(lambda q, k, v, m: (q @ k.mT * m.scale).softmax(-2) @ v))
    for head in range(4):
        rows(wide.attention.v, head, 3)[0][1] = 0
        for part in rows(wide.attention.q, head, 3):
            part[1] = 0
    result = ep.reduce(wide, X)
    assert "rolled back" not in str(result.report)
    assert result.model.attention.v.out_features == 12
    assert max(apart(wide, result.model, length) for length in (4, 6, 9)) < 1e-10


@pytest.mark.parametrize("how", ["reshape", "chunk"])
def test_equal_parts_are_filled_up_after_what_the_heads_need(how: str) -> None:
    """Heads 0 and 2 stay: nothing may take the queries of head 1 in the place of those of head 2."""
    wide = block(Packed(how))
    for part in (wide.attention.qkv.weight.data.view(3, 4, 3, 12), wide.attention.qkv.bias.data.view(3, 4, 3)):
        part[:, 1], part[:, 3] = part[:, 0], part[:, 0]
    narrow = ep.reduce(wide, X).model
    assert (narrow.attention.num_heads, narrow.attention.qkv.out_features) == (2, 18)
    assert apart(wide, narrow, 9) < 1e-10


@pytest.mark.parametrize("way", ["fused", "by hand", "einsum"])
def test_factors_inside_a_head_and_its_channels_in_another_order(way: str) -> None:
    """q times c and k by c, channel by channel in another order, are the same scores."""
    wide = block(Attention(WAYS[way]))
    part, order = wide.attention, torch.tensor([2, 0, 1])
    gain = torch.tensor([2.0, -0.5, 4.0], dtype=torch.float64)
    for layer, factor in ((part.q, gain), (part.k, 1 / gain), (part.v, torch.tensor(-1.5))):
        for new, old in zip(rows(layer, 3, 3), rows(layer, 0, 3), strict=True):
            new.copy_(old[order] * factor.reshape(-1, *[1] * (old.ndim - 1)) if factor.ndim else factor * old)
    result = ep.reduce(wide, X)
    assert result.model.attention.num_heads == 3
    assert apart(wide, result.model, 9) < 1e-10


def test_a_table_of_positions_is_compared_beyond_the_examples_length() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.places = nn.Parameter(torch.randn(9, 8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.inner(x) + self.places[: x.shape[1]]))
            return out

    torch.manual_seed(0)
    wide = Positions().double().eval()
    for part in (wide.inner.weight.data, wide.inner.bias.data, wide.places.data.T[:, :6]):
        part[3] = part[0]
    narrow = ep.reduce(wide, X).model
    assert narrow.inner.out_features == 8 and apart(wide, narrow, 9) < 1e-10
    wide.places.data[:, 3] = wide.places.data[:, 0]
    narrow = ep.reduce(wide, X).model
    assert narrow.inner.out_features == 7 and apart(wide, narrow, 9) < 1e-10


class Around(nn.Module):
    """A module for attention, twice."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner, self.attention, self.again, self.head = nn.Linear(5, 8), attention, attention, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x = x + self.attention(x, x, x)[0]
        out: Tensor = self.head(self.again(x, x, x)[0])
        return out


class Doubled(nn.MultiheadAttention):
    def forward(self, *args: Tensor, **options: bool) -> tuple[Tensor, Tensor | None]:
        out, weights = super().forward(*args, **options)
        return 2 * out, weights


@pytest.mark.parametrize("what", ["subclass", "hook", "plain"])
def test_only_plain_multihead_attention_is_exchanged(what: str) -> None:
    torch.manual_seed(0)
    attention = (Doubled if what == "subclass" else nn.MultiheadAttention)(8, 4, batch_first=True)
    if what == "hook":
        attention.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    wide = Around(attention).double().eval()
    attention.out_proj.weight.data[:, 2:4] = 0
    result = ep.reduce(wide, X, replace_modules=True)
    assert apart(wide, result.model, 6) < 1e-10
    assert (type(result.model.attention) is HeadAttention) == (what == "plain")
    assert result.model.attention is result.model.again
    assert ("exchanged" if what == "plain" else "attention kept") in str(result.report)
    if what == "plain":
        assert result.model.attention.num_heads == 3


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_head_attention_hides_what_multihead_attention_hides(batch_first: bool, need_weights: bool) -> None:
    """All masks, those included that hide all keys of a query, with and without gradients."""
    torch.manual_seed(0)
    old = nn.MultiheadAttention(8, 4, batch_first=batch_first, kdim=5, vdim=7).double().eval()
    new = HeadAttention(old)
    query, key, value = (torch.randn(3, 6, size).double() for size in (8, 5, 7))
    batch, length = (3, 6) if batch_first else (6, 3)
    later = torch.ones(length, length).triu(1).bool()
    all_hidden, last = later.clone(), torch.zeros(batch, length, dtype=torch.bool)
    all_hidden[1], last[:, -1] = True, True
    whole = last.clone()
    whole[0] = True
    masks = (
        None,
        later,
        all_hidden,
        torch.randn(length, length).double(),
        later.expand(4 * batch, length, length),
    )
    paddings = (None, last, whole, torch.randn(batch, length).double())
    for mask, padding, average, grad in itertools.product(masks, paddings, (True, False), (True, False)):
        told = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights,
                "average_attn_weights": average}  # fmt: skip
        with torch.set_grad_enabled(grad):
            (a, w), (b, u) = old(query, key, value, **told), new(query, key, value, **told)
        assert torch.allclose(a, b, atol=1e-12, equal_nan=True)
        assert (w is None and u is None) or torch.allclose(w, u, atol=1e-12, equal_nan=True)


def test_what_is_exchanged_trains_as_before() -> None:
    model = Around(nn.MultiheadAttention(8, 4))
    model.attention.in_proj_weight.requires_grad_(False)
    assert replace_(model) and model.attention.out_proj.weight.requires_grad
    assert not model.attention.q_proj.weight.requires_grad
