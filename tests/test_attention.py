"""Attention: planted heads and channels go exactly, whatever the code that holds them; nothing else does."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ep_prune as ep
from ep_prune.modules import HeadAttention
from tests.attention import WAYS, Attention, Block, Packed, block, rows

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(wide: nn.Module, narrow: nn.Module, *, limit: float = 1e-10) -> None:
    """On other batches and lengths than the example's."""
    for batch, length in ((1, 6), (3, 6), (2, 9), (2, 4)):
        x = torch.randn(batch, length, 5, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
        with torch.no_grad():
            a, b = wide(x), narrow(x)
        assert float((a - b).abs().max() / a.abs().max()) <= limit


def null_(model: Attention | Packed, head: int) -> None:
    size = model.head_dim
    model.o.weight.data[:, head * size : (head + 1) * size] = 0


def copy_(model: Attention, head: int, of: int) -> None:
    """The same queries and keys, and values times -2."""
    for layer, factor in ((model.q, 1.0), (model.k, 1.0), (model.v, -2.0)):
        for new, old in zip(rows(layer, head, model.head_dim), rows(layer, of, model.head_dim), strict=True):
            new.copy_(factor * old)
    model.table.weight.data[:, head] = model.table.weight.data[:, of]


@pytest.mark.parametrize("way", WAYS)
def test_null_heads_and_copies_go(way: str) -> None:
    wide = block(Attention(WAYS[way], size=4))
    null_(wide.attention, 1)
    copy_(wide.attention, 3, 0)
    narrow = ep.reduce(wide, X).model
    same(wide, narrow)
    got = narrow.attention
    assert [tuple(getattr(got, name).weight.shape) for name in "qkvo"] == [(8, 12)] * 3 + [(12, 8)]
    assert (got.num_heads, got.num_kv_heads, got.head_dim, got.n_rep) == (2, 2, 4, 1)
    assert (got.q.out_features, got.o.in_features) == (8, 8)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "bias by distance"])
def test_heads_that_are_nearly_copies_stay(way: str) -> None:
    wide = block(Attention(WAYS[way], size=4))
    copy_(wide.attention, 3, 0)
    wide.attention.q.weight.data[12, 0] += 1e-6
    result = ep.reduce(wide, X)
    assert result.model.attention.q.out_features == 16
    other = block(Attention(WAYS[way], size=4))
    copy_(other.attention, 3, 0)
    for part in rows(other.attention.v, 3, 4):  # the same weights, of other values
        part.normal_()
    assert ep.reduce(other, X).model.attention.v.out_features == 16


@pytest.mark.parametrize("way", WAYS)
def test_a_random_block_stays_as_it_is(way: str) -> None:
    wide = block(Attention(WAYS[way], size=4))
    result = ep.reduce(wide, X)
    assert not result.plan.rounds
    layers = {name for name, module in wide.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    assert {space.name for space in result.report.spaces} <= layers  # no masks, no lists of places


@pytest.mark.parametrize("way", ["fused", "size of the keys", "fused, causal", "einsum"])
def test_channels_inside_heads(way: str) -> None:
    """One value that is not read, and one product that is null, in every head; the scale is kept."""
    wide = block(Attention(WAYS[way]))
    for head in range(4):
        wide.attention.o.weight.data[:, 3 * head + 1] = 0
        for part in rows(wide.attention.k if head % 2 else wide.attention.q, head, 3):
            part[2] = 0
    narrow = ep.reduce(wide, X).model
    same(wide, narrow)
    assert [getattr(narrow.attention, name).out_features for name in "qkv"] == [8, 8, 8]
    assert (narrow.attention.num_heads, narrow.attention.head_dim) == (4, 2)


def test_ranks_of_queries_with_keys_and_of_values_with_outputs() -> None:
    wide = block(Attention(WAYS["fused"], size=4))
    for head in range(4):
        for layer in (wide.attention.k, wide.attention.v):
            weight, _ = rows(layer, head, 4)
            weight.copy_(torch.randn(4, 2).double() @ torch.randn(2, 12).double())
    result = ep.reduce(wide, X)
    same(wide, result.model)
    assert [getattr(result.model.attention, name).out_features for name in "qkv"] == [8, 8, 8]
    assert "linear" in str(result.report)
    same(wide, result.plan.apply(wide))


def test_the_keys_offset_counts_without_a_softmax_over_the_keys() -> None:
    for way in (lambda q, k, v, m: (q @ k.mT) @ v, lambda q, k, v, m: (q @ k.mT).softmax(-2) @ v):
        wide = block(Attention(way))
        for head in range(4):  # keys that are constants, but not null
            rows(wide.attention.k, head, 3)[0][2] = 0
        result = ep.reduce(wide, X)
        same(wide, result.model)
        assert result.model.attention.k.out_features == 12


def test_a_mask_that_hides_everything_keeps_constant_values() -> None:
    """The fused operator gives zeros for such queries, so that a constant value cannot go to a bias."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Attention(WAYS["fused"]), nn.Linear(12, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            block = self.block
            q, k, v = (part(x).unflatten(-1, (4, 3)).transpose(1, 2) for part in (block.q, block.k, block.v))
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out: Tensor = self.head(block.o(seen.transpose(1, 2).flatten(2)))
            return out

    model = Masked().double().eval()
    for head in range(4):
        rows(model.block.v, head, 3)[0][0] = 0
    x, mask = torch.randn(2, 6, 12).double(), torch.ones(2, 1, 6, 6, dtype=torch.bool)
    narrow = ep.reduce(model, (x, mask)).model
    mask[0, :, 2] = False
    assert not bool(mask[0, 0, 2].any())
    with torch.no_grad():
        assert float((model(x, mask) - narrow(x, mask)).abs().max()) < 1e-10


@pytest.mark.parametrize(("way", "shared"), [("fused, grouped", 2), ("by hand", 2), ("rotary", 2)])
def test_heads_that_share_keys_go_together(way: str, shared: int) -> None:
    wide = block(Attention(WAYS[way], size=4, shared=shared))
    null_(wide.attention, 0)
    assert ep.reduce(wide, X).model.attention.num_heads == 4  # every group keeps equally many
    null_(wide.attention, 1)
    narrow = ep.reduce(wide, X).model
    same(wide, narrow)
    got = narrow.attention
    assert (got.num_heads, got.num_kv_heads, got.n_rep, got.k.out_features) == (2, 1, 2, 4)


@pytest.mark.parametrize("way", ["fused, grouped", "by hand"])
def test_heads_of_one_key(way: str) -> None:
    wide = block(Attention(WAYS[way], size=4, shared=1))
    null_(wide.attention, 2)
    narrow = ep.reduce(wide, X).model
    same(wide, narrow)
    assert (narrow.attention.num_heads, narrow.attention.num_kv_heads) == (3, 1)


@pytest.mark.parametrize("how", ["reshape", "chunk"])
def test_packed_queries_keys_and_values(how: str) -> None:
    wide = block(Packed(how))
    null_(wide.attention, 2)
    for part in (wide.attention.qkv.weight.data.view(3, 4, 3, 12), wide.attention.qkv.bias.data.view(3, 4, 3)):
        part[:, 3] = part[:, 0]
    narrow = ep.reduce(wide, X).model
    same(wide, narrow)
    assert (narrow.attention.qkv.out_features, narrow.attention.num_heads) == (18, 2)


def test_a_head_count_in_the_code_is_rolled_back_and_named() -> None:
    class Literal(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            q = self.attention.q(x).view(len(x), -1, 4, 3).transpose(1, 2)
            out: Tensor = self.head(self.attention.o((q @ q.mT).softmax(-1).matmul(q).transpose(1, 2).flatten(2)))
            return out

    torch.manual_seed(0)
    wide = Literal(Attention(WAYS["fused"])).double().eval()
    null_(wide.attention, 1)
    result = ep.reduce(wide, X)
    assert result.model.attention.q.out_features == 12
    assert "does not follow" in str(result.report)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}, {"bias": False}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_head_attention_is_multihead_attention(
    batch_first: bool, options: dict[str, int], need_weights: bool
) -> None:
    torch.manual_seed(0)
    old = nn.MultiheadAttention(8, 4, batch_first=batch_first, **options).double().eval()
    new = HeadAttention(old)
    query, key, value = (torch.randn(3, 6, size).double() for size in (8, old.kdim, old.vdim))
    length = 6 if batch_first else 3
    hidden = torch.zeros(3 if batch_first else 6, length, dtype=torch.bool)
    hidden[:, -1] = True
    for mask in (None, torch.ones(length, length).triu(1).bool(), torch.randn(length, length).double()):
        for padding in (None, hidden):
            told = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
            if padding is not None and mask is not None and mask.dtype != torch.bool:
                continue
            (a, w), (b, u) = old(query, key, value, **told), new(query, key, value, **told)
            assert torch.allclose(a, b, atol=1e-12)
            assert (w is None and u is None) or torch.allclose(w, u, atol=1e-12)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
        self.inner, self.encoder, self.head = nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.inner(x)))
        return out


def test_multihead_attention_is_kept_or_exchanged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = Encoder().double().eval()
    for parameter in wide.parameters():
        nn.init.normal_(parameter, std=0.5)
    for layer in wide.encoder.layers:
        layer.self_attn.out_proj.weight.data[:, 2:4] = 0
        layer.linear2.weight.data[:, :3] = 0
    before = copy.deepcopy(wide.state_dict())
    kept = ep.reduce(wide, X)
    assert "replace_modules=True" in str(kept.report)
    assert type(kept.model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    result = ep.reduce(wide, X, replace_modules=True)
    same(wide, result.model)
    attention = result.model.encoder.layers[0].self_attn
    assert (attention.num_heads, attention.q_proj.out_features, attention.out_proj.in_features) == (3, 6, 6)
    assert result.model.encoder.layers[1].linear1.out_features == 13
    assert "exchanged" in str(result.report)
    assert all(torch.equal(before[name], now) for name, now in wide.state_dict().items())
    result.plan.save(tmp_path / "plan.safetensors")
    same(wide, ep.Plan.load(tmp_path / "plan.safetensors").apply(wide))
    ep.save(result, tmp_path / "narrow.safetensors")
    same(wide, ep.load(Encoder, tmp_path / "narrow.safetensors").double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    wide = block(Attention(WAYS["fused"], size=4)).to(dtype)
    null_(wide.attention, 1)
    copy_(wide.attention, 3, 0)
    result = ep.reduce(wide, X.to(dtype))
    assert result.model.attention.num_heads == 2
    assert result.verification


def test_a_mask_computed_of_a_table_keeps_constant_values() -> None:
    """At another length it may hide everything from a query: there the fused operator gives zeros."""

    def cut(q: Tensor, k: Tensor, v: Tensor, m: Attention) -> Tensor:
        length = q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m.seen[:length, :length] == 1)

    wide = block(Attention(cut))
    wide.attention.seen[7] = 0
    for head in range(4):
        rows(wide.attention.v, head, 3)[0][0] = 0
    same(wide, ep.reduce(wide, X).model)


class Two(nn.Module):
    """Two attentions that one configuration describes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (block(Attention(WAYS["by hand"], size=4)) for _ in range(2))
        self.back = nn.Linear(3, 5).double()
        self.config = SimpleNamespace(num_attention_heads=4, head_dim=4, other=4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.back(self.one(x)))
        return out


@pytest.mark.parametrize("both", [True, False])
def test_a_configuration_follows_where_it_can_hold_the_counts(both: bool) -> None:
    wide = Two()
    null_(wide.one.attention, 1)
    if both:
        null_(wide.two.attention, 2)
    result = ep.reduce(wide, X)
    same(wide, result.model)
    assert vars(result.model.config) == {"num_attention_heads": 4 - both, "head_dim": 4, "other": 4}
    assert wide.config.num_attention_heads == 4  # the user's own


class OneNumber(nn.Module):
    """A product of matrices that have one channel, and no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 1), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.first(x))
        out: Tensor = self.head((z @ z).squeeze().reshape(1, 1))
        return out


def test_matrices_without_a_batch_are_left_alone() -> None:
    wide, x = OneNumber().double(), torch.ones(1, 5, dtype=torch.float64)
    result = ep.reduce(wide, x)
    assert torch.equal(wide(x), result.model(x))
    assert any("single sample" in why for why in result.report.barriers.values())


def test_the_scale_is_kept_where_the_example_does_not_show_it() -> None:
    """All weight is on one key of the example, whatever the scale."""
    wide = block(Attention(WAYS["size of the keys"], size=4))
    with torch.no_grad():
        for layer in (wide.attention.q, wide.attention.k):
            layer.bias.zero_()
            layer.weight *= 100
            layer.weight.view(4, 4, -1)[:, 3] = 0  # a channel of every head
        wide.attention.o.weight.view(-1, 4, 4)[..., 3] = 0
    narrow = ep.reduce(wide, 10 * X).model
    assert narrow.attention.q.out_features == 12
    x = X * torch.linspace(0, 1e-4, 6, dtype=X.dtype)[:, None]
    with torch.no_grad():
        assert float((wide(x) - narrow(x)).abs().max() / wide(x).abs().max()) <= 1e-10
