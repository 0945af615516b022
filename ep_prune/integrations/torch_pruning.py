"""A plug-in for torch-pruning: an importance that knows what can be merged, and a pruner that merges it.

A script that prunes with torch-pruning changes one line. Either the importance, in any of its pruners:

    imp = RedundancyImportance(calibration=loader)      # was: tp.importance.GroupMagnitudeImportance(p=2)

or the pruner:

    import torch, torch_pruning as tp
    from torchvision.models import resnet18
    from ep_prune.integrations.torch_pruning import EmbeddingPruner

    model = resnet18(weights="DEFAULT")
    example_inputs = torch.randn(1, 3, 224, 224)
    pruner = EmbeddingPruner(                           # was: tp.pruner.BasePruner(
        model,
        example_inputs,
        calibration=loader,                             # a batch or a loader of images; some hundreds, no labels
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
        round_to=8,
    )
    pruner.step()
    print(tp.utils.count_ops_and_params(model, example_inputs))
    torch.save(model, "narrow.pth")

torch-pruning finds the groups of channels that go together, and cuts. What it lacks is what this module adds: the
channels kept take over what those that go have meant to their readers (`pruning_scores`, `pruning_merge`), as far
as one layer's least squares can do it, so that less is left to fine-tuning, or nothing. Grade: *fitted*.

Widths, `ignored_layers`, `round_to`, ratios by layer, heads and groups are torch-pruning's own affair, and come
out as it makes them. Training mode, frozen parameters and tied weights stay as they were, where the host changes
them (`EmbeddingPruner`). Left out: queries and keys of an attention, LSTMs, `nn.MultiheadAttention` and custom
layers are cut, not merged; their channels are scored by their other readers. Behind zero padding a constant is no
constant, and is fitted like anything else. Without data nothing is checked; with data, rows held out say how far a
fit may go.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ep_prune.calibrate import SAMPLES
from ep_prune.errors import InputError
from ep_prune.integrations import pruning_host as host
from ep_prune.integrations.pruning_feed import Course, Feed, Forward, feed_of
from ep_prune.integrations.pruning_merge import Merger, install, without_data
from ep_prune.integrations.pruning_moments import covariances
from ep_prune.integrations.pruning_prior import spread_of
from ep_prune.integrations.pruning_scores import items_of, own_size, readings, scores
from ep_prune.integrations.pruning_sites import Site

SCORED = 1200
"""Columns of a patch in a score, at most; of larger patches, channels count alone, tap by tap."""


class RedundancyImportance(tp.importance.Importance):  # type: ignore[misc]
    """Scores the channels of a group by what their readers lose without them, after merging.

    calibration: a batch or a loader of inputs, labels dropped; None: no data, moments as batch norms have recorded
    them (`pruning_prior`). samples: of these, at most. forward(model, batch): how the model is called, if not as
    model(inputs). refresh: "changed" reads the calibration data again after any change of the model, "widths" only
    when a shape has changed: for pruners that ask for scores at every batch of sparse training.

        imp = RedundancyImportance(calibration=images)
        pruner = tp.pruner.GroupNormPruner(model, (images[:1],), importance=imp, global_pruning=True)
        pruner.step()
    """

    def __init__(
        self,
        calibration: Any = None,
        *,
        samples: int = SAMPLES,
        forward: Forward | None = None,
        refresh: Literal["changed", "widths"] = "changed",
    ) -> None:
        if refresh not in ("changed", "widths"):
            raise InputError(f"refresh is {refresh!r}: pass 'changed' or 'widths'")
        self.calibration, self.samples, self.forward, self.refresh = calibration, samples, forward, refresh
        self._model: nn.Module | None = None
        self._feed: Feed | None = None
        self._mark: list[Any] = []
        self._sites: dict[str, Site] = {}
        self._covariances: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, group: Any, parts: int | None = None, contiguous: bool = False) -> Tensor:
        """(channels of the group,) float32, larger: worth more.

        parts: channels at the same place of so many equal parts go together (default: the groups of convolutions
        and group norms); contiguous: whole parts go (heads).
        """
        count = len(group[0].idxs)
        device = next(group._DG.model.parameters()).device
        if parts is None:
            parts = host.channel_groups(group) if count == host.width(group) else 1
        items = items_of(count, parts, contiguous)
        found = []
        for consumer in host.consumers(group):
            if self.calibration is None:
                site = Site.of(consumer.module, consumer.stride, largest=0)
                covariance = spread_of(group, consumer, site, count)[1]
            else:
                covariances = self._moments(group)
                if consumer.name not in covariances:
                    continue  # it never ran
                site, covariance = self._sites[consumer.name], covariances[consumer.name]
            found += readings(consumer, site, covariance, consumer.module.weight, items)
        if not found:
            return own_size(group).to(device)
        return scores(found, items).to(device)

    def _moments(self, group: Any) -> dict[str, Tensor]:
        """Of all that the model's groups are read by, as it is now."""
        model = group._DG.model
        mark: list[Any] = host.fingerprint(model)
        if self.refresh == "widths":
            mark = [entry[0] for entry in mark]
        names = {consumer.name for consumer in host.consumers(group)}
        if self._model is not model or self._mark != mark or not names <= set(self._sites):
            if self._feed is None:
                fed = isinstance(self.calibration, Feed)
                self._feed = (
                    self.calibration if fed else feed_of(self.calibration, None, model, self.forward, self.samples)
                )
            groups = [group, *group._DG.get_all_groups()]
            self._sites = {
                c.name: Site.of(c.module, c.stride, SCORED) for g in reversed(groups) for c in host.consumers(g)
            }
            self._covariances = covariances(model, self._sites, self._feed, Course.of(model, self._feed))
            self._model, self._mark = model, mark
        return self._covariances


class EmbeddingPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """`tp.pruner.BasePruner`, which merges the channels that go into those that stay before it drops them.

    Takes its arguments, in its order, all after `importance` as they are there, and

    importance    None: `RedundancyImportance` on the same calibration data
    calibration   a batch or a loader of inputs, labels dropped: readers of pruned channels are refitted by least
                  squares to what the model wrote before pruning, with an intercept. None: merged by the moments
                  that weights and batch norms record (`pruning_prior`), which know of copies and constants
    samples       of these, at most

        pruner = EmbeddingPruner(model, example_inputs, calibration=loader, pruning_ratio=0.5, iterative_steps=2)
        for _ in range(2):
            for group in pruner.step(interactive=True):
                print(group)
                group.prune()             # merges, then drops; group.prune(idxs=[0, 2, 6]) too
            # fine-tune here, or not

    `step()`: all groups are cut, then their readers are refitted in the order in which they run. In a step of
    `interactive=True` a group's readers are refitted when `group.prune()` is called, and once more in order after
    the last one. The aim is what the model wrote when this pruner first pruned it; after any other change of its
    weights (training), what it wrote before the step. Up to two copies of the model are held.

    If the pruned model does not run as it is, or attention heads have been pruned, readers are fitted on what they
    read before the step: set what the model keeps as numbers (`num_heads`, `head_dim`), then call `refit()`.

    A constant goes into the reader's bias, else into the running mean of the batch norm behind it, else the reader
    gets a bias. Groups from `pruner.DG` merge too. Other hazards of the host that are gone here: dictionaries as
    default arguments are fresh ones; the model's training mode and `requires_grad` stay, and frozen parameters are
    pruned too; weights that were tied are tied again where they are still equal, otherwise there is a warning;
    `group.prune(idxs=...)` writes one entry of the history; `unwrapped_parameters` may be a dictionary.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any = None,
        *arguments: Any,
        calibration: Any = None,
        samples: int = SAMPLES,
        **options: Any,
    ) -> None:
        given = host.arguments(model, example_inputs, importance, arguments, options)
        self.feed: Feed | None = None
        if calibration is not None:
            self.feed = feed_of(calibration, example_inputs, model, given.get("forward_fn"), samples)
        if importance is None:
            given["importance"] = RedundancyImportance(self.feed)
        self._interactive = self._stepping = self._replaying = self._heads = False
        with host.as_it_was(model), torch.enable_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            super().__init__(**given)
        self._group_of = self.DG.get_pruning_group
        self.DG.get_pruning_group = self._merging_group
        self.merger = None if self.feed is None else Merger(self.DG, self.feed)

    def step(self, interactive: bool = False) -> Any:
        """One step, as `tp.pruner.BasePruner.step`."""
        self._interactive = interactive
        return super().step(interactive)

    def refit(self) -> None:
        """Refit the readers of what the last step has pruned, in order. Raises `InputError`: it does not run."""
        if self.merger is not None:
            self.merger.sweep(Course.of(self.model, self.merger.feed))
            self.merger.end()

    def estimate_importance(self, group: Any) -> Any:
        """As the host's; ours is told what goes together."""
        if not isinstance(self.importance, RedundancyImportance):
            return self.importance(group)
        attention, layers = self._is_atten_group(group)
        if attention and self.prune_num_heads:
            # the host takes means over heads and over places in a head: one score for each channel serves both
            heads = max(self.num_heads[layer] for layer in layers)
            return self.importance(group, 1 if self.prune_head_dims else heads, contiguous=True)
        return self.importance(group, self._get_channel_groups(group))

    def load_pruning_history(self, pruning_history: Any) -> None:
        """Cut as recorded, without merging: the weights are to be loaded."""
        self._replaying = True
        try:
            super().load_pruning_history(pruning_history)
        finally:
            self._replaying = False

    def _prune(self) -> Iterator[Any]:
        merged = self._interactive
        self._begin()
        self._stepping = True
        try:
            yield from super()._prune()
        finally:
            self._stepping = False
        self._finish(merged)

    def _begin(self) -> None:
        self._heads = False
        if self.merger is not None:
            self.merger.begin()

    def _finish(self, merged: bool) -> None:
        """Refit in order if the model runs; else, if that is not done, on what it read before."""
        merger = self.merger
        if merger is None or not merger.touched:
            return
        course = None
        if not self._heads:
            try:
                course = Course.of(self.model, merger.feed)
            except InputError as error:
                warnings.warn(f"{error}, and call refit()", stacklevel=3)
        if course is not None:
            merger.sweep(course)
        elif not merged:
            merger.merge(merger.touched)
        merger.end()

    def _merging_group(self, *arguments: Any, **named: Any) -> Any:
        group = self._group_of(*arguments, **named)
        group.prune = partial(self._prune_group, group)
        return group

    def _prune_group(self, group: Any, idxs: Any = None, record_history: bool = True) -> None:
        if idxs is not None:
            dep = group[0].dep
            self.DG.get_pruning_group(dep.target.module, dep.handler, list(idxs)).prune(
                record_history=record_history
            )
            return
        alone = not self._stepping and not self._replaying
        if alone:
            self._begin()
        merges = not self._replaying
        merger = self.merger if merges else None
        fitted = without_data(group) if merges and merger is None else []
        if merger is not None:
            merger.strides_of(group)
        self._heads |= self._is_atten_group(group)[0]
        ties = host.ties(self.model)
        with host.as_it_was(self.model):
            type(group).prune(group, record_history=record_history)
        host.tie(self.model, ties)
        for fit in fitted:
            install(self.DG, fit)
        if merger is not None:
            names = merger.dropped(group)
            if alone or self._interactive:
                merger.merge(names)
        if alone:
            self._finish(merged=True)
