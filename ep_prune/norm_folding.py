"""Batch norm, at inference an affine map of every channel, folded into the layer before it: same function, fewer
operations. What is left of the module is `nn.Identity`.

Only where the trace shows that nothing else can notice: module after module, each called once, plain PyTorch
layers, tensors that nobody shares or reads elsewhere. The sums are made in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import fusion

from ep_prune.errors import PlanError
from ep_prune.graph import Contract, Graph, Node, Normalize
from ep_prune.rules import kind_of

Pair = tuple[str, str]
"""Names of a layer with weights, and of the batch norm behind it."""

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def foldable(model: nn.Module, graph: Graph) -> tuple[Pair, ...]:
    """All pairs of a model, in the order of its trace; exact types alone: others may compute more."""
    modules, users = dict(model.named_modules(remove_duplicate=False)), graph.users()
    reads = Counter(node.tensor for node in graph.nodes if node.tensor is not None)
    uses = {name: len(users[node]) for node in graph.nodes if (name := node.tensor) is not None}

    def own(operands: Sequence[Node | None], layer: str) -> bool:
        """Whether all are tensors of the module of this name, each read once and under no other name."""
        names = [operand.tensor for operand in operands if operand is not None]
        return all(
            name is not None
            and name.rpartition(".")[0] == layer
            and len(graph.aliases.get(name, (name,))) == 1
            and reads[name] == uses[name] == 1
            for name in names
        )

    found = []
    for node in graph.nodes:
        norm = kind_of(node, graph)
        if not isinstance(norm, Normalize):
            continue
        x = norm.x
        made = kind_of(x, graph)
        if not isinstance(made, Contract) or users[x] != [node] or x in graph.outputs or made.layout.axis != 1:
            continue
        first, second = modules.get(x.layer), modules.get(node.layer)
        plain = type(first) in WEIGHTED and type(second) in NORMS
        parts = norm.weight, norm.bias, norm.mean, norm.variance
        if plain and own((made.weight, made.bias), x.layer) and own(parts, node.layer):
            found.append((x.layer, node.layer))
    return tuple(found)


def fold_norms_(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold the second of each pair into the first, in place."""
    for layer, name in pairs:
        try:
            first, norm = model.get_submodule(layer), model.get_submodule(name)
        except AttributeError as error:
            raise PlanError(
                f"the model has no layers {layer!r} and {name!r}: the plan belongs to another"
            ) from error
        if type(first) not in WEIGHTED or type(norm) not in NORMS:
            raise PlanError(f"{name!r} is no batch norm behind {layer!r}: the plan belongs to another model")
        _fold_(first, norm)  # type: ignore[arg-type]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Identity())


def _fold_(first: nn.Linear | nn.modules.conv._ConvNd, norm: nn.modules.batchnorm._BatchNorm) -> None:
    weight, bias = first.weight, first.bias

    def exact(tensor: Tensor | None) -> Any:  # the functions' own annotations do not allow None, and they do
        return None if tensor is None else tensor.detach().double()

    parts = *map(exact, (norm.running_mean, norm.running_var)), norm.eps, exact(norm.weight), exact(norm.bias)
    fold: Callable[..., tuple[Tensor, Tensor]] = fusion.fuse_linear_bn_weights
    if not isinstance(first, nn.Linear):
        fold = partial(fusion.fuse_conv_bn_weights, transpose=first.transposed)
        if first.transposed and first.groups > 1:  # rows of its kernel are inputs, columns their group's outputs
            fold = partial(_grouped, first.groups)
    new, shift = fold(exact(weight), exact(bias), *parts)
    trained = weight.requires_grad if bias is None else bias.requires_grad
    first.weight = nn.Parameter(new.detach().to(weight), weight.requires_grad)
    first.bias = nn.Parameter(shift.detach().to(weight), trained)


def _grouped(
    groups: int, weight: Tensor, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float,
    gain: Tensor | None, offset: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kernel (inputs, outputs / groups, ...) and bias of a grouped transposed convolution with its norm."""
    slope = (variance + eps).rsqrt() * (1.0 if gain is None else gain)
    each = slope.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1).reshape(len(weight), -1)
    shape = (*each.shape, *(1,) * (weight.ndim - 2))
    shift = slope * ((0.0 if bias is None else bias) - mean) + (0.0 if offset is None else offset)
    return weight * each.reshape(shape), shift


__all__ = ["Pair", "fold_norms_", "foldable"]
