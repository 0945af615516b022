"""The fuzzer's programs in CI, and the fuzzer itself: it is seeded, finds planted faults, and shrinks them.

EP_PRUNE_FUZZ says how many seeds to run (acceptance: `make fuzz`, 5,000).
"""

from __future__ import annotations

import os

import fuzz
import pytest
import torch
from fuzz import Outcome, check, shrink
from fuzz_programs import ACTIVATIONS, CONVS, LAYERS, MOVES, POOLS, Op, Program, build, generate

SEEDS = int(os.environ.get("EP_PRUNE_FUZZ", "200"))
CHUNK = 20


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_programs_come_back_to_their_widths_with_equal_outputs(start: int) -> None:
    failed = {seed: check(generate(seed)) for seed in range(start, min(start + CHUNK, SEEDS))}
    bad = [(generate(seed).code(), outcome.problem) for seed, outcome in failed.items() if outcome.problem]
    assert not bad, f"python tests/fuzz.py --start N --seeds 1 shrinks these: {bad}"


def test_a_seed_is_a_program() -> None:
    assert generate(11) == generate(11)
    assert len({generate(seed).code() for seed in range(40)}) == 40
    net, x = build(generate(11))
    again, y = build(generate(11))
    assert all(torch.equal(a, b) for a, b in zip(net(x), again(y), strict=True))


def test_code_makes_the_program() -> None:
    program = generate(3)
    assert eval(program.code(), {"Program": Program, "Op": Op}) == program


def test_programs_draw_all_operations() -> None:
    drawn = [op for seed in range(600) for op in generate(seed).ops]
    assert {op.name for op in drawn} >= {*LAYERS, "act", "pool", "move", "join", "cat", "mean", "scale"}
    assert {op.setting for op in drawn if op.name == "conv"} == set(CONVS)
    assert {op.setting for op in drawn if op.name == "move"} == set(MOVES)
    assert {op.setting for op in drawn if op.name == "pool"} >= set(POOLS) - {"avg", "max"}
    assert {op.setting for op in drawn if op.name == "act"} == set(ACTIVATIONS)
    assert any(op.like > 0 for op in drawn), "no layer is called twice"


def test_shrinking_drops_what_the_failure_does_not_need() -> None:
    def spoilt(program: Program) -> Outcome:
        return Outcome("bad" if any(op.setting == "tanh" for op in program.ops) else "")

    seed = next(s for s in range(100) if len(generate(s).ops) > 6 and spoilt(generate(s)).problem)
    small = shrink(generate(seed), spoilt(generate(seed)), spoilt)
    assert len(small.ops) == 1 and small.ops[0].setting == "tanh"


def test_a_wrong_narrow_model_is_found(monkeypatch) -> None:
    reduce = fuzz.ep.reduce

    def off(model, *args, **options):
        result = reduce(model, *args, **options)
        with torch.no_grad():
            next(p for p in result.model.parameters() if p.ndim > 1).mul_(1 + 1e-6)
        return result

    monkeypatch.setattr(fuzz.ep, "reduce", off)
    assert check(generate(3)).problem == "wrong output of reduce"
