"""`compress`: narrower than exact, to a budget, by least squares on a few unlabelled inputs; no fine-tuning.

    reduce         what is exact goes first, and is free
    calibrate      chunks of inputs; some are held out, and only measured on
    rehearse       every space is narrowed by one channel and the narrow model run: where sizes are written into
                   the code, the space is named and left alone
    measure        covariances, importances, and for every space the divergence over its width (`curves`)
    allocate       a path of widths down to the budget (`budget`)
    fit            all weights of the narrow network, front to back, to what the wide one computes (`fitting`), on
                   copies of the inputs, too, where they are images that it answers alike (`augment`)
    check          the narrow model against the same function in wide shapes, and against the wide model on
                   held-out inputs; what has collapsed is said

The grade of claim is *fitted*: the error is measured and reported, not bounded.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ep_prune.budget import Asked, Path
from ep_prune.calibrate import SAMPLES
from ep_prune.compress_report import CompressReport
from ep_prune.cost import Cost
from ep_prune.errors import InputError
from ep_prune.latency import latency_of
from ep_prune.narrowing import Held, Work
from ep_prune.pipeline import Result, reduce
from ep_prune.plan import Plan, with_modes_of
from ep_prune.trace import prepare, random_state_kept, run

TRIALS = 10
"""Fits that a measured budget may take; with the wide and the reduced model, 12 evaluations."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` returns. `reduced`: the exact part, as `reduce` gives it."""

    model: nn.Module
    plan: Plan
    report: CompressReport
    reduced: Result


def compress(
    model: nn.Module,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
    *,
    keep_macs: float | None = None,
    keep_params: float | None = None,
    latency: float | None = None,
    tol: float | None = None,
    max_drop: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    round_to: int = 1,
    protect: Sequence[str] = (),
    min_width: int | Mapping[str, int] = 1,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: bool | None = None,
    replace_modules: bool = False,
    fold_batch_norm: bool = False,
    resume: str | FilePath | None = None,
) -> Compressed:
    """Narrow a trained model to a budget and refit what reads the channels that stay. No labels, no training.

    Args:
        model: any `nn.Module` that torch.export takes. It is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as the model takes them.
        calibration: batches like example_inputs, or a loader of (inputs, labels), whose labels are not read; None:
            seeded synthetic inputs with the moments that batch norm recorded.
        keep_macs, keep_params: what may stay of multiply-accumulates, of parameters: a share of the given model's
            (up to 1), or an absolute number (above 1).
        latency: milliseconds that one call on example_inputs may take here, measured.
        tol: the largest change of any output that is accepted on held-out calibration inputs, relative to that
            output's largest absolute value.
        max_drop, evaluate: the narrowest model for which evaluate(model), higher is better, drops by no more than
            max_drop; at most 12 evaluations.
        round_to: widths become multiples of this (what is not narrowed keeps its width).
        protect: names of layers whose channels all stay.
        min_width: the least that any space, or a space by its name, may keep. 0 lets a residual branch go as a
            whole, where it alone makes up its module: what is left of that is `ep_prune.modules.Shift`.
        samples: calibration samples used, at most.
        seed: of samples, rows and probes.
        progress: show a progress bar; by default on a terminal only.
        replace_modules: exchange modules that cannot hold fewer heads, as `reduce` does; without it, they are kept
            and named.
        fold_batch_norm: fold every batch norm, an affine map at inference, into the layer before it, and leave
            `nn.Identity` in its place: the same function, faster, and no longer for training.
        resume: a file in which what is measured is kept as it comes. A run that was interrupted goes on from it,
            and one with another budget, for the same model, samples and seed, measures nothing anew.

    Raises:
        InputError: the model, the inputs or the budget cannot be used; a budget that cannot be met names the least
            that can be reached.
        TraceError: the model cannot be exported.
        VerificationError: the narrow model is not the function that was fitted.
    """
    asked = Asked(keep_macs, keep_params, latency, tol, max_drop, evaluate, round_to)
    start = time.perf_counter()
    with random_state_kept(), _plain_arithmetic():
        wide, notes = prepare(model, replace_modules)
        run(wide, example_inputs)
        bar = tqdm(total=None, desc="compress", disable=None if progress is None else not progress, leave=False)
        with bar:
            bar.set_postfix_str("reducing")
            reduced = reduce(wide, example_inputs, protect=protect, seed=seed, verify_result=False, progress=False)
            reduced = replace(reduced, plan=replace(reduced.plan, replace_modules=replace_modules))
            work = Work.of(wide, reduced, example_inputs, calibration, protect, samples, seed, bar, notes)
            if fold_batch_norm:
                work.fold_norms()
            least = min_width if isinstance(min_width, Mapping) else None
            work.allow_branches(lambda name: (min_width if least is None else least.get(name, 1)) == 0)
            work.resume = None if resume is None else FilePath(resume)
            path = work.path(asked, round_to, min_width)
            state = _chosen(work, path, asked)
            narrow, plan, held = work.narrow(path, state)
        report = work.report(narrow, plan, held, asked, time.perf_counter() - start)
    return Compressed(with_modes_of(model, narrow), plan, report, reduced)


@contextlib.contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """Gradients can be taken, and nothing is cast, whatever the caller is in the middle of."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _chosen(work: Work, path: Path, asked: Asked) -> Tensor:
    """The place on the path that all budgets allow."""
    if not asked.measured:
        return path.states[-1]
    reference = None
    if asked.evaluate is not None:
        reference = _figure(work, asked.evaluate, work.wide)
    counted = len(path.states) - 1 if asked.keep_macs is not None or asked.keep_params is not None else 0

    def good(state: Tensor) -> bool:
        narrow, _, held = work.narrow(path, state)
        if asked.latency is not None and latency_of(narrow, work.example) > asked.latency:
            return False
        return _faithful(work, asked, narrow, held, reference)

    if asked.latency is not None:  # the widest that is fast enough, if the other budgets allow it
        return _fast_enough(work, path, asked, good)
    if counted:  # the end of the path is the widest model of the counted budgets: it alone is in question
        if good(path.states[-1]):
            return path.states[-1]
        raise InputError("the budgets cannot be met together: allow a larger max_drop or tol, or keep more")
    found = path.search(good, TRIALS)
    if found is not None:
        return found
    if asked.max_drop is None or good(path.states[0]):
        return path.states[0]
    raise InputError(f"max_drop={asked.max_drop} cannot be met: the exactly reduced model drops by more already")


def _faithful(work: Work, asked: Asked, narrow: nn.Module, held: Held, reference: float | None) -> bool:
    if asked.tol is not None and held.change > asked.tol:
        return False
    if asked.evaluate is not None and asked.max_drop is not None and reference is not None:
        return reference - _figure(work, asked.evaluate, narrow) <= asked.max_drop
    return True


def _figure(work: Work, evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """What the user's `evaluate` says of a copy of a model."""
    work.evaluations += 1
    found = evaluate(copy.deepcopy(model))
    try:
        figure = float(found)
    except (TypeError, ValueError):
        figure = math.nan
    if math.isnan(figure):
        raise InputError(f"evaluate(model) gave {found!r}: let it return a number, higher for a better model")
    return figure


def _fast_enough(work: Work, path: Path, asked: Asked, good: Callable[[Tensor], bool]) -> Tensor:
    assert asked.latency is not None

    def too_slow(state: Tensor) -> bool:
        return latency_of(work.sketch(path.kept(state)), work.example) > asked.latency  # type: ignore[operator]

    last_slow = path.search(too_slow, 12)
    place = 0 if last_slow is None else next(k for k, s in enumerate(path.states) if torch.equal(s, last_slow)) + 1
    for state in path.states[place : place + 4]:  # what was fitted is measured itself
        if good(state):
            return state
    if place >= len(path.states):
        fastest = path.states[-1]
        narrow, _, _ = work.narrow(path, fastest)
        raise InputError(
            f"latency={asked.latency:g} ms cannot be met: the narrowest model takes "
            f"{latency_of(narrow, work.example):.3g} ms here"
        )
    raise InputError("the budgets cannot be met together: allow a larger latency, max_drop or tol")


__all__ = ["Compressed", "Cost", "compress", "latency_of"]
