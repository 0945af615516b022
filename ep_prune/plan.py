"""A plan: what a reduction did, to be saved, read and applied to another copy of the wide model."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ep_prune.embedding import ChannelEmbedding, Cut, Fold, Heads, Mix, Refit, Round, Scale, Vanished
from ep_prune.errors import PlanError
from ep_prune.graph import Layout
from ep_prune.norm_folding import Pair, fold_norms_
from ep_prune.rewrite import apply_round_
from ep_prune.trace import prepare
from ep_prune.verification import verify


@dataclass(frozen=True, eq=False)
class Plan:
    """Rounds of edits, and the fingerprint of the weights that they were made for."""

    rounds: tuple[Round, ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = field(default=())
    domain: Any = None
    """The box (lo, hi) of inputs on which the narrow model is the same, as nested lists; None: everywhere."""
    replace_modules: bool = False
    """Whether modules that cannot hold the new sizes were exchanged first."""
    norms: tuple[Pair, ...] = ()
    """Batch norms that were folded into the layers before them, after the rounds: (layer, batch norm)."""

    @property
    def fitted(self) -> bool:
        """Whether it holds weights that were fitted to data (`compress`): grade fitted, no equality is claimed."""
        return any(step.refits or step.vanished for step in self.rounds)

    def apply(self, model: nn.Module, *, recheck: Any = None) -> nn.Module:
        """A narrow copy of a fresh wide model, which is not changed.

        `recheck`: for weights other than those that the plan was made for, example inputs on which the outcome
        is compared with the wide model instead. Raises `PlanError` where the weights differ and there are none, or
        the plan is of grade fitted, `VerificationError` where the outcome differs.
        """
        wide, _ = prepare(model, self.replace_modules)
        own = fingerprint(wide.state_dict()) == self.fingerprint
        if not own and self.fitted:
            raise PlanError("the plan holds weights that were fitted for others than these: compress this model")
        if not own and recheck is None:
            raise PlanError(
                "these are not the weights that the plan was made for: reduce this model, or pass recheck=inputs"
            )
        narrow = copy.deepcopy(wide)
        self.apply_(narrow)
        if not own:
            verify(wide, narrow, recheck, domain=self.domain).raise_if_different()
        return with_modes_of(model, narrow)

    def apply_(self, wide: nn.Module) -> None:
        """Make a prepared wide model narrow, in place; nothing is checked."""
        for step in self.rounds:
            apply_round_(wide, step)
        fold_norms_(wide, self.norms)

    def save(self, path: str | Path) -> None:
        """Write the plan to a safetensors file."""
        tensors, header = self.to_tensors()
        save_whole(tensors, path, {"ep_prune.plan": header})

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
                        "width": fold.width,
                        **{key: getattr(fold, key) for key in ("bias", "mean", "new_bias")},
                    }
                    for fold in step.folds
                ],
                "cuts": [[cut.tensor, cut.axis, keep(cut.keep), cut.width] for cut in step.cuts],
                "mixes": [
                    {
                        "weight": mix.weight,
                        "layout": [mix.layout.groups, mix.layout.inputs_first, len(mix.layout.interior)],
                        **{key: keep(getattr(mix, key)) for key in ("rows", "mixing", "offset")},
                        **{key: getattr(mix, key) for key in ("bias", "new_bias")},
                    }
                    for mix in step.mixes
                ],
                "refits": [
                    {
                        "weight": refit.weight,
                        "groups": refit.groups,
                        "value": keep(refit.value),
                        "constants": None if refit.constants is None else keep(refit.constants),
                        **{key: getattr(refit, key) for key in ("bias", "mean", "new_bias")},
                    }
                    for refit in step.refits
                ],
                "heads": [[h.layer, h.heads, h.shared, h.size, h.alike] for h in step.heads],
                "scales": [[s.tensor, s.axis, keep(s.places), keep(s.factor)] for s in step.scales],
                "vanished": [[v.module, keep(v.constant), v.after, v.summed, v.rectified] for v in step.vanished],
            }
            for step in self.rounds
        ]
        # as old as can be, for those who read it
        version = 7 if any(step.vanished for step in self.rounds) else 6 if self.norms else 5
        header = {"version": version, "fingerprint": self.fingerprint, "notes": self.notes, "rounds": rounds}
        if self.domain is not None:
            header["domain"] = self.domain
        if self.replace_modules:
            header["replace_modules"] = True
        if self.norms:
            header["norms"] = self.norms
        return tensors, json.dumps(header)

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], header: str) -> Plan:
        """The inverse of `to_tensors`."""
        data: dict[str, Any] = json.loads(header)
        if data.get("version") not in (2, 3, 4, 5, 6, 7):
            raise PlanError(f"a plan of version {data.get('version')}: this package reads versions 2 to 7")

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
                item["width"],
                item["bias"],
                item["mean"],
                item["new_bias"],
            )

        def mix(item: dict[str, Any]) -> Mix:
            groups, inputs_first, taps = item["layout"]
            rows, mixing, offset = (tensors[item[key]] for key in ("rows", "mixing", "offset"))
            layout = Layout(groups, inputs_first, interior=(True,) * taps)
            return Mix(item["weight"], layout, rows, mixing, offset, item["bias"], item["new_bias"])

        def refit(item: dict[str, Any]) -> Refit:
            constants = None if item["constants"] is None else tensors[item["constants"]]
            places = (item[key] for key in ("bias", "mean", "new_bias"))
            return Refit(item["weight"], tensors[item["value"]], item["groups"], constants, *places)

        def scale(name: str, axis: int, places: str, by: str | float) -> Scale:
            places_ = tensors[places]
            factor = tensors[by] if isinstance(by, str) else torch.full((len(places_),), by, dtype=torch.float64)
            return Scale(name, axis, places_, factor)

        rounds = tuple(
            Round(
                tuple(fold(item) for item in step["folds"]),
                tuple(Cut(name, axis, tensors[key], width) for name, axis, key, width in step["cuts"]),
                tuple(mix(item) for item in step.get("mixes", ())),
                tuple(refit(item) for item in step.get("refits", ())),
                tuple(
                    Heads(layer, tuple(heads), tuple(shared), tuple(size), alike=alike == [True])
                    for layer, heads, shared, size, *alike in step.get("heads", ())
                ),
                tuple(scale(*item) for item in step.get("scales", ())),
                tuple(
                    Vanished(str(module), tensors[constant], int(after), bool(summed), bool(rectified))
                    for module, constant, after, summed, rectified in step.get("vanished", ())
                ),
            )
            for step in data["rounds"]
        )
        exchanged = bool(data.get("replace_modules"))
        norms = tuple((str(layer), str(norm)) for layer, norm in data.get("norms", ()))
        return Plan(rounds, data["fingerprint"], tuple(data["notes"]), data.get("domain"), exchanged, norms)


def save_whole(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    partial = Path(f"{path}.partial")
    try:
        save_file(tensors, str(partial), metadata)
        mask = os.umask(0)  # safetensors writes for the owner alone: give the file the mode of any other
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_modes_of(model: nn.Module, narrow: nn.Module) -> nn.Module:
    """`narrow`, in the training or eval mode of `model`, module by module where names match, and its weights
    channels-last where the model's are."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in narrow.named_modules():
        module.training = modes.get(name, model.training)
    keep_layouts_(model, narrow)
    return narrow


def keep_layouts_(model: nn.Module, narrow: nn.Module) -> None:
    """Put the weights of `narrow` channels-last where those of `model` are."""
    last = {name for name, tensor in model.named_parameters() if is_channels_last(tensor)}
    for name, tensor in narrow.named_parameters():
        if name in last and tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether an image, or a kernel, lies in memory with its channels last, and only so."""
    last = torch.channels_last
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()
