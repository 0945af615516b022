"""Residual streams under norms that see all channels: zero channels, copies and equal multiplicities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ep_prune as ep
from tests.planted import randomize_, relative

F64 = torch.float64
WIDTH, HIDDEN = 8, 6


class ByHand(nn.Module):
    """RMS norm as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        x = x.to(torch.promote_types(torch.float32, kind))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)
        return self.weight * x.to(kind)


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Stream(nn.Module):
    """Tokens and positions, two gated blocks, a norm, a head; `straight` also reads the stream without a norm."""

    def __init__(self, norm: Callable[[int], nn.Module], tied: bool = False) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(11, WIDTH), nn.Parameter(torch.zeros(5, WIDTH))
        self.one, self.two, self.norm = Block(norm), Block(norm), norm(WIDTH)
        self.straight, self.head = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.two(self.one(self.token(x) + self.place))
        return self.head(self.norm(z)), self.straight(z)

    def written(self) -> list[Tensor]:
        """All that is added up in the stream, (..., WIDTH)."""
        parts = [self.token.weight, self.place]
        for block in (self.one, self.two):
            parts += [block.down.weight.T, block.down.bias]
        return parts


def planted(norm: Callable[[int], nn.Module], copies: dict[int, tuple[int, float]], tied: bool = False) -> Stream:
    """copies: channel -> (of which, times what)."""
    model = Stream(norm, tied)
    randomize_(model)
    with torch.no_grad():
        for part in model.written():
            for channel, (other, ratio) in copies.items():
                part[..., channel] = ratio * part[..., other]
    return model


TOKENS = torch.tensor([[1, 5, 2, 7, 10], [0, 3, 3, 9, 4]])
RMS = [lambda width: nn.RMSNorm(width, eps=1e-2), ByHand]


@pytest.mark.parametrize("norm", RMS)
@pytest.mark.parametrize(
    "copies", [{2: (0, 0.0)}, {1: (0, 1.0)}, {1: (0, -2.0), 5: (0, 0.5), 3: (4, 0.3), 7: (4, 0.0)}]
)
def test_zero_channels_and_copies_under_rms_norm(
    norm: Callable[[int], nn.Module], copies: dict[int, tuple[int, float]]
) -> None:
    model = planted(norm, copies)
    result = ep.reduce(model, TOKENS)
    narrow = result.model
    assert narrow.token.embedding_dim == narrow.norm.weight.shape[0] == WIDTH - len(copies)
    for wide, small in zip(model(TOKENS), narrow(TOKENS), strict=True):
        assert relative(wide, small) < 1e-12
    again = result.plan.apply(model)  # and through the plan
    assert relative(narrow(TOKENS)[0], again(TOKENS)[0]) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_in_the_models_type(dtype: torch.dtype) -> None:
    model = planted(RMS[0], {2: (0, 0.0), 1: (0, 2.0)}).to(dtype)
    narrow = ep.reduce(model, TOKENS).model
    assert narrow.token.embedding_dim == WIDTH - 2
    bound = 20 * torch.finfo(dtype).eps
    assert relative(model(TOKENS)[0].double(), narrow(TOKENS)[0].double()) < bound


@pytest.mark.parametrize("norm", RMS)
def test_a_tied_head_keeps_the_stream(norm: Callable[[int], nn.Module]) -> None:
    """The table would have to be larger where it writes, and smaller where it reads."""
    model = planted(norm, {2: (0, 0.0)}, tied=True)
    result = ep.reduce(model, TOKENS)
    assert result.model.token.embedding_dim == WIDTH
    why = result.report.spaces[0].stayed
    assert all("RMS norm" in reason for reason in why)


def test_a_new_bias_is_scaled_with_its_layer() -> None:
    """A constant hidden unit goes into a bias that the layer did not have, in the round that scales the layer."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, WIDTH, bias=False)
            self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.down(torch.relu(self.up(x)))))

    model = Small()
    randomize_(model)
    with torch.no_grad():
        model.up.weight[2], model.up.bias[2] = 0, 1.5
        model.down.weight[1], model.down.weight[4] = -2 * model.down.weight[0], 0
    x = torch.randn(7, 3, dtype=F64)
    result = ep.reduce(model, x)
    narrow = result.model
    assert (narrow.up.out_features, narrow.norm.weight.shape[0]) == (5, WIDTH - 2)
    assert len(result.plan.rounds) == 1
    assert relative(model(x), narrow(x)) < 1e-12


def test_rms_norm_without_a_gain_keeps_the_stream() -> None:
    model = planted(lambda width: nn.RMSNorm(width, elementwise_affine=False), {2: (0, 0.0)})
    assert ep.reduce(model, TOKENS).model.token.embedding_dim == WIDTH


def test_equal_multiplicities_under_layer_norm() -> None:
    model = planted(nn.LayerNorm, {1: (0, 1.0), 3: (2, 1.0), 6: (4, 1.0), 7: (5, 1.0)})
    narrow = ep.reduce(model, TOKENS).model
    assert narrow.token.embedding_dim == WIDTH // 2 == narrow.norm.normalized_shape[0]
    for wide, small in zip(model(TOKENS), narrow(TOKENS), strict=True):
        assert relative(wide, small) < 1e-12


@pytest.mark.parametrize(
    "copies", [{1: (0, 1.0), 3: (2, 1.0), 6: (4, 1.0)}, {1: (0, 2.0), 3: (2, 1.0)}, {2: (0, 0.0)}]
)
def test_unequal_multiplicities_under_layer_norm_stay(copies: dict[int, tuple[int, float]]) -> None:
    model = planted(nn.LayerNorm, copies)
    result = ep.reduce(model, TOKENS)
    assert result.model.token.embedding_dim == WIDTH
    why = result.report.spaces[0].stayed
    assert all("layer norm" in reason for reason in why)


class Image(nn.Module):
    """A mean of squares over the columns of an image: no norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).pow(2).mean(-1).mean(-1))


def test_a_mean_of_squares_over_space_is_none_over_channels() -> None:
    model = Image()
    randomize_(model)
    with torch.no_grad():
        model.conv.weight[3:], model.conv.bias[3:] = 2 * model.conv.weight[:3], 2 * model.conv.bias[:3]
    x = torch.randn(2, 2, 4, 4, dtype=F64)
    narrow = ep.reduce(model, x).model
    assert narrow.conv.out_channels == 3
    assert relative(model(x), narrow(x)) < 1e-12
