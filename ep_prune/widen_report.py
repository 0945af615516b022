"""What an embedding did, and how large the manifold of critical points is on which it put the model.

A critical point of the narrow network becomes a critical point of the wide one for every choice of what an
embedding leaves free. JML 2022 counts these dimensions as K + sum over l of K_l K_{l-1}, with K_l the neurons that
layer l gained; a weight of several taps (convolution) counts K_l K_{l-1} for each. To these come the scales and
offsets that the activations admit (the symmetry of homogeneous ones), which the papers call trivial. For several
layers the count is heuristic; so the rank of the tangent directions is measured beside it: the free numbers are
moved at random, both ways, and the singular values of the moves of the trainable weights are counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ep_prune.embedding import ChannelEmbedding
from ep_prune.graph import Contract
from ep_prune.widen_rules import Draws, Mode, Wide, Widening, walk

STEP = 1e-4
"""How far the free numbers are moved: the error of a central difference is its square."""
RESOLVED = 1e-6
"""Singular values below this share of the largest count as zero."""


@dataclass(frozen=True)
class WideSpaceRecord:
    """One space: its widths, and what its wide channels are. `shares`: of the outgoing weight."""

    name: str
    before: int
    after: int
    copies: int
    nulls: int
    channel: tuple[int, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Dimension:
    """The dimension of the critical manifold.

    gained: K, one for every share or null's constant that is free. mixed: sum over weights of K_out K_in taps.
    symmetries: free scales and offsets. rank: of the tangent directions, measured; `gap`: its smallest singular
    value that counts and the largest that does not, relative to the largest.
    """

    gained: int
    mixed: int
    symmetries: int
    rank: int
    gap: tuple[float, float]

    @property
    def formula(self) -> int:
        return self.gained + self.mixed + self.symmetries


@dataclass(frozen=True, eq=False)
class EmbedReport:
    """The outcome of `embed`. embeddings: for every weight that consumes a widened space, x' = T x + t at its
    input; left_alone: space -> reason."""

    kind: str
    critical: bool
    spaces: tuple[WideSpaceRecord, ...]
    left_alone: dict[str, str]
    embeddings: dict[str, ChannelEmbedding]
    trainable: frozenset[str]
    _work: Widening = field(repr=False)

    def dimension(self) -> Dimension:
        """The dimension of the critical manifold through this point: the formula, and the measured rank.

        Walks the graph twice for every tangent direction: for small networks. Raises `ValueError` where the
        embedding was drawn without the backward condition, and so lies on no such manifold.
        """
        if not self.critical:
            raise ValueError("an embedding without the backward condition lies on no critical manifold")
        return _dimension(self._work, self._work.draws, self.trainable)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the matrices, as plain values."""
        return {
            "kind": self.kind,
            "critical": self.critical,
            "spaces": [asdict(space) for space in self.spaces],
            "left_alone": self.left_alone,
        }

    def __str__(self) -> str:
        header = ("space", "width", "copies", "nulls")
        body = [(s.name, f"{s.before} -> {s.after}", str(s.copies or ""), str(s.nulls or "")) for s in self.spaces]
        wide = [max(len(row[k]) for row in (header, *body)) for k in range(4)]
        lines = [
            "  ".join(cell.ljust(size) for cell, size in zip(row, wide, strict=True)) for row in (header, *body)
        ]
        lines += [f"left alone  {name}: {reason}" for name, reason in self.left_alone.items()]
        condition = "forward and backward" if self.critical else "forward"
        return "\n".join([*(line.rstrip() for line in lines), f"{self.kind} embedding, {condition} condition"])


def report_on(work: Widening, left_alone: dict[str, str], kind: str, trainable: set[str]) -> EmbedReport:
    """The report of a walk that came to its end."""
    spaces = []
    for k, pull in enumerate(work.pulls):
        shares = work.shares[work.first[k] : work.first[k + 1]]
        nulls = int((pull.pi < 0).sum())
        copies = len(pull.pi) - pull.k - nulls
        spaces.append(
            WideSpaceRecord(
                pull.name, pull.k, len(pull.pi), copies, nulls, tuple(pull.pi.tolist()), tuple(shares.tolist())
            )
        )
    embeddings = {
        str(op.weight.tensor): work.wide[op.x].embedding(op.layout.groups * op.layout.canonical(
            work.tensor(op.weight)).shape[2])
        for op in work.kinds.values()
        if isinstance(op, Contract) and op.x in work.wide
    }  # fmt: skip
    return EmbedReport(kind, work.critical, tuple(spaces), left_alone, embeddings, frozenset(trainable), work)


def _dimension(work: Widening, draws: Draws, trainable: frozenset[str]) -> Dimension:
    gained, mixed, symmetries = _counts(work, draws)
    total = sum(draws.coordinates().values())
    generator = torch.Generator().manual_seed(0)
    count = min(gained + mixed + symmetries + 8, total)
    moves = torch.empty(0, 0, dtype=torch.float64)
    while True:
        fresh = [_tangent(work, draws, trainable, generator) for _ in range(count - len(moves))]
        moves = torch.stack([*moves, *fresh]) if fresh else moves
        values = torch.linalg.svdvals(moves) if moves.numel() else torch.zeros(0, dtype=torch.float64)
        values = values / values.max().clamp_min(1e-300) if len(values) else values
        rank = int((values > RESOLVED).sum())
        if rank < len(moves) or count >= total:  # some direction brought nothing new, or all are tried
            smallest = float(values[rank - 1]) if rank else 1.0
            largest = float(values[rank]) if rank < len(values) else 0.0
            return Dimension(gained, mixed, symmetries, rank, (smallest, largest))
        count = min(2 * count, total)


def _tangent(work: Widening, draws: Draws, trainable: frozenset[str], generator: torch.Generator) -> Tensor:
    """How the trainable weights move along one random direction of the free numbers, (weights,)."""
    step = {
        name: torch.randn(draws.values[name].shape, generator=generator, dtype=torch.float64)
        for name in draws.coordinates()
    }
    sides = []
    for size in (STEP, -STEP):
        numbers = draws.moved(step, size)
        mode, pulls = Mode(True, True, True), _all_varied(work)
        moved = Widening(work.n, work.kinds, pulls, work.calm_names, mode, numbers, untrained=work.untrained)
        walk(moved)
        sides.append(torch.cat([moved.new[name].reshape(-1) for name in sorted(moved.new) if name in trainable]))
    return (sides[0] - sides[1]) / (2 * STEP)


def _all_varied(work: Widening) -> list[Any]:
    return [replace(pull, varied=True) for pull in work.pulls]


def _counts(work: Widening, draws: Draws) -> tuple[int, int, int]:
    """K, sum of K_out K_in taps, and the free scales and offsets."""
    gained = sum(int((pull.pi >= 0).sum()) - pull.k for pull in work.pulls)
    mixed = 0
    offsets: list[Tensor] = []
    constants: list[Tensor] = []
    for node, op in work.kinds.items():
        rows = work.wide.get(node)
        if rows is not None and f"{node.name} constants" in draws.values:
            constants.append(rows.slot[rows.null & ~work.silent[rows.slot]])
        if rows is not None and f"{node.name} offsets" in draws.values:
            offsets.append(rows.slot[~rows.null & ~work.calm[rows.slot]])
        if isinstance(op, Contract) and op.layout.groups == 1:
            x = work.wide.get(op.x)
            outputs, inputs, taps = op.layout.canonical(work.tensor(op.weight))[0].shape
            mixed += _extra(rows, outputs) * _extra(x, inputs) * taps
    gained += len(torch.unique(torch.cat(constants))) if constants else 0
    return gained, mixed, _scales(work) + sum(len(part) for part in offsets)


def _extra(rows: Wide | None, narrow: int) -> int:
    return 0 if rows is None else len(rows.slot) - narrow


def _scales(work: Widening) -> int:
    """Size variables that are free, and that some channel has."""
    roots = work.sizes.roots()
    used = [roots[rows.size[~rows.null]] for rows in work.wide.values()]
    if not used:
        return 0
    found = torch.unique(torch.cat(used))
    return int((~work.sizes.pinned(roots)[found]).sum())
