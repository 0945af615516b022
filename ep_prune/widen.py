"""The embedding principle forwards: a wider network that computes the same function.

A space of k tied channels becomes n > k channels by a pull-back map pi: [n] -> [k] + {null}, onto [k]. At every
program point p of the space

    x'_j = d_j(p) x_pi(j) + e_j(p)        or, for a null, the constant e_j(p):      x' = T_p x + t_p.

What d and e may be follows from the operations between the points (`widen_rules`): batch norm gives any scale,
an activation lets through its symmetry, a sum needs equal scales. Where a weight consumes the space, the wide
weight is any solution of W' T = diag(r) W[pi], with W' t = 0 on the taps that can fall on zero padding; elsewhere
the bias takes -W' t. `embed` draws all of it at random: the *general compatible embedding* of Zhang, Li, Zhang,
Luo, Xu (JML 2022), with the scales and signs that each activation admits. Splitting embeddings (copies, d = 1)
and null embeddings are special cases.

Left as they are: spaces with pinned channels (inputs, outputs, what a barrier reads, sizes written in code),
channels of grouped convolutions other than depthwise ones, and weights that are used twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.errors import InputError
from ep_prune.graph import Contract, Graph, Node, Normalize, Operation, Slope
from ep_prune.numbering import Numbering, number_channels
from ep_prune.rewrite import resize_
from ep_prune.rules import kind_of
from ep_prune.slots import EqualCounts, Groups
from ep_prune.trace import prepare, run, trace
from ep_prune.widen_rules import Pull, Stuck, Widening, walk

KINDS = ("splitting", "null", "compatible")


@dataclass(frozen=True)
class WideSpace:
    """A space that can be widened: `members` (k,) are its slots' roots, in order."""

    name: str
    members: Tensor


def embed(
    model: nn.Module,
    example_inputs: Any,
    *,
    factor: float = 1.5,
    widths: Mapping[str, int] | None = None,
    kind: str = "compatible",
    seed: int = 0,
) -> nn.Module:
    """A wider copy of `model`, of the same class, that computes the same function.

    `factor`: every space of k channels gets max(k + 1, round(factor * k)); `widths` names the spaces to widen
    and their widths instead (a space goes by the first layer that writes to it, see `widenable`). `kind`:
    "splitting" (copies), "null" (constant channels) or "compatible" (both, with scales, signs and offsets).
    Exact in real arithmetic; use a float64 model to keep it so to rounding. Raises `InputError`.
    """
    if kind not in KINDS:
        raise InputError(f"no embedding of kind {kind!r}: choose one of {', '.join(KINDS)}")
    if not factor >= 1:
        raise InputError(f"a factor of {factor} does not widen: pass one of at least 1")
    wide, _ = prepare(model)
    n, kinds = _numbered(trace(wide, example_inputs))
    spaces = _spaces(n, kinds)
    chosen = _widths(spaces, factor, widths)
    blocked: set[str] = set()
    calm: set[str] = set()
    while True:
        open_spaces = [space for space in spaces if space.name in chosen and space.name not in blocked]
        generator = torch.Generator().manual_seed(seed)
        pulls = [_pull(space, chosen[space.name], kind, generator) for space in open_spaces]
        work = Widening(n, kinds, pulls, frozenset(calm), kind == "compatible", generator)
        try:
            new, groups = walk(work)
            break
        except Stuck as stuck:
            assert stuck.spaces, "an attempt fails over some space"
            blocked |= stuck.spaces & (calm if stuck.may_calm else stuck.spaces)
            calm |= stuck.spaces
    if widths is not None and blocked:
        name = min(blocked)
        raise InputError(f"the space {name!r} cannot be widened in this network: leave it out of widths")
    resize_(wide, {name: value.to(n.graph.tensors[name]) for name, value in new.items()}, groups)
    try:
        run(wide, example_inputs)
    except InputError as error:
        raise InputError(f"the model's code holds on to a width: {error}") from error
    for narrow_module, wide_module in zip(model.modules(), wide.modules(), strict=False):
        wide_module.training = narrow_module.training
    return wide


def widenable(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """The spaces that `embed` can widen, with their widths."""
    narrow, _ = prepare(model)
    n, kinds = _numbered(trace(narrow, example_inputs))
    return {space.name: len(space.members) for space in _spaces(n, kinds)}


def _numbered(graph: Graph) -> tuple[Numbering, dict[Node, Operation]]:
    """The numbering, with the two sides of every depthwise convolution tied: its channels widen together."""
    n = number_channels(graph)
    for constraint in n.slots.constraints:
        if isinstance(constraint, Groups) and constraint.inputs.shape[1] == 1:
            n.slots.unify(constraint.inputs.expand_as(constraint.outputs), constraint.outputs)
    called = [node for node in graph.nodes if node.tensor is None and node.target is not None]
    return n, {node: kind_of(node, graph) for node in called}


def _spaces(n: Numbering, kinds: Mapping[Node, Operation]) -> list[WideSpace]:
    """Sets of channels that run along the same parameter axes, and may all be widened."""
    roots = n.slots.roots()
    fixed = n.slots.pinned(roots)
    plain = _plainly_used(n, kinds)
    code = torch.zeros(n.slots.count, dtype=torch.int64)
    draw = torch.Generator().manual_seed(0)
    for (name, _), slots in n.slots.bound.items():
        own = torch.unique(roots[slots])
        code[own] += torch.randint(2**62, (1,), generator=draw)  # a hash of the set of axes
        if name not in plain:
            fixed[own] = True
    for constraint in n.slots.constraints:
        if isinstance(constraint, EqualCounts):
            for section in constraint.sections:
                fixed[roots[section]] = True
        elif isinstance(constraint, Groups) and constraint.inputs.shape[1] > 1:
            fixed[roots[constraint.inputs]] = True
            fixed[roots[constraint.outputs]] = True
    found: dict[str, WideSpace] = {}
    taken: set[int] = set()
    for op in kinds.values():
        if not isinstance(op, Contract):
            continue
        name = str(op.weight.tensor)
        axis = -1 if op.layout.groups > 1 else int(op.layout.inputs_first)
        if (name, axis) not in n.slots.bound:
            continue
        own = torch.unique(roots[n.slots.bound[(name, axis)]])
        for key in torch.unique(code[own]).tolist():
            members = own[code[own] == key]
            if key in taken or bool(fixed[members].any()):
                continue
            taken.add(key)
            base = name.rpartition(".")[0] or name
            labels = itertools.chain([base], (f"{base}:{k}" for k in itertools.count(1)))
            label = next(label for label in labels if label not in found)
            found[label] = WideSpace(label, members)
    return list(found.values())


def _plainly_used(n: Numbering, kinds: Mapping[Node, Operation]) -> set[str]:
    """Tensors that exactly one operation reads, under one name, in a role whose algebra is known here."""
    reads: dict[str, int] = {}
    roles: set[str] = set()
    for node, op in kinds.items():
        for operand in node.operands():
            if operand.tensor is not None:
                reads[operand.tensor] = reads.get(operand.tensor, 0) + 1
        if isinstance(op, Contract):
            parts: Iterable[Node | None] = (op.weight, op.bias)
        elif isinstance(op, Normalize) and op.weight is not None and op.bias is not None:
            parts = (op.weight, op.bias, op.mean, op.variance)
        elif isinstance(op, Slope):
            parts = (op.slope,)
        else:
            continue
        roles |= {part.tensor for part in parts if part is not None and part.tensor is not None}
    return {name for name in roles if reads[name] == 1 and len(n.graph.aliases.get(name, (name,))) == 1}


def _widths(spaces: list[WideSpace], factor: float, widths: Mapping[str, int] | None) -> dict[str, int]:
    narrow = {space.name: len(space.members) for space in spaces}
    if widths is None:
        return {name: max(k + 1, round(factor * k)) for name, k in narrow.items()} if factor > 1 else {}
    for name, width in widths.items():
        if name not in narrow:
            raise InputError(f"no space {name!r} that can be widened: choose among {', '.join(narrow) or 'none'}")
        if width < narrow[name]:
            raise InputError(
                f"the space {name!r} has {narrow[name]} channels: pass a width of at least that, not {width}"
            )
    return {name: width for name, width in widths.items() if width > narrow[name]}


def _pull(space: WideSpace, width: int, kind: str, generator: torch.Generator) -> Pull:
    """A random map of `width` wide channels onto the space's own and null (-1)."""
    k = len(space.members)
    extra = torch.randint(k, (width - k,), generator=generator)
    if kind == "null":
        extra[:] = -1
    elif kind == "compatible":
        extra[torch.rand(width - k, generator=generator) < 0.4] = -1
    pi = torch.cat([torch.arange(k), extra])
    order = torch.randperm(width, generator=generator)
    return Pull(space.name, space.members, pi[order], (torch.arange(width) < k)[order])
