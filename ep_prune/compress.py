"""`compress`: narrower than exact, to a budget, by least squares on a few unlabelled inputs; no fine-tuning.

    reduce         what is exact goes first, and is free
    calibrate      chunks of inputs; some are held out, and only measured on
    rehearse       every space is narrowed by one channel and the narrow model run: where sizes are written into the
                   code, the space is named and left alone
    measure        covariances, importances, and for every space the divergence over its width (`fitting.curves`)
    allocate       a path of widths down to the budget (`budget`)
    fit            all weights of the narrow network, front to back, to what the wide one computes (`fitting.fitted`)
    check          the narrow model against the same function in wide shapes, and against the wide model on held-out
                   inputs; what has collapsed is said

The grade of claim is *fitted*: the error is measured and reported, not bounded.
"""

from __future__ import annotations

import copy
import math
import numbers
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from ep_prune.budget import Budget, Path, allowed_widths, descend, excess
from ep_prune.calibrate import CHUNK, SAMPLES, Program, Samples, samples_of
from ep_prune.compress_report import CompressReport, Width
from ep_prune.cost import Cost, cost
from ep_prune.divergence import agreement, classes_seen, divergence
from ep_prune.errors import InputError, VerificationError
from ep_prune.fitting import curves, fitted, importances, moments
from ep_prune.pipeline import Result, protected, reduce
from ep_prune.plan import Plan, fingerprint, with_modes_of
from ep_prune.probes import synthetic_probes
from ep_prune.readers import Structure
from ep_prune.rewrite import apply_round_
from ep_prune.trace import prepare, random_state_kept, run, trace
from ep_prune.trial import largest_good, read_in_training

MEMORY = 3 * 2**30
"""Bytes of activations that calibration may hold; beyond, fewer samples are used, and the report says so."""
IMPORTANCE_CHUNKS = 4
TRIALS = 10
"""Fits that a measured budget may take; with the wide and the reduced model, 12 evaluations."""
SAME = 1e-3
"""Largest relative difference, in float32, between the narrow model and its own function in wide shapes."""


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
        min_width: the least that any space, or a space by its name, may keep.
        samples: calibration samples used, at most.
        seed: of samples, rows and probes.
        progress: show a progress bar; by default on a terminal only.

    Raises:
        InputError: the model, the inputs or the budget cannot be used; a budget that cannot be met names the least
            that can be reached.
        TraceError: the model cannot be exported.
        VerificationError: the narrow model is not the function that was fitted.
    """
    asked = _Asked(keep_macs, keep_params, latency, tol, max_drop, evaluate, round_to)
    start = time.perf_counter()
    with random_state_kept():
        wide, notes = prepare(model)
        run(wide, example_inputs)
        bar = tqdm(total=None, desc="compress", disable=None if progress is None else not progress, leave=False)
        with bar:
            bar.set_postfix_str("reducing")
            reduced = reduce(wide, example_inputs, protect=protect, seed=seed, verify_result=False, progress=False)
            work = _Work.of(wide, reduced, example_inputs, calibration, protect, samples, seed, bar, notes)
            path = work.path(asked, round_to, min_width)
            state = _chosen(work, path, asked)
            narrow, plan, held = work.narrow(path, state)
        report = work.report(narrow, held, asked, time.perf_counter() - start)
    return Compressed(with_modes_of(model, narrow), plan, report, reduced)


@dataclass(frozen=True)
class _Asked:
    """The budgets, checked."""

    keep_macs: float | None
    keep_params: float | None
    latency: float | None
    tol: float | None
    max_drop: float | None
    evaluate: Callable[[nn.Module], float] | None
    round_to: int

    def __post_init__(self) -> None:
        named = {k: getattr(self, k) for k in ("keep_macs", "keep_params", "latency", "tol", "max_drop")}
        if all(value is None for value in named.values()):
            raise InputError("no budget: pass keep_macs=, keep_params=, latency=, tol= or max_drop= with evaluate=")
        for name, value in named.items():
            if value is None:
                continue
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            share = name.startswith("keep")
            if not number or not (math.isfinite(value) and value >= 0 and (value > 0 or not share)):
                raise InputError(f"{name}={value!r} is no budget: it must be a number above 0")
            if share and value > 1 and value != int(value):
                raise InputError(f"{name}={value!r} is neither a share up to 1 nor a whole number: pass one of these")
        if (self.max_drop is None) != (self.evaluate is None):
            raise InputError("max_drop= and evaluate= go together: evaluate(model) gives the figure that may drop")
        if self.round_to < 1:
            raise InputError(f"round_to={self.round_to} is not at least 1")

    @property
    def measured(self) -> bool:
        return any(value is not None for value in (self.latency, self.tol, self.max_drop))

    def __str__(self) -> str:
        parts = [f"{k}={v:g}" for k in ("keep_macs", "keep_params", "latency", "tol", "max_drop")
                 if (v := getattr(self, k)) is not None]  # fmt: skip
        return ", ".join(parts) + (f", round_to={self.round_to}" if self.round_to > 1 else "")


@dataclass(frozen=True, eq=False)
class _Held:
    """What held-out samples say of a narrow model: divergence, equal decisions, largest relative change. errors: of
    every weight that was fitted."""

    divergence: float
    agreement: float | None
    change: float
    errors: Mapping[str, float] = field(default_factory=dict)


class _Work:
    """Everything that is known of one model on its way to a budget."""

    def __init__(self, wide: nn.Module, reduced: Result, example: Any, seed: int, bar: Any) -> None:
        self.wide, self.reduced, self.example, self.seed, self.bar = wide, reduced, example, seed, bar
        self.before = cost(wide, example)
        self.base = cost(reduced.model, example)
        self.notes: list[str] = []
        self.evaluations = 0
        self.fits: dict[tuple[int, ...], tuple[nn.Module, Plan, _Held]] = {}

    @staticmethod
    def of(
        wide: nn.Module, reduced: Result, example: Any, calibration: Iterable[Any] | None, protect: Sequence[str],
        samples: int, seed: int, bar: Any, notes: Sequence[str],
    ) -> _Work:  # fmt: skip
        work = _Work(wide, reduced, example, seed, bar)
        work.notes += notes
        work.model = copy.deepcopy(reduced.model).float().eval()  # float64 and half precision alike
        if calibration is None:
            calibration = synthetic_probes(work.model, example, seed)
            work.notes.append("no calibration data: synthetic inputs stood in, and the error on real ones is unknown")
        work.samples = samples_of(calibration, example, work.model, samples, CHUNK)
        work._trace()
        work._limit_memory()
        work._note_classes()
        frozen = dict(protected(work.program.graph, protect))
        frozen |= read_in_training(work.model, work.program.graph, work.samples.call(work.samples.chunks[0]))
        work.frozen = frozen
        parameters = [name for name, _ in work.model.named_parameters()]
        work.structure = Structure(work.program, frozen, parameters)
        work._rehearse(parameters)
        return work

    model: nn.Module
    samples: Samples
    program: Program
    structure: Structure
    frozen: dict[tuple[str, int], str]

    def step(self, text: str) -> None:
        self.bar.set_postfix_str(text)
        self.bar.update()

    def _trace(self) -> None:
        self.program = Program(trace(self.model, self.samples.call(self.samples.chunks[0])))
        shapes = [node.shape for node in self.program.inputs]
        found = [tuple(leaf.shape) for leaf in self.samples.chunks[0]]
        if shapes != found:
            raise InputError(
                f"the traced inputs have shapes {shapes}, the calibration's {found}: pass tensors in the order in "
                "which the model takes them, and more than one sample"
            )

    def _limit_memory(self) -> None:
        size = self.samples.size
        each = 2 * self.program.bytes_a_sample(size) * size
        most = max(int(MEMORY // max(each, 1)), 3)
        if most < len(self.samples.chunks):
            chunks = self.samples.chunks[:most]
            self.samples = replace(self.samples, chunks=chunks, used=most * size)
            self.notes.append(f"{most * size} of {self.samples.given} samples used: activations of more would not fit")

    def _note_classes(self) -> None:
        """Say so where the samples are of few classes: on others nothing is fitted, and nothing is measured."""
        seen = classes_seen(self.program.finish(self.program.begin(c, {}), {}) for c in self.samples.chunks)
        if seen is not None and 2 * seen[0] <= min(seen[1:]):
            self.notes.append(
                f"calibration covers {seen[0]} of {seen[1]} classes, as the model answers: how the narrow one answers "
                "to inputs of the others is unknown"
            )

    def _split(self) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Chunks to fit on, to measure curves on (half of these, at most), and held out."""
        chunks = self.samples.chunks
        held = max(1, len(chunks) // 8)
        fit = chunks[:-held]
        return fit, fit[-max(1, len(fit) // 2) :], chunks[-held:]

    # ---- which spaces can be narrowed at all ------------------------------------------------------------

    def _rehearse(self, parameters: Sequence[str]) -> None:
        """Narrow every space by one channel, run, compare; what fails is frozen and named."""
        if not self.structure.spaces:
            return

        def good(free: Sequence[Any]) -> bool:
            kept = self.structure.everything()
            for space in free:
                kept[space.roots[-1]] = False
            kept = self.structure.close(kept)
            return self._same(kept, self._masked(kept)) is None

        self.step("rehearsing")
        _, bad = largest_good(list(self.structure.spaces), good)
        if bad:
            slots, roots = self.structure.numbering.slots, self.structure.roots
            for space in bad:
                for axis, own in slots.bound.items():
                    if bool(torch.isin(roots[own], space.roots).any()):
                        self.frozen[axis] = "a size written in the code does not follow"
            self.structure = Structure(self.program, self.frozen, parameters)
            self.structure.untouched |= {s.name: "a size written in the code does not follow" for s in bad}

    def _masked(self, kept: Tensor) -> dict[str, Tensor]:
        """The weights with zeros for all channels that go."""
        own = {}
        for reader in self.structure.readers:
            inputs = kept[reader.roots]
            if not bool(inputs.all()):
                layout, weight = reader.op.layout, self.program.graph.tensors[reader.name]
                wide = layout.canonical(weight)
                mask = inputs.reshape(layout.groups, 1, -1, 1).to(wide.device)
                own[reader.name] = layout.original(torch.where(mask, wide, 0.0), reader.kernel)
        return own

    def _same(self, kept: Tensor, own: Mapping[str, Tensor]) -> str | None:
        """Why the narrow model is not the function that `own` is in wide shapes; None if it is."""
        narrow = copy.deepcopy(self.model)
        apply_round_(narrow, self.structure.round(kept, own))
        chunk = self.samples.chunks[0]
        expected = self.program.finish(self.program.begin(chunk, own), {})
        try:
            found = _tensors(run(narrow, self.samples.call(chunk)))
        except InputError as error:
            return str(error)
        if [t.shape for t in found] != [t.shape for t in expected]:
            return "its outputs have other shapes"
        for a, b in zip(expected, found, strict=True):
            if a.is_floating_point() and a.numel():
                known = a.isfinite()  # where the fitted network overflows, so may the narrow one
                a, b = torch.where(known, a, 0.0), torch.where(known, b, 0.0)
                if not float((a - b).abs().max()) <= SAME * max(float(a.abs().max()), 1e-30):
                    return f"its outputs differ by {float((a - b).abs().max()):.1e}"
        return None

    # ---- the path and its places ------------------------------------------------------------------------

    def path(self, asked: _Asked, round_to: int, min_width: int | Mapping[str, int]) -> Path:
        fit, measure, _ = self._split()
        readers = self.structure.readers
        if isinstance(min_width, Mapping) and (unknown := set(min_width) - {s.name for s in self.structure.spaces}):
            raise InputError(f"min_width names {sorted(unknown)[0]!r}, which is no space that can be narrowed")
        covariances = moments(self.program, readers, fit, self.seed, self.step)
        metrics = importances(self.program, readers, fit[:IMPORTANCE_CHUNKS], self.seed, self.step)
        found = curves(self.program, self.structure, covariances, metrics, measure, self.step)
        del covariances, metrics

        def least(name: str) -> int:
            return min_width.get(name, 1) if isinstance(min_width, Mapping) else min_width

        allowed = allowed_widths(self.structure, found, round_to, least)
        budget = self._counted(asked)
        if budget is not None and asked.latency is not None:  # the latency may ask for less than what is counted
            path = descend(self.structure, found, allowed, None)
            within = [state for state in path.states if excess(self.structure, path.kept(state), budget) == 0]
            if within:
                return replace(path, states=within)
        return descend(self.structure, found, allowed, budget)

    def _counted(self, asked: _Asked) -> Budget | None:
        """The budgets that can be counted, in terms of what the structure counts."""
        if asked.keep_macs is None and asked.keep_params is None:
            return None
        whole = self.structure.everything()
        given = self.before.macs, self.before.parameters
        others = self.base.macs - self.structure.macs(whole), self.base.parameters - self.structure.size(whole)

        def left(value: float | None, before: int, other: int) -> int | None:
            return None if value is None else max(int(value * before if value <= 1 else value) - other, 0)

        macs, size = (
            left(v, b, o) for v, b, o in zip((asked.keep_macs, asked.keep_params), given, others, strict=True)
        )
        return Budget(macs, size, given, others)

    def narrow(self, path: Path, state: Tensor) -> tuple[nn.Module, Plan, _Held]:
        """The model at one place of the path, its plan, and what held-out samples say of it."""
        key = tuple(state.tolist())
        if key not in self.fits:
            self.fits[key] = self._fit(path.kept(state))
        return self.fits[key]

    def _fit(self, kept: Tensor) -> tuple[nn.Module, Plan, _Held]:
        fit, _, held = self._split()
        rounds = list(self.reduced.plan.rounds)
        narrow = copy.deepcopy(self.reduced.model)
        errors: dict[str, float] = {}
        if not bool(kept.all()):
            own, errors = fitted(self.program, self.structure, kept, fit, self.seed, self.step)
            if (why := self._same(kept, own)) is not None:
                raise VerificationError(f"the narrow model is not what was fitted ({why}): please report this model")
            step = self.structure.round(kept, own)
            apply_round_(narrow, step)
            rounds.append(step)
        plan = Plan(tuple(rounds), fingerprint(self.wide.state_dict()), self.reduced.plan.notes)
        return narrow, plan, self._held(narrow, held, errors)

    def _held(self, narrow: nn.Module, held: Sequence[Sequence[Tensor]], errors: Mapping[str, float]) -> _Held:
        narrow = copy.deepcopy(narrow).float()
        losses, equal = [], []
        worst: dict[int, tuple[float, float]] = {}
        for chunk in held:
            wide = self.program.finish(self.program.begin(chunk, {}), {})
            found = _tensors(run(narrow, self.samples.call(chunk)))
            losses.append(divergence(wide, found))
            same = agreement(wide, found)
            equal += [] if same is None else [same]
            for place, (a, b) in enumerate(zip(wide, found, strict=True)):
                if a.is_floating_point() and a.numel():
                    change, size = worst.get(place, (0.0, 0.0))
                    new = float((a - b).abs().nan_to_num(torch.inf).max())
                    worst[place] = max(change, new), max(size, float(a.abs().max()))
        change = max((change / size if size else change for change, size in worst.values()), default=0.0)
        return _Held(statistics.fmean(losses), statistics.fmean(equal) if equal else None, change, errors)

    def report(self, narrow: nn.Module, held: _Held, asked: _Asked, seconds: float) -> CompressReport:
        after = cost(narrow, self.example)
        widths = []
        for record in self.reduced.report.spaces:
            widths.append(Width(record.name, record.before, _width_now(narrow, record.producers, record.after)))
        return CompressReport(
            budget=str(asked),
            widths=tuple(widths),
            before=self.before,
            reduced=self.base,
            after=after,
            divergence=held.divergence,
            agreement=held.agreement,
            change=held.change,
            errors=dict(held.errors),
            samples_given=self.samples.given,
            samples_used=self.samples.used,
            evaluations=self.evaluations,
            latency_before=latency_of(self.wide, self.example),
            latency_after=latency_of(narrow, self.example),
            untouched=dict(self.structure.untouched),
            barriers=dict(self.reduced.report.barriers),
            notes=tuple(self.notes),
            seconds=seconds,
        )


def _chosen(work: _Work, path: Path, asked: _Asked) -> Tensor:
    """The place on the path that all budgets allow."""
    if not asked.measured:
        return _within(work, path, asked)
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


def _faithful(work: _Work, asked: _Asked, narrow: nn.Module, held: _Held, reference: float | None) -> bool:
    if asked.tol is not None and held.change > asked.tol:
        return False
    if asked.evaluate is not None and asked.max_drop is not None and reference is not None:
        return reference - _figure(work, asked.evaluate, narrow) <= asked.max_drop
    return True


def _figure(work: _Work, evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
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


def _within(work: _Work, path: Path, asked: _Asked) -> Tensor:
    """The last state; new biases count too, so that a tight budget of parameters may take a step more."""
    return path.states[-1]


def _fast_enough(work: _Work, path: Path, asked: _Asked, good: Callable[[Tensor], bool]) -> Tensor:
    assert asked.latency is not None

    def too_slow(state: Tensor) -> bool:
        narrow = copy.deepcopy(work.model)
        kept = path.kept(state)
        apply_round_(narrow, work.structure.round(kept, work._masked(kept)))
        return latency_of(narrow.to(next(work.wide.parameters()).dtype), work.example) > asked.latency  # type: ignore[operator]

    last_slow = path.search(too_slow, 12)
    place = 0 if last_slow is None else next(k for k, s in enumerate(path.states) if torch.equal(s, last_slow)) + 1
    for state in path.states[place : place + 4]:  # what was fitted is measured itself
        if good(state):
            return state
    if place >= len(path.states):
        fastest = path.states[-1]
        narrow, _, _ = work.narrow(path, fastest)
        raise InputError(
            f"latency={asked.latency:g} ms cannot be met: the narrowest model takes {latency_of(narrow, work.example):.3g} ms here"
        )
    raise InputError("the budgets cannot be met together: allow a larger latency, max_drop or tol")


def latency_of(model: nn.Module, inputs: Any, least: int = 5, seconds: float = 0.3) -> float:
    """Milliseconds of one call, the median over at least `least` calls and about `seconds`."""
    times: list[float] = []
    started = time.perf_counter()
    run(model, inputs)
    while len(times) < least or time.perf_counter() - started < seconds:
        _wait(inputs)
        begin = time.perf_counter()
        run(model, inputs)
        _wait(inputs)
        times.append(1e3 * (time.perf_counter() - begin))
        if len(times) >= 1000:
            break
    return statistics.median(times)


def _wait(inputs: Any) -> None:
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(inputs)):
        torch.cuda.synchronize()


def _tensors(output: Any) -> list[Tensor]:
    fields = getattr(output, "__dataclass_fields__", None)
    if fields and not isinstance(output, dict):
        output = {key: getattr(output, key) for key in fields}
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _width_now(narrow: nn.Module, producers: Sequence[str], otherwise: int) -> int:
    tensors = dict(narrow.named_parameters(remove_duplicate=False))
    found = []
    for name in producers:
        module = narrow.get_submodule(name.rpartition(".")[0]) if name.rpartition(".")[0] else narrow
        if name in tensors:
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            found.append(module.out_channels if transposed else tensors[name].shape[int(isinstance(module, nn.Embedding))])
    return max((int(width) for width in found), default=otherwise)


__all__ = ["Compressed", "Cost", "compress", "latency_of"]
