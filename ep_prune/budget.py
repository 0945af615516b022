"""Widths under a budget: which space gives up how many channels.

Every space has a curve, the divergence of the outputs over the channels that it has given up (`curves.Curve`).
Channels go where the divergence grows least for each multiply-accumulate (or parameter) that it saves, at the
widths that the other spaces have by then: costs are products of widths, so what a channel saves changes on the
way. For a latency it is milliseconds that they save, by a table of what layers take here (`layer_times`). Looking
several channels ahead steps over bumps of a curve. What the last, coarse step saved too much is given back.

The states on the way form a path from wide to narrow; budgets that are not counted but measured (`tol`, `latency`,
`max_drop`) look for their place on it (`Path.search`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ep_prune.calibrate import positions
from ep_prune.curves import Curve
from ep_prune.errors import InputError
from ep_prune.layer_times import LayerTimes
from ep_prune.structure import Structure

AHEAD = (1, 2, 4, 8)
"""How many of the allowed widths further down a step may go."""
UNMEASURED = 0.1
"""What multiply-accumulates count beside measured milliseconds, by which a step may seem to save nothing."""


@dataclass(frozen=True)
class Asked:
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
            raise InputError(
                "no budget: pass keep_macs=, keep_params=, latency=, tol= or max_drop= with evaluate="
            )
        for name, value in named.items():
            if value is None:
                continue
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            share = name.startswith("keep")
            if not number or not (math.isfinite(value) and value >= 0 and (value > 0 or not share)):
                raise InputError(f"{name}={value!r} is no budget: it must be a number above 0")
            if share and value > 1 and value != int(value):
                raise InputError(
                    f"{name}={value!r} is neither a share up to 1 nor a whole number: pass one of these"
                )
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


@dataclass(frozen=True)
class Budget:
    """What may stay of what the structure counts: multiply-accumulates of one sample, parameters; None: not
    asked for.

    given, others: both of the model that was given, and those that the structure does not count, for what is said.
    """

    macs: int | None = None
    parameters: int | None = None
    given: tuple[int, int] = (0, 0)
    others: tuple[int, int] = (0, 0)


@dataclass
class Counts:
    """Costs as functions of how many channels each space has given up, without the ties of equal groups.

    inputs, outputs[s] (J + 1, readers): what a reader loses once j channels of space s are gone; rest[s] (J + 1,):
    parameters outside of weights.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    rest: list[Tensor]
    base: tuple[Tensor, Tensor, int]
    places: Tensor
    areas: Tensor
    owned: Tensor
    single: Tensor
    times: LayerTimes | None

    @staticmethod
    def of(structure: Structure, curves: Sequence[Curve], times: LayerTimes | None = None) -> Counts:
        readers = structure.readers
        groups = torch.tensor([r.op.layout.groups for r in readers])
        widths = torch.tensor([len(r.roots) for r in readers])
        taps = torch.tensor([math.prod(r.kernel) for r in readers])
        whole = structure.everything()
        inputs, outputs, rest = [], [], []
        extra = _extra_parameters(structure)
        for curve in curves:
            order = curve.order
            place = torch.full((structure.count,), len(order))
            place[order] = torch.arange(len(order))
            inputs.append(torch.stack([_cumulative(place[r.roots], len(order)) for r in readers], 1))
            outputs.append(
                torch.stack([_cumulative(place[r.outputs.reshape(-1)], len(order)) for r in readers], 1)
            )
            rest.append(torch.cat([extra.new_zeros(1), extra[order].cumsum(0)]))
            if (branch := structure.branches.get(curve.space.name)) is not None:  # takes all that is in its module
                inside = torch.tensor([branch.holds(r.name) for r in readers])
                inputs[-1][-1] = torch.where(inside, widths, inputs[-1][-1])
        weights = sum(structure._weight_size(r, whole) for r in readers if r.name in structure.parameters)
        return Counts(
            inputs, outputs, rest,
            (widths, torch.tensor([r.outputs.numel() for r in readers]), structure.size(whole) - weights),
            torch.tensor([positions(r.node, r.op) * r.uses for r in readers]),
            taps.double() / groups,
            torch.tensor([r.name in structure.parameters for r in readers]),
            (widths == groups) & (groups > 1),
            times,
        )  # fmt: skip

    @cached_property
    def milliseconds(self) -> float:
        """What all layers of the wide model take together, by the table."""
        return 1e-9 if self.times is None else max(float(self.times.at(*self.base[:2])), 1e-9)

    def costs(self, lost_in: Tensor, lost_out: Tensor, lost_rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(...,) multiply-accumulates, parameters and milliseconds (0 without a table), of losses (..., readers)
        and (...,)."""
        n_in, n_out = (self.base[0] - lost_in).clamp_min(0), (self.base[1] - lost_out).clamp_min(0)
        size = torch.where(self.single, n_out * self.areas * self.base[0], n_in * n_out * self.areas)
        taken = torch.zeros(lost_rest.shape) if self.times is None else self.times.at(n_in, n_out)
        return (size * self.places).sum(-1), (size * self.owned).sum(-1) + self.base[2] - lost_rest, taken


def _cumulative(places: Tensor, count: int) -> Tensor:
    """(count + 1,) how many of the places come before 0, 1, ... count."""
    hits = torch.bincount(places[places < count], minlength=count)[:count]
    return torch.cat([hits.new_zeros(1), hits.cumsum(0)])


def _extra_parameters(structure: Structure) -> Tensor:
    """(slots,) parameters that go with a channel outside of the readers' weights."""
    extra = torch.zeros(structure.count, dtype=torch.int64)
    weights = {r.name for r in structure.readers}
    for (name, _axis), slots in structure.numbering.slots.bound.items():
        if name in structure.parameters and name not in weights:
            roots = structure.roots[slots]
            each = structure.graph.tensors[name].numel() // max(len(slots), 1)
            extra.index_add_(0, roots, torch.full((len(roots),), each))
    return extra


@dataclass
class Path:
    """Widths from wide to narrow: `states` (steps + 1, spaces), channels that each space has given up."""

    structure: Structure
    curves: Sequence[Curve]
    states: list[Tensor] = field(default_factory=list)

    def kept(self, state: Tensor) -> Tensor:
        """By root, what stays: with all that must stay with it."""
        kept = self.structure.everything()
        for curve, gone in zip(self.curves, state.tolist(), strict=True):
            kept[curve.order[:gone]] = False
        return self.structure.close(kept)

    def search(self, good: Callable[[Tensor], bool], most: int) -> Tensor | None:
        """The narrowest state found for which `good` holds, by bisection, in at most `most` trials; None: no
        state."""
        low, high, found = -1, len(self.states), None
        for _ in range(most):
            if high - low <= 1:
                break
            middle = (low + high) // 2
            if good(self.states[middle]):
                low, found = middle, self.states[middle]
            else:
                high = middle
        return found


def allowed_widths(
    structure: Structure, curves: Sequence[Curve], round_to: int, least: Callable[[str], int]
) -> list[Tensor]:
    """For every space, how many channels it may give up: what leaves multiples of `round_to`, and `least` or
    more."""
    result = []
    for curve in curves:
        space = curve.space
        gone = torch.arange(len(curve.order) + 1)

        def left(axis: Tensor, order: Tensor = curve.order) -> Tensor:
            each = torch.bincount(axis, minlength=structure.count)[order]
            return len(axis) - torch.cat([each.new_zeros(1), each.cumsum(0)])

        rounded = torch.stack([left(axis) % round_to == 0 for axis in space.widths]).all(0)
        lowest = max(least(space.name), 0 if space.name in structure.branches else 1)
        good = (gone == 0) | (rounded & (left(space.longest) >= lowest))
        if space.sections is not None:
            good &= gone % (int(space.sections.max()) + 1) == 0
        result.append(gone[good & (gone < len(curve.losses()))])
    return result


def descend(
    structure: Structure,
    curves: Sequence[Curve],
    allowed: Sequence[Tensor],
    budget: Budget | None,
    times: LayerTimes | None = None,
) -> Path:
    """The path down to a budget, the last state within it; or, without one, to where nothing more can go.

    times: what layers take; with it, and without a budget, it is milliseconds that are to be saved.

    Raises `InputError` with the least that can be reached where the budget cannot be met.
    """
    counts = Counts.of(structure, curves, times)
    losses = [curve.losses() for curve in curves]
    at = [0] * len(curves)  # places in `allowed`
    path = Path(structure, curves, [torch.zeros(len(curves), dtype=torch.int64)])

    def state() -> Tensor:
        return torch.tensor([int(a[k]) for a, k in zip(allowed, at, strict=True)], dtype=torch.int64)

    def totals(now: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        picked = [
            [part[s][j] for s, j in enumerate(now.tolist())]
            for part in (counts.inputs, counts.outputs, counts.rest)
        ]
        zeros = (
            torch.zeros_like(counts.base[0]),
            torch.zeros_like(counts.base[0]),
            torch.zeros((), dtype=torch.int64),
        )
        return tuple(torch.stack(p).sum(0) if p else z for p, z in zip(picked, zeros, strict=True))  # type: ignore[return-value]

    def options(steps: Sequence[int]) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
        """(space, place) one can move to, with the change of divergence and what that saves (`_price`)."""
        now = state()
        base = totals(now)
        moves, deltas, change = [], [], []
        for s, (a, k) in enumerate(zip(allowed, at, strict=True)):
            for step in steps:
                if 0 <= k + step < len(a):
                    old, new = int(a[k]), int(a[k + step])
                    moves.append((s, k + step))
                    deltas.append(
                        [part[s][new] - part[s][old] for part in (counts.inputs, counts.outputs, counts.rest)]
                    )
                    change.append(float(losses[s][new] - losses[s][old]))
        if not moves:
            return [], torch.empty(0), torch.empty(0)
        found = counts.costs(*(torch.stack([d[k] for d in deltas]) + base[k] for k in range(3)))
        saved = (before - after for before, after in zip(counts.costs(*base), found, strict=True))
        return moves, torch.tensor(change, dtype=torch.float64), _price(counts, structure, budget, *saved)

    while True:
        here = state()
        over = excess(structure, path.kept(here), budget)
        if budget is not None and over == 0:
            break
        moves, change, saved = options(AHEAD)
        useful = saved > 0
        if not bool(useful.any()):
            if budget is not None:
                _refuse(structure, path.kept(here), budget)
            break
        price = torch.where(useful, change / saved.clamp_min(1e-12), torch.inf)
        space, place = moves[int(price.argmin())]
        at[space] = place
        path.states.append(state())
    if budget is not None:
        _give_back(structure, path, at, allowed, budget, options, state)
    return path


def _give_back(
    structure: Structure,
    path: Path,
    at: list[int],
    allowed: Sequence[Tensor],
    budget: Budget,
    options: Callable[[Sequence[int]], tuple[list[tuple[int, int]], Tensor, Tensor]],
    state: Callable[[], Tensor],
) -> None:
    """Take channels back as long as the budget allows, those that help most for what they cost first."""
    while True:
        moves, change, saved = options((-1, -2, -4))
        if not moves:
            return
        cost = -saved
        worth = torch.where(cost > 0, -change / cost.clamp_min(1e-12), torch.inf)
        for k in worth.argsort(descending=True).tolist():
            space, place = moves[k]
            before, at[space] = at[space], place
            if excess(structure, path.kept(state()), budget) == 0:
                path.states.append(state())
                break
            at[space] = before
        else:
            return


def _price(
    counts: Counts, structure: Structure, budget: Budget | None, macs: Tensor, size: Tensor, taken: Tensor
) -> Tensor:
    """What a step saves, as a share of the wide model's cost."""
    whole = structure.everything()
    total = torch.zeros_like(macs)
    if budget is None or budget.macs is not None:
        total = total + macs / max(structure.macs(whole), 1)
    if budget is not None and budget.parameters is not None:
        total = total + size / max(structure.size(whole), 1)
    if budget is None and counts.times is not None:
        total = UNMEASURED * total + taken.clamp_min(0) / counts.milliseconds
    return total


def excess(structure: Structure, kept: Tensor, budget: Budget | None) -> int:
    """By how much the kept channels exceed a budget, counts summed up; 0: within it."""
    if budget is None:
        return 1
    over = 0 if budget.macs is None else max(structure.macs(kept) - budget.macs, 0)
    return over + (0 if budget.parameters is None else max(structure.size(kept) - budget.parameters, 0))


def _refuse(structure: Structure, kept: Tensor, budget: Budget) -> None:
    parts = []
    for asked, count, given, others, unit in (
        (budget.macs, structure.macs, budget.given[0], budget.others[0], "MACs"),
        (budget.parameters, structure.size, budget.given[1], budget.others[1], "parameters"),
    ):
        if asked is not None:
            least = count(kept) + others
            share = f" ({math.ceil(1000 * least / given) / 10:.1f} % of the given model's)" if given else ""
            parts.append(f"{least:,} {unit}{share}")
    raise InputError(
        f"the budget cannot be met: the narrowest model that can be reached keeps {' and '.join(parts)}: "
        f"ask for more, or protect and round less{_left_alone(structure)}"
    )


def _left_alone(structure: Structure) -> str:
    """The first layer whose inputs cannot be narrowed, and why."""
    if not structure.untouched:
        return ""
    name, why = next(iter(structure.untouched.items()))
    others = len(structure.untouched) - 1
    return f"; left alone is {name}{f' with {others} more' if others else ''} ({why})"
