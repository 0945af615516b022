"""The narrow model's weights: least squares from what it still reads to what the wide model wrote.

    Merger.begin()      keeps copies of the model: `wide`, whose outputs are the aim, and `before`, as it was when
                        this step began. While nothing but pruning changes weights, `wide` stays; after any
                        training it is taken anew
    Merger.dropped()    a group is gone: which channels are left where
    Merger.merge()      refit modules on the inputs that they had before the step, less the channels that are gone
    Merger.sweep()      refit modules one after the other in the order in which they run, on what the narrow model
                        reads by then: earlier errors are corrected where they can be
    without_data()      no pass: merge by the moments that weights and batch norms record (`pruning_prior`)

A constant goes into the bias; without one, into the running mean of the batch norm behind; else a bias is made.
Weights that several modules share, and parametrized ones, are left as they were cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.errors import InputError
from ep_prune.integrations.pruning_feed import Course, Feed, evaluating, hooked
from ep_prune.integrations.pruning_host import (
    READ,
    WRITE,
    Group,
    consumers,
    fingerprint,
    indices,
    norm_after,
    untouchable,
    whole,
)
from ep_prune.integrations.pruning_moments import (
    Sums,
    Wanted,
    collect,
    device_memory,
    fit_in_one,
    order,
    quota,
    targets,
)
from ep_prune.integrations.pruning_prior import spread_of
from ep_prune.integrations.pruning_sites import Site
from ep_prune.projection import fit, through

NEARLY_EXACT = 1e-3
"""Share of the target's variance left over, below which the ridge's own bias counts: a second fit takes it out."""
NOTHING = 1e-6
"""A constant of less than this share of the outputs' size makes no new bias."""


SHARE = 1e-6
"""Ridge of the fits without data, whose moments have no noise."""


class Merger:
    """State of one pruner. kept: what is left of each module's inputs and outputs, as indices into a copy."""

    def __init__(self, graph: Any, feed: Feed) -> None:
        self.graph, self.feed = graph, feed
        self.model: nn.Module = graph.model
        self.wide = self.before = self.model
        self.course = Course((), 1)
        self.mark: list[tuple[Any, ...]] | None = None
        self.of_wide: dict[str, tuple[Tensor, Tensor]] = {}
        self.of_before: dict[str, tuple[Tensor, Tensor]] = {}
        self.strides: dict[str, int] = {}
        self.touched: set[str] = set()
        self.untied: set[str] = set()

    def begin(self) -> None:
        """Take copies. Raises `InputError` where the model cannot be copied, or does not run."""
        self.course = Course.of(self.model, self.feed)
        self.untied = untouchable(self.model)
        self.touched = set()
        same = self.mark == fingerprint(self.model)
        self.before = _copied(self.model)
        self.of_before = _everything(self.model)
        if not same:
            self.wide, self.of_wide = self.before, _everything(self.model)

    def end(self) -> None:
        """Forget the copy of before the step."""
        self.before = self.wide
        self.mark = fingerprint(self.model)

    def strides_of(self, group: Group) -> None:
        """Remember how flattened images lie in linear layers, before the group is cut."""
        for consumer in consumers(group):
            stride = consumer.stride
            if stride > 1:
                self.strides[consumer.name] = stride

    def dropped(self, group: Group) -> list[str]:
        """Count what a group has taken away; the modules that read it."""
        inputs, outputs = indices(group, READ), indices(group, WRITE)
        for kept in (self.of_wide, self.of_before):
            for name in {*inputs, *outputs} & set(kept):
                read, written = kept[name]
                kept[name] = (_without(read, inputs.get(name, [])), _without(written, outputs.get(name, [])))
        names = [n for n in inputs if n in self.course.calls and n not in self.untied]
        self.touched |= set(names)
        return names

    # ---- fits --------------------------------------------------------------------------------------------

    def merge(self, names: Iterable[str]) -> None:
        """Refit on the inputs before the step."""
        wanted = {name: self._wanted(name, self.of_before[name][0]) for name in names}
        if wanted:
            for name, sums in collect(self.before, self.wide, wanted, self.feed, self.course).items():
                self._install(name, wanted[name], sums)

    def sweep(self, course: Course) -> None:
        """Refit what was touched, front to back; course: of the narrow model."""
        self.course = course
        names = order(self.course, self.touched)
        if not names:
            return
        wanted = {name: self._wanted(name, None) for name in names}
        whole = fit_in_one(self.feed, self.course, names, device_memory(self.model))
        if whole is None:
            for name in names:
                sums = collect(self.model, self.wide, {name: wanted[name]}, self.feed, self.course)
                self._install(name, wanted[name], sums[name])
            return
        # One batch: every weight is fitted at the moment when the pass comes to it.
        aims: dict[str, Tensor] = {}
        most = quota(whole, 0)
        wide, narrow = dict(self.wide.named_modules()), dict(self.model.named_modules())

        def aim(name: str, x: Tensor, y: Tensor | None) -> None:
            assert y is not None
            aims[name] = targets(wanted[name], wide[name], x, y, most, 0).clone()

        def refit(name: str, x: Tensor, y: Tensor | None) -> None:
            rows = wanted[name].site.read(narrow[name], x, None, most, 0)
            sums = Sums.of(rows, aims[name])
            sums.add(rows, aims.pop(name))
            self._install(name, wanted[name], sums)

        with evaluating(self.wide, self.model):
            with hooked(self.wide, names, aim):
                whole.call(self.wide, 0)
            with hooked(self.model, names, refit, before=True):
                whole.call(self.model, 0)

    def _wanted(self, name: str, keep: Tensor | None) -> Wanted:
        wide = self.wide.get_submodule(name)
        stride = self.strides.get(name, 1)
        seen = Site.of(wide, stride)
        narrow = Site.of(self.model.get_submodule(name), stride)
        site = Site(narrow.groups, narrow.taps, stride, narrow.transposed, seen.by_channels)
        return Wanted(site, keep, self.of_wide[name][1], seen)

    def _install(self, name: str, wanted: Wanted, sums: Sums) -> None:
        """Fit one module and write its weight and its constant."""
        module, wide = self.model.get_submodule(name), self.wide.get_submodule(name)
        site, outputs = wanted.site, self.of_wide[name][1]
        weight = module.get_parameter("weight")
        if site.by_channels:
            view, constant = self._through_channels(name, wanted, sums)
        else:
            found = _nearest(sums, site.view(weight.detach()))
            view, constant = found
        if not bool(view.isfinite().all() and constant.isfinite().all()):
            return  # nothing that can be fitted: the weight stays as it was cut
        weight.data.copy_(site.restore(view, weight.shape))
        scale = (sums.train.yy.sum() / max(sums.train.rows, 1)).sqrt()
        write_constant(
            self.graph,
            name,
            module,
            constant.reshape(-1),
            _origin(self.graph, self.wide, wide, name, outputs),
            float(scale),
        )

    def _through_channels(self, name: str, wanted: Wanted, sums: Sums) -> tuple[Tensor, Tensor]:
        wide, site = self.wide.get_submodule(name), wanted.site
        read, written = self.of_wide[name]
        kept = site.channels_of(read)
        original = torch.zeros(site.groups, sums.train.y.shape[1], len(kept) // site.groups, dtype=torch.float64)
        each = kept.reshape(site.groups, -1) % sums.train.y.shape[1]
        original.scatter_(1, each.unsqueeze(1), 1.0)
        mixed, constant = _nearest(sums, original.to(sums.train.xx.device))
        axis = 1 if site.transposed else 0
        whole = wide.get_parameter("weight").detach()
        if site.groups > 1 and site.transposed:
            written = written[: len(written) // site.groups]
        whole = whole.index_select(axis, written.to(whole.device))
        view = wanted.wide.view(whole).double() if wanted.wide is not None else site.view(whole).double()
        shift = (view @ constant.unsqueeze(2)).reshape(-1, site.spots).sum(1)
        bias = wide.bias
        if isinstance(bias, Tensor):
            shift = shift + bias.detach().double()[self.of_wide[name][1].to(bias.device)]
        return view @ mixed, shift


def _nearest(sums: Sums, original: Tensor) -> tuple[Tensor, Tensor]:
    """The fitted view and its constant."""
    found = fit(sums.train, sums.held_out, original)
    if found.error < NEARLY_EXACT:
        again = fit(sums.train, sums.held_out, found.weight)
        found = again if again.error <= found.error else found
    return found.weight, found.intercept


def write_constant(
    graph: Any, name: str, module: nn.Module, constant: Tensor, origin: Tensor | None, scale: float
) -> None:
    """Make `constant` (outputs,) what a module adds. origin: the batch norm's own mean, from which it goes off."""
    if isinstance(module.bias, Tensor):
        module.bias.data.copy_(constant)
        return
    norm = norm_after(graph, module)
    if norm is not None and origin is not None:
        running: Any = graph.model.get_submodule(norm)
        running.running_mean.copy_(origin - constant.to(origin))
    elif float(constant.norm()) > NOTHING * scale:
        weight = module.get_parameter("weight")
        module.bias = nn.Parameter(constant.to(weight), requires_grad=weight.requires_grad)


def _origin(graph: Any, wide: nn.Module, module: nn.Module, name: str, outputs: Tensor) -> Tensor | None:
    norm = norm_after(graph, graph.model.get_submodule(name))
    if norm is None:
        return None
    mean = wide.get_submodule(norm).running_mean
    return mean[outputs.to(mean.device)] if isinstance(mean, Tensor) else None


def _copied(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"the model cannot be copied ({str(error).splitlines()[0][:160]}): pass one that deepcopy takes"
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    return twin.eval()


def _everything(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> all of its inputs and outputs."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = (torch.arange(module.in_features), torch.arange(module.out_features))
        elif isinstance(module, nn.modules.conv._ConvNd):
            found[name] = (torch.arange(module.in_channels), torch.arange(module.out_channels))
    return found


def _without(kept: Tensor, gone: list[int]) -> Tensor:
    stays = torch.ones(len(kept), dtype=torch.bool)
    stays[gone] = False
    return kept[stays]


# ---- without data ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Merged:
    """One module's weight as it is to be after its group is cut, and what is to be added to its constant."""

    name: str
    weight: Tensor
    constant: Tensor


def without_data(group: Group) -> list[Merged]:
    """What the readers of a group are to be once it is cut, by the moments that weights record."""
    full = whole(group)
    inputs, outputs = indices(group, READ), indices(group, WRITE)
    kept_out = untouchable(group._DG.model)
    found = []
    for consumer in consumers(full):
        module, name = consumer.module, consumer.name
        if name in kept_out or name not in inputs:
            continue
        site = Site.of(module, consumer.stride, largest=0)
        mean, covariance = spread_of(full, consumer, site, len(full[0].idxs))
        wide = site.view(module.weight.detach()).double()
        kept = torch.ones(site.groups * wide.shape[2], dtype=torch.bool, device=wide.device)
        kept[torch.tensor(inputs[name], device=wide.device) // site.stride] = False
        kept = kept.reshape(site.groups, -1)
        narrow = through(wide, covariance, kept, SHARE)
        shift = ((wide - narrow) @ mean.unsqueeze(2)).reshape(-1, site.spots).sum(1)
        columns = kept.nonzero()[:, 1].reshape(site.groups, 1, -1)
        shape = list(module.weight.shape)
        axis = 0 if site.transposed else 1
        shape[axis] = columns.shape[2] * site.stride * (site.groups if site.transposed else 1)
        view = narrow.gather(2, columns.expand(-1, narrow.shape[1], -1))
        weight = site.restore(view, torch.Size(shape))
        rows = _without(torch.arange(len(shift)), outputs.get(name, [])).to(weight.device)
        shift = shift[rows]
        if site.groups > 1 and site.transposed:
            rows = rows[: len(rows) // site.groups]
        found.append(Merged(name, weight.index_select(1 if site.transposed else 0, rows), shift))
    return found


def install(graph: Any, merged: Merged) -> None:
    """Write what `without_data` has found, after the cut."""
    module = graph.model.get_submodule(merged.name)
    module.weight.data.copy_(merged.weight)
    norm = norm_after(graph, module)
    origin = None if norm is None else graph.model.get_submodule(norm).running_mean
    constant = merged.constant if module.bias is None else merged.constant + module.bias.data
    write_constant(graph, merged.name, module, constant, origin, float(merged.weight.norm()))
