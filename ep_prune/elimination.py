"""Which k of n channels to keep: backward elimination on triangular factors, and the least-squares embedding.

A consumer reads n channels x and sends Z = X L to what lies behind it. Written through the kept channels K,

    x ~ T x_K (+ t)        T = argmin || X - X_K T' ||^2        (regression of every channel on the kept ones)

it sends X_K T' L, and T' L is also the best *direct* refit of the outgoing weights: regression commutes with L.
So the loss of a set K is J(K) = min_B || (X L) - X_K B ||^2 + lambda ||B||^2, summed over the consumers, and
taking channel c away raises it by exactly

    J(K - c) - J(K)  =  || B_c ||^2 / M_cc,        M = (X_K' X_K + lambda)^-1,   B = M X_K' X L.

One sweep gives an order of all channels: those whose loss costs least go first. Finding the best K is NP-complete
(Farrugia-Roberts 2023, proximate rank), so the order is a heuristic. Columns are scaled to unit length, so that
lambda is relative; besides numerical rank, it settles ties for the better reason: among sets that span the same,
it prefers those that say it with smaller coefficients (s itself, and not 1 - (1 - s)).

Only the triangular factor of X is needed, X = Q R: `absorbed` takes data in pieces of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-10
"""lambda, relative to the squared length of a channel: parts below 1e-5 of it count as linearly dependent."""

LARGE = 96
"""Up to this many channels the inverse is made anew at each step; beyond, it is updated, with `COARSE` lambda."""

COARSE = 1e-7
DEPENDENT = 1e-9
"""Where more than `LARGE` channels are given, those this near to the span of the others go first of all."""


@dataclass(frozen=True)
class Part:
    """One use of the channels: factor R (m, n) of their values, and where they are sent, L (n, r)."""

    factor: Tensor
    sent: Tensor


def absorbed(factor: Tensor | None, rows: Tensor) -> Tensor:
    """The triangular factor of all rows so far and these (N, n): at most (n, n)."""
    rows = rows if factor is None else torch.cat([factor, rows])
    if rows.shape[0] <= rows.shape[1]:
        return rows
    triangular: Tensor = torch.linalg.qr(rows, mode="r").R
    return triangular


def elimination_order(parts: Sequence[Part], pinned: Tensor) -> Tensor:
    """(n,) all channels, the first k of which are to be kept for any k; pinned ones (n,) bool come first.

    The parts' losses are added as they are: scale `sent` by how much each matters.
    """
    n = len(pinned)
    parts = [_unit(part) for part in parts]
    rest = torch.arange(n)
    gone: list[Tensor] = []
    if n > LARGE and parts:
        spanning = _spanning(parts, pinned)
        gone.append(rest[~spanning])
        rest = rest[spanning]
    if len(rest) > LARGE:
        rest, out = _sweep(parts, rest, pinned, LARGE, COARSE, len(rest) // 32)
        gone.append(out)
    rest, out = _sweep(parts, rest, pinned, int(pinned.sum()), RIDGE, 1)
    return torch.cat([rest, out, *reversed(gone)])


def fitted_embedding(factor: Tensor, keep: Tensor) -> Tensor:
    """T (n, k): every channel through the kept ones, by least squares; those kept are exactly themselves."""
    solved: Tensor = torch.linalg.lstsq(factor[:, keep], factor, rcond=1e-13, driver="gelsd").solution
    embedding = solved.T.contiguous()
    embedding[keep] = torch.eye(len(keep), dtype=factor.dtype)
    return embedding


def _unit(part: Part) -> Part:
    """Channels of length 1, `sent` scaled to match; (n, n) in place of a wider L: only L L' matters."""
    length = torch.linalg.vector_norm(part.factor, dim=0)
    scale = torch.where(length > 0, length, 1.0)
    sent = part.sent * length.unsqueeze(1)
    if sent.shape[1] > sent.shape[0]:
        sent = torch.linalg.qr(sent.T, mode="r").R.T
    return Part(part.factor / scale, sent)


def _spanning(parts: Sequence[Part], pinned: Tensor) -> Tensor:
    """(n,) bool: channels that span the others to `DEPENDENT`: Gram-Schmidt, always the largest effect next."""
    columns = torch.cat([part.factor * torch.linalg.vector_norm(part.sent, dim=1) for part in parts])
    left = columns.square().sum(0)
    chosen = torch.zeros(len(pinned), dtype=torch.bool)
    floor = DEPENDENT**2 * float(left.max())
    while bool((left > floor).any()) and int(chosen.sum()) < min(columns.shape):
        place = int(left.argmax())
        chosen[place] = True
        direction = columns[:, place] / columns[:, place].norm()
        columns = columns - torch.outer(direction, direction @ columns)
        columns[:, chosen] = 0.0
        left = columns.square().sum(0)
    return chosen | pinned


def _sweep(
    parts: Sequence[Part], keep: Tensor, pinned: Tensor, target: int, ridge: float, every: int
) -> tuple[Tensor, Tensor]:
    """Take channels away one by one down to `target`: (kept, gone), `gone` in the order of the last to go first.

    `every`: after how many steps the inverse is made anew.
    """
    gone: list[int] = []
    fixed = pinned[keep]
    inverses, coefficients = _solve(parts, keep, ridge)
    while len(keep) > max(target, 1):
        score = torch.zeros(len(keep), dtype=torch.float64)
        for inverse, coefficient in zip(inverses, coefficients, strict=True):
            score += coefficient.square().sum(1) / inverse.diagonal().clamp_min(1e-300)
        place = int(torch.where(fixed, torch.inf, score).argmin())
        if bool(fixed[place]):
            break
        gone.append(int(keep[place]))
        stay = torch.arange(len(keep)) != place
        keep, fixed = keep[stay], fixed[stay]
        if len(gone) % every == 0:
            inverses, coefficients = _solve(parts, keep, ridge)
            continue
        for k, (inverse, coefficient) in enumerate(zip(inverses, coefficients, strict=True)):
            column = inverse[stay, place] / inverse[place, place]
            inverses[k] = inverse[stay][:, stay] - torch.outer(column, inverse[place, stay])
            coefficients[k] = coefficient[stay] - torch.outer(column, coefficient[place])
    order = torch.tensor([*keep[fixed].tolist(), *keep[~fixed].tolist()], dtype=torch.int64)
    return order, torch.tensor(gone[::-1], dtype=torch.int64)


def _solve(parts: Sequence[Part], keep: Tensor, ridge: float) -> tuple[list[Tensor], list[Tensor]]:
    """M (k, k) and B (k, r) of every part."""
    inverses, coefficients = [], []
    for part in parts:
        kept = part.factor[:, keep]
        gram = kept.T @ kept + ridge * torch.eye(len(keep), dtype=torch.float64)
        inverses.append(torch.cholesky_inverse(torch.linalg.cholesky(gram)))
        coefficients.append(inverses[-1] @ (kept.T @ (part.factor @ part.sent)))
    return inverses, coefficients
