"""Embed, then reduce, and get the narrow network back: the strongest test that the program has.

EP_PRUNE_ROUND_TRIPS says how many seeds to run (acceptance: 500); 49 consecutive ones cover seven families and
seven activations. EP_PRUNE_ROUND_TRIPS_OF_ALL_KINDS does so for the round trip of every kind, and back.
"""

from __future__ import annotations

import os

import pytest
import torch
from families import ACTIVATIONS, FAMILIES, network
from torch import nn

import ep_prune as ep
from ep_prune.widen import KINDS, embed, widenable

SEEDS = int(os.environ.get("EP_PRUNE_ROUND_TRIPS", "49"))
KINDS_SEEDS = int(os.environ.get("EP_PRUNE_ROUND_TRIPS_OF_ALL_KINDS", "28"))
ALL_KINDS = [(kind, critical) for critical in (True, False) for kind in KINDS]


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
    wide = embed(narrow, inputs, critical=False, seed=seed)
    assert type(wide) is type(narrow)
    assert difference(wide, narrow, inputs) <= 1e-12, description
    assert_every_space_is_wider(narrow, wide, inputs)

    result = ep.reduce(wide, inputs)

    assert shapes(result.model) == shapes(narrow), description
    assert difference(result.model, narrow, inputs) <= 1e-10, description


@pytest.mark.parametrize("seed", range(KINDS_SEEDS))
def test_reduce_undoes_every_kind_and_embed_with_its_plan_undoes_reduce(seed: int) -> None:
    narrow, inputs, description = network(seed)
    kind, critical = ALL_KINDS[seed % len(ALL_KINDS)]
    wide, report = embed(narrow, inputs, kind=kind, critical=critical, seed=seed, full_output=True)
    description = f"{description}, {kind}, critical {critical}"
    assert difference(wide, narrow, inputs) <= 1e-12, description
    if not report.left_alone:
        assert_every_space_is_wider(narrow, wide, inputs)

    result = ep.reduce(wide, inputs)
    assert shapes(result.model) == shapes(narrow), description
    assert difference(result.model, narrow, inputs) <= 1e-10, description
    if report.left_alone.keys() == widenable(narrow, inputs).keys():
        # Behind sigmoid and zero padding no null is critical.
        assert (kind, critical) == ("null", True) and "sigmoid" in description, description
        assert shapes(wide) == shapes(narrow) and not result.plan.rounds, description
        return

    again = embed(result.model, inputs, plan=result.plan)
    assert shapes(again) == shapes(wide), description
    assert difference(again, wide, inputs) <= 1e-10, description
    # The plan's own embeddings hold in it: applied to it, they give the same narrow weights.
    narrowed = result.plan.apply(again, recheck=inputs).state_dict()
    assert all(
        float((narrowed[name] - tensor).abs().max()) <= 1e-10 for name, tensor in result.model.state_dict().items()
    ), description


def assert_every_space_is_wider(narrow: nn.Module, wide: nn.Module, inputs: torch.Tensor) -> None:
    before, after = widenable(narrow, inputs), widenable(wide, inputs)
    assert before.keys() == after.keys()
    assert before and all(after[space] > width for space, width in before.items())


@pytest.mark.parametrize("seed", range(49))
def test_the_narrow_networks_are_irreducible(seed: int) -> None:
    narrow, inputs, description = network(seed)
    assert shapes(ep.reduce(narrow, inputs, verify_result=False).model) == shapes(narrow), description


def test_seeds_cover_all_families_and_activations() -> None:
    found = {tuple(network(seed)[2].split(",")[0].split(" with ")) for seed in range(49)}
    assert found == {(family, activation) for family in FAMILIES for activation in ACTIVATIONS}
