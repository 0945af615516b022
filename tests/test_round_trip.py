"""Embed, then reduce, and get the narrow network back: the strongest test that the program has.

EP_PRUNE_ROUND_TRIPS says how many seeds to run (acceptance: 500); 35 consecutive ones cover five families and
seven activations.
"""

from __future__ import annotations

import os

import pytest
import torch
from families import ACTIVATIONS, FAMILIES, network
from torch import nn

import ep_prune as ep
from ep_prune.errors import InputError
from ep_prune.widen import KINDS, embed, widenable

SEEDS = int(os.environ.get("EP_PRUNE_ROUND_TRIPS", "70"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def difference(a: nn.Module, b: nn.Module, inputs: torch.Tensor) -> float:
    """Largest difference of the outputs, relative to the largest output of `b`."""
    with torch.no_grad():
        wanted = b(inputs)
        return float((a(inputs) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("seed", range(SEEDS))
def test_reduce_undoes_a_general_compatible_embedding(seed: int) -> None:
    narrow, inputs, description = network(seed)
    wide = embed(narrow, inputs, seed=seed)
    assert type(wide) is type(narrow)
    assert difference(wide, narrow, inputs) <= 1e-12, description
    before, after = widenable(narrow, inputs), shapes(wide)
    assert all(after[f"{space}.weight"][0] > width for space, width in before.items()), description

    result = ep.reduce(wide, inputs)

    assert shapes(result.model) == shapes(narrow), description
    assert difference(result.model, narrow, inputs) <= 1e-10, description


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 16, 17, 18, 19])
def test_every_kind_of_embedding_keeps_the_function(seed: int, kind: str) -> None:
    narrow, inputs, _ = network(seed)
    wide = embed(narrow, inputs, kind=kind, factor=2.0, seed=seed)
    assert difference(wide, narrow, inputs) <= 1e-12
    assert sum(p.numel() for p in wide.parameters()) > 2 * sum(p.numel() for p in narrow.parameters())


@pytest.mark.parametrize("seed", range(35))
def test_the_narrow_networks_are_irreducible(seed: int) -> None:
    narrow, inputs, description = network(seed)
    assert shapes(ep.reduce(narrow, inputs).model) == shapes(narrow), description


def test_seeds_cover_all_families_and_activations() -> None:
    found = {tuple(network(seed)[2].split(",")[0].split(" with ")) for seed in range(35)}
    assert found == {(family, activation) for family in FAMILIES for activation in ACTIVATIONS}


def test_widths_name_the_spaces_to_widen() -> None:
    narrow = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)
    assert widenable(narrow, inputs) == {"0": 4, "2": 4}
    wide = embed(narrow, inputs, widths={"2": 9})
    assert isinstance(wide, nn.Sequential)
    assert [wide[k].weight.shape for k in (0, 2, 4)] == [(4, 3), (9, 4), (2, 9)]
    assert [wide[2].out_features, wide[4].in_features] == [9, 9]
    assert difference(wide, narrow, inputs) <= 1e-12
    with pytest.raises(InputError, match="'4'"):
        embed(narrow, inputs, widths={"4": 9})
    with pytest.raises(InputError, match="'2' has 4 channels"):
        embed(narrow, inputs, widths={"2": 3})
    with pytest.raises(InputError, match="no embedding of kind"):
        embed(narrow, inputs, kind="wider")
    with pytest.raises(InputError, match="does not widen"):
        embed(narrow, inputs, factor=0.5)


def test_the_same_seed_gives_the_same_network_and_leaves_the_model_and_the_random_state() -> None:
    narrow, inputs, _ = network(2)
    narrow.train()
    kept, state = {k: v.clone() for k, v in narrow.state_dict().items()}, torch.get_rng_state()
    one, same, other = (embed(narrow, inputs, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(kept[k], v) for k, v in narrow.state_dict().items())
    assert narrow.training and embed(narrow, inputs).training
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_pinned_grouped_and_shared_channels_are_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.mix = nn.Conv2d(4, 4, 1)
            self.twice = nn.Conv2d(4, 4, 1)
            self.free = nn.Conv2d(4, 3, 1)
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.mix(self.grouped(self.stem(x).relu()).relu()).relu()
            z: torch.Tensor = self.head(self.free(self.twice(self.twice(y).relu()).relu()).relu())
            return z

    model, inputs = Shared().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert widenable(model, inputs) == {"free": 3}
    wide = embed(model, inputs)
    assert isinstance(wide, Shared)
    assert wide.free.weight.shape == (4, 4, 1, 1)
    assert difference(wide, model, inputs) <= 1e-12
