"""A reduction run backwards: the embedding that a plan's round says the wide network was.

A round's folds hold x = T z + t at the input of every weight. An entry of T says which narrow channel a wide one
is a copy of, and at which ratio; a row without entries is a null. Cuts say how wide each axis was. From these
follow the pull-back map of every space, and the scales and offsets that the copies have where they are read;
`widen_rules` carries them to the producers. Outgoing weights are the shortest that the forward condition allows,
so that nulls are not read at all: they, and the shares of the copies, are what a plan leaves free.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ep_prune.channels import Channels
from ep_prune.embedding import ChannelEmbedding, Fold, Round
from ep_prune.errors import InputError
from ep_prune.graph import Contract, Node, Operation
from ep_prune.numbering import Numbering
from ep_prune.widen_rules import Draws, Mode, Pull, Stuck, Widening, walk
from ep_prune.widen_spaces import WideSpace

_MODE = Mode(general=False, critical=False, mixed=False)


def undo_round(n: Numbering, kinds: Mapping[Node, Operation], spaces: list[WideSpace], step: Round) -> Widening:
    """The walk that writes the wide parameters from which `step` made these. Raises `InputError`."""
    if step.refits or step.vanished:
        raise InputError(
            "the plan holds weights that compress fitted to data: only what reduce found can be undone"
        )
    folds = {fold.weight: fold for fold in step.folds}
    made = next((fold for fold in step.folds if fold.new_bias is not None), None)
    if made is not None:
        raise InputError(
            f"the plan gave {made.new_bias!r} a bias that the wide model has not: it cannot be undone"
        )
    chosen = []
    for space in spaces:
        width = _width(n, step, folds, space)
        if width is not None:
            chosen.append((space, width))
    pulls = [
        Pull(s.name, s.members, torch.zeros(w, dtype=torch.int64), torch.zeros(w).bool(), torch.zeros(w).double())
        for s, w in chosen
    ]
    blank = Widening(n, kinds, pulls, frozenset(), _MODE, Draws(torch.Generator()))
    try:
        given, maps = _read_folds(blank, folds)
        final = [_pull(pull, *found) for pull, found in zip(pulls, maps, strict=True)]
        work = Widening(n, kinds, final, frozenset(), _MODE, Draws(torch.Generator()), given)
        walk(work)
    except Stuck as stuck:
        raise InputError(f"the plan cannot be undone in the space {min(stuck.spaces)!r}: {stuck.reason}") from None
    _check_all(folds, work)
    return work


def _width(n: Numbering, step: Round, folds: Mapping[str, Fold], space: WideSpace) -> int | None:
    """How wide a space was; None where the round did not touch it."""
    roots = n.slots.roots()
    cuts = {(cut.tensor, cut.axis): cut.width for cut in step.cuts}
    for (name, axis), slots in n.slots.bound.items():
        if not torch.equal(roots[slots], space.members):
            continue
        if (name, axis) in cuts:
            return cuts[(name, axis)]
        fold = folds.get(name)
        if fold is not None and axis == (-1 if fold.layout.groups > 1 else int(fold.layout.inputs_first)):
            return fold.width if fold.width > len(slots) else None
    return None


def _read_folds(
    blank: Widening, folds: Mapping[str, Fold]
) -> tuple[dict[Node, tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """For every weight, d and t at its input; for every space, which narrow channel each wide one is a copy of,
    and which constant one it may be."""
    given: dict[Node, tuple[Tensor, Tensor]] = {}
    maps = [(torch.full((len(pull.pi),), -1), torch.full((len(pull.pi),), -1)) for pull in blank.pulls]
    for node, op in blank.kinds.items():
        fold = folds.get(str(op.weight.tensor)) if isinstance(op, Contract) else None
        if fold is None or not isinstance(op, Contract):
            continue
        value = blank.n.values[op.x]
        rows = blank.rows_of(op.x)
        if rows is None or not isinstance(value, Channels):
            continue
        embedding = fold.embedding
        narrow = blank.roots[value.slots[value.labels.reshape(-1)]]
        if len(rows.slot) != embedding.n or len(narrow) != embedding.k:
            raise blank.stuck(narrow)
        given[node] = _scales(embedding, blank, narrow)
        constant = value.rows[value.labels.reshape(-1)].is_constant()[embedding.narrow]
        slot, source = rows.slot[embedding.wide], narrow[embedding.narrow]
        for k, pull in enumerate(blank.pulls):
            own = (slot >= blank.first[k]) & (slot < blank.first[k + 1])
            for into, some in zip(
                maps[k], (own & ~constant, own & constant & (embedding.values == 1)), strict=True
            ):
                channel = slot[some] - blank.first[k]
                member = torch.searchsorted(pull.members, source[some])
                if bool(((into[channel] >= 0) & (into[channel] != member)).any()):
                    raise blank.stuck(pull.members)
                into[channel] = member
    return given, maps


def _scales(embedding: ChannelEmbedding, blank: Widening, narrow: Tensor) -> tuple[Tensor, Tensor]:
    """d (N,) and t (N,) at a weight's input; NaN for channels that it does not read."""
    d = torch.full((embedding.n,), torch.nan, dtype=torch.float64)
    d[embedding.wide] = embedding.values
    return d, torch.where(d.isnan(), torch.nan, embedding.t)


def _pull(blank: Pull, found: Tensor, constant: Tensor) -> Pull:
    """The pull-back map. A kept constant channel, or one that no weight reads, goes to one null."""
    k, pi = blank.k, found.clone()
    for member in (torch.bincount(pi[pi >= 0], minlength=k) == 0).nonzero().squeeze(1):
        free = pi < 0
        likely = free & (constant == member)
        pi[int((likely if bool(likely.any()) else free).long().argmax())] = member
    count = torch.bincount(pi + 1, minlength=k + 1).double()
    share = torch.where(pi >= 0, 1 / count[pi + 1], 0.0)
    return Pull(blank.name, blank.members, pi, pi >= 0, share, varied=False)


def _check_all(folds: Mapping[str, Fold], work: Widening) -> None:
    """Every weight that the round made narrower is wide again."""
    for name, fold in folds.items():
        groups, _, inputs, _ = fold.layout.canonical(work.new.get(name, work.n.graph.tensors[name])).shape
        if groups * inputs != fold.embedding.n:
            raise InputError(f"the plan cannot be undone: {name!r} is read where its width cannot grow")
