"""Saving and loading narrow models as safetensors, the plan inside; never a pickle.

A narrow model's shapes are told by its plan alone, so `load` makes the wide model by the user's factory,
resizes it by the plan's shapes and fills in the saved weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ep_prune.errors import InputError, PlanError
from ep_prune.plan import Plan
from ep_prune.rewrite import apply_round_
from ep_prune.trace import prepare


def save(result: Any, path: str | Path) -> None:
    """Write `result.model` and `result.plan` to one safetensors file, whole or not at all."""
    tensors, header = result.plan.to_tensors()
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in result.model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name!r} in the state dict is no tensor: it cannot be saved without pickle")
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        tensors[f"model.{name}"] = tensor.detach().cpu().contiguous().clone()
    metadata = {"ep_prune.plan": header, "ep_prune.ties": json.dumps(ties)}
    partial = Path(f"{path}.partial")
    try:
        save_file(tensors, str(partial), metadata)
        mask = os.umask(0)  # safetensors writes for the owner alone: give the file the mode of any other
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(factory: Callable[[], nn.Module], path: str | Path) -> nn.Module:
    """The narrow model from a file of `save`. `factory()` makes the wide model; its weights do not matter.

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
    wide, _ = prepare(factory())
    narrow = wide
    for step in plan.rounds:
        apply_round_(narrow, step)
    state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    state |= {name: state[kept] for name, kept in json.loads(metadata.get("ep_prune.ties", "{}")).items()}
    for parameter in narrow.parameters():
        kept = next(iter(state.values()), torch.empty(0)).dtype
        if parameter.is_floating_point() and kept.is_floating_point:
            narrow = narrow.to(kept)
            break
    try:
        narrow.load_state_dict(state, strict=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise PlanError(f"{path} does not fit this factory's model: {text[:200]}") from error
    return narrow
