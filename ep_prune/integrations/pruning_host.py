"""What torch-pruning's groups say: which modules read the channels, which write them, and where a constant can go.

A group is a list of (dependency, indices). Its consumers are the linear layers and convolutions whose inputs it
narrows; all others of its members (norms, elementwise operators, depthwise convolutions) stand between.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

Group = Any
"""`torch_pruning.Group`, which has no types."""
READ = (function.prune_conv_in_channels, function.prune_linear_in_channels)
WRITE = (function.prune_conv_out_channels, function.prune_linear_out_channels)


@dataclass(frozen=True, eq=False)
class Consumer:
    """A module that reads channels of a group: its input `columns` (n,), and which `channels` (n,) they are."""

    name: str
    module: Any
    columns: Tensor
    channels: Tensor

    @property
    def stride(self) -> int:
        """Columns for each channel of a flattened image, side by side; 1 where they do not lie so."""
        if not isinstance(self.module, nn.Linear):
            return 1
        counts = torch.unique(self.channels, return_counts=True)[1]
        stride = int(counts[0])
        order = self.columns.sort().values.reshape(-1, stride) if len(self.columns) % stride == 0 else None
        if bool((counts != stride).any()) or order is None or self.module.in_features % stride:
            return 1
        whole = (order - order[:, :1] == torch.arange(stride)).all() and (order[:, 0] % stride == 0).all()
        return stride if bool(whole) else 1


def consumers(group: Group) -> list[Consumer]:
    """One for each module, in the order of the group."""
    place = {root: k for k, root in enumerate(group[0].idxs)}
    found: dict[str, tuple[Any, dict[int, int]]] = {}
    for item in group:
        dep, idxs = item
        if dep.handler not in READ:
            continue
        roots = getattr(item, "root_idxs", None)
        pairs = {c: place[r] for c, r in zip(idxs, roots or [None] * len(idxs), strict=True) if r in place}
        found.setdefault(name_of(group, dep.target.module), (dep.target.module, {}))[1].update(pairs)
    return [
        Consumer(name, module, torch.tensor(list(pairs)), torch.tensor(list(pairs.values())))
        for name, (module, pairs) in found.items()
        if pairs
    ]


def name_of(group: Group, module: nn.Module) -> str:
    """A module's name in the model."""
    return str(group._DG._module2name[module])


def indices(group: Group, handlers: Iterable[Any]) -> dict[str, list[int]]:
    """Module -> the indices that the group's members with these pruning functions drop there."""
    handlers = tuple(handlers)
    found: dict[str, set[int]] = {}
    for dep, idxs in group:
        if dep.handler in handlers:
            found.setdefault(name_of(group, dep.target.module), set()).update(idxs)
    return {name: sorted(idxs) for name, idxs in found.items()}


def width(group: Group) -> int:
    """All channels of the group's root."""
    graph, dep = group._DG, group[0].dep
    writes = graph.is_out_channel_pruning_fn(dep.handler)
    return int((graph.get_out_channels if writes else graph.get_in_channels)(dep.target.module))


def whole(group: Group) -> Group:
    """The group with all channels of its root in it."""
    dep = group[0].dep
    return group._DG.get_pruning_group(dep.target.module, dep.handler, list(range(width(group))))


def channel_groups(group: Group) -> int:
    """Into how many equal parts the channels fall: grouped convolutions, group norms."""
    counts = [1]
    for dep, _ in group:
        module = dep.target.module
        if isinstance(module, nn.modules.conv._ConvNd) and dep.handler in READ + WRITE:
            counts.append(module.groups)
        elif isinstance(module, nn.GroupNorm):
            counts.append(module.num_groups)
    return max(counts)


def norm_after(graph: Any, module: nn.Module) -> str | None:
    """The name of the batch norm that alone reads a module's output, and takes a constant in its running mean."""
    node = graph.module2node.get(module)
    if node is None or len(node.outputs) != 1:
        return None
    after = node.outputs[0]
    known = isinstance(after.module, nn.modules.batchnorm._BatchNorm) and after.module.running_mean is not None
    return str(graph._module2name[after.module]) if known and len(after.inputs) == 1 else None


def ties(model: nn.Module) -> list[list[tuple[str, str]]]:
    """Parameters that several modules have in common, each as (module, its name there)."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, key))
    return [places for places in owners.values() if len(places) > 1]


def tie(model: nn.Module, places: Iterable[list[tuple[str, str]]]) -> None:
    """Tie again what pruning has untied, where it is still equal; else warn."""
    for found in places:
        (first, key), *others = found
        leader = getattr(model.get_submodule(first), key)
        for name, other in others:
            follower = getattr(model.get_submodule(name), other)
            if follower is leader:
                continue
            if follower.shape == leader.shape and torch.equal(follower, leader):
                setattr(model.get_submodule(name), other, leader)
            else:
                warnings.warn(
                    f"{first}.{key} and {name}.{other} were one parameter, and pruning has made two of it: "
                    "put both layers into ignored_layers if they are to stay tied",
                    stacklevel=4,
                )


def untouchable(model: nn.Module) -> set[str]:
    """Modules whose weight is another module's, too, or is computed (parametrized): it is not fitted."""
    names = {name for found in ties(model) for name, _ in found}
    return names | {n for n, m in model.named_modules() if nn.utils.parametrize.is_parametrized(m)}


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Keep every module's mode and every parameter's `requires_grad`, by name, whatever happens to them inside."""
    modes = {module: module.training for module in model.modules()}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        parameters = dict(model.named_parameters())
        for name in frozen:
            if name in parameters:
                parameters[name].requires_grad_(False)


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Of all parameters and buffers: shapes, norms and sums. Another one means that something was changed."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.numel()]
    sizes = [torch.stack([t.float().norm(), t.float().sum()]).cpu() for t in tensors]
    numbers = torch.stack(sizes).tolist() if sizes else []
    return [(tuple(t.shape), *pair) for t, pair in zip(tensors, numbers, strict=True)]


def arguments(
    model: nn.Module, example_inputs: Any, importance: Any, rest: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `tp.pruner.BasePruner`, with its hazards taken out.

    Its default dictionaries are shared by all pruners, and it writes into them: every pruner gets its own. It
    takes a tensor apart into samples before it tries it as it is: it goes in as a tuple. It documents types in
    `ignored_layers` and passes them over: they become the modules of that type. `unwrapped_parameters` is to be a
    list of pairs, and may be the dictionary that is documented.
    """
    signature = inspect.signature(tp.pruner.BasePruner)
    given = dict(signature.bind(model, example_inputs, importance, *rest, **named).arguments)
    for key, parameter in signature.parameters.items():
        if isinstance(parameter.default, dict):
            given[key] = dict(given.get(key) or {})
    if isinstance(example_inputs, Tensor) and given.get("forward_fn") is None:
        given["example_inputs"] = (example_inputs,)
    if given.get("ignored_layers") is not None:
        layers: list[Any] = []
        for layer in given["ignored_layers"]:
            layers += [m for m in model.modules() if isinstance(m, layer)] if isinstance(layer, type) else [layer]
        given["ignored_layers"] = layers
    if given.get("unwrapped_parameters") is not None:
        pairs = given["unwrapped_parameters"]
        given["unwrapped_parameters"] = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    return given
