"""Two weights at once: what the first makes of its inputs, so that the second has the features that it needs.

A weight's own fit makes each kept channel as much like itself as it can be. What counts is only what the next weight
makes of them: where nothing else reads them, channels may move. With first weight W, second weight B, a batch norm
and an activation phi between, and target t of the second:

    min over W, c   |phi(a(W x + c)) B - t|^2 + damping |change|^2_M

by Gauss-Newton steps; the normal equations are solved by conjugate gradients, with M = D (x) H as preconditioner and
metric: H the covariance of x, D what a channel's square sends on. Steps are taken as far as held-out samples agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_prune.calibrate import Program, Values
from ep_prune.graph import Extreme, Item, Node, Normalize, Pass, Pointwise, Stencil
from ep_prune.readers import Reader, Structure
from ep_prune.rules import kind_of

STEPS, INNER = 2, 8
DAMPING = 0.03
IMAGES = 256


@dataclass(frozen=True)
class Pair:
    first: Reader
    second: Reader
    between: tuple[Node, ...]


def pairs(program: Program, readers: Sequence[Reader]) -> dict[Node, Pair]:
    """By the second weight's node."""
    graph = program.graph
    users = graph.users()
    by_node = {r.node: r for r in readers}
    found = {}
    for first in readers:
        if not _plain(first):
            continue
        at, between = first.node, []
        while len(users[at]) == 1 and at not in graph.outputs:
            at = users[at][0]
            if at in by_node:
                second = by_node[at]
                if _plain(second) and second.op.x is (between[-1] if between else first.node) and between:
                    found[at] = Pair(first, second, tuple(between))
                break
            kind = kind_of(at, graph)
            if not isinstance(kind, Normalize | Pointwise | Pass | Item | Extreme | Stencil):
                break
            others = [o for o in at.operands() if o.tensor is None and o is not (between[-1] if between else first.node)]
            if others:
                break
            between.append(at)
    return found


def _plain(reader: Reader) -> bool:
    return (
        not reader.kept_whole and not reader.by_channels and reader.op.layout.groups == 1
        and not reader.op.layout.inputs_first and reader.op.weight.tensor == reader.name
    )


class Block:
    """One pair in narrow shapes."""

    def __init__(self, program: Program, structure: Structure, pair: Pair, kept: Tensor, own: Mapping[str, Tensor]):
        self.program, self.structure, self.pair, self.kept, self.own = program, structure, pair, kept, own
        self.nodes = [pair.first.node, *pair.between, pair.second.node]
        self.base: Values = {}
        device = program.graph.tensors[pair.first.name].device
        for node in self.nodes:
            for operand in node.operands():
                if operand.tensor is not None:
                    self.base[operand] = self._narrow(str(operand.tensor))
        for reader in (pair.first, pair.second):
            name = str(reader.constant)
            if reader.new_bias is not None and name in own:
                self.base[name] = own[name][kept[reader.outputs.reshape(-1)].to(device)]
        self.inputs = kept[pair.first.roots].nonzero().squeeze(1).to(device)
        self.outputs = kept[pair.second.outputs.reshape(-1)].nonzero().squeeze(1).to(device)
        self.weight = self.base[pair.first.op.weight]
        self.constant = torch.zeros(self.weight.shape[0], device=device)
        self.sign = 1.0

    def _narrow(self, name: str) -> Tensor:
        tensor = self.own.get(name, self.program.graph.tensors[name])
        for (own, axis), slots in self.structure.numbering.slots.bound.items():
            if own == name:
                keep = self.kept[self.structure.roots[slots]].nonzero().squeeze(1).to(tensor.device)
                tensor = tensor.index_select(axis, keep)
        return tensor

    def run(self, x: Tensor, weight: Tensor, constant: Tensor) -> Tensor:
        values = dict(self.base)
        values[self.pair.first.op.x] = x
        values[self.pair.first.op.weight] = weight
        for node in self.nodes:
            values[node] = self.program.call(node, values)
            if node is self.nodes[0]:
                axis = self.pair.first.op.layout.axis
                values[node] = values[node] + constant.reshape([-1 if a == axis else 1 for a in range(values[node].ndim)])
        return values[self.pair.second.node]


def improve(
    block: Block,
    xs: Sequence[Tensor],
    targets: Sequence[Callable[[Tensor], Tensor]],
    xs_held: Sequence[Tensor],
    targets_held: Sequence[Callable[[Tensor], Tensor]],
    covariance: Tensor,
    mean: Tensor,
    damping: float = DAMPING,
    steps: int = STEPS,
    inner: int = INNER,
) -> tuple[Tensor, Tensor, float, float]:
    """weight, constant (narrow), and the held-out loss before and after. targets: residual of an output, weighted."""
    weight, constant = block.weight.clone(), block.constant.clone()
    taps = math.prod(block.pair.first.kernel)
    sizes = weight.shape

    def loss(w: Tensor, c: Tensor, x_: Sequence[Tensor], t_: Sequence[Callable[[Tensor], Tensor]]) -> float:
        return sum(float(t(block.run(x, w, c)).square().sum()) for x, t in zip(x_, t_, strict=True))

    before = now = loss(weight, constant, xs_held, targets_held)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    size = covariance.diagonal().mean()
    lower = torch.linalg.cholesky(covariance + 1e-3 * size * eye)
    mean = mean.to(weight)
    for _ in range(steps):
        graphs = []
        g_w, g_c = torch.zeros_like(weight), torch.zeros_like(constant)
        diagonal = torch.zeros(sizes[0], device=weight.device)
        for x, t in zip(xs, targets, strict=True):
            with torch.enable_grad():
                w, c = weight.detach().requires_grad_(), constant.detach().requires_grad_()
                out = t(block.run(x, w, c))
                zero = torch.zeros_like(out, requires_grad=True)
                backward = torch.autograd.grad(out, (w, c), zero, create_graph=True)
                gradient = torch.autograd.grad(out, (w, c), out.detach(), retain_graph=True)
            graphs.append((w, c, out, zero, backward))
            g_w += gradient[0]
            g_c += gradient[1]
        # what a channel's square sends on: Hutchinson
        for w, c, out, zero, backward in graphs:
            noise = torch.randint(0, 2, out.shape, device=out.device).to(out) * 2 - 1
            with torch.enable_grad():
                part = torch.autograd.grad(out, (w, c), noise, retain_graph=True)
            diagonal += part[0].flatten(1).double().matmul(torch.linalg.inv(covariance + 1e-3 * size * eye)).mul(part[0].flatten(1)).sum(1).to(diagonal) / len(covariance)
        diagonal = diagonal.clamp_min(1e-6 * float(diagonal.max()) + 1e-30)

        def metric(v: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            flat = v[0].flatten(1)
            shift = v[1] * block.sign + flat @ mean
            m = diagonal.unsqueeze(1) * (flat.double() @ (covariance + 1e-3 * size * eye)).to(flat) + torch.outer(diagonal * shift, mean)
            return m.reshape(sizes), diagonal * shift * block.sign

        def solve(v: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            shift = v[1] * block.sign / diagonal
            flat = v[0].flatten(1) - torch.outer(v[1] * block.sign, mean)
            d = torch.cholesky_solve(flat.double().T, lower).T.to(flat) / diagonal.unsqueeze(1)
            return d.reshape(sizes), (shift - d @ mean) * block.sign

        def normal(v: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            a, b = (damping * p for p in metric(v))
            for w, c, out, zero, backward in graphs:
                with torch.enable_grad():
                    (image,) = torch.autograd.grad(backward, zero, v, retain_graph=True)
                    part = torch.autograd.grad(out, (w, c), image.detach(), retain_graph=True)
                a, b = a + part[0], b + part[1]
            return a, b

        change = _conjugate(normal, solve, (-g_w, -g_c), inner)
        for halving in range(5):
            w_, c_ = weight + change[0] * 0.5**halving, constant + change[1] * 0.5**halving
            new = loss(w_, c_, xs_held, targets_held)
            if new < now:
                weight, constant, now = w_, c_, new
                break
        else:
            break
    return weight, constant, before, now


def _conjugate(normal: Any, solve: Any, right: tuple[Tensor, Tensor], inner: int) -> tuple[Tensor, Tensor]:
    solution = tuple(torch.zeros_like(r) for r in right)
    left = right
    towards = solve(left)
    square = _inner(left, towards)
    for _ in range(inner):
        image = normal(towards)
        step = square / _inner(towards, image).clamp_min(1e-30)
        solution = tuple(s + step * t for s, t in zip(solution, towards, strict=True))
        left = tuple(g - step * i for g, i in zip(left, image, strict=True))
        scaled = solve(left)
        fresh = _inner(left, scaled)
        towards = tuple(z + fresh / square * t for z, t in zip(scaled, towards, strict=True))
        square = fresh
    return solution


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(p.double() * q.double()).sum() for p, q in zip(a, b, strict=True)]).sum().float()
