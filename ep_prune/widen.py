"""The embedding principle forwards: a wider network that computes the same function.

A space of k tied channels becomes n > k channels by a pull-back map pi: [n] -> [k] + {null}, onto [k]. At every
program point p of the space

    x'_j = d_j(p) x_pi(j) + e_j(p)        or, for a null, the constant e_j(p):      x' = T_p x + t_p.

What d and e may be follows from the operations between the points (`widen_rules`): batch norm gives any scale,
an activation lets through its symmetry, a sum needs equal scales. Where a weight consumes the space, the wide
weight is any solution of the *forward condition* W' T = diag(r) W[pi], with W' t = 0 on the taps that can fall on
zero padding; elsewhere the bias takes -W' t. The output is the same.

Critical points stay critical under the *backward condition* as well: with T B' = the left inverse made of the
shares g_j that the copies take of their channel's outgoing weight (1 in sum, 0 for nulls), B_out' W' = W B_in', so
that the gradient at every wide channel is g_j / d_j times the narrow one. All solutions of both are

    W' = T_out W B_in' + (1 - T_out B_out') Z (1 - T_in B_in'),          any Z.

The kinds (Zhang, Zhang, Luo, Xu, NeurIPS 2021; Zhang, Li, Zhang, Luo, Xu, JML 2022):

    splitting    copies; d = 1, Z = 0
    threefold    every channel three times, with shares 1, 1, -1 (three-fold global splitting)
    null         neurons that read nothing, and that nothing reads; Z = 0
    compatible   both, with the scales and signs that each activation admits, shares and Z at random

A point is critical for the loss as a function of the trainable parameters, in evaluation mode.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ep_prune.errors import InputError
from ep_prune.graph import Node, Operation
from ep_prune.numbering import Numbering
from ep_prune.plan import Plan, with_modes_of
from ep_prune.rewrite import resize_
from ep_prune.trace import prepare, random_state_kept, trace
from ep_prune.trial import as_double, difference, largest_good, outputs_of, read_in_training
from ep_prune.widen_plan import undo_round
from ep_prune.widen_report import EmbedReport, report_on
from ep_prune.widen_rules import Draws, Mode, Pull, Stuck, Widening, walk
from ep_prune.widen_spaces import WideSpace, closed_layers, numbered, open_spaces

KINDS = ("splitting", "threefold", "null", "compatible")


@dataclass(frozen=True, eq=False)
class _Order:
    """What was asked for: the kind, which condition, and given shares."""

    kind: str
    critical: bool
    coefficients: Mapping[str, Tensor]
    widths: dict[str, int]

    @property
    def mode(self) -> Mode:
        return Mode(self.kind == "compatible", self.critical, self.kind == "compatible" or not self.critical)


@overload
def embed(
    model: nn.Module,
    example_inputs: Any,
    *,
    widths: Mapping[str, int] | None = None,
    kind: str = "compatible",
    critical: bool = True,
    coefficients: Mapping[str, Tensor] | None = None,
    factor: float = 1.5,
    seed: int = 0,
    plan: Plan | None = None,
    full_output: Literal[True],
) -> tuple[nn.Module, EmbedReport]: ...
@overload
def embed(
    model: nn.Module,
    example_inputs: Any,
    *,
    widths: Mapping[str, int] | None = None,
    kind: str = "compatible",
    critical: bool = True,
    coefficients: Mapping[str, Tensor] | None = None,
    factor: float = 1.5,
    seed: int = 0,
    plan: Plan | None = None,
    full_output: Literal[False] = False,
) -> nn.Module: ...
def embed(
    model: nn.Module,
    example_inputs: Any,
    *,
    widths: Mapping[str, int] | None = None,
    kind: str = "compatible",
    critical: bool = True,
    coefficients: Mapping[str, Tensor] | None = None,
    factor: float = 1.5,
    seed: int = 0,
    plan: Plan | None = None,
    full_output: bool = False,
) -> nn.Module | tuple[nn.Module, EmbedReport]:
    """A wider copy of `model`, of the same class, that computes the same function.

    Args:
        model: any `nn.Module` that torch.export takes. It is not changed. Use a float64 model to keep the output
            to rounding.
        example_inputs: as for `reduce`.
        widths: {space: width}, the spaces to widen. A space goes by the first layer that writes to it (see
            `widenable`). Without it, every space that can be widened.
        kind: "splitting", "threefold", "null" or "compatible" (this module's docstring).
        critical: keep critical points critical (backward condition). Without it, outgoing weights are any solution
            of the forward condition, entry by entry.
        coefficients: {space: (n, k) tensor} for a splitting embedding: entry (j, i) is the share that wide channel
            j takes of the outgoing weight of narrow channel i. At most one entry a row is not 0, columns sum to 1
            (forward condition); a row of zeros is a null neuron.
        factor: without widths, a space of k channels gets max(k + 1, round(factor * k)).
        seed: of all that is drawn.
        plan: instead of all these, what `reduce` found: its embeddings are run forwards again. The wide model
            comes back up to what an embedding leaves free (nulls, and the shares of the copies).
        full_output: return (wide, report); the report has the embeddings, what was left alone and why, and the
            dimension of the critical manifold.

    Raises:
        InputError: a width smaller than the model's, a space that does not exist or cannot be widened so,
            coefficients that violate the forward condition. Nothing is built then.
        TraceError: the model cannot be exported.
    """
    with random_state_kept():
        narrow, _ = prepare(model)
        if plan is not None:
            if widths is not None or coefficients:
                raise InputError("a plan says how wide each space was: pass no widths or coefficients beside it")
            wide = copy.deepcopy(narrow)
            refused: dict[str, str] = {}
            work, kind = _undo(wide, example_inputs, plan), "splitting"
            reason = _wrong(narrow, wide, example_inputs)
            if reason:
                raise InputError(f"the plan cannot be undone: {reason}")
        else:
            graph = trace(narrow, example_inputs)
            n, kinds = numbered(graph)
            spaces = open_spaces(n, kinds, read_in_training(narrow, graph, example_inputs))
            order = _order(spaces, widths, kind, critical, coefficients, factor)
            wide, work, refused = _tried(narrow, example_inputs, _Job(n, kinds, spaces, order, seed))
            if widths is not None or coefficients:
                for name, reason in refused.items():
                    raise InputError(
                        f"the space {name!r} cannot be widened so: {reason}; leave it out, or try another kind"
                    )
    with_modes_of(model, wide)
    if not full_output:
        return wide
    trainable = {name for name, parameter in wide.named_parameters() if parameter.requires_grad}
    return wide, report_on(work, {**closed_layers(work.kinds), **refused}, kind, trainable)


@dataclass(frozen=True, eq=False)
class _Job:
    """What all attempts share."""

    n: Numbering
    kinds: Mapping[Node, Operation]
    spaces: list[WideSpace]
    order: _Order
    seed: int


def _tried(narrow: nn.Module, example_inputs: Any, job: _Job) -> tuple[nn.Module, Widening, dict[str, str]]:
    """The wide model, compared with the narrow one: code may use a width in a way that no operation shows.

    Where they differ, spaces are tried one by one, and those that spoil the output are left alone.
    """
    work, refused = _attempts(narrow, job, frozenset(job.order.widths))
    wide = _written(narrow, work)
    reason = _wrong(narrow, wide, example_inputs)
    if not reason:
        return wide, work, refused
    guilty: dict[str, str] = {}
    for pull in work.pulls:
        alone, _ = _attempts(narrow, job, frozenset({pull.name}))
        why = _wrong(narrow, _written(narrow, alone), example_inputs)
        if why:
            guilty[pull.name] = why
    if not guilty:  # each alone is right: take as many together as are

        def right(names: Sequence[str]) -> bool:
            together, _ = _attempts(narrow, job, frozenset(names))
            return not _wrong(narrow, _written(narrow, together), example_inputs)

        good, bad = largest_good([pull.name for pull in work.pulls], right)
        guilty = dict.fromkeys(bad, f"not together with {', '.join(good)}: {reason}")
    work, refused = _attempts(narrow, job, frozenset(job.order.widths) - guilty.keys())
    wide = _written(narrow, work)
    reason = _wrong(narrow, wide, example_inputs)
    if reason:
        raise InputError(f"the wide model differs: {reason}; name fewer spaces in widths")
    return wide, work, {**refused, **guilty}


def _wrong(narrow: nn.Module, wide: nn.Module, example_inputs: Any) -> str:
    """Why the wide model is not the narrow one's equal on the example, in float64; empty where it is."""
    dtype = next((p.dtype for p in narrow.parameters() if p.is_floating_point()), torch.float64)
    limit = 1e-9 if dtype == torch.float64 else min(0.1, 1e3 * torch.finfo(dtype).eps)
    inputs = as_double(example_inputs)
    try:
        torch.manual_seed(0)
        wanted = outputs_of(copy.deepcopy(narrow).double(), inputs)
        torch.manual_seed(0)
        change = difference(wide, [(inputs, wanted)])
    except InputError as error:
        cause = error.__cause__ or error
        return f"the model's code holds on to a width ({' '.join(str(cause).split())[:120]})"
    return (
        f"the model's code uses a width, and the output would change by {change:.1e}"
        if not change <= limit
        else ""
    )


def _written(narrow: nn.Module, work: Widening) -> nn.Module:
    wide = copy.deepcopy(narrow)
    _write(wide, work)
    return wide


def _write(model: nn.Module, work: Widening) -> None:
    new = {name: value.to(work.n.graph.tensors[name]) for name, value in work.new.items()}
    for name, value in new.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name!r} would leave the range of {value.dtype}: widen a float32 or float64 model")
    resize_(model, new, work.groups)


def _undo(model: nn.Module, example_inputs: Any, plan: Plan) -> Widening:
    """Widen `model` in place through the rounds of a plan, the last one first; the walk of the first round."""
    if not plan.rounds:
        raise InputError("the plan has no rounds: the reduction changed nothing")
    for step in reversed(plan.rounds):
        graph = trace(model, example_inputs)
        n, kinds = numbered(graph)
        work = undo_round(n, kinds, open_spaces(n, kinds, read_in_training(model, graph, example_inputs)), step)
        _write(model, work)
    return work


def widenable(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """The spaces that `embed` can widen, with their widths."""
    with random_state_kept():
        narrow, _ = prepare(model)
        graph = trace(narrow, example_inputs)
        n, kinds = numbered(graph)
        kept = read_in_training(narrow, graph, example_inputs)
        return {space.name: len(space.members) for space in open_spaces(n, kinds, kept)}


def _attempts(narrow: nn.Module, job: _Job, names: frozenset[str]) -> tuple[Widening, dict[str, str]]:
    """Walk until nothing is stuck: a space that is goes without signs and offsets, then not at all."""
    order = job.order
    untrained = frozenset(name for name, parameter in narrow.named_parameters() if not parameter.requires_grad)
    refused: dict[str, str] = {}
    calm: set[str] = set()
    while True:
        chosen = [space for space in job.spaces if space.name in names and space.name not in refused]
        draws = Draws(torch.Generator().manual_seed(job.seed))
        pulls = [_pull(space, order, space.name in calm, draws.generator) for space in chosen]
        work = Widening(job.n, job.kinds, pulls, frozenset(calm), order.mode, draws, None, untrained)
        try:
            walk(work)
            return work, refused
        except Stuck as stuck:
            assert stuck.spaces, "an attempt fails over some space"
            lost = frozenset() if stuck.may_calm and stuck.spaces - calm else stuck.spaces
            refused |= dict.fromkeys(lost, stuck.reason)
            calm |= stuck.spaces


def _order(
    spaces: list[WideSpace],
    widths: Mapping[str, int] | None,
    kind: str,
    critical: bool,
    coefficients: Mapping[str, Tensor] | None,
    factor: float,
) -> _Order:
    """What was asked for, checked."""
    if kind not in KINDS:
        raise InputError(f"no embedding of kind {kind!r}: choose one of {', '.join(KINDS)}")
    if not 1 <= factor < 1e6:
        raise InputError(f"a factor of {factor} does not widen: pass one of at least 1")
    narrow = {space.name: len(space.members) for space in spaces}
    whole = {space.name for space in spaces if space.whole}
    given = {name: _shares(name, value, narrow) for name, value in (coefficients or {}).items()}
    if given and (kind != "splitting" or not critical):
        raise InputError(f"coefficients are those of a splitting embedding: pass kind='splitting', not {kind!r}")
    if widths is None and given:
        widths = {name: len(value) for name, value in given.items()}
    for name, shares in given.items():
        if name in whole and float((shares.sum(1) - len(shares.T) / len(shares)).abs().max()) > 1e-12:
            raise InputError(f"a layer norm reads the space {name!r}: only equal shares keep critical points")
    if widths is None:
        if kind in ("threefold", "null"):  # neither is one of equal multiplicities and shares
            narrow = {name: k for name, k in narrow.items() if name not in whole}
        if kind == "threefold":
            chosen = {name: 3 * k for name, k in narrow.items()}
        else:
            chosen = {
                name: k * max(2, round(factor)) if name in whole else max(k + 1, round(factor * k))
                for name, k in narrow.items()
                if factor > 1
            }
        return _Order(kind, critical, given, chosen)
    for name in given.keys() - widths.keys():
        raise InputError(f"coefficients are given for the space {name!r}, which widths does not name")
    for name, width in widths.items():
        _known(name, narrow)
        if not isinstance(width, int) or width > 2**31:
            raise InputError(f"the width of the space {name!r} is {width!r}: pass an integer")
        if width < narrow[name]:
            raise InputError(
                f"the space {name!r} has {narrow[name]} channels: pass a width of at least that, not {width}"
            )
        if name in whole and kind in ("threefold", "null") and width > narrow[name]:
            raise InputError(
                f"a layer norm reads the space {name!r}: only copies, with equal shares, keep the function"
            )
        if name in whole and width % narrow[name]:
            raise InputError(
                f"a layer norm reads the space {name!r} and sees all channels: only a multiple of {narrow[name]}"
                f" channels keeps the function, not {width}"
            )
        if kind == "threefold" and width not in (narrow[name], 3 * narrow[name]):
            raise InputError(f"three-fold splitting makes {3 * narrow[name]} channels of the space {name!r}")
        if name in given and len(given[name]) != width:
            raise InputError(f"the coefficients of {name!r} are for {len(given[name])} channels, not {width}")
    return _Order(kind, critical, given, {name: width for name, width in widths.items() if width > narrow[name]})


def _known(name: str, narrow: Mapping[str, int]) -> None:
    if name not in narrow:
        raise InputError(f"no space {name!r} that can be widened: choose among {', '.join(narrow) or 'none'}")


def _shares(name: str, value: Tensor, narrow: Mapping[str, int]) -> Tensor:
    """Coefficients (n, k) of one space, checked."""
    _known(name, narrow)
    try:
        value = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the coefficients of {name!r} are no matrix: pass a tensor (width, k)") from error
    eps = torch.finfo(value.dtype if value.is_floating_point() else torch.float64).eps
    shares = value.to("cpu", torch.float64)
    k = narrow[name]
    if shares.ndim != 2 or shares.shape[1] != k or len(shares) < k:
        raise InputError(f"the coefficients of {name!r} have shape {tuple(shares.shape)}: pass (width, {k})")
    if bool(((shares != 0).sum(1) > 1).any()):
        raise InputError(f"a row of the coefficients of {name!r} has two entries: a copy is of one channel")
    off = float((shares.sum(0) - 1).abs().max())
    if not off <= 16 * eps * max(1.0, float(shares.abs().max())):
        raise InputError(f"the coefficients of {name!r} violate the forward condition: columns must sum to 1")
    return shares / shares.sum(0)


def _pull(space: WideSpace, order: _Order, calm: bool, generator: torch.Generator) -> Pull:
    """A map of wide channels onto the space's own and null (-1): given, or at random."""
    k, width = len(space.members), order.widths[space.name]
    if space.whole and space.name not in order.coefficients:  # every channel equally often, and with equal shares
        pi = torch.arange(k).repeat(width // k)[torch.randperm(width, generator=generator)]
        share = torch.full((width,), k / width, dtype=torch.float64)
        return Pull(space.name, space.members, pi, _first_copies(pi, k), share, varied=False)
    if space.name in order.coefficients:
        shares = order.coefficients[space.name]
        pi = torch.where((shares != 0).any(1), (shares != 0).long().argmax(1), -1)
        return Pull(space.name, space.members, pi, _first_copies(pi, k), shares.sum(1), varied=False)
    if order.kind == "threefold":
        pi = torch.arange(k).repeat(3)
        share = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64).repeat_interleave(k)
        return Pull(space.name, space.members, pi, torch.arange(3 * k) < k, share, varied=False)
    extra = torch.randint(k, (width - k,), generator=generator)
    nulls = torch.rand(width - k, generator=generator) < 0.4
    if order.kind == "null":
        extra[:] = -1
    elif order.kind == "compatible" and not (calm and order.critical):  # a calm space may have no room for nulls
        extra[nulls] = -1
    pi = torch.cat([torch.arange(k), extra])
    moved = torch.randperm(width, generator=generator)
    pi, plain = pi[moved], (torch.arange(width) < k)[moved]
    count = torch.bincount(pi + 1, minlength=k + 1).double()
    share = torch.where(pi >= 0, 1 / count[pi + 1], 0.0)
    return Pull(space.name, space.members, pi, plain, share)


def _first_copies(pi: Tensor, k: int) -> Tensor:
    """(n,) bool: the first copy of every narrow channel."""
    here = torch.arange(len(pi))
    first = torch.full((k + 1,), len(pi)).scatter_reduce_(0, pi + 1, here, "amin")
    return (here == first[pi + 1]) & (pi >= 0)


__all__ = ["KINDS", "embed", "widenable"]
