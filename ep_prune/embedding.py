"""The one object: how wide channels are made of narrow ones, x = T z + t, and the edits that follow from it.

A `ChannelEmbedding` stands at one program point. Where the point is *consumed* by a weight, the narrow weight is
W T and the bias gains W t (`Fold`); where it is *produced* the kept rows are taken as they are (`Cut`). Where
nothing bends between the two, T may be dense: the narrow channels are then mixtures of the wide ones (`Mix`). What
was fitted to data is stated as it stands (`Refit`): W T for a T of patches, which is larger than W T itself. A
plan is a sequence of rounds of such edits, stated on parameters by name, and so applies to any copy of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_prune.graph import Layout


@dataclass(frozen=True, eq=False)
class ChannelEmbedding:
    """x = T z + t. T (n, k) is sparse: entry e is `values[e]` at (`wide[e]`, `narrow[e]`); t (n,) float64."""

    n: int
    k: int
    wide: Tensor
    narrow: Tensor
    values: Tensor
    t: Tensor

    @property
    def T(self) -> Tensor:
        """The matrix, dense (n, k)."""
        dense = torch.zeros(self.n, self.k, dtype=torch.float64)
        return dense.index_put((self.wide, self.narrow), self.values, accumulate=True)

    def fold(self, weight: Tensor) -> Tensor:
        """T' W for a weight (n, m) by input position: (k, m), in float64."""
        if len(self.values) > 4 * (self.n + self.k):  # a dense block: entry by entry would copy the weight often
            return self.T.T @ weight.double()
        folded = torch.zeros(self.k, weight.shape[1], dtype=torch.float64)
        return folded.index_add_(0, self.narrow, weight.double()[self.wide] * self.values.unsqueeze(1))

    def expand(self, z: Tensor) -> Tensor:
        """T z + t along the last axis: (..., k) -> (..., n)."""
        return z @ self.T.T.to(z) + self.t.to(z)

    def is_identity(self) -> bool:
        whole = self.n == self.k == len(self.values)
        return whole and bool((self.values == 1).all()) and torch.equal(self.wide, self.narrow)


@dataclass(frozen=True, eq=False)
class Fold:
    """A weight that consumes: its inputs through `embedding`, its outputs cut to `outputs` (G', O') in `groups`.

    `width`: outputs in all before the cut. What W t sends goes to `bias` (added), to `mean` (the running mean of
    the batch norm that follows, subtracted), or into a new bias, where `new_bias` names the module.
    """

    weight: str
    layout: Layout
    embedding: ChannelEmbedding
    groups: Tensor
    outputs: Tensor
    width: int
    bias: str | None = None
    mean: str | None = None
    new_bias: str | None = None


@dataclass(frozen=True, eq=False)
class Cut:
    """A parameter's axis of `width` places cut to the kept ones."""

    tensor: str
    axis: int
    keep: Tensor
    width: int


@dataclass(frozen=True, eq=False)
class Mix:
    """A weight that produces: of its outputs `rows` (s,) the first r become L times all s, the others are unread.

    mixing (r, s): L, float64. offset (r,): their biases, in `bias`, or in a new one where `new_bias` names the
    module; None where there is none. The shapes stay. With it go the `Fold`s of the weights that consume.
    """

    weight: str
    layout: Layout
    rows: Tensor
    mixing: Tensor
    offset: Tensor
    bias: str | None = None
    new_bias: str | None = None


@dataclass(frozen=True, eq=False)
class Refit:
    """A weight that was fitted to data: its narrow value as it stands, in `groups` groups.

    constants (O',): the narrow values of its `bias`, or of the `mean` of the batch norm that follows, or of a new
    bias of the module named by `new_bias`; None where they stay as they are.
    """

    weight: str
    value: Tensor
    groups: int
    constants: Tensor | None = None
    bias: str | None = None
    mean: str | None = None
    new_bias: str | None = None


@dataclass(frozen=True, eq=False)
class Heads:
    """Attention in `layer`, before and after: heads, heads that have keys of their own, channels of a head.

    queries: the axes (tensor, axis, places after the cut) that write the queries, for a `Scale`. alike: whether
    all attention of the model has these counts, before and after, so that one configuration holds them all.
    """

    layer: str
    heads: tuple[int, int]
    shared: tuple[int, int]
    size: tuple[int, int]
    queries: tuple[tuple[str, int, Tensor], ...] = ()
    alike: bool = False


@dataclass(frozen=True, eq=False)
class Scale:
    """Places (k,) of a tensor's axis, as they are after all cuts, times `factor` (k,), float64: where the code
    takes attention's scale from the size of a head, queries make up for it; a stream under RMS norm keeps the mean
    of its squares."""

    tensor: str
    axis: int
    places: Tensor
    factor: Tensor


@dataclass(frozen=True, eq=False)
class Vanished:
    """A residual branch that has no channels left: `module` becomes `constant`; or, `summed`, x + constant; or,
    `rectified`, too, the ReLU of that.

    constant (C',): of the kept channels of x, along an axis that `after` others follow."""

    module: str
    constant: Tensor
    after: int
    summed: bool
    rectified: bool


@dataclass(frozen=True, eq=False)
class Round:
    """Edits that apply to one state of the model: mixes, folds, cuts, refits, scales, what vanishes, heads, in
    this order."""

    folds: tuple[Fold, ...] = ()
    cuts: tuple[Cut, ...] = ()
    mixes: tuple[Mix, ...] = ()
    refits: tuple[Refit, ...] = ()
    heads: tuple[Heads, ...] = ()
    scales: tuple[Scale, ...] = ()
    vanished: tuple[Vanished, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.folds or self.cuts or self.mixes or self.refits or self.scales or self.vanished)
