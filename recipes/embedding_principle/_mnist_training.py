"""Training of the MNIST recipe: full-batch Adam from a very small start, resumable.

Gradients are written out, in float32. Inputs that are 0 in all training samples never get one; their weights stay
at their start (1e-8) and are left out of the arithmetic, but not out of the network.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from recipes.embedding_principle import common
from recipes.embedding_principle._mnist_merge import groups, live
from recipes.embedding_principle._mnist_network import Images, Network

SAVE_EVERY = 500
LOG_EVERY = 50


@dataclass
class Run:
    """A training run: network, Adam's moments, and the curve (epoch, loss, live neurons, groups)."""

    network: Network
    moments: list[Tensor]
    squares: list[Tensor]
    epoch: int = 0
    curve: list[list[float]] = field(default_factory=list)
    done: bool = False
    seconds: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        names = ("incoming", "outgoing")
        return {
            **dict(zip(names, (self.network.incoming, self.network.outgoing), strict=True)),
            **{f"{name}.moment": tensor for name, tensor in zip(names, self.moments, strict=True)},
            **{f"{name}.square": tensor for name, tensor in zip(names, self.squares, strict=True)},
        }


def fresh(args: argparse.Namespace, seed: int, head: str, inputs: int) -> Run:
    """Weights from N(0, 1/m^6), the paper's scale: standard deviation m^-3."""
    generator = torch.Generator().manual_seed(seed)
    m = args.width
    incoming = torch.randn(m, inputs, generator=generator, dtype=torch.float64) * m**-3.0
    outgoing = torch.randn(m, 10, generator=generator, dtype=torch.float64) * m**-3.0
    return start(Network(incoming.float(), outgoing.float(), head))


def start(network: Network) -> Run:
    """A run from these weights, with a fresh optimizer."""
    zeros = [torch.zeros_like(network.incoming), torch.zeros_like(network.outgoing)]
    return Run(network, zeros, [zero.clone() for zero in zeros])


def train(args: argparse.Namespace, images: Images, seed: int, head: str) -> Run:
    """Full-batch Adam until the loss is at most `args.loss`, or `args.epochs` steps are done. Goes on from its
    state file, and is done at once if that says so."""
    path = args.out / f"mnist.{head}.{seed}.state"
    run = _resume(path, args, head) or fresh(args, seed, head, images.x.shape[1])
    if run.done:
        return run
    with common.progress(args.epochs, f"{head}, seed {seed}") as bar:
        bar.update(run.epoch)
        while not run.done:
            begin = time.perf_counter()
            advance_(run, images, args.lr, min(run.epoch + SAVE_EVERY, args.epochs), args.loss)
            run.seconds += time.perf_counter() - begin
            run.done |= run.epoch >= args.epochs
            values = {"epoch": run.epoch, "curve": run.curve, "done": run.done, "seconds": run.seconds}
            common.save_state(path, args, run.tensors(), values)
            bar.update(run.epoch - bar.n)
            bar.set_postfix(loss=run.curve[-1][1], groups=run.curve[-1][3])
    return run


def _resume(path: Path, args: argparse.Namespace, head: str) -> Run | None:
    state = common.load_state(path, args)
    if state is None:
        return None
    tensors, values = state
    both = ("incoming", "outgoing")
    network = Network(tensors["incoming"], tensors["outgoing"], head)
    moments, squares = ([tensors[f"{name}.{kind}"] for name in both] for kind in ("moment", "square"))
    return Run(network, moments, squares, values["epoch"], values["curve"], values["done"], values["seconds"])


def advance_(run: Run, images: Images, lr: float, until: int, goal: float = 0.0, log: bool = True) -> None:
    """Steps of Adam (PyTorch's defaults) up to epoch `until`, or until the loss is at most `goal` (`run.done`).

    With r = d loss / d f and D = (r A') * [H > 0]: the gradients are D' x for W and H' r for A.
    """
    torch.set_flush_denormal(True)
    used = (images.x != 0).any(dim=0)
    x, targets = images.x[:, used].float(), images.targets().float()
    weights = [run.network.incoming[:, used].contiguous(), run.network.outgoing.clone()]
    moments = [run.moments[0][:, used].contiguous(), run.moments[1]]
    squares = [run.squares[0][:, used].contiguous(), run.squares[1]]
    softmax = run.network.head == "softmax"
    beta, gamma, epsilon = 0.9, 0.999, 1e-8
    while True:
        hidden = (x @ weights[0].T).relu_()
        f = hidden @ weights[1]
        if softmax:
            f = f.softmax(1)
        residual = f - targets
        loss = float(residual.square().mean())
        run.done = loss <= goal
        last = run.done or run.epoch >= until
        if log and (run.epoch % LOG_EVERY == 0 or last):
            _log(run, loss, Network(*weights, run.network.head))
        if last:
            break
        residual *= 2 / residual.numel()
        if softmax:
            residual = f * (residual - (f * residual).sum(1, keepdim=True))
        behind = (residual @ weights[1].T).mul_(hidden > 0)
        run.epoch += 1
        rate = lr / (1 - beta**run.epoch)
        root = (1 - gamma**run.epoch) ** 0.5
        for weight, moment, square, gradient in zip(
            weights, moments, squares, (behind.T @ x, hidden.T @ residual), strict=True
        ):
            moment.lerp_(gradient, 1 - beta)
            square.mul_(gamma).addcmul_(gradient, gradient, value=1 - gamma)
            weight.addcdiv_(moment, (square.sqrt() / root).add_(epsilon), value=-rate)
    torch.set_flush_denormal(False)
    whole = [run.network.incoming.clone(), run.moments[0].clone(), run.squares[0].clone()]
    for tensor, part in zip(whole, (weights[0], moments[0], squares[0]), strict=True):
        tensor[:, used] = part
    run.network = Network(whole[0], weights[1], run.network.head)
    run.moments[0], run.squares[0] = whole[1:]


def _log(run: Run, loss: float, network: Network) -> None:
    if run.curve and run.curve[-1][0] == run.epoch:
        return
    kept = live(network)
    count = len(groups(network.take(kept).double(), 0.9))
    run.curve.append([run.epoch, loss, len(kept), count])
