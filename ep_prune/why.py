"""Why every channel of a layer stayed, and how near it came to going.

A channel stays because something pins it, or because a weight reads it and no kept channel is its copy. In the
second case the *nearest miss* says how far the algebra was from merging it. It is measured where copies are told
apart: on the channel's row of real weights (v, c) with the freedom of what follows it,

    residual of i to j = min over the admitted ratios r of || (v_i, c_i) - r (v_j, c_j) || / || (v_i, c_i) ||

    split    r = 1          flipped  r = -1          scaled   any other ratio
    null     what the readers see of the channel, as a share of the size of the output that sees most of it

Activations admit what their symmetry lets through, linear readers any ratio and any offset. Where several weights
read the channels, a copy must be one at each, and the largest residual counts. `find.congruence` decides with the
same norm, at a few roundings of the weights. Atoms without weights of their own (what came through an activation
before a sum, products) count as equal or as orthogonal: there the residual is an upper bound of what is to close.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.demand import Demand, spread
from ep_prune.embedding import Round
from ep_prune.errors import InputError
from ep_prune.nearest import Facets, nearest_copies
from ep_prune.numbering import number_channels
from ep_prune.pipeline import Result, reduce
from ep_prune.selection import COPY, DISTINCT, STAYED, Selection, select
from ep_prune.spaces import Space, longest_axis, spaces, units_along
from ep_prune.trace import random_state_kept, trace
from ep_prune.trial import frozen_slots, ranges_of

TOLD_APART = (DISTINCT, COPY, "near a copy, but its outgoing weights tell them apart")
"""The reasons of `STAYED` that a nearer copy would do away with."""

SHOWN = 3
"""How many channels of a group are printed one by one: those with the nearest misses."""


@dataclass(frozen=True, eq=False)
class Why:
    """The k channels of a space that stayed. Channels are numbered as in the model that was given.

    before: the space's width in that model. channels (k,); reason (k,): a place in `reasons`. For each channel the
    nearest one that might have been kept in its stead: other (k,), -1 where there is none, in the space
    `names[other_space]`; residual, rounding (k,): how far it is off, and up to where it would count as equal, both
    relative to the channel's own row; ratio (k,). seen (k,): the largest share that a reader has of it, NaN where
    no weight reads it.
    """

    space: str
    producers: tuple[str, ...]
    before: int
    channels: Tensor
    reasons: tuple[str, ...]
    reason: Tensor
    names: tuple[str, ...]
    other: Tensor
    other_space: Tensor
    ratio: Tensor
    residual: Tensor
    rounding: Tensor
    seen: Tensor
    domain: str = ""

    def rules(self) -> list[str]:
        """For each channel the rule whose residual is smallest: split, flipped, scaled, null; '' where it is not
        for lack of a rule that the channel stays, or none comes near."""
        near = ((self.ratio.abs() - 1).abs() <= self.residual + self.rounding) & (self.other >= 0)
        copy = torch.where(near, torch.where(self.ratio > 0, 0, 1), 2)
        null = self.seen < self.residual.nan_to_num(torch.inf)
        told_apart = torch.tensor([reason in TOLD_APART for reason in self.reasons])
        none = ~told_apart[self.reason] | ((self.other < 0) & ~null)
        code = torch.where(none, 4, torch.where(null, 3, copy))
        return [("split", "flipped", "scaled", "null", "")[k] for k in code.tolist()]

    def misses(self) -> Tensor:
        """(k,) the smallest residual of any rule, inf where no rule comes near."""
        return torch.minimum(self.seen.nan_to_num(torch.inf), self.residual.nan_to_num(torch.inf))

    def groups(self) -> list[tuple[str, str, list[int]]]:
        """(reason, rule, places in `channels`), the largest group first; within a group the nearest miss first."""
        found: dict[tuple[str, str], list[int]] = {}
        rules, codes = self.rules(), self.reason.tolist()
        for place in self.misses().argsort(stable=True).tolist():
            found.setdefault((self.reasons[codes[place]], rules[place]), []).append(place)
        return [(*key, places) for key, places in sorted(found.items(), key=lambda item: -len(item[1]))]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON: one list for each column; what is unknown is None."""

        def column(values: Tensor) -> list[float | None]:
            return [value if value == value and abs(value) != float("inf") else None for value in values.tolist()]

        codes, spaces_of = self.reason.tolist(), self.other_space.tolist()
        others = self.other.tolist()
        return {
            "space": self.space,
            "domain": self.domain,
            "producers": list(self.producers),
            "before": self.before,
            "after": len(self.channels),
            "channel": self.channels.tolist(),
            "reason": [self.reasons[code] for code in codes],
            "rule": self.rules(),
            "nearest": [place if place >= 0 else None for place in others],
            "nearest_space": [
                self.names[s] if place >= 0 else None for s, place in zip(spaces_of, others, strict=True)
            ],
            "ratio": column(self.ratio),
            "residual": column(self.residual),
            "rounding": column(self.rounding),
            "seen": column(self.seen),
        }

    def __str__(self) -> str:
        more = len(self.producers) - 1
        lines = [
            f"{self.space}{f' (+{more})' if more else ''}: {len(self.channels)} of {self.before} channels stay"
            + (f" on the declared domain {self.domain}" if self.domain else "")
        ]
        misses = self.misses()
        for reason, rule, places in self.groups():
            lines.append(f"  {len(places):4}  {reason}{_span(rule, misses[places])}")
            if rule:
                lines += [f"        {self._line(place, rule)}" for place in places[:SHOWN]]
                if len(places) > SHOWN:
                    lines.append(f"        ... and {len(places) - SHOWN} more")
        return "\n".join(lines)

    def _line(self, place: int, rule: str) -> str:
        own = int(self.channels[place])
        if rule == "null":
            return f"channel {own}: its readers see {float(self.seen[place]):.1e} of an output"
        name = self.names[int(self.other_space[place])]
        other = f"{int(self.other[place])}" + ("" if name == self.space else f" of {name}")
        times = {"split": "", "flipped": "-"}.get(rule, f"{float(self.ratio[place]):.4g} x ")
        return (
            f"channel {own} is {times}channel {other} up to {float(self.residual[place]):.1e} "
            f"(equal: {float(self.rounding[place]):.0e})"
        )


def _span(rule: str, misses: Tensor) -> str:
    if not rule:
        return ""
    low, high = float(misses.min()), float(misses.max())
    return f"; nearest rule: {rule}, missed by {low:.1e}" + (f" to {high:.1e}" if high > low else "")


def why(
    model: nn.Module,
    example_inputs: Any,
    layer: str,
    *,
    tol: float = 0.0,
    probes: Iterable[Any] | None = None,
    protect: Sequence[str] = (),
    seed: int = 0,
    domain: Any = None,
) -> Why:
    """Why the channels that `layer` writes stay in `reduce`, each with its nearest miss.

    Args:
        layer: a name of `named_modules()`, or of a parameter; a batch norm stands for what it normalizes.
        model, example_inputs, tol, probes, protect, seed, domain: as for `reduce`, which is run,
            without verification.

    Raises:
        InputError: `layer` writes no channels, or the model or the inputs cannot be used.
        TraceError: the model cannot be exported.
    """
    given = reduce(
        model,
        example_inputs,
        tol=tol,
        probes=probes,
        protect=protect,
        seed=seed,
        verify_result=False,
        progress=False,
        domain=domain,
    )
    return explain(given, example_inputs, layer)


def explain(result: Result, example_inputs: Any, layer: str) -> Why:
    """As `why`, of a reduction that is already there."""
    with random_state_kept():
        graph = trace(result.model, example_inputs)
        n = number_channels(graph, ranges=ranges_of(result.model, graph, example_inputs, result.boxes))
    chosen = select(n, frozen_slots(n, result.frozen))
    found = spaces(chosen)
    space = _named(chosen, found, layer)
    names = tuple(item.name for item in found)
    home = torch.full((n.slots.count,), -1, dtype=torch.int64)
    place = torch.full((n.slots.count,), -1, dtype=torch.int64)
    for code, item in enumerate(found):  # over layers
        axis = longest_axis(chosen, item.axes)
        own = units_along(chosen, axis)
        count = len(n.slots.bound[axis])
        home[own], place[own] = code, _originals(result.plan.rounds, axis, count)[: len(own)]
    roots = units_along(chosen, longest_axis(chosen, space.axes))
    facets, needs = Facets(n), list(chosen.demands.values())
    copies = nearest_copies(facets, needs, roots)
    known = copies.other >= 0
    other = torch.where(known, copies.other, 0)
    reasons, reason = _reasons(chosen, space, roots, result)
    record = next((r for r in result.report.spaces if r.name == space.name), None)
    return Why(
        space=space.name,
        producers=space.producers,
        before=len(roots) if record is None else record.before,
        channels=place[roots],
        reasons=reasons,
        reason=reason,
        names=names,
        other=torch.where(known, place[other], -1),
        other_space=torch.where(known, home[other], -1),
        ratio=copies.ratio,
        residual=copies.residual,
        rounding=copies.rounding,
        seen=_seen(facets, needs, roots),
        domain=result.report.domain,
    )


def _named(chosen: Selection, found: Sequence[Space], layer: str) -> Space:
    """The space that a layer writes, by the name of the layer or of one of its parameters."""
    n, roots = chosen.numbering, chosen.roots

    def belongs(name: str) -> bool:
        return name == layer or name.rpartition(".")[0] == layer

    for space in found:
        if space.name == layer or any(belongs(name) for name, _ in space.axes):
            return space
    for (name, axis), slots in n.slots.bound.items():  # a batch norm, a bias
        if belongs(name) and n.graph.tensors[name].ndim == 1 and axis == 0:
            for space in found:
                members = torch.cat([roots[n.slots.bound[key]] for key in space.axes])
                if bool(torch.isin(roots[slots], members).any()):
                    return space
    known = [space.name for space in found]
    near = difflib.get_close_matches(layer, known, 3, 0.3) or known[:3]
    raise InputError(f"no layer {layer!r} that writes channels: name one such as {', '.join(near) or '(none)'}")


def _originals(rounds: Sequence[Round], axis: tuple[str, int], count: int) -> Tensor:
    """(count,) the numbers, in the model that was given, of the channels left along a parameter's axis."""
    name, place = axis
    left: Tensor | None = None
    for step in rounds:
        keep: Tensor | None = None
        for fold in step.folds:
            if fold.weight == name and place in (-1, int(fold.layout.inputs_first)):
                size = fold.width // fold.layout.groups
                keep = (fold.groups.unsqueeze(1) * size + fold.outputs).reshape(-1)
        for cut in step.cuts:
            if (cut.tensor, cut.axis) == axis:
                keep = cut.keep
        if keep is not None:
            left = keep if left is None else left[keep]
    return torch.arange(count) if left is None else left


def _reasons(chosen: Selection, space: Space, roots: Tensor, result: Result) -> tuple[tuple[str, ...], Tensor]:
    """What keeps each channel: the first pin, or what the selection noted."""
    held = "; ".join(sorted({result.frozen[axis] for axis in space.axes if axis in result.frozen}))
    names = [*STAYED, held or "rolled back or protected"]
    code = chosen.why[roots].clone()
    pinned = code == STAYED.index("pinned")
    code[pinned] = len(STAYED)
    for reason, members in chosen.numbering.slots.reasons(chosen.roots).items():
        own = pinned & torch.isin(roots, members)
        code[own] = len(names)
        pinned &= ~own
        names.append(reason)
    return tuple(names), code


def _seen(facets: Facets, needs: Sequence[Demand], roots: Tensor) -> Tensor:
    """(k,) the largest share of an output's size that a reader has of each channel; NaN where none reads it.

    Sizes are root mean squares where batch norm recorded them for all that is read, else `Facets.size`.
    """
    size = max((int(demand.roots.max()) for demand in needs), default=0)
    seen = torch.full((max(size, int(roots.max())) + 1,), -1.0, dtype=torch.float64)
    for demand in needs:
        outputs = spread(demand.outputs(), len(demand.roots))
        for port, net in zip(demand.ports, demand.nets, strict=True):
            recorded = port.x.root_mean_square()
            scale = recorded if bool(recorded.isfinite().all()) else facets.size(port.x)
            sent = torch.where(outputs, net.values().square().sum(2).sqrt(), 0.0) * scale.unsqueeze(1)
            total = sent.square().reshape(port.groups, -1, sent.shape[1]).sum(1).sqrt().clamp_min(1e-300)
            share = (sent.reshape(port.groups, -1, sent.shape[1]) / total.unsqueeze(1)).reshape(sent.shape)
            seen.scatter_reduce_(0, demand.roots, share.amax(1)[demand.leader], "amax")
    return torch.where(seen[roots] < 0, torch.nan, seen[roots])


__all__ = ["Why", "explain", "why"]
