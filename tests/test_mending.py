"""Operands of different rank, tables read at fixed places, and other shapes in which networks add up tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import ep_prune as ep
from tests.planted import randomize_, relative

F64 = torch.float64


class Added(nn.Module):
    """relu(one(x) + two(y)), read by a head; x and y may have different ranks and batches of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.relu(self.one(x) + self.two(y)))


def added() -> Added:
    """Six channels in the stream, of which 0, 1 and 4 are needed: 2 = 2 * 0, 3 = 1, 5 is read by nobody."""
    model = Added()
    randomize_(model)
    with torch.no_grad():
        for layer in (model.one, model.two):
            for part in (layer.weight, layer.bias):
                part[2], part[3] = 2 * part[0], part[1]
        model.head.weight[:, 5] = 0
    return model


_SHAPES = ((2, 5, 3), (5, 3), (1, 5, 3), (2, 1, 3), (3,), (1, 3), (2, 1, 5, 3))


@pytest.mark.parametrize("one, two", [pair for pair in itertools.permutations(_SHAPES, 2) if len(pair[0]) > 1])
def test_operands_of_different_rank(one: tuple[int, ...], two: tuple[int, ...]) -> None:
    model = added()
    inputs = (torch.randn(one, dtype=F64), torch.randn(two, dtype=F64))
    result = ep.reduce(model, inputs)
    assert result.model.head.in_features == 3
    assert relative(model(*inputs), result.model(*inputs)) < 1e-12
