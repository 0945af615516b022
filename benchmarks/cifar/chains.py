"""Inner channels: those that one layer makes, and one other layer alone reads.

    z = W x (+ b),  optionally y = batch norm(z),
    h = channel-wise functions of it (activation, pool, padding with zeros),
    out = V h (+ c)

A chain is found in the torch.fx trace of a network: a convolution or linear layer (without groups), whose
result goes through operations that treat every channel alike, each read once, into another. Flattening in
front of a linear layer makes every channel a block of its inputs. Channels of residual streams are no chains,
and so are left alone by every method that is written on top of this file.

Narrowing from C to K channels is two matrices:

    incoming A (K, C):  W' = A W, b' = A b, and so for gain, shift, mean and variance of the batch norm
    outgoing T (C, K):  V'[o, k, :] = sum_c V[o, c, :] T[c, k]       (h is approximated by T h')

Picking channels is a row of the identity in A, which changes no bit of what is picked.

`Walk` runs the network node by node, on all images at once, so that a method may change each layer when the
forward pass comes to it, front to back, with the inputs that the layers changed before it give.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from benchmarks.cifar.budget import Prices, largest

CHUNK = 128

CHANNELWISE_MODULES = (
    nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ReLU6,
    nn.Dropout, nn.Dropout2d, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d,
    nn.Flatten,
)  # fmt: skip
CHANNELWISE_CALLS = {
    F.relu, torch.relu, torch.sigmoid, torch.tanh, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.dropout,
    torch.flatten, "relu", "sigmoid", "tanh", "flatten", "contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """Paths of the layer that makes the channels, of the batch norm right behind it if there is one, and of the
    layer that reads them; `width` is their number."""

    producer: str
    norm: str | None
    consumer: str
    width: int


def find(model: nn.Module) -> list[Chain]:
    """The chains of `model`, in the order in which it runs."""
    traced = fx.symbolic_trace(model)
    modules = dict(model.named_modules())
    chains = []
    for node in traced.graph.nodes:
        layer = _layer(node, modules)
        if layer is None:
            continue
        norm, step = None, _only_reader(node)
        while step is not None and _layer(step, modules) is None:
            module = modules.get(step.target) if step.op == "call_module" else None
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and step.args[0] is node:
                norm = step.target
            elif not (isinstance(module, CHANNELWISE_MODULES) if module is not None else _channelwise(step)):
                step = None
                break
            step = _only_reader(step)
        if step is not None:
            chains.append(Chain(node.target, norm, step.target, layer.weight.shape[0]))
    used = [name for chain in chains for name in (chain.producer, chain.consumer)]
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert all(calls.count(name) == 1 for name in used), "a layer that runs twice cannot be narrowed for one place"
    return chains


def _layer(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Conv2d | nn.Linear | None:
    module = modules.get(node.target) if node.op == "call_module" else None
    plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    return module if plain else None


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].op != "output" else None


def _channelwise(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in CHANNELWISE_CALLS


@torch.no_grad()
def narrow_(model: nn.Module, chain: Chain, incoming: Tensor, outgoing: Tensor) -> None:
    """Narrow a chain in place by A = `incoming` (K, C) and T = `outgoing` (C, K); see the top of the file."""
    producer, consumer = model.get_submodule(chain.producer), model.get_submodule(chain.consumer)
    norm = model.get_submodule(chain.norm) if chain.norm else None
    width, incoming, outgoing = len(incoming), incoming.double(), outgoing.double()

    def mixed(tensor: Tensor) -> Tensor:
        return (incoming @ tensor.double().flatten(1)).view(width, *tensor.shape[1:]).to(tensor.dtype)

    for module, names in (
        (producer, ("weight", "bias")),
        (norm, ("weight", "bias", "running_mean", "running_var")),
    ):
        for name in names:
            tensor = getattr(module, name, None)
            if tensor is not None:
                new = mixed(tensor) if tensor.ndim > 1 else mixed(tensor.unsqueeze(1)).squeeze(1)
                _set(module, name, new)
    weight = blocks(consumer.weight, chain_width(consumer, incoming)).double()
    new = torch.einsum("ocb,ck->okb", weight, outgoing).to(consumer.weight.dtype)
    _set(consumer, "weight", new.reshape(len(new), -1, *consumer.weight.shape[2:]))
    for module, made, read in ((producer, width, None), (norm, width, None), (consumer, None, width)):
        _resize(module, made, read)


def chain_width(consumer: nn.Module, incoming: Tensor) -> int:
    """The wide number of channels, which the consumer's inputs must be blocks of."""
    width = incoming.shape[1]
    assert consumer.weight.shape[1] % width == 0, "the consumer reads blocks of the producer's channels"
    return width


def blocks(weight: Tensor, width: int) -> Tensor:
    """A consumer's weight as (outputs, channels, what it reads of each channel)."""
    return weight.reshape(len(weight), width, -1)


def _set(module: Any, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    value = value.contiguous()
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _resize(module: Any, made: int | None, read: int | None) -> None:
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = made or module.out_channels, module.weight.shape[1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = made or module.out_features, module.weight.shape[1]
    elif module is not None:
        module.num_features = made


def picking(kept: Tensor, width: int) -> Tensor:
    """A (K, width): rows of the identity."""
    return torch.eye(width, dtype=torch.float64)[kept]


def shared_widths(model: nn.Module, images: Tensor, keep_macs: float) -> dict[Chain, int]:
    """One ratio for all chains, the largest that the budget lets through; at least one channel each."""
    chains, prices = find(model), Prices(model, images)
    if not chains:
        raise ValueError("no inner channels found: nothing can be narrowed")
    share = largest(lambda share: cost_of(model, prices, widths_at(chains, share)) <= keep_macs * prices.wide)
    return widths_at(chains, share)


def widths_at(chains: list[Chain], share: float) -> dict[Chain, int]:
    """`share` of every chain's width, rounded, at least 1."""
    return {chain: max(1, round(share * chain.width)) for chain in chains}


def cost_of(model: nn.Module, prices: Prices, widths: dict[Chain, int]) -> int:
    """MACs of `model` at these widths of its chains."""
    total, modules = 0, dict(model.named_modules())
    for name, positions in prices.positions.items():
        size = modules[name].weight.numel()
        for chain, width in widths.items():
            if name in (chain.producer, chain.consumer):
                size = size * width // chain.width  # exact: the width divides the size
        total += positions * size
    return total


Chunks = list[Tensor]


class Walk:
    """One forward pass over all images, node by node.

    `before[path]` is called with the inputs of a layer, in chunks of images, when all is ready to run it; it may
    change the layer (and layers behind it), and returns the inputs to run it on. `after[path]` gets the outputs in
    the same way.
    """

    def __init__(self, model: nn.Module, images: Tensor, chunk: int = CHUNK) -> None:
        self.model, self.images = model, images.split(chunk)
        self.graph = fx.symbolic_trace(model).graph
        self.before: dict[str, Callable[[Chunks], Chunks]] = {}
        self.after: dict[str, Callable[[Chunks], Chunks]] = {}

    @torch.no_grad()
    def run(self) -> Chunks:
        """The outputs, in chunks."""
        values: dict[fx.Node, list[Any]] = {}
        last = {operand: node for node in self.graph.nodes for operand in node.all_input_nodes}
        for node in self.graph.nodes:
            if node.op == "output":
                return values[node.args[0]]
            if node.op == "call_module" and node.target in self.before:
                values[node.args[0]] = self.before[node.target](values[node.args[0]])
            values[node] = [self._one(node, values, part) for part in range(len(self.images))]
            if node.op == "call_module" and node.target in self.after:
                values[node] = self.after[node.target](values[node])
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    del values[operand]
        raise AssertionError("a graph ends in its output")

    def _one(self, node: fx.Node, values: dict[fx.Node, list[Any]], part: int) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: values[operand][part])
        if node.op == "placeholder":
            return self.images[part].clone()  # a network may work in place
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.model)
        if node.op == "call_module":
            return self.model.get_submodule(node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)
