"""Saving and loading models of other widths than their factory's, as safetensors; never a pickle.

A narrow model's shapes are told by its plan alone, so `load` makes the wide model by the user's factory,
resizes it by the plan's shapes and fills in the saved weights. A wide model that `embed` made is stored beside
a plan without rounds, with the shapes that the widened tensors had in the factory's model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ep_prune.errors import InputError, PlanError
from ep_prune.plan import Plan, fingerprint, save_whole
from ep_prune.rewrite import resize_
from ep_prune.trace import prepare


def save(result: Any, path: str | Path) -> None:
    """Write `result.model` and `result.plan` to one safetensors file, whole or not at all."""
    _store(result.model, result.plan, {}, path)


def save_wide(wide: nn.Module, narrow: nn.Module, path: str | Path) -> None:
    """Write `wide`, which `embed` made of `narrow`, such that `load(factory of narrow, path)` gives it again."""
    before = prepare(narrow)[0].state_dict()
    now = wide.state_dict()
    grown = {name: list(old.shape) for name, old in before.items() if now[name].shape != old.shape}
    groups = {
        f"{name}.weight": module.groups
        for name, module in wide.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and f"{name}.weight" in grown
    }
    told = {"ep_prune.wide": json.dumps({"grown": grown, "groups": groups})}
    _store(wide, Plan((), fingerprint(before)), told, path)


def holds_plan(path: Path) -> bool:
    """Whether a file is one that `load` reads. Anything else, a missing one too, is not."""
    try:
        with safe_open(str(path), "pt") as file:
            return "ep_prune.plan" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _store(model: nn.Module, plan: Plan, told: dict[str, str], path: str | Path) -> None:
    tensors, header = plan.to_tensors()
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name!r} in the state dict is no tensor: it cannot be saved without pickle")
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[f"model.{name}"] = tensor.detach().cpu().contiguous().clone()
    metadata = {"ep_prune.plan": header, "ep_prune.ties": json.dumps(ties), **told}
    save_whole(tensors, path, metadata)


def load(factory: Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """The model in a file of `save`, or of `ep-prune embed`.

    `factory()` makes the model that was reduced, or widened; its weights do not matter.

    Raises `PlanError` where the file holds no plan or belongs to another model.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PlanError(f"{path} is not a safetensors file ({error}): write one with ep_prune.save") from error
    if "ep_prune.plan" not in metadata:
        raise PlanError(f"{path} holds no plan: write it with ep_prune.save")
    plan = Plan.from_tensors(tensors, metadata["ep_prune.plan"])
    wide, _ = prepare(factory(), plan.replace_modules)
    narrow = wide
    plan.apply_(narrow)
    state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    state |= {name: state[kept] for name, kept in json.loads(metadata.get("ep_prune.ties", "{}")).items()}
    if "ep_prune.wide" in metadata:
        _grow_(narrow, state, json.loads(metadata["ep_prune.wide"]))
    for name, tensor in narrow.state_dict(keep_vars=True).items():
        kept = state.get(name, tensor).dtype  # each as it was saved: a model may mix types
        if tensor.is_floating_point() and kept.is_floating_point:
            tensor.data = tensor.data.to(kept)
    try:
        narrow.load_state_dict(state, strict=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise PlanError(f"{path} does not fit this factory's model: {text[:200]}") from error
    return narrow


def _grow_(model: nn.Module, state: dict[str, Tensor], told: dict[str, Any]) -> None:
    """Give the widened tensors of the factory's model the shapes that they have in the file."""
    own = model.state_dict()
    for name, shape in told["grown"].items():
        found = tuple(own[name].shape) if name in own else "missing"
        if found != tuple(shape) or name not in state:
            raise PlanError(
                f"the file's {name!r} was widened from {tuple(shape)}, and is {found} in this factory's model: "
                "name the model that was widened"
            )
    resize_(model, {name: state[name].to(own[name].device) for name in told["grown"]}, told["groups"])
