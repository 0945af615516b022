"""`reduce`: trace, number, select, rewrite, check; again until nothing changes; verify.

One round at grade exact follows from the algebra. What the algebra cannot know is whether sizes written in the
user's code (`view(-1, 512)`, `C // 4`) follow the narrow widths: every round is a hypothesis, tested by running
and re-exporting the narrow copy. If it fails, the spaces at fault are found by bisection, left alone and named.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from ep_prune.cost import cost
from ep_prune.embedding import Round
from ep_prune.errors import EpPruneError, InputError, VerificationError
from ep_prune.graph import Graph
from ep_prune.numbering import Numbering, number_channels
from ep_prune.plan import Plan, fingerprint, with_modes_of
from ep_prune.probes import synthetic_probes
from ep_prune.report import Report, SpaceRecord
from ep_prune.rewrite import apply_round_
from ep_prune.selection import Selection, select, to_round
from ep_prune.spaces import Space, spaces
from ep_prune.trace import as_arguments, prepare, run, trace
from ep_prune.verification import InFloat64, Verification, verify

Axis = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Result:
    """What `reduce` returns: the narrow model, what was done, and the proof that it is the same function."""

    model: nn.Module
    plan: Plan
    report: Report
    verification: Verification


@dataclass
class _State:
    """One model on its way to being narrow."""

    model: nn.Module
    graph: Graph
    reference: list[tuple[Any, list[Tensor]]]
    """Inputs in float64 and the wide model's outputs on them."""
    limit: float
    probes_given: bool
    promised: list[Any]
    """The probes that `tol` is a promise about: the user's, or synthetic ones."""
    frozen: dict[Axis, str] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    records: dict[str, SpaceRecord] = field(default_factory=dict)
    barriers: dict[str, str] = field(default_factory=dict)


@contextmanager
def _random_state_kept() -> Any:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield


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

    Raises:
        InputError: the model or the inputs cannot be used; the sentence names the layer and what to do.
        TraceError: the model cannot be exported.
        VerificationError: the narrow model differs, and no space could be found whose rollback mends it.
    """
    if not (tol >= 0.0 and tol < 1.0):
        raise InputError(f"tol={tol} is not in [0, 1): it is a relative change of the output")
    with _random_state_kept():
        wide, notes = prepare(model)
        run(wide, example_inputs)
        given = _listed(probes, example_inputs)
        bar = tqdm(total=None, desc="reduce", disable=None if progress is None else not progress, leave=False)
        with bar:
            state = _start(wide, example_inputs, given, tol, seed)
            before = cost(wide, example_inputs)
            state.frozen = _protected(state.graph, protect)
            _freeze_unseen_readers(state, example_inputs)
            _exact_rounds(state, example_inputs, bar)
            if tol > 0:
                _bounded_round(state, example_inputs, tol, bar)
                _exact_rounds(state, example_inputs, bar)
            bar.set_postfix_str("verifying")
            plan = Plan(tuple(state.rounds), fingerprint(wide.state_dict()), tuple(notes))
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
            )
            if verify_result:
                checked.raise_if_different()
            checked = replace(checked, synthetic=given is None)
        report = Report(
            spaces=tuple(state.records.values()),
            before=before,
            after=cost(state.model, example_inputs),
            grade="exact" if tol == 0 else "bounded",
            tol=tol,
            barriers=dict(state.barriers),
            untraced=state.graph.untraced,
            notes=tuple(notes),
            verification=checked,
        )
        narrow = with_modes_of(model, state.model)
    return Result(narrow, plan, report, checked)


def reduce_(model: nn.Module, example_inputs: Any, **options: Any) -> Result:
    """As `reduce`, and `model` itself becomes narrow (once everything is verified; untouched on an error)."""
    result = reduce(model, example_inputs, **options)
    if result.report.notes:
        raise InputError(f"cannot work in place on a wrapped or parametrized model ({result.report.notes[0]})")
    for step in result.plan.rounds:
        apply_round_(model, step)
    return Result(model, result.plan, result.report, result.verification)


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


def _start(wide: nn.Module, example_inputs: Any, given: list[Any] | None, tol: float, seed: int) -> _State:
    promised = given if given is not None else synthetic_probes(wide, example_inputs, seed) if tol > 0 else []
    reference = []
    double = copy.deepcopy(wide).double()
    for batch in [example_inputs, *(promised if tol > 0 else [])]:
        inputs = _double(batch)
        reference.append((inputs, _outputs(double, inputs)))
    dtype = next((p.dtype for p in wide.parameters() if p.is_floating_point()), torch.float64)
    limit = tol if tol > 0 else (1e-9 if dtype == torch.float64 else 1e4 * torch.finfo(dtype).eps)
    return _State(wide, trace(wide, example_inputs), reference, limit, given is not None, promised)


def _double(inputs: Any) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, inputs)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with InFloat64():  # a cast inside the model is no rounding of ours
        found = run(model, inputs)
    return [leaf for leaf in pytree.tree_leaves(_plain(found)) if isinstance(leaf, Tensor)]


def _plain(output: Any) -> Any:
    """Dataclasses as dicts of their fields."""
    fields = getattr(output, "__dataclass_fields__", None)
    return {key: getattr(output, key) for key in fields} if fields and not isinstance(output, dict) else output


def _difference(model: nn.Module, reference: Sequence[tuple[Any, list[Tensor]]]) -> float:
    """Largest relative change of any output tensor over the reference inputs, in float64; inf on a failure."""
    double = copy.deepcopy(model).double()
    worst: dict[int, tuple[float, float]] = {}
    for inputs, expected in reference:
        try:
            found = _outputs(double, inputs)
        except InputError:
            return float("inf")
        if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
            return float("inf")
        for place, (a, b) in enumerate(zip(expected, found, strict=True)):
            if a.numel() == 0:
                continue
            change, size = worst.get(place, (0.0, 0.0))
            new = float(
                (a.double() - b.double()).abs().nan_to_num(0.0 if not a.isfinite().all() else torch.inf).max()
            )
            worst[place] = max(change, new), max(size, float(a.double().abs().nan_to_num(0.0, 0.0, 0.0).max()))
    return max((change / size if size else change for change, size in worst.values()), default=0.0)


def _protected(graph: Graph, protect: Sequence[str]) -> dict[Axis, str]:
    frozen: dict[Axis, str] = {}
    for layer in protect:
        own = [name for name in graph.tensors if name == layer or name.startswith(layer + ".")]
        if not own:
            raise InputError(f"protect names {layer!r}, which the model has not: use a name of named_modules()")
        for name in own:
            frozen |= {(name, axis): "protected" for axis in (-1, *range(graph.tensors[name].ndim))}
    return frozen


def _freeze_unseen_readers(state: _State, example_inputs: Any) -> None:
    """Spaces that layers outside the inference trace read (auxiliary heads) stay as they are."""
    unseen = set(state.graph.untraced)
    if not unseen:
        return
    training = copy.deepcopy(state.model).train()
    try:
        numbering = number_channels(trace(training, example_inputs))
    except EpPruneError:
        return
    for port in numbering.ports:
        if port.name in unseen:
            roots = numbering.slots.roots()
            read = set(roots[port.x.slots].tolist())
            for axis, slots in numbering.slots.bound.items():
                if axis[0] not in unseen and read & set(roots[slots].tolist()):
                    state.frozen[axis] = f"read in training mode by {port.node.layer}"


def _frozen_slots(n: Numbering, frozen: Iterable[Axis]) -> Tensor | None:
    found = [n.slots.bound[axis] for axis in frozen if axis in n.slots.bound]
    return torch.cat(found) if found else None


def _exact_rounds(state: _State, example_inputs: Any, bar: Any) -> None:
    while True:
        bar.set_postfix_str(f"round {len(state.rounds) + 1}")
        bar.update()
        numbering = number_channels(state.graph)
        chosen = select(numbering, _frozen_slots(numbering, state.frozen))
        step = to_round(chosen)
        if step:
            trial = _try(state, step, example_inputs)
            if trial is None:
                chosen, step = _roll_back(state, numbering, chosen, example_inputs)
                trial = _try(state, step, example_inputs) if step else None
        _note(state, numbering, chosen)
        if not step or trial is None:
            return
        state.model, state.graph = trial
        state.rounds.append(step)


def _try(state: _State, step: Round, example_inputs: Any) -> tuple[nn.Module, Graph] | None:
    """The narrow model and its graph, or None where it does not run, differs, or traces to something else."""
    narrow = copy.deepcopy(state.model)
    apply_round_(narrow, step)
    if _difference(narrow, state.reference) > state.limit:
        return None
    try:
        graph = trace(narrow, example_inputs)
    except EpPruneError:
        return None
    same = [node.op for node in graph.nodes] == [node.op for node in state.graph.nodes]
    return (narrow, graph) if same or _only_biases_added(state.graph, graph) else None


def _only_biases_added(before: Graph, after: Graph) -> bool:
    def calls(graph: Graph) -> list[str]:
        return [node.op for node in graph.nodes if node.target is not None]

    return calls(before) == calls(after)


def _roll_back(
    state: _State, numbering: Numbering, chosen: Selection, example_inputs: Any
) -> tuple[Selection, Round]:
    """Find, by bisection, spaces whose narrowing is at fault; freeze and name them."""
    changed = [space for space in spaces(chosen) if space.after < space.before]

    def attempt(free: Sequence[Space]) -> tuple[Selection, Round] | None:
        names = {space.name for space in free}
        held = [axis for space in changed if space.name not in names for axis in space.axes]
        trial = select(numbering, _frozen_slots(numbering, [*state.frozen, *held]))
        step = to_round(trial)
        return (trial, step) if not step or _try(state, step, example_inputs) is not None else None

    good, bad = _largest_good(changed, lambda free: attempt(free) is not None)
    for space in bad:
        for axis in space.axes:
            state.frozen[axis] = (
                f"rolled back: {space.name} did not verify when narrowed (a size written in the code)"
            )
    final = attempt(good)
    if final is None:
        raise VerificationError(
            f"the narrow model differs and no single space is at fault; first of them {changed[0].name!r}: "
            "protect it, and please report this model"
        )
    return final


def _largest_good(
    items: Sequence[Space], good: Callable[[Sequence[Space]], bool]
) -> tuple[list[Space], list[Space]]:
    """Split items into those that can go together and those that spoil it: group testing, O(bad * log n) calls."""
    accepted: list[Space] = []
    refused: list[Space] = []

    def add(part: Sequence[Space]) -> None:
        if not part:
            return
        if good([*accepted, *part]):
            accepted.extend(part)
        elif len(part) == 1:
            refused.extend(part)
        else:
            add(part[: len(part) // 2])
            add(part[len(part) // 2 :])

    add(list(items))
    return accepted, refused


def _note(state: _State, numbering: Numbering, chosen: Selection) -> None:
    """Bring the report's records up to date with one more round."""
    state.barriers.update(numbering.barriers)
    for space in spaces(chosen):
        record = state.records.get(space.name)
        stayed = dict(space.stayed)
        reasons = {state.frozen[axis] for axis in space.axes if axis in state.frozen}
        if reasons and "rolled back or protected" in stayed:
            stayed["; ".join(sorted(reasons))] = stayed.pop("rolled back or protected")
        gone = dict(space.gone)
        before = space.before
        if record is not None:
            gone = {kind: count + record.gone.get(kind, 0) for kind, count in gone.items()}
            before = record.before
        state.records[space.name] = SpaceRecord(space.name, space.producers, before, space.after, gone, stayed)


def _bounded_round(state: _State, example_inputs: Any, tol: float, bar: Any) -> None:
    """Grow the local threshold while the measured change of the output stays under `tol`; keep the narrowest.

    One threshold for all, grown by factors of 10 and refined by bisection. Synthetic probes do not reach what
    real inputs reach: without the user's own, the threshold, which bounds each channel's share of what batch
    norm recorded, must itself stay near `tol`.
    """
    best: tuple[Selection, Round, nn.Module] | None = None

    def attempt(threshold: float) -> tuple[Selection, Round, nn.Module] | None:
        bar.set_postfix_str(f"threshold {threshold:.1e}")
        bar.update()
        numbering = number_channels(state.graph, threshold)
        chosen = select(numbering, _frozen_slots(numbering, state.frozen))
        step = to_round(chosen)
        narrow = copy.deepcopy(state.model)
        if step:
            apply_round_(narrow, step)
            if _difference(narrow, state.reference) > state.limit:
                return None
        return chosen, step, narrow

    cap = 1.0 if state.probes_given else 10 * tol
    low, high = 0.0, 0.0
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
    if best is None or not best[1]:
        return
    chosen, step, _ = best
    done = _try(state, step, example_inputs)
    if done is None:
        chosen, step = _roll_back(state, chosen.numbering, chosen, example_inputs)
        done = _try(state, step, example_inputs) if step else None
    if done is not None:
        _note(state, chosen.numbering, chosen)
        state.model, state.graph = done
        state.rounds.append(step)


__all__ = ["Result", "reduce", "reduce_"]
