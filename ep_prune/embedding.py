"""The one object: how wide channels are made of narrow ones, x = T z + t, and the plan of a reversal.

A `ChannelEmbedding` stands at one program point. Where the point is *consumed* by a weight, the narrow weight is
W T and the bias gains W t (`Fold`); where it is *produced* the kept rows are taken as they are (`Cut`). A plan
is a sequence of rounds of such edits, stated on parameters by name, and so applies to any copy of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ep_prune.errors import PlanError
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
        folded = torch.zeros(self.k, weight.shape[1], dtype=torch.float64)
        return folded.index_add_(0, self.narrow, weight.double()[self.wide] * self.values.unsqueeze(1))

    def expand(self, z: Tensor) -> Tensor:
        """T z + t along the last axis: (..., k) -> (..., n)."""
        return z @ self.T.T.to(z) + self.t.to(z)

    def is_identity(self) -> bool:
        return self.n == self.k and bool((self.values == 1).all()) and torch.equal(self.wide, self.narrow)


@dataclass(frozen=True, eq=False)
class Fold:
    """A weight that consumes: its inputs through `embedding`, its outputs cut to `outputs` (G', O') in `groups`.

    What W t sends goes to `bias` (added), to `mean` (the running mean of the batch norm that follows,
    subtracted), or into a new bias, where `new_bias` names the module.
    """

    weight: str
    layout: Layout
    embedding: ChannelEmbedding
    groups: Tensor
    outputs: Tensor
    bias: str | None = None
    mean: str | None = None
    new_bias: str | None = None


@dataclass(frozen=True, eq=False)
class Cut:
    """A parameter's axis cut to the kept places."""

    tensor: str
    axis: int
    keep: Tensor


@dataclass(frozen=True, eq=False)
class Round:
    """Edits that apply to one state of the model."""

    folds: tuple[Fold, ...] = ()
    cuts: tuple[Cut, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.folds or self.cuts)


@dataclass(frozen=True, eq=False)
class Plan:
    """Rounds of edits, and the fingerprint of the weights that they were made for."""

    rounds: tuple[Round, ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = field(default=())

    def save(self, path: str | Path) -> None:
        """Write the plan to a safetensors file."""
        tensors, header = self.to_tensors()
        save_file(tensors, str(path), {"ep_prune.plan": header})

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan written by `save` or `ep_prune.save`. Nothing in the file is executed."""
        try:
            with safe_open(str(path), "pt") as file:
                header = (file.metadata() or {}).get("ep_prune.plan")
                names = [key for key in file.keys() if key.startswith("plan.")]  # noqa: SIM118
                tensors = {key: file.get_tensor(key) for key in names}
        except (SafetensorError, OSError) as error:
            raise PlanError(
                f"{path} is not a safetensors file ({error}): write one with plan.save(path)"
            ) from error
        if header is None:
            raise PlanError(f"{path} holds no plan: write one with plan.save(path)")
        return Plan.from_tensors(tensors, header)

    def to_tensors(self) -> tuple[dict[str, Tensor], str]:
        """The plan as named tensors and a JSON text."""
        tensors: dict[str, Tensor] = {}

        def keep(tensor: Tensor) -> str:
            name = f"plan.{len(tensors)}"
            tensors[name] = tensor.contiguous()
            return name

        rounds = [
            {
                "folds": [
                    {
                        "weight": fold.weight,
                        "layout": [fold.layout.groups, fold.layout.inputs_first, len(fold.layout.interior)],
                        "size": [fold.embedding.n, fold.embedding.k],
                        **{key: keep(getattr(fold.embedding, key)) for key in ("wide", "narrow", "values", "t")},
                        "groups": keep(fold.groups),
                        "outputs": keep(fold.outputs),
                        **{key: getattr(fold, key) for key in ("bias", "mean", "new_bias")},
                    }
                    for fold in step.folds
                ],
                "cuts": [[cut.tensor, cut.axis, keep(cut.keep)] for cut in step.cuts],
            }
            for step in self.rounds
        ]
        header = {"version": 1, "fingerprint": self.fingerprint, "notes": self.notes, "rounds": rounds}
        return tensors, json.dumps(header)

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], header: str) -> Plan:
        """The inverse of `to_tensors`."""
        data: dict[str, Any] = json.loads(header)
        if data.get("version") != 1:
            raise PlanError(f"a plan of version {data.get('version')}: this package reads version 1")

        def fold(item: dict[str, Any]) -> Fold:
            groups, inputs_first, taps = item["layout"]
            n, k = item["size"]
            parts = [tensors[item[key]] for key in ("wide", "narrow", "values", "t")]
            return Fold(
                item["weight"],
                Layout(groups, inputs_first, interior=(True,) * taps),
                ChannelEmbedding(n, k, *parts),
                tensors[item["groups"]],
                tensors[item["outputs"]],
                item["bias"],
                item["mean"],
                item["new_bias"],
            )

        rounds = tuple(
            Round(
                tuple(fold(item) for item in step["folds"]),
                tuple(Cut(name, axis, tensors[key]) for name, axis, key in step["cuts"]),
            )
            for step in data["rounds"]
        )
        return Plan(rounds, data["fingerprint"], tuple(data["notes"]))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
