"""Second moments of what modules read, and of what the wide model writes there, in one pass for all of them.

Rows are drawn at the same random places of the narrow and of the wide model, in each batch other ones; the last
quarter of a batch's rows is held out, to choose how far a fit may go (`projection.fit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ep_prune.integrations.pruning_feed import Course, Enough, Feed, evaluating, hooked
from ep_prune.integrations.pruning_sites import ROWS, Site
from ep_prune.projection import Moments

EXACT = 1536
"""Columns up to which products are summed up in float64; of more, in the model's type, batch by batch."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """One module's sums. keep (n,): those of the narrow model's input channels to look at; outputs (n,): which of
    the wide model's outputs are still there; wide: how the wide model's module is seen."""

    site: Site
    keep: Tensor | None = None
    outputs: Tensor | None = None
    wide: Site | None = None


@dataclass
class Sums:
    """Moments of rows to fit on, and of rows held out."""

    train: Moments
    held_out: Moments

    @staticmethod
    def of(x: Tensor, y: Tensor) -> Sums:
        sizes = (x.shape[0], x.shape[2], y.shape[2])
        return Sums(Moments.empty(*sizes, x.device), Moments.empty(*sizes, x.device))

    def add(self, x: Tensor, y: Tensor) -> None:
        if x.shape[2] <= EXACT:
            x, y = x.double(), y.double()
        cut = x.shape[1] - x.shape[1] // 4
        self.train.add(x[:, :cut], y[:, :cut])
        self.held_out.add(x[:, cut:], y[:, cut:])


def quota(feed: Feed, number: int) -> int:
    """How many rows to take from a batch."""
    return max(1, ROWS * feed.sizes[number] // feed.samples)


def targets(wanted: Wanted, module: nn.Module, x: Tensor, y: Tensor, most: int, seed: int) -> Tensor:
    """What a fit is to come near to (g, r, o): the wide model's outputs that are left; by channels, its inputs."""
    if wanted.site.by_channels:
        return (wanted.wide or wanted.site).read(module, x, None, most, seed)
    rows = wanted.site.written(module, y, most, seed)
    rows = rows if wanted.outputs is None else rows[:, wanted.outputs]
    return rows.reshape(len(rows), wanted.site.groups, -1).transpose(0, 1)


def collect(
    narrow: nn.Module, wide: nn.Module | None, wanted: Mapping[str, Wanted], feed: Feed, course: Course
) -> dict[str, Sums]:
    """Sums for all modules of `wanted` that run: x of the narrow model, y of the wide one (None: no y).

    Passes end where the last of them has run.
    """
    found: dict[str, Sums] = {}
    names = [n for n in dict.fromkeys(course.calls) if n in wanted]
    expected = sum(course.calls.count(n) for n in names)
    inside = [m for m in (narrow, wide) if m is not None]
    modules = [dict(m.named_modules()) for m in inside]
    for number in range(len(feed.batches)):
        most = quota(feed, number)
        written: dict[str, list[Tensor]] = {n: [] for n in names}
        left = [expected] * 2

        def aim(name: str, x: Tensor, y: Tensor | None, most: int = most, seed: int = number,
                into: dict[str, list[Tensor]] = written, left: list[int] = left) -> None:  # fmt: skip
            assert y is not None
            into[name].append(targets(wanted[name], modules[-1][name], x, y, most, seed))
            _count_down(left, 0)

        def take(name: str, x: Tensor, y: Tensor | None, most: int = most, seed: int = number,
                 given: dict[str, list[Tensor]] = written, left: list[int] = left) -> None:  # fmt: skip
            want = wanted[name]
            rows = want.site.read(modules[0][name], x, want.keep, most, seed)
            aims = given[name].pop(0) if wide is not None else rows.new_zeros(*rows.shape[:2], 0)
            if name not in found:
                found[name] = Sums.of(rows, aims)
            found[name].add(rows, aims)
            _count_down(left, 1)

        with evaluating(*inside):
            if wide is not None:
                with hooked(wide, names, aim):
                    feed.call(wide, number)
            with hooked(narrow, names, take):
                feed.call(narrow, number)
    return found


def _count_down(left: list[int], which: int) -> None:
    left[which] -= 1
    if left[which] == 0:
        raise Enough


def covariances(model: nn.Module, sites: Mapping[str, Site], feed: Feed, course: Course) -> dict[str, Tensor]:
    """(g, p, p) of what every module reads."""
    found = collect(model, None, {name: Wanted(site) for name, site in sites.items()}, feed, course)
    return {name: (sums.train + sums.held_out).centred()[0] for name, sums in found.items()}


def order(course: Course, names: Sequence[str] | set[str]) -> list[str]:
    """Names in the order in which they first run."""
    return [name for name in dict.fromkeys(course.calls) if name in set(names)]


def fit_in_one(feed: Feed, course: Course, names: Sequence[str], memory: int) -> Feed | None:
    """All samples as one batch, if that takes no more than `memory` bytes and every module runs once."""
    if any(course.calls.count(name) != 1 for name in names) or 4 * course.bytes_a_sample * feed.samples > memory:
        return None
    return feed.joined()


def device_memory(model: nn.Module) -> int:
    """Bytes that activations of one pass may take: 2 GiB, or half of what an accelerator has free."""
    at = next(model.parameters(), torch.empty(0)).device
    if at.type == "cuda":
        return torch.cuda.mem_get_info(at)[0] // 2
    return 2 << 30
