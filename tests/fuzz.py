"""Seeded random programs over the registered operators: reduced, widened by `embed`, and reduced again.

`check` takes a program of `fuzz_programs` through

    narrow -> reduce -> base -> embed -> wide -> reduce -> back

and says what is wrong: an output that differs by more than 1e-10 (relative, float64), an error, a second
reduction of `base` that still finds something, or a space of `back` that is wider than that of `base` without a
reason in the report. `shrink` drops operations as long as the program fails in the same way.

    python tests/fuzz.py --seeds 5000 --start 0 --log fuzz-out/log.jsonl      (or: make fuzz SEEDS=5000 START=0)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fuzz_programs import BATCH, UNFIT, Program, build, example, generate, pruned, without
from torch import nn
from tqdm import tqdm

import ep_prune as ep
from ep_prune.widen import KINDS

LIMIT = 1e-10


@dataclass(frozen=True)
class Outcome:
    """`problem`: what is wrong, or "". planted: channels that `embed` added; left: spaces still wider, with the
    reasons of the report; barriers: operators without a rule that were met."""

    problem: str
    detail: str = ""
    planted: int = 0
    left: tuple[str, ...] = ()
    barriers: tuple[str, ...] = ()


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters but biases, which `reduce` may add."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if not name.endswith("bias")}


Draw = Callable[[int], tuple[torch.Tensor, ...]]
"""Inputs by seed."""


def apart(one: nn.Module, two: nn.Module, draw: Draw) -> float:
    """Largest difference of any output, relative to its largest value, on new inputs."""
    worst = 0.0
    for seed in (0, 1):
        x = draw(seed)
        with torch.no_grad():
            for a, b in zip(one(*x), two(*x), strict=True):
                defined = a.isfinite()  # 0 / 0 is the wide model's own affair
                if a.shape != b.shape or not torch.equal(defined, b.isfinite()):
                    return math.inf
                if bool(defined.any()):
                    a, b = a[defined], b[defined]
                    worst = max(worst, float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30))
    return worst


def check(program: Program) -> Outcome:
    """Take one program through the round trip."""
    return guarded(lambda: _checked(program))


def guarded(test: Callable[[], Outcome]) -> Outcome:
    """The outcome, or the crash as one."""
    try:
        return test()
    except Exception as error:  # whatever goes wrong is a finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"
        return Outcome(f"crash: {kind}", str(error))


def _checked(program: Program) -> Outcome:
    narrow, _ = build(program)
    return checked(narrow, lambda seed: (example(program, BATCH, seed),), program.seed)


def checked(narrow: nn.Module, draw: Draw, seed: int) -> Outcome:
    """Take one network, which returns a tuple of tensors, through the round trip."""
    x = draw(0)
    first = ep.reduce(narrow, x, verify_result=False, progress=False)
    base = first.model
    if (change := apart(narrow, base, draw)) > LIMIT:
        return Outcome("wrong output of reduce", f"{change:.1e}")
    kind, critical = KINDS[seed % 4], seed // 4 % 2 == 0
    critical = critical and kind != "compatible"
    wide = ep.embed(base, x, kind=kind, critical=critical, factor=2.0, seed=seed)
    if (change := apart(base, wide, draw)) > LIMIT:
        return Outcome("wrong output of embed", f"{change:.1e}")
    planted = sum(math.prod(s) for s in widths(wide).values()) - sum(math.prod(s) for s in widths(base).values())
    second = ep.reduce(wide, x, verify_result=False, progress=False)
    back = second.model
    if (change := apart(base, back, draw)) > LIMIT:
        return Outcome("wrong output of reduce after embed", f"{change:.1e}")
    barriers = tuple(sorted({why for why in second.report.barriers.values()}))
    wanted, found = widths(base), widths(back)
    larger = [name for name in wanted if math.prod(found[name]) > math.prod(wanted[name])]
    smaller = [name for name in wanted if math.prod(found[name]) < math.prod(wanted[name])]
    if smaller and not larger:
        return Outcome(
            "the first reduction was not the narrowest", f"{[(n, wanted[n], found[n]) for n in smaller]}"
        )
    left, unexplained = [], []
    by_name = {space.name: space for space in first.report.spaces}
    for space in second.report.spaces:
        before = by_name[space.name].after if space.name in by_name else 0
        if space.after > before:
            named = {why: count for why, count in space.stayed.items() if why != "distinct and read"}
            distinct = space.stayed.get("distinct and read", 0)
            known = by_name[space.name].stayed.get("distinct and read", 0) if space.name in by_name else 0
            text = f"{space.name} {before} -> {space.before} -> {space.after}: {space.stayed}"
            (left if named and distinct <= known else unexplained).append(text)
    if larger and not left and not unexplained:
        unexplained = [f"{name} {wanted[name]} -> {found[name]}, in no space of the report" for name in larger]
    if unexplained:
        return Outcome("unexplained miss", "; ".join(unexplained), planted, tuple(left), barriers)
    return Outcome("", "", planted, tuple(left), barriers)


def shrink(program: Program, outcome: Outcome, test: Callable[[Program], Outcome] = check) -> Program:
    """The smallest program found that has the same problem, by dropping operations and outputs one by one."""
    while True:
        smaller = [without(program, place) for place in range(len(program.ops), 0, -1) if len(program.ops) > 1]
        if len(program.outputs) > 1:
            smaller += [pruned(replace(program, outputs=(output,))) for output in program.outputs]
        for candidate in smaller:
            try:
                build(candidate)
            except UNFIT:
                continue
            if test(candidate).problem == outcome.problem:
                program = candidate
                break
        else:
            return program


def main() -> int:
    """Run seeds, append one line for each to the log, go on behind the last one there; 1 if any failed."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seeds", type=int, default=5000)
    options.add_argument("--start", type=int, default=0)
    options.add_argument("--log", type=Path, default=Path("fuzz-out/log.jsonl"))
    options.add_argument("--no-shrink", action="store_true")
    asked = options.parse_args()
    torch.set_num_threads(1)
    asked.log.parent.mkdir(parents=True, exist_ok=True)
    lines = asked.log.read_text().splitlines() if asked.log.exists() else []
    done = {entry["seed"]: entry for entry in map(json.loads, lines)}
    span = range(asked.start, asked.start + asked.seeds)
    for seed in tqdm([seed for seed in span if seed not in done], disable=None):
        program = generate(seed)
        outcome = check(program)
        done[seed] = {"seed": seed, "problem": outcome.problem, "detail": outcome.detail, "left": outcome.left,
                      "planted": outcome.planted}  # fmt: skip
        with asked.log.open("a") as log:
            log.write(json.dumps(done[seed]) + "\n")
        if outcome.problem:
            small = program if asked.no_shrink else shrink(program, outcome)
            tqdm.write(f"seed {seed}: {outcome.problem}: {outcome.detail}\n{small.code()}\n")
    problems = Counter(done[seed]["problem"].split(":")[0] or "none" for seed in span)
    planted = sum(done[seed]["planted"] > 0 for seed in span)
    print(f"seeds {span.start} to {span.stop - 1}: {dict(problems)}; redundancy planted in {planted}, ", end="")
    print(f"spaces left wider with a reason in {sum(bool(done[seed]['left']) for seed in span)}")
    return int(set(problems) != {"none"})


if __name__ == "__main__":
    sys.exit(main())
