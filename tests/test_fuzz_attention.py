"""Random attention blocks in CI. EP_PRUNE_FUZZ_ATTENTION says how many seeds (acceptance: 300)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import ep_prune as ep
from tests import fuzz_attention
from tests.fuzz_attention import CORES, LAYOUTS, build, check, generate

SEEDS = int(os.environ.get("EP_PRUNE_FUZZ_ATTENTION", "12"))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_planted_minimum_is_reached(seed: int) -> None:
    assert not check(generate(seed))


def test_seeds_draw_everything_and_are_the_same_again() -> None:
    cases = [generate(seed) for seed in range(300)]
    assert {case.core for case in cases} == set(CORES) and {case.layout for case in cases} == set(LAYOUTS)
    assert {what for case in cases for what in (*case.groups, *case.heads)} == {"own", "null", "copy"}
    assert any(case.memory for case in cases) and any(case.padding for case in cases)
    (one, x), (two, y) = build(cases[5]), build(generate(5))
    with torch.no_grad():
        assert torch.equal(one(*x), two(*y))


def test_what_is_wrong_or_too_wide_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce = ep.reduce

    def off(model: Any, inputs: Any, **options: Any) -> Any:
        result = reduce(model, inputs, **options)
        with torch.no_grad():
            result.model.attention.o.weight.mul_(1 + 1e-6)
        return result

    seed = next(seed for seed in range(100) if "null" in generate(seed).groups)
    monkeypatch.setattr(fuzz_attention.ep, "reduce", off)
    assert check(generate(seed)).startswith("wrong output")
    monkeypatch.setattr(fuzz_attention.ep, "reduce", lambda *a, **k: reduce(*a, **k, protect=["attention"]))
    assert check(generate(seed)).startswith("not the narrowest")
