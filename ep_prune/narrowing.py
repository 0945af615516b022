"""One model on its way to a budget: calibrated, rehearsed, narrowed, checked.

Spaces are rehearsed first: each loses one channel, and the narrow model is run. Where sizes are written into the
code, the space is named and left alone. The narrow model that is delivered was compared with the function that was
fitted, in wide shapes; what it does on inputs that nothing was fitted on is measured (`Held`).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ep_prune.augment import augmented
from ep_prune.branches import inside
from ep_prune.budget import Asked, Budget, Path, allowed_widths, descend, excess
from ep_prune.calibrate import CHUNK, Program, Samples, samples_of
from ep_prune.compress_report import Point
from ep_prune.cost import cost
from ep_prune.divergence import agreement, classes_seen, divergence
from ep_prune.errors import InputError, VerificationError
from ep_prune.fitting import fitted
from ep_prune.layer_times import layer_times
from ep_prune.measurements import Measurements, digest_of, measured
from ep_prune.norm_folding import Pair, fold_norms_, foldable
from ep_prune.pipeline import Result, held_by_their_class, protected
from ep_prune.plan import Plan, fingerprint, is_channels_last, keep_layouts_
from ep_prune.probes import synthetic_probes
from ep_prune.rewrite import apply_round_
from ep_prune.structure import Structure
from ep_prune.trace import run, trace
from ep_prune.trial import largest_good, read_in_training

MEMORY = 3 * 2**30
"""Bytes of activations that calibration may hold; beyond, fewer samples are used, and the report says so."""
POINTS = 60
"""Of the path, in the report."""
SAME = 1e-3
"""Largest relative difference, in float32, between the narrow model and its own function in wide shapes."""


@dataclass(frozen=True, eq=False)
class Held:
    """What held-out samples say of a narrow model: divergence, equal decisions, largest relative change.
    errors: of every weight that was fitted."""

    divergence: float
    agreement: float | None
    change: float
    errors: Mapping[str, float] = field(default_factory=dict)


class Work:
    """Everything that is known of one model on its way to a budget."""

    def __init__(self, wide: nn.Module, reduced: Result, example: Any, seed: int, bar: Any) -> None:
        self.wide, self.reduced, self.example, self.seed, self.bar = wide, reduced, example, seed, bar
        self.before = cost(wide, example)
        self.base = cost(reduced.model, example)
        self.notes: list[str] = []
        self.evaluations = 0
        self.fits: dict[tuple[int, ...], tuple[nn.Module, Plan, Held]] = {}
        self.course: tuple[Point, ...] = ()
        self.trials: list[Point] = []
        self.norms: tuple[Pair, ...] = ()
        self.folds = False
        self.resume: FilePath | None = None

    @staticmethod
    def of(
        wide: nn.Module, reduced: Result, example: Any, calibration: Iterable[Any] | None, protect: Sequence[str],
        samples: int, seed: int, bar: Any, notes: Sequence[str],
    ) -> Work:  # fmt: skip
        work = Work(wide, reduced, example, seed, bar)
        work.notes += notes
        work.model = copy.deepcopy(reduced.model).float().eval()  # float64 and half precision alike
        if calibration is None:
            calibration = synthetic_probes(work.model, example, seed)
            work.notes.append(
                "no calibration data: synthetic inputs stood in, and the error on real ones is unknown"
            )
        work.samples = samples_of(calibration, example, work.model, samples, CHUNK)
        work._trace()
        work._limit_memory()
        work._check_answers()
        held = held_by_their_class(work.model)
        frozen = {**protected(work.program.graph, protect), **held}
        frozen |= read_in_training(work.model, work.program.graph, work.samples.call(work.samples.chunks[0]))
        work.frozen, work.held = frozen, dict(frozen)
        parameters = [name for name, _ in work.model.named_parameters()]
        work.structure = Structure(work.program, frozen, parameters)
        if (why := work._same(work.structure.everything(), {})) is not None:
            raise InputError(
                f"two runs of the model on the same inputs differ ({why}): turn off what is random in it"
            )
        work._rehearse(parameters)
        work.structure.untouched |= {axis[0].rpartition(".")[0] or axis[0]: why for axis, why in held.items()}
        return work

    model: nn.Module
    samples: Samples
    program: Program
    structure: Structure
    frozen: dict[tuple[str, int], str]
    held: dict[tuple[str, int], str]
    """Those of `frozen` that were so before anything was tried: protected, or read in training."""

    def fold_norms(self) -> None:
        """Have all narrow models' batch norms folded, where that changes nothing."""
        self.norms = foldable(self.model, self.program.graph)
        self.folds = True

    def allow_branches(self, wanted: Callable[[str], bool]) -> None:
        """Let residual branches of the `wanted` spaces go as a whole, where a trial run is right without them."""
        held = {name for name, _ in self.held}
        offered = {
            name: branch
            for name, branch in self.structure.candidates(self.model).items()
            if all(map(wanted, branch.takes)) and not any(map(branch.holds, held))
        }
        if not offered:
            return
        generator = torch.Generator().manual_seed(self.seed)

        def good(names: Sequence[str]) -> bool:
            self.structure.allow({name: offered[name] for name in names})
            kept = self.structure.everything()
            for name in names:
                kept[offered[name].last.roots] = False
            kept = self.structure.close(kept)
            own = self.masked(kept)
            for name in names:  # with constants as a fit may find them
                last = offered[name].last
                drawn = torch.randn(last.outputs.numel(), generator=generator)
                like = self.program.graph.tensors[last.name]
                own[str(last.constant)] = drawn.to(like) + self.program.graph.tensors.get(str(last.constant), 0.0)
            return self._same(kept, own) is None

        self.step("rehearsing branches")
        allowed, _ = largest_good(list(offered), good)
        self.structure.allow({name: offered[name] for name in allowed})

    def _norms_left(self, kept: Tensor) -> tuple[Pair, ...]:
        """Those to be folded, of a narrow model in which whole branches may have gone."""
        gone = self.structure.vanished(kept)
        return tuple(pair for pair in self.norms if not any(inside(gone, name) for name in pair))

    def sketch(self, kept: Tensor) -> nn.Module:
        """A model of the narrow shapes, not fitted: to be timed."""
        narrow = copy.deepcopy(self.model)
        apply_round_(narrow, self.structure.round(kept, self.masked(kept)))
        fold_norms_(narrow, self._norms_left(kept))
        keep_layouts_(self.wide, narrow)
        dtype = next((p.dtype for p in self.wide.parameters()), torch.float32)
        return narrow.to(dtype)

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
            self.notes.append(
                f"{most * size} of {self.samples.given} samples used: activations of more would not fit"
            )

    def _check_answers(self) -> None:
        """Refuse NaN, and say so where the samples are of few classes: on others nothing is fitted or measured."""

        def answers() -> Iterator[list[Tensor]]:  # one batch at a time: they may be images
            for chunk in self.samples.chunks:
                found = self.program.finish(self.program.begin(chunk, {}), {})
                if any(a.is_floating_point() and bool(a.isnan().any()) for a in found):
                    raise InputError(
                        "the model gives NaN on the calibration data: leave those inputs out, or mend the model"
                    )
                yield found

        seen = classes_seen(answers())
        if seen is not None and 2 * seen[0] <= min(seen[1:]):
            self.notes.append(
                f"calibration covers {seen[0]} of {seen[1]} classes, as the model answers: "
                "how the narrow one answers to inputs of the others is unknown"
            )

    def _split(self) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Chunks to fit on, to measure curves on (half of these, at most), and held out.

        Curves are measured on other samples than their weights are made from: where a weight reads more numbers
        than there are samples, it would look as if channels could go for nothing."""
        chunks = self.samples.chunks
        held = max(1, len(chunks) // 8)
        fit = chunks[:-held]
        return fit, fit[-max(1, len(fit) // 2) :], chunks[-held:]

    # ---- which spaces can be narrowed at all ------------------------------------------------------------

    def _rehearse(self, parameters: Sequence[str]) -> None:
        """Narrow every space by one channel, or one a section, run, compare; what fails is frozen and named."""
        if not self.structure.spaces:
            return

        def good(free: Sequence[Any]) -> bool:
            kept = self.structure.everything()
            for space in free:
                last = space.roots[-1:]
                if space.sections is not None:  # equally many each, or the others come back
                    last = space.roots[space.sections.argsort(stable=True)]
                    last = last.reshape(int(space.sections.max()) + 1, -1)[:, -1]
                kept[last] = False
            kept = self.structure.close(kept)
            return self._same(kept, self.masked(kept)) is None

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

    def masked(self, kept: Tensor) -> dict[str, Tensor]:
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
            found = tensors_of(run(narrow, self.samples.call(chunk)))
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

    def path(self, asked: Asked, round_to: int, min_width: int | Mapping[str, int]) -> Path:
        fit, measure, _ = self._split()
        if isinstance(min_width, Mapping) and (
            unknown := set(min_width) - {s.name for s in self.structure.spaces}
        ):
            raise InputError(f"min_width names {sorted(unknown)[0]!r}, which is no space that can be narrowed")
        stored = None
        if self.resume is not None:
            weights = fingerprint(self.model.state_dict())
            digest = digest_of(weights, self.structure, self.samples.chunks, self.seed)
            stored = Measurements(self.resume, digest, self.structure)
            if stored.curves:
                self.notes.append(f"{len(stored.curves)} spaces as they were measured before, from {self.resume}")
        found = measured(self.program, self.structure, fit, measure, self.seed, self.step, stored)

        def least(name: str) -> int:
            return min_width.get(name, 1) if isinstance(min_width, Mapping) else min_width

        allowed = allowed_widths(self.structure, found, round_to, least)
        budget = self._counted(asked)
        if budget is None or asked.latency is not None:
            times = None
            if asked.latency is not None:
                self.step("timing layers")
                times = layer_times(self.program, self.structure.readers, *self._example_layout())
            path = descend(self.structure, found, allowed, None, times)
            self.course = self._course(path)
            if budget is None:
                return path
            # the latency may ask for less than what is counted
            within = [state for state in path.states if excess(self.structure, path.kept(state), budget) == 0]
            if within:
                return replace(path, states=within)
        else:  # for the report alone, a few states are enough
            self.course = self._course(
                descend(self.structure, found, [a[:: max(len(a) // 8, 1)] for a in allowed], None)
            )
        path = descend(self.structure, found, allowed, budget)
        return path if asked.latency is None else replace(path, states=path.states[-1:])

    def _example_layout(self) -> tuple[float, bool]:
        """Samples in the example over those of the trace, and whether its images are channels-last."""
        leaves = [leaf for leaf in pytree.tree_leaves(self.example) if isinstance(leaf, Tensor) and leaf.ndim]
        return (len(leaves[0]) if leaves else 1) / self.samples.size, any(map(is_channels_last, leaves))

    def _course(self, path: Path) -> tuple[Point, ...]:
        """Some `POINTS` of the path's models, and what its curves say of them."""
        losses = [curve.losses() for curve in path.curves]
        points = []
        for state in path.states[:: max(len(path.states) // POINTS, 1)]:
            expected = sum(float(own[gone]) for own, gone in zip(losses, state.tolist(), strict=True))
            points.append(self._point(path.kept(state), expected))
        return tuple(points)

    def _point(self, kept: Tensor, loss: float) -> Point:
        whole = self.structure.everything()
        macs = self.base.macs - self.structure.macs(whole) + self.structure.macs(kept)
        return Point(macs, self.base.parameters - self.structure.size(whole) + self.structure.size(kept), loss)

    def _counted(self, asked: Asked) -> Budget | None:
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

    def narrow(self, path: Path, state: Tensor) -> tuple[nn.Module, Plan, Held]:
        """The model at one place of the path, its plan, and what held-out samples say of it."""
        key = tuple(state.tolist())
        if key not in self.fits:
            kept = path.kept(state)
            self.fits[key] = self._fit(kept)
            self.trials.append(self._point(kept, self.fits[key][2].divergence))
        return self.fits[key]

    def _fit(self, kept: Tensor) -> tuple[nn.Module, Plan, Held]:
        fit, _, held = self._split()
        rounds = list(self.reduced.plan.rounds)
        narrow = copy.deepcopy(self.reduced.model)
        errors: dict[str, float] = {}
        if not bool(kept.all()):
            chunks = augmented(self.program, self.structure.readers, fit, self.seed)
            own, errors = fitted(self.program, self.structure, kept, chunks, self.seed, self.step, len(fit))
            if (why := self._same(kept, own)) is not None:
                raise VerificationError(
                    f"the narrow model is not what was fitted ({why}): please report this model"
                )
            step = self.structure.round(kept, own)
            apply_round_(narrow, step)
            rounds.append(step)
        norms = self._norms_left(kept)
        fold_norms_(narrow, norms)
        keep_layouts_(self.wide, narrow)
        made_for = fingerprint(self.wide.state_dict())
        plan = replace(self.reduced.plan, rounds=tuple(rounds), fingerprint=made_for, norms=norms)
        return narrow, plan, self._held(narrow, held, errors)

    def _held(self, narrow: nn.Module, held: Sequence[Sequence[Tensor]], errors: Mapping[str, float]) -> Held:
        narrow = copy.deepcopy(narrow).float()
        losses, equal = [], []
        worst: dict[int, tuple[float, float]] = {}
        for chunk in held:
            wide = self.program.finish(self.program.begin(chunk, {}), {})
            found = tensors_of(run(narrow, self.samples.call(chunk)))
            losses.append(divergence(wide, found))
            same = agreement(wide, found)
            equal += [] if same is None else [same]
            for place, (a, b) in enumerate(zip(wide, found, strict=True)):
                if a.is_floating_point() and a.numel():
                    change, size = worst.get(place, (0.0, 0.0))
                    known = a.isfinite()  # a score of -inf, of what is masked out, is no change
                    a, b = torch.where(known, a, 0.0), torch.where(known, b, 0.0)
                    new = float((a - b).abs().nan_to_num(torch.inf).max())
                    worst[place] = max(change, new), max(size, float(a.abs().max()))
        change = max((change / size if size else change for change, size in worst.values()), default=0.0)
        return Held(statistics.fmean(losses), statistics.fmean(equal) if equal else None, change, errors)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a model returned, in order, those in dataclasses too."""
    fields = getattr(output, "__dataclass_fields__", None)
    if fields and not isinstance(output, dict):
        output = {key: getattr(output, key) for key in fields}
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
