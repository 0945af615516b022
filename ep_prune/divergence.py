"""How far two networks' answers are apart, without labels.

Scores of classes, an output (N, C) with C > 1: KL(softmax(wide) || softmax(narrow)), a sample's mean, in nats. Any
other floating output: half the mean squared difference, in units of the output's own variance over the samples.
Outputs that are not floating do not count. `own_answer_loss` is what has the Fisher information of the same
measure as the mean square of its gradient: labels drawn from the softmax, or normal noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def is_scores(output: Tensor) -> bool:
    """Whether an output is taken for scores of classes."""
    return output.ndim == 2 and output.shape[1] > 1


def divergence(wide: Sequence[Tensor], narrow: Sequence[Tensor]) -> float:
    """Of the answers to one batch. inf where the narrow one is not finite."""
    total = 0.0
    for a, b in zip(wide, narrow, strict=True):
        if not a.is_floating_point() or not a.numel():
            continue
        a, b = a.double(), b.double()
        if is_scores(a):
            p, q = a.log_softmax(1), b.log_softmax(1)
            found = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(1).mean()
        else:
            found = 0.5 * (a - b).square().mean() / _variance(a)
        total += float(found.nan_to_num(torch.inf))
    return total


def agreement(wide: Sequence[Tensor], narrow: Sequence[Tensor]) -> float | None:
    """The share of samples whose first class scores have the same largest one; None without class scores."""
    for a, b in zip(wide, narrow, strict=True):
        if a.is_floating_point() and is_scores(a):
            return float((a.argmax(1) == b.argmax(1)).double().mean())
    return None


def classes_seen(batches: Iterable[Sequence[Tensor]]) -> tuple[int, int, int] | None:
    """Of answers to batches: how many classes are decided for, of how many, on how many samples; None without
    any."""
    seen: list[Tensor] = []
    classes = 0
    for batch in batches:
        scores = next((a for a in batch if a.is_floating_point() and is_scores(a)), None)
        if scores is not None:
            classes = scores.shape[1]
            seen.append(scores.argmax(1))
    return (len(torch.unique(torch.cat(seen))), classes, sum(map(len, seen))) if seen else None


def own_answer_loss(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A sum over samples whose gradients' second moment is the Fisher information of `divergence`."""
    total = torch.zeros((), device=outputs[0].device if outputs else None)
    for output in outputs:
        if not output.is_floating_point() or not output.requires_grad:
            continue
        if is_scores(output):
            chances = output.detach().softmax(1).double().cpu()
            labels = torch.multinomial(chances.nan_to_num(1.0), 1, generator=generator).squeeze(1)
            total = total + torch.nn.functional.cross_entropy(output, labels.to(output.device), reduction="sum")
        else:
            noise = torch.randn(output.shape, generator=generator).to(output)
            each = output.numel() // max(len(output), 1) if output.ndim else 1
            size = (_variance(output.detach()) * each).sqrt()
            total = total + (output * noise).sum() / size
    return total


def _variance(output: Tensor) -> Tensor:
    """Of an output over the samples, or its mean square where it does not vary."""
    varies = output.var(0, correction=0).mean() if output.ndim and len(output) > 1 else output.new_zeros(())
    return torch.where(varies > 0, varies, output.square().mean()).clamp_min(torch.finfo(output.dtype).tiny)
