"""What a command line names, made real: a model, its weights, example inputs, probes.

    package.module:factory   called without arguments, or with --model-args; found from the current folder
    torchvision:resnet18     torchvision's model of that name; weights=None unless --model-args says otherwise
    timm:resnet18            timm's, where timm is installed

Weights are a safetensors file, one that `reduce` or `embed` wrote among them, or a checkpoint that
`torch.load(weights_only=True)` takes, so that nothing in a file is executed. What fails here does so
with an `InputError`: one sentence that says what to do.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ep_prune.errors import EpPruneError, InputError
from ep_prune.storage import holds_plan, load
from ep_prune.verification import boxes_of, draw

DEFAULT_SHAPE = "1,3,224,224"
"""Of torchvision's and timm's models, where --input is not given."""
PROBE_BATCH = 64
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def given(
    options: argparse.Namespace,
) -> tuple[nn.Module, tuple[Tensor, ...], list[tuple[Tensor, ...]] | None]:
    """Model, example inputs and probes, as the options say."""
    made = make_model(options.model, options.model_args, options.seed).eval()
    resized = options.weights is not None and holds_plan(options.weights)  # what reduce or embed wrote
    model = _resized(made, options.weights) if resized else made
    if options.double:
        model = model.double()
    if options.weights is not None and not resized:
        load_weights_(model, options.weights)
    inputs = example_inputs(options.input, options.model, model, options.seed)
    if options.double:
        inputs = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    probes = getattr(options, "probes", None)  # compress has none
    return model, inputs, None if probes is None else load_probes(probes, inputs)


def given_inside(
    options: argparse.Namespace,
) -> tuple[nn.Module, tuple[Tensor, ...], list[tuple[Tensor, ...]] | None]:
    """As `given`; the example inputs lie in the declared domain, if there is one."""
    model, inputs, probes = given(options)
    domain = domain_of(options.domain, inputs)
    return model, inputs if domain is None else moved_inside(inputs, domain, options.seed), probes


def domain_of(text: str | None, inputs: tuple[Tensor, ...]) -> tuple[Any, Any] | None:
    """The domain of --domain: a pair of numbers, or of one number for each feature (each channel, of images)."""
    if text is None:
        return None
    try:
        pairs = [tuple(float(end) for end in pair.split(",")) for pair in text.split(":")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(
            f"--domain {text!r} is no box: write LO,HI as in --domain=0,1, or LO,HI:LO,HI:... by feature"
        )
    if len(pairs) == 1:
        return pairs[0][0], pairs[0][1]
    floating = [value for value in inputs if value.is_floating_point()]
    if len(floating) != 1 or floating[0].ndim < 2 or floating[0].shape[1] != len(pairs):
        wanted = floating[0].shape[1] if len(floating) == 1 and floating[0].ndim > 1 else 1
        raise InputError(
            f"--domain has {len(pairs)} pairs, and the model takes {wanted}: give one for each feature"
        )
    shape = (-1, *[1] * (floating[0].ndim - 2))
    low, high = (torch.tensor(ends, dtype=torch.float64).reshape(shape) for ends in zip(*pairs, strict=True))
    return low, high


def moved_inside(inputs: tuple[Tensor, ...], domain: Any, seed: int) -> tuple[Tensor, ...]:
    """Seeded inputs of the same shapes in the domain."""
    generator = torch.Generator().manual_seed(seed)
    boxes = boxes_of(domain, inputs, {})
    return tuple(
        value if box is None else draw(box, "uniform", value.shape, generator).to(value)
        for value, box in zip(inputs, boxes, strict=True)
    )


def _resized(made: nn.Module, path: Path) -> nn.Module:
    try:
        return load(lambda: made, path)
    except EpPruneError:
        raise
    except Exception as error:  # a plan for other shapes fails in as many ways as there are edits
        raise InputError(
            f"{path} does not fit this model ({type(error).__name__}: {_line(error)}): name the model that it was "
            "made of, with its --model-args"
        ) from error


def make_model(name: str, arguments: str | None, seed: int) -> nn.Module:
    """The model called `name`; its random initial weights, where it keeps them, are those of `seed`."""
    source, colon, target = name.partition(":")
    if not (source and colon and target):
        raise InputError(
            f"{name!r} names no model: write package.module:factory, torchvision:resnet18 or timm:NAME"
        )
    options = _options(arguments)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision about its own initial weights
        torch.manual_seed(seed)
        if source == "torchvision":
            return _from_torchvision(target, options)
        if source == "timm":
            return _from_timm(target, options)
        return _from_factory(name, source, target, options)


def _options(arguments: str | None) -> dict[str, Any]:
    try:
        options = json.loads(arguments or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"--model-args is not JSON ({error}): write '{{\"num_classes\": 10}}'") from error
    if not isinstance(options, dict):
        raise InputError("--model-args must be a JSON object of keyword arguments: '{\"num_classes\": 10}'")
    return options


def _from_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    known = models.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise InputError(
            f"torchvision has no model {name!r}"
            + (f": did you mean {' or '.join(near)}?" if near else ": see torchvision.models.list_models()")
        )
    return _call(f"torchvision:{name}", models.get_model, name, **{"weights": None, **options})


def _from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise InputError(f"timm:{name} needs timm, which is not installed: pip install timm") from error
    return _call(f"timm:{name}", timm.create_model, name, **{"pretrained": False, **options})


def _from_factory(name: str, module_name: str, attribute: str, options: dict[str, Any]) -> nn.Module:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise InputError(
                f"there is no module {missing!r} for {name!r}: give a module that Python imports from {here}"
            ) from error
        raise InputError(f"importing {module_name!r} failed: {error}; install {missing!r}") from error
    except Exception as error:
        raise InputError(f"importing {module_name!r} failed: {type(error).__name__}: {_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"module {module_name!r} has no {attribute!r}: name a function or class that makes the model"
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"{name!r} is no function or class: name one that makes the model")
    return _call(name, found, **options)


def _call(name: str, factory: Any, *positional: Any, **options: Any) -> nn.Module:
    try:
        model = factory(*positional, **options)
    except Exception as error:
        raise InputError(
            f"{name} failed: {type(error).__name__}: {_line(error)}; "
            "its arguments come from --model-args '{\"name\": value}'"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned {type(model).__name__}, not an nn.Module: name a factory of models")
    return model


def load_weights_(model: nn.Module, path: Path) -> None:
    """Fill `model` with the weights in `path`, all of them or none."""
    found, expected = _state(path), model.state_dict()
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in found and name not in optional]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {tuple(found[name].shape)} in the file and {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise InputError(
            f"{path} does not fit this model, tensors: {', '.join(problems)}; name the model that these "
            "weights are of, with its --model-args"
        )
    model.load_state_dict(found, strict=False)


def _state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, unwrapped and without the prefixes of wrappers."""
    content = _read(path, "--weights")
    for _ in range(3):
        if isinstance(content, list | tuple) and content:
            content = content[0]
        elif isinstance(content, Mapping):
            inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping | list | tuple)]
            if not inner:
                break
            content = inner[0]
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds {_article(content)}, no state dict: save model.state_dict()")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(str(key) for key in list(content)[:5])
        raise InputError(f"{path} holds no tensors but {keys or 'nothing'}: save model.state_dict()")
    if len(state) != len(content):
        others = [str(key) for key in content if str(key) not in state]
        raise InputError(
            f"{path} holds more than tensors ({', '.join(others[:3])}): save model.state_dict() alone, "
            "or under the key 'state_dict'"
        )
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read(path: Path, option: str) -> Any:
    """The content of a safetensors file, or of a checkpoint of which nothing is executed."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{option} {path} cannot be read ({error.strerror}): check the path") from error
    size = path.stat().st_size
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{path} is a damaged safetensors file ({_line(error)}): write or download it again"
            ) from error
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is {_looks_like(head)}, not a safetensors file: write or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError,
            AttributeError, UnicodeDecodeError, OSError, MemoryError) as error:  # fmt: skip
        raise InputError(f"{path} {_why_not(head, str(error))}") from error


def _why_not(head: bytes, message: str) -> str:
    """What is wrong with a checkpoint that torch refuses, and what to do."""
    if "TorchScript" in message:
        return "is a TorchScript archive: give the state dict of the eager model"
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        name = re.search(r"GLOBAL (\S+)|(?:call|type|class) ['\"]?([\w.]+\.\w+)", message)
        if "weights_only" in message or "Weights only" in message or name:
            what = f" ({name[1] or name[2]})" if name else ""
            return (
                f"holds pickled code{what}, which is never run: load it where you trust it and "
                "torch.save(model.state_dict(), FILE), or write safetensors"
            )
        return "is a damaged checkpoint: write or download it again"
    return f"is {_looks_like(head)}, not a checkpoint: write or download it again"


def _looks_like(head: bytes) -> str:
    start = head.lstrip()[:64].lower()
    if not head:
        return "an empty file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page (a download that failed?)"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run git lfs pull)"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "a PyTorch checkpoint or zip archive (name it .pt)"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 or byte >= 160 for byte in head):
        return "a text file"
    return "a file of an unknown kind"


def example_inputs(texts: Sequence[str], name: str, model: nn.Module, seed: int) -> tuple[Tensor, ...]:
    """Seeded inputs from `1,3,32,32` or `1,16:int64` or `1,16:int64:30522` (integers below 30522)."""
    library = name.startswith(("torchvision:", "timm:"))
    if not texts and not library:
        raise InputError("--input is missing: give the shape of every input of the model, as in --input 1,3,32,32")
    generator = torch.Generator().manual_seed(seed)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return tuple(_example(text, own, generator) for text in texts or [DEFAULT_SHAPE])


def _example(text: str, own: torch.dtype, generator: torch.Generator) -> Tensor:
    shape_text, _, rest = text.partition(":")
    type_text, _, high_text = rest.partition(":")
    dtype = getattr(torch, type_text, None) if type_text else own
    try:
        shape = tuple(int(size) for size in shape_text.split(","))
        high = int(high_text or 2)
    except ValueError:
        shape, high = (), 0
    if not shape or min(shape) < 1 or high < 1 or not isinstance(dtype, torch.dtype):
        raise InputError(
            f"--input {text!r} is no shape: write positive sizes and, where needed, a type, as in 1,3,32,32, "
            "1,16:int64 or 1,16:int64:30522 (integers below 30522)"
        )
    if dtype.is_floating_point:
        # float32 numbers in any floating type: the example does not change with --double
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(high, shape, generator=generator).to(dtype)


def load_probes(
    path: Path, inputs: tuple[Tensor, ...], option: str = "--probes", command: str = "reduce"
) -> list[tuple[Tensor, ...]]:
    """Batches of the first floating array in a file, as inputs of a model that takes one."""
    if len(inputs) != 1:
        raise InputError(
            f"{option} holds one input, and the model takes several: call ep_prune.{command} from Python"
        )
    example = inputs[0]
    found = next((value for value in _arrays(path, option) if value.is_floating_point()), None)
    if found is None:
        raise InputError(f"{option} {path} holds no floating array: store one of shape {_like(example)}")
    if found.ndim != example.ndim or found.shape[1:] != example.shape[1:] or not len(found):
        raise InputError(f"{option} {path} has shape {tuple(found.shape)}: store one of shape {_like(example)}")
    return [(batch,) for batch in torch.split(found.to(example.dtype), PROBE_BATCH)]


def _arrays(path: Path, option: str) -> list[Tensor]:
    if path.suffix in (".npz", ".npy"):
        try:
            stored = np.load(path, allow_pickle=False)
            arrays = [stored] if isinstance(stored, np.ndarray) else [stored[key] for key in stored.files]
            return [torch.from_numpy(array) for array in arrays if array.dtype.kind in "fiub"]
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{option} {path} is no plain array file ({_line(error)}): write it with numpy.savez"
            ) from error
    content = _read(path, option)
    values = content.values() if isinstance(content, Mapping) else content
    values = values if isinstance(content, Mapping | list | tuple) else [values]
    return [value for value in values if isinstance(value, Tensor)]


def _like(example: Tensor) -> str:
    return f"(samples, {', '.join(str(size) for size in example.shape[1:])})"


def _article(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(" .;:")[:300]
