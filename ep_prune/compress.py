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
from ep_prune.compress_report import CompressReport, Width
from ep_prune.cost import Cost, cost
from ep_prune.errors import InputError
from ep_prune.latency import latency_of
from ep_prune.memory import peak_memory_of
from ep_prune.modules import Constant
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
            whole, where it, or it and the sum, make up a module: `ep_prune.modules.Constant` or `Shift` is left.
        samples: calibration samples used, at most.
        seed: of samples, rows and probes.
        progress: show a progress bar; by default on a terminal only.
        replace_modules: exchange modules that cannot hold fewer heads, as `reduce` does; without it, they are kept
            and named.
        fold_batch_norm: fold every batch norm, an affine map at inference, into the layer before it, and leave
            `nn.Identity` in its place: the same function, faster, and no longer for training.
        resume: a file in which what is measured is kept as it comes. A run that was interrupted goes on from it,
            and one with another budget, for the same model, samples and seed, measures nothing anew (but with
            min_width=0 where it was not).

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
            if isinstance(min_width, Mapping) and 0 in min_width.values():
                work.allow_branches(lambda name: min_width.get(name) == 0)
            elif min_width == 0:
                work.allow_branches(lambda _: True)
            work.resume = None if resume is None else FilePath(resume)
            path = work.path(asked, round_to, min_width)
            state = _chosen(work, path, asked)
            narrow, plan, held = work.narrow(path, state)
        report = _report(work, narrow, plan, held, asked, time.perf_counter() - start)
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

    if asked.latency is not None:
        return _fast_enough(work, path, asked, asked.latency, reference)

    def good(state: Tensor) -> bool:
        narrow, _, held = work.narrow(path, state)
        return _faithful(work, asked, narrow, held, reference)

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


def _fast_enough(work: Work, path: Path, asked: Asked, limit: float, reference: float | None) -> Tensor:
    """About the widest that takes no more than `limit` milliseconds, if the other budgets allow it."""

    def slow(model: nn.Module) -> bool:  # twice: whatever else the machine does only makes calls slower
        return latency_of(model, work.example) > limit and latency_of(model, work.example) > limit

    last_slow = path.search(lambda state: slow(work.sketch(path.kept(state))), 12)
    place = 0 if last_slow is None else next(k for k, s in enumerate(path.states) if torch.equal(s, last_slow)) + 1
    last = len(path.states) - 1
    for k in sorted({min(place + 2**step - 1, last) for step in range(last.bit_length() + 1)}):
        state: Tensor = path.states[k]
        if k > place and slow(work.sketch(path.kept(state))):
            continue
        narrow, _, held = work.narrow(path, state)  # what was fitted is measured itself
        if slow(narrow):
            continue
        if _faithful(work, asked, narrow, held, reference):
            return state
        raise InputError("the budgets cannot be met together: allow a larger latency, max_drop or tol")
    taken = latency_of(work.narrow(path, path.states[-1])[0], work.example)
    raise InputError(f"latency={limit:g} ms cannot be met: the narrowest model takes {taken:.3g} ms here")


def _report(work: Work, narrow: nn.Module, plan: Plan, held: Held, asked: Asked, seconds: float) -> CompressReport:
    after = cost(narrow, work.example)
    widths = []
    for record in work.reduced.report.spaces:
        widths.append(Width(record.name, record.before, _width_now(narrow, record.producers, record.after)))
    notes = list(work.notes)
    before = {name for name, module in work.wide.named_modules() if isinstance(module, Constant)}
    left = (name for name, module in narrow.named_modules() if isinstance(module, Constant))
    if gone := [name for name in left if name not in before]:
        notes.append(f"residual branches taken out whole: {len(gone)} ({', '.join(gone)})")
    if work.folds:
        stay = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in narrow.modules())
        notes.append(
            f"{len(plan.norms)} batch norms folded into the layers before them"
            + (f"; {stay} stay: no plain layer before them that nothing else reads" if stay else "")
        )
    return CompressReport(
        budget=str(asked),
        widths=tuple(widths),
        before=work.before,
        reduced=work.base,
        after=after,
        divergence=held.divergence,
        agreement=held.agreement,
        change=held.change,
        path=work.course,
        trials=tuple(work.trials),
        errors=dict(held.errors),
        samples_given=work.samples.given,
        samples_used=work.samples.used,
        evaluations=work.evaluations,
        latency_before=latency_of(work.wide, work.example),
        latency_after=latency_of(narrow, work.example),
        memory_before=peak_memory_of(work.wide, work.example),
        memory_after=peak_memory_of(narrow, work.example),
        untouched=dict(work.structure.untouched),
        barriers=dict(work.reduced.report.barriers),
        notes=tuple(notes),
        seconds=seconds,
    )


def _width_now(narrow: nn.Module, producers: Sequence[str], otherwise: int) -> int:
    tensors = dict(narrow.named_parameters(remove_duplicate=False))
    modules = dict(narrow.named_modules(remove_duplicate=False))
    found = []
    for name in producers:
        if name.rpartition(".")[0] not in modules:  # a branch that went
            otherwise = 0
            continue
        module = narrow.get_submodule(name.rpartition(".")[0]) if name.rpartition(".")[0] else narrow
        if name in tensors:
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                found.append(module.out_channels)
            elif isinstance(module, nn.RNNBase):
                found.append(module.proj_size if "weight_hr_" in name else module.hidden_size)
            else:
                found.append(tensors[name].shape[int(isinstance(module, nn.Embedding))])
    return max(found, default=otherwise)


__all__ = ["Compressed", "Cost", "compress", "latency_of"]
