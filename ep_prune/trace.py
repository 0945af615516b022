"""From an `nn.Module` to a `Graph`: torch.export at ATen level, made functional, sizes concrete at the example.

The batch is free wherever the model lets it be (an example of batch 1 is repeated to 2, since export takes a
size of 1 for a constant). Parameters go by their names in the module, with every alias of a tied one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from ep_prune.errors import InputError, TraceError
from ep_prune.graph import Graph, Node
from ep_prune.modules import replace_
from ep_prune.rules import REGISTRY

_TORCH = str(Path(torch.__file__).parent)

_COMPOSED = get_decompositions([torch.ops.aten.glu, torch.ops.aten.addcmul, torch.ops.aten.addcdiv])
"""Operators that are taken apart into others, which have rules."""


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """The global random state, of every device, is afterwards as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of positional or a dict of keyword arguments, as (args, kwargs)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def prepare(model: nn.Module, replace_modules: bool = False, share: bool = False) -> tuple[nn.Module, list[str]]:
    """A private copy to work on: unwrapped, in eval mode, parametrizations baked into plain weights.

    Returns the copy and notes on what was unwrapped, baked, or exchanged for modules whose sizes are free. Raises
    `InputError` for what cannot be handled, naming the layer and what to do. share: its parameters are in the
    memory of the model's.
    """
    notes: list[str] = []
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, got {type(model).__name__}: pass the model itself")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            notes.append(f"{type(model).__name__} unwrapped")
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            notes.append("torch.compile unwrapped")
            model = inner
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is scripted: pass the eager module that it was scripted from")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"layer {name!r} is scripted: use the eager module that it was scripted from")
        if "quantized" in type(module).__module__:
            raise InputError(f"layer {name!r} is quantized: reduce the float model before quantizing it")
    _check_tensors(model)
    try:
        working = copy.deepcopy(model, _computed_attributes(model) | (own_parameters(model) if share else {}))
    except Exception as error:
        raise InputError(f"the model cannot be copied ({error}): detach tensors kept as attributes") from error
    baked = _bake(working)
    if baked:
        _check_tensors(working)  # weight norm makes NaN of a row of zeros
    notes += baked
    if replace_modules:
        notes += replace_(working)
    return working.eval(), notes


def _computed_attributes(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which refuses tensors with a history: what weight norm, spectral norm and masks keep
    as a plain attribute is copied without it."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in kept if tensor.grad_fn is not None}


def own_parameters(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy: parameters of their own, in the memory of the model's."""
    return {
        id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter
    }


def _check_tensors(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedTensorMixin):
            raise InputError(f"{name!r} is not initialized: run the model once on an example first")
        if tensor.is_meta:
            raise InputError(f"{name!r} has no data (meta device): load the weights first")
        if tensor.numel() == 0 and isinstance(tensor, nn.Parameter):
            raise InputError(f"{name!r} has zero width, shape {tuple(tensor.shape)}: remove this layer")
        if tensor.is_floating_point() and not bool((torch.isfinite(tensor) | _hides(tensor)).all()):
            raise InputError(f"{name!r} has NaN or infinite values: repair or reload this layer's weights")


def _hides(tensor: Tensor) -> Tensor | bool:
    """Where a tensor is minus infinity as a stored mask is."""
    return not isinstance(tensor, nn.Parameter) and tensor.ndim > 1 and tensor == -torch.inf


def _bake(model: nn.Module) -> list[str]:
    """Replace parametrized weights (weight norm, spectral norm, pruning masks) by the tensors they compute."""
    notes = []
    for name, module in model.named_modules():
        parametrized = getattr(module, "parametrizations", None)
        if isinstance(parametrized, nn.ModuleDict) and nn.utils.parametrize.is_parametrized(module):
            module.eval()
            # A copy shares its class with the user's module, and removing a parametrization changes the class.
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
            for tensor in list(parametrized):
                nn.utils.parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
                notes.append(f"parametrization of {name}.{tensor} baked in")
        for key, hook in list(module._forward_pre_hooks.items()):
            hooked = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
            kind = type(hook).__module__
            if not isinstance(hooked, str):
                continue
            if kind == "torch.nn.utils.prune":
                prune.remove(module, hooked)  # type: ignore[no-untyped-call]
            elif kind == "torch.nn.utils.weight_norm":
                nn.utils.remove_weight_norm(module, hooked)
            elif kind == "torch.nn.utils.spectral_norm":
                nn.utils.remove_spectral_norm(module, hooked)
            else:
                continue
            module._forward_pre_hooks.pop(key, None)
            notes.append(f"{kind.rsplit('.', 1)[1]} of {name}.{hooked} baked in")
    return notes


def run(model: nn.Module, inputs: Any) -> Any:
    """`model` on `inputs`, without gradients; a failure names the layer that it came from."""
    args, kwargs = as_arguments(inputs)
    active: list[str] = []
    hooks = []

    def leave(*_: Any) -> None:  # what a forward hook returns, unless None, replaces the output
        active.pop()

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: active.append(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        layer = active[-1] if active and active[-1] else "the top level"
        raise InputError(
            f"the model does not run on example_inputs, at layer {layer}: {_first_line(error)}; "
            "pass inputs of the shape, type and device that the model takes"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def with_batch_of_two(model: nn.Module, inputs: Any) -> Any:
    """The inputs, repeated to a batch of 2 where they have a batch of 1 and the model takes it."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors or tensors[0].shape[0] != 1:
        return inputs

    def repeat(leaf: Any) -> Any:
        grows = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 1
        return torch.cat([leaf, leaf]) if grows else leaf

    doubled = pytree.tree_map(repeat, inputs)
    try:
        run(model, doubled)
    except InputError:
        return inputs
    return doubled


def trace(model: nn.Module, example_inputs: Any) -> Graph:
    """Export `model`, in the mode it is in, to a `Graph`. Raises `TraceError`, `InputError`."""
    example_inputs = with_batch_of_two(model, example_inputs)
    args, kwargs = as_arguments(example_inputs)
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    batch = tensors[0].shape[0] if tensors and tensors[0].ndim else None
    for tensor in tensors:
        if tensor.ndim and tensor.shape[0] == batch and batch and batch > 1:
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    failure: Exception | None = None
    with _quiet():
        for dynamic in (True, False):
            try:
                dynamic_shapes = shapes.dynamic_shapes(model, args, kwargs) if dynamic else None  # type: ignore[no-untyped-call]
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
                if _is_functional(program):
                    program.graph.eliminate_dead_code()  # results that nobody reads, as of a max pool's places
                else:
                    program = program.run_decompositions(dict(_COMPOSED))
                return _convert(program, model)
            except Exception as error:
                if _register_dataclasses(model, example_inputs):
                    return trace(model, example_inputs)
                failure = failure or error
    assert failure is not None
    raise TraceError(
        f"the model cannot be exported{_stopped_at(failure)}: {_first_line(failure)}; "
        "reduce a submodule that does export instead (ep_prune.reduce(model.backbone, ...))"
    ) from failure


def _register_dataclasses(model: nn.Module, inputs: Any) -> bool:
    """Tell PyTorch of the dataclasses that a model returns, which it does not export otherwise; whether there were
    any that it did not know."""
    try:
        leaves = pytree.tree_leaves(run(model, inputs))
    except InputError:
        return False
    unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
    for kind in unknown:
        torch.export.register_dataclass(kind)
    return bool(unknown)


def _is_functional(program: torch.export.ExportedProgram) -> bool:
    """Whether every operator has a rule and none works in place: making it functional, most of the time that a
    trace takes, would change nothing."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                return False  # also where it returns nothing
            known = str(node.target).removesuffix(".default") in REGISTRY
            if isinstance(node.meta.get("val"), Tensor | tuple | list) and not known:
                return False
        elif node.op not in ("call_function", "placeholder", "output"):
            return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export logs and warns at length about sizes that it cannot solve for; a failure is raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.fx", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(" .;:")[:300]


def _stopped_at(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_TORCH)]
    frames = [f for f in frames if f.filename != __file__ and "sympy" not in f.filename]
    found = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    users = [(path, line) for path, line in found if not path.startswith(_TORCH) and path != __file__]
    if users:
        return " at {}:{}".format(*users[-1])
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _convert(program: torch.export.ExportedProgram, model: nn.Module) -> Graph:
    signature = program.graph_signature
    stored = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    names: dict[int, list[str]] = {}
    live: dict[str, Tensor] = {}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
        live[name] = tensor.detach()
    first = {name: group[0] for group in names.values() for name in group}
    tensors = {name: live[name] for name in first.values()}

    nodes: dict[Any, Any] = {}
    converted: list[Node] = []
    outputs: tuple[Node, ...] = ()

    def operand(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return nodes[value]
        if isinstance(value, tuple | list):
            return type(value)(operand(item) for item in value)
        if isinstance(value, dict):
            return {key: operand(item) for key, item in value.items()}
        return value

    for fx in program.graph.nodes:
        if fx.op == "output":
            outputs = tuple(_tensor_nodes(operand(fx.args[0])))
            continue
        value = fx.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            nodes[fx] = _hint(value)
            continue
        if fx.op == "get_attr":
            nodes[fx] = Node(fx.name, "get_attr")
            converted.append(nodes[fx])
            continue
        is_tensor = isinstance(value, Tensor)
        read: str | None = None
        if fx.op == "placeholder" and fx.name in stored:
            read = first.get(stored[fx.name], stored[fx.name])
            if read not in tensors:
                tensors[read] = program.constants[read].detach()
        stack = list((fx.meta.get("nn_module_stack") or {}).values())
        node = Node(
            name=fx.name,
            op=str(fx.target).removesuffix(".default") if fx.op == "call_function" else fx.op,
            args=operand(tuple(fx.args)),
            kwargs=operand(dict(fx.kwargs)),
            shape=tuple(_hint(size) for size in value.shape) if is_tensor else None,
            dtype=value.dtype if is_tensor else None,
            layer=re.sub(r"^L__self__\.?", "", stack[-1][0]) if stack else "",
            source=_source(fx.meta.get("stack_trace")),
            target=fx.target if callable(fx.target) else None,
            tensor=read,
            sized=any(isinstance(x.meta.get("val"), torch.SymInt) for x in fx.all_input_nodes),
        )
        nodes[fx] = node
        converted.append(node)
    used = {node.tensor for node in converted for node in node.operands() if node.tensor is not None}
    return Graph(
        nodes=tuple(converted),
        outputs=outputs,
        tensors=tensors,
        aliases={group[0]: tuple(group) for group in names.values()},
        bias_free=frozenset(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is None
        ),
        untraced=tuple(name for name in tensors if name not in used and name in parameters),
    )


def _tensor_nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensor_nodes(item)


def _hint(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


def _source(stack_trace: str | None) -> str:
    """The innermost line of the user's own code, as file:line."""
    found = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    own = [(path, line) for path, line in found if not path.startswith(_TORCH)]
    return "{}:{}".format(*(own or found)[-1]) if found else ""
