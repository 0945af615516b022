"""`reduce`: trace, number, select, rewrite, check; again until nothing changes; verify.

One round at grade exact follows from the algebra, and is tried on a copy all the same (`trial`). At grade
bounded a local threshold grows as long as the measured change of the output allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from ep_prune.cost import cost
from ep_prune.embedding import Round
from ep_prune.errors import InputError
from ep_prune.graph import Graph
from ep_prune.head_mixing import HeadMixture, head_mixtures
from ep_prune.mixing import mixtures
from ep_prune.modules import fixed_attentions
from ep_prune.plan import Plan, fingerprint, with_modes_of
from ep_prune.probes import synthetic_probes
from ep_prune.records import Records
from ep_prune.report import Report
from ep_prune.rewrite import apply_round_
from ep_prune.selection import Selection, select, to_round
from ep_prune.sharing import copy_of, prepare_and_run, unshare_
from ep_prune.trace import as_arguments, random_state_kept, trace
from ep_prune.trial import (
    Axis,
    State,
    as_double,
    attempt_round,
    difference,
    frozen_slots,
    outputs_of,
    read_in_training,
    roll_back,
)
from ep_prune.verification import (
    Box,
    Verification,
    boxes_of,
    check_inside,
    described,
    draw,
    hand_back,
    plain,
    verify,
    widened,
)

IDLE = 4
"""After how many rounds that take nothing selection ends: one may empty a channel that the next one takes."""


@dataclass(frozen=True, eq=False)
class Result:
    """What `reduce` returns: the narrow model, what was done, and the proof that it is the same function.

    frozen: (parameter, axis) -> why it was kept whole: protected, rolled back, read in training. On a declared
    domain the promise holds there alone (`report.domain`, `plan.domain`).
    """

    model: nn.Module
    plan: Plan
    report: Report
    verification: Verification
    frozen: Mapping[Axis, str] = field(default_factory=dict, repr=False)
    boxes: Sequence[Box | None] | None = field(default=None, repr=False)


def reduce(
    model: nn.Module,
    example_inputs: Any,
    *,
    tol: float = 0.0,
    probes: Iterable[Any] | None = None,
    protect: Sequence[str] = (),
    seed: int = 0,
    verify_result: bool = True,
    progress: bool | None = None,
    domain: Any = None,
    replace_modules: bool = False,
) -> Result:
    """The narrowest equivalent of a trained model that the algebra finds, verified.

    Args:
        model: any `nn.Module` that torch.export takes. It is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, as the model takes them.
        tol: the largest change of any output that is accepted, relative to that output's largest absolute
            value on the probes, in float64. 0: grade exact, the difference is rounding.
        probes: the inputs on which `tol` is a promise: batches like `example_inputs`, or a loader of
            (inputs, labels). Without them, seeded synthetic ones, and the report says so.
        protect: names of layers whose channels all stay.
        seed: of probes and searches.
        verify_result: compare outputs before returning (float64 and the model's type, random, given and
            adversarial probes).
        progress: show a progress bar; by default on a terminal only.
        domain: a box of inputs (lo, hi), numbers or arrays that broadcast to one sample; for several inputs a
            list of pairs (None: not bounded), or a dict by keyword. Units that bounds prove never to bend there
            are folded. The promise holds on this box, at the example's sizes, and is silent on inputs outside.
        replace_modules: exchange modules that cannot hold fewer heads (`nn.MultiheadAttention`) for ones that can
            (`ep_prune.modules.HeadAttention`); the report names them. Without it they are kept, and named.

    Raises:
        InputError: the model or the inputs cannot be used; the sentence names the layer and what to do.
        TraceError: the model cannot be exported.
        VerificationError: the narrow model differs from the given one.
    """
    if not (tol >= 0.0 and tol < 1.0):
        raise InputError(f"tol={tol} is not in [0, 1): it is a relative change of the output")
    with random_state_kept():
        wide, notes, shares = prepare_and_run(model, example_inputs, replace_modules)
        given = _listed(probes, example_inputs)
        boxes = None if domain is None else _declared(domain, example_inputs, given)
        bar = tqdm(total=None, desc="reduce", disable=None if progress is None else not progress, leave=False)
        with bar:
            state = _start(wide, example_inputs, given, tol, seed, boxes, shares)
            before = cost(wide, example_inputs)
            state.frozen = protected(state.graph, protect) | held_by_their_class(state.model)
            _freeze_unseen_readers(state, example_inputs)
            records = Records()
            _exact_rounds(state, records, example_inputs, bar)
            if tol > 0:
                _bounded_round(state, records, example_inputs, tol, bar)
                _exact_rounds(state, records, example_inputs, bar)
            records.name_near()
            bar.set_postfix_str("verifying")
            hand_back()
            stated = None if domain is None else plain(domain)
            own = fingerprint(wide.state_dict())
            plan = Plan(tuple(state.rounds), own, tuple(notes), stated, replace_modules)
            checked = verify(
                wide,
                state.model,
                example_inputs,
                probes=given if tol == 0 else state.promised,
                seed=seed,
                limit=tol if tol > 0 else None,
                judged=("example", "user") if tol > 0 else None,
                count=16,
                ascent_steps=8 if verify_result else 0,
                reach=verify_result,
                domain=domain,
                share=shares,
            )
            if verify_result:
                checked.raise_if_different()
            checked = replace(checked, synthetic=given is None)
        report = Report(
            spaces=tuple(records.spaces.values()),
            before=before,
            after=cost(state.model, example_inputs),
            grade="exact" if tol == 0 else "bounded",
            tol=tol,
            barriers=records.barriers,
            untraced=state.graph.untraced,
            notes=tuple(notes),
            verification=checked,
            domain="" if domain is None else described(boxes or []),
        )
        narrow = with_modes_of(model, state.model)
        unshare_(narrow, model)
    return Result(narrow, plan, report, checked, state.frozen, boxes)


def reduce_(model: nn.Module, example_inputs: Any, **options: Any) -> Result:
    """As `reduce`, and `model` itself becomes narrow (once everything is verified; untouched on an error)."""
    result = reduce(model, example_inputs, **options)
    if result.report.notes:
        raise InputError(f"cannot work in place on a wrapped or parametrized model ({result.report.notes[0]})")
    for step in result.plan.rounds:
        apply_round_(model, step)
    return Result(model, result.plan, result.report, result.verification, result.frozen, result.boxes)


def _listed(probes: Iterable[Any] | None, example_inputs: Any) -> list[Any] | None:
    if probes is None:
        return None
    args, _ = as_arguments(example_inputs)
    batches = []
    for batch in probes:
        paired = len(args) == 1 and isinstance(batch, tuple | list) and len(batch) == 2
        batches.append(batch[0] if paired else batch)
    if not batches:
        raise InputError("probes is empty: give at least one batch of inputs, or None for synthetic probes")
    return batches


def _declared(domain: Any, example_inputs: Any, given: Sequence[Any] | None) -> list[Box | None]:
    """The boxes of a domain, once the example and the user's probes are seen to lie in them."""
    call = as_arguments(example_inputs)
    boxes = boxes_of(domain, *call)
    check_inside(boxes, call, "the example")
    for batch in given or ():
        check_inside(boxes, as_arguments(batch), "a batch of the probes")
    return boxes


def _inside(example_inputs: Any, boxes: Sequence[Box | None], seed: int) -> list[Any]:
    """Two batches like the example in the declared domain: anywhere, and corners."""
    call = as_arguments(example_inputs)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for family in ("uniform", "corners"):
        left = iter(boxes)

        def drawn(leaf: Any, left: Any = left, family: str = family) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            box = next(left)
            return leaf if box is None else draw(box, family, leaf.shape, generator).to(leaf)

        args, kwargs = pytree.tree_map(drawn, call)
        batches.append(kwargs if kwargs else args)
    return batches


def _start(
    wide: nn.Module,
    example_inputs: Any,
    given: list[Any] | None,
    tol: float,
    seed: int,
    boxes: list[Box | None] | None,
    shares: bool,
) -> State:
    promised = given if given is not None else synthetic_probes(wide, example_inputs, seed) if tol > 0 else []
    inside = [] if boxes is None else _inside(example_inputs, boxes, seed)
    if given is None and boxes is not None and tol > 0:
        promised = inside
    reference = []
    double = widened(wide, shares)
    for batch in [example_inputs, *inside, *(promised if tol > 0 else [])]:
        inputs = as_double(batch)
        reference.append((inputs, outputs_of(double, inputs)))
    dtype = next((p.dtype for p in wide.parameters() if p.is_floating_point()), torch.float64)
    limit = tol if tol > 0 else (1e-9 if dtype == torch.float64 else 1e4 * torch.finfo(dtype).eps)
    graph = trace(wide, example_inputs)
    probes_given = given is not None
    return State(
        wide, graph, reference, limit, probes_given, promised, example=example_inputs, boxes=boxes, shares=shares
    )


def protected(graph: Graph, protect: Sequence[str]) -> dict[Axis, str]:
    frozen: dict[Axis, str] = {}
    for layer in protect:
        own = [name for name in graph.tensors if name == layer or name.startswith(layer + ".")]
        if not own:
            raise InputError(f"protect names {layer!r}, which the model has not: use a name of named_modules()")
        for name in own:
            frozen |= {(name, axis): "protected" for axis in (-1, *range(graph.tensors[name].ndim))}
    return frozen


def held_by_their_class(model: nn.Module) -> dict[Axis, str]:
    """The heads of every `nn.MultiheadAttention`, whose class ties their sizes to those of its inputs."""
    reason = (
        "nn.MultiheadAttention cannot hold fewer heads: replace_modules=True exchanges it for a module that can"
    )
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
    return {(f"{path}.{name}".removeprefix("."), 0): reason for path in fixed_attentions(model) for name in names}


def _freeze_unseen_readers(state: State, example_inputs: Any) -> None:
    """Spaces that layers outside the inference trace read (auxiliary heads) stay as they are."""
    state.frozen |= read_in_training(state.model, state.graph, example_inputs, state.shares)


def _exact_rounds(state: State, records: Records, example_inputs: Any, bar: Any) -> None:
    while True:
        while _selection_round(state, records, example_inputs, bar):
            pass
        if _head_mixing_round(state, records, example_inputs):
            continue
        if not _mixing_round(state, records, example_inputs):
            return


def _selection_round(state: State, records: Records, example_inputs: Any, bar: Any) -> bool:
    """Number, select and take one round. What was found out for it is given up at its end."""
    bar.set_postfix_str(f"round {len(state.rounds) + 1}")
    bar.update()
    numbering = state.number()
    chosen = select(numbering, frozen_slots(numbering, state.frozen))
    return _settle(state, records, chosen, to_round(chosen), example_inputs)


def _head_mixing_round(state: State, records: Records, example_inputs: Any) -> bool:
    """Fold attention's heads to their ranks, all at once, or one by one where that fails; each at most once as
    wide as it is."""

    def as_wide(mixture: HeadMixture) -> tuple[object, ...]:
        return mixture.layer, *(state.graph.tensors[mix.weight].shape for mix in mixture.step.mixes)

    found = [m for m in head_mixtures(state.graph, state.frozen) if as_wide(m) not in records.folded]
    records.folded |= set(map(as_wide, found))

    def take(mixtures: Sequence[HeadMixture]) -> bool:
        step = Round(
            folds=tuple(fold for mixture in mixtures for fold in mixture.step.folds),
            mixes=tuple(mix for mixture in mixtures for mix in mixture.step.mixes),
        )
        outcome = attempt_round(state, step, example_inputs) if step else ""
        if isinstance(outcome, str):
            return False
        state.model, state.graph, step = outcome
        state.rounds.append(step)
        for mixture in mixtures:
            records.left |= mixture.left
        return True

    return take(found) or (len(found) > 1 and any([take([mixture]) for mixture in found]))


def _mixing_round(state: State, records: Records, example_inputs: Any) -> bool:
    """Fold one layer's straight channels to their rank; the rounds after it drop those that are left over."""
    if records.mixed is not None:  # what was folded last: did the rounds since then take what it left?
        last, width = records.mixed
        if state.graph.tensors[last[0]].shape[last[1]] >= width:
            state.frozen[last] = "folded to its rank, and its channels are needed elsewhere"
    while True:
        found, records.near = mixtures(state.graph, state.ranges(), state.frozen)
        if found is None:
            return False
        axis = found.weight, found.axis
        outcome = attempt_round(state, found.step, example_inputs)
        if not isinstance(outcome, str):
            records.mixed = axis, state.graph.tensors[found.weight].shape[found.axis]
            records.left[axis] = found.left
            state.model, state.graph, step = outcome
            state.rounds.append(step)
            return True
        state.frozen[axis] = f"rolled back: {outcome}"


def _settle(state: State, records: Records, chosen: Selection, step: Round, example_inputs: Any) -> bool:
    """Take one round, without the spaces that spoil it; False where nothing is left to take."""
    outcome = attempt_round(state, step, example_inputs) if step else ""
    if step and isinstance(outcome, str):
        chosen, step = roll_back(state, chosen.numbering, chosen, example_inputs)
        outcome = attempt_round(state, step, example_inputs) if step else ""
    records.add(chosen, state.frozen)
    if isinstance(outcome, str):
        return False
    state.model, state.graph, step = outcome
    state.rounds.append(step)
    size = sum(tensor.numel() for tensor in state.graph.tensors.values())
    records.idle = records.idle + 1 if size == records.size else 0
    records.size = size
    return records.idle < IDLE


def _bounded_round(state: State, records: Records, example_inputs: Any, tol: float, bar: Any) -> None:
    """Grow the local threshold while the measured change of the output stays under `tol`; keep the narrowest.

    One threshold for all, grown by factors of 10 and refined by bisection. Synthetic probes do not reach what
    real inputs reach: without the user's own, the threshold, which bounds each channel's share of what batch
    norm recorded, must itself stay near `tol`.
    """
    measured: dict[int, bool] = {}

    def attempt(threshold: float) -> tuple[Selection, Round] | None:
        bar.set_postfix_str(f"threshold {threshold:.1e}")
        bar.update()
        numbering = state.number(threshold)
        chosen = select(numbering, frozen_slots(numbering, state.frozen))
        step = to_round(chosen)
        kept = int(chosen.kept.sum())
        if kept not in measured:  # a higher threshold that takes no more than the last one needs no new trial
            narrow = copy_of(state.model, state.shares)
            apply_round_(narrow, step)
            try:
                measured[kept] = difference(narrow, state.reference, state.shares) <= state.limit
            except InputError:  # a size in the code: the exact trial below finds and names it
                measured[kept] = True
        return (chosen, step) if measured[kept] else None

    cap = 1.0 if state.probes_given else 10 * tol
    best, low, high = None, 0.0, 0.0
    for threshold in [t for t in (10.0**e for e in range(-9, 0)) if t < cap] + [min(cap, 0.5)]:
        trial = attempt(threshold)
        if trial is None:
            high = threshold
            break
        best, low = trial, threshold
    for _ in range(4 if high > 0 and low > 0 else 0):
        middle = (low * high) ** 0.5
        trial = attempt(middle)
        if trial is None:
            high = middle
        else:
            best, low = trial, middle
    if best is not None and best[1]:
        _settle(state, records, *best, example_inputs)


__all__ = ["Result", "reduce", "reduce_"]
