"""A plan put into weights and shapes: one `resize` for parameters of modules, bare parameters and ties.

Edits are stated on parameter names. A tied parameter is edited once and stays tied, under all its names; the
modules' attributes (`out_channels`, `groups`, `num_features`, ...) are read off the new shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ep_prune.embedding import Fold, Heads, Mix, Round, Scale
from ep_prune.errors import PlanError
from ep_prune.modules import Constant, Shift


def apply_round_(model: nn.Module, step: Round) -> None:
    """Apply one round in place: mixes, folds (they read the wide outputs' biases), cuts, refits, scales; then
    modules: new biases, what vanishes, heads."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    new: dict[str, Tensor] = {}

    def current(name: str) -> Tensor:
        if name not in tensors and name not in new:
            raise PlanError(f"the model has no tensor {name!r}: the plan belongs to another model")
        return (new[name] if name in new else tensors[name]).detach()

    created: list[tuple[str, Tensor]] = []
    for mix in step.mixes:
        new[mix.weight] = mixed(mix, current(mix.weight))
        if mix.bias is not None:
            bias = current(mix.bias).clone()
            bias[mix.rows[: len(mix.offset)].to(bias.device)] = mix.offset.to(bias)
            new[mix.bias] = bias
        elif mix.new_bias is not None:
            weight = new[mix.weight]
            bias = torch.zeros(mix.layout.canonical(weight).shape[1], dtype=torch.float64)
            bias[mix.rows[: len(mix.offset)]] = mix.offset
            created.append((mix.new_bias, bias.to(weight)))
    for fold in step.folds:
        weight, sent = _folded(fold, current(fold.weight))
        if fold.bias is not None:
            old = current(fold.bias)
            new[fold.bias] = (old.double() + sent.to(old.device)).to(old.dtype)
        elif fold.mean is not None:
            old = current(fold.mean)
            new[fold.mean] = (old.double() - sent.to(old.device)).to(old.dtype)
        elif fold.new_bias is not None:
            size = fold.layout.canonical(current(fold.weight)).shape[1]
            keep = (fold.groups.unsqueeze(1) * size + fold.outputs).reshape(-1)
            axis = fold.weight, int(fold.layout.inputs_first)
            created.append((fold.new_bias, _scaled(sent[keep], axis, step.scales).to(weight)))
        new[fold.weight] = weight
    for cut in step.cuts:
        old = current(cut.tensor)
        new[cut.tensor] = old.index_select(cut.axis, cut.keep.to(old.device))
    for refit in step.refits:
        new[refit.weight] = refit.value.to(current(refit.weight))
        for name in (refit.bias, refit.mean):
            if name is not None and refit.constants is not None:
                new[name] = refit.constants.to(current(name))
        if refit.new_bias is not None and refit.constants is not None:
            created.append((refit.new_bias, refit.constants.to(new[refit.weight])))
    for scale in step.scales:
        old = current(scale.tensor)
        factor = torch.ones(old.shape[scale.axis], dtype=torch.float64)
        factor[scale.places] = scale.factor
        shape = [-1 if axis == scale.axis else 1 for axis in range(old.ndim)]
        new[scale.tensor] = (old.double() * factor.to(old.device).reshape(shape)).to(old.dtype)
    groups = {fold.weight: len(fold.groups) for fold in step.folds}
    resize_(model, new, groups | {refit.weight: refit.groups for refit in step.refits})
    for path, bias in created:
        module = model.get_submodule(path)
        trained = module.get_parameter("weight").requires_grad
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=trained))
    for block in step.vanished:
        was = model.get_submodule(block.module)
        bias = block.constant.to(next(was.parameters()))
        left = Shift(bias, block.after, block.rectified) if block.summed else Constant(bias, block.after)
        left.requires_grad_(any(p.requires_grad for p in was.parameters())).train(was.training)
        model.set_submodule(block.module, left)
    modules = dict(model.named_modules(remove_duplicate=False)) if step.heads else {}
    for heads in step.heads:
        if heads.layer in modules:  # a trace may name what is no module, and has no counts
            count_heads_(modules[heads.layer], heads)
    if step.heads and step.heads[0].alike:
        for config in {id(m.config): m.config for m in modules.values() if hasattr(m, "config")}.values():
            if hasattr(config, "__dict__"):
                count_heads_(config, step.heads[0])


def _scaled(bias: Tensor, axis: tuple[str, int], scales: tuple[Scale, ...]) -> Tensor:
    """A new bias of a weight whose outputs, along `axis`, are scaled in the same round."""
    for scale in scales:
        if (scale.tensor, scale.axis) == axis:
            bias = bias.index_put((scale.places,), bias[scale.places] * scale.factor)
    return bias


def mixed(mix: Mix, weight: Tensor) -> Tensor:
    """The producing weight with its first rows replaced, in its own type."""
    wide = mix.layout.canonical(weight.detach().to("cpu", torch.float64))[0].clone()
    count, size = mix.mixing.shape
    if int(mix.rows.max()) >= len(wide):
        raise PlanError(f"{mix.weight!r} has shape {tuple(weight.shape)}: the plan belongs to another model")
    wide[mix.rows[:count]] = (mix.mixing @ wide[mix.rows].reshape(size, -1)).reshape(count, *wide.shape[1:])
    return mix.layout.original(wide.unsqueeze(0), tuple(weight.shape[2:])).to(weight).contiguous()


def _folded(fold: Fold, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The narrow weight, and (O,) what the constants t send to every (wide) output, summed over taps."""
    wide = fold.layout.canonical(weight.detach().to("cpu", torch.float64))
    groups, outputs, inputs, taps = wide.shape
    if fold.embedding.n != groups * inputs or int(fold.outputs.max()) >= outputs:
        raise PlanError(f"{fold.weight!r} has shape {tuple(weight.shape)}: the plan belongs to another model")
    by_input = wide.transpose(1, 2).reshape(groups * inputs, outputs * taps)
    sent = (by_input * fold.embedding.t.unsqueeze(1)).reshape(groups, inputs, outputs, taps).sum((1, 3))
    narrow = fold.embedding.fold(by_input).reshape(len(fold.groups), -1, outputs, taps)
    picked = narrow.gather(2, fold.outputs[:, None, :, None].expand(-1, narrow.shape[1], -1, taps)).transpose(1, 2)
    kernel = tuple(weight.shape[2:])
    return fold.layout.original(picked, kernel).to(weight).contiguous(), sent.reshape(-1)


def resize_(model: nn.Module, new: dict[str, Tensor], groups: dict[str, int]) -> None:
    """Give parameters and buffers new values and shapes, under all their names, and keep attributes true.

    `groups`: the number of groups of each convolution's weight, which its shape alone does not tell.
    """
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    homes.setdefault(id(tensor), []).append((module, key))
    names = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    touched: set[nn.Module] = set()
    for name, value in new.items():
        old = names[name]
        replacement: Tensor = value
        if isinstance(old, nn.Parameter):
            replacement = nn.Parameter(value, requires_grad=old.requires_grad)
        for module, key in homes[id(old)]:
            if isinstance(replacement, nn.Parameter):
                module._parameters[key] = replacement
            else:
                module._buffers[key] = replacement
            touched.add(module)
            if isinstance(module, nn.modules.conv._ConvNd) and name in groups:
                module.groups = groups[name]
    for module in touched:
        for kind, refresh in _ATTRIBUTES:
            if isinstance(module, kind):
                refresh(module)
        if type(module).__name__ == "Conv1D" and {"nf", "nx"} & vars(module).keys():
            _linear_of_transformers(module)


def count_heads_(module: object, heads: Heads) -> None:
    """Bring the integers by which an attention's code, or a configuration, counts heads up to date.

    They go by their usual names, and only where they have the value that the name says: what this misses, the
    trial of the round sees.
    """
    widths = [
        (h * d, k * d, h // max(k, 1)) for h, k, d in zip(heads.heads, heads.shared, heads.size, strict=True)
    ]
    total, shared_total, repeats = zip(*widths, strict=True)
    for names, (old, new) in (
        (_HEADS, heads.heads),
        (_SHARED, heads.shared),
        (_SIZES, heads.size),
        (_TOTALS, total),
        (_SHARED_TOTALS, shared_total),
        (_REPEATS, repeats),
    ):
        for name in names & vars(module).keys():
            if type(getattr(module, name)) is int and getattr(module, name) == old:
                setattr(module, name, new)


_HEADS = {"num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads", "num_q_heads", "nh"}
_SHARED = {"num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_kv_head", "n_local_kv_heads"}
_SIZES = {"head_dim", "dim_head", "head_size", "attention_head_size", "dim_per_head", "key_value_proj_dim",
          "d_kv", "d_k", "d_v", "head_channels", "hd"}  # fmt: skip
_TOTALS = {"all_head_size", "inner_dim", "split_size", "attn_dim", "attention_dim", "q_size"}
_SHARED_TOTALS = {"kv_dim", "kv_size"}
_REPEATS = {"num_key_value_groups", "n_rep", "num_queries_per_kv", "repeats", "rep"}


def _linear(module: nn.Module) -> None:
    assert isinstance(module, nn.Linear)
    module.out_features, module.in_features = module.weight.shape


def _linear_of_transformers(module: nn.Module) -> None:
    """transformers' Conv1D, a linear layer whose weight is (inputs, outputs)."""
    for name, size in zip(("nx", "nf"), module.get_parameter("weight").shape, strict=True):
        if hasattr(module, name):
            setattr(module, name, size)


def _convolution(module: nn.Module) -> None:
    assert isinstance(module, nn.modules.conv._ConvNd)
    first, second = module.weight.shape[:2]
    if module.transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.out_channels, module.in_channels = first, second * module.groups


def _norm(module: nn.Module) -> None:
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    sized = module.weight if module.weight is not None else module.running_mean
    assert sized is not None
    module.num_features = len(sized)


def _layer_norm(module: nn.Module) -> None:
    assert isinstance(module, nn.LayerNorm)
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: nn.Module) -> None:
    assert isinstance(module, nn.GroupNorm) and module.weight is not None
    if module.num_groups == module.num_channels:
        module.num_groups = len(module.weight)
    module.num_channels = len(module.weight)


def _root_mean_square(module: nn.Module) -> None:
    assert isinstance(module, nn.RMSNorm)
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _prelu(module: nn.Module) -> None:
    assert isinstance(module, nn.PReLU)
    module.num_parameters = module.weight.numel()


def _table(module: nn.Module) -> None:
    assert isinstance(module, nn.Embedding)
    module.embedding_dim = module.weight.shape[1]


def _recurrent(module: nn.Module) -> None:
    assert isinstance(module, nn.RNNBase)
    first = module._parameters["weight_ih_l0"]
    assert first is not None
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.hidden_size, module.input_size = first.shape[0] // gates, first.shape[1]
    if module.proj_size:
        projection = module._parameters["weight_hr_l0"]
        assert projection is not None
        module.proj_size = projection.shape[0]
    module._init_flat_weights()  # the list that it runs with holds the parameters themselves


_ATTRIBUTES: tuple[tuple[type[nn.Module], Callable[[nn.Module], None]], ...] = (
    (nn.Linear, _linear),
    (nn.modules.conv._ConvNd, _convolution),
    (nn.modules.batchnorm._NormBase, _norm),
    (nn.LayerNorm, _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.RMSNorm, _root_mean_square),
    (nn.PReLU, _prelu),
    (nn.Embedding, _table),
    (nn.RNNBase, _recurrent),
)
