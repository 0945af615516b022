"""Seeded random programs over the registered operators, and the modules that run them.

A `Program` is a list of operations on numbered values (0 is the input); `build` makes a module that runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, SIDE, TOKENS = 2, 6, 5
UNFIT = (ValueError, RuntimeError, KeyError, IndexError, NotImplementedError)
"""What `build` raises where shapes do not fit."""


@dataclass(frozen=True)
class Op:
    """values.append(name(values of `args`)), with outputs of width `width` where it has weights of its own.

    like: the place of an earlier operation whose layer is called again, -1 for a layer of its own.
    """

    name: str
    args: tuple[int, ...]
    setting: Any = None
    width: int = 0
    seed: int = 0
    like: int = -1


@dataclass(frozen=True)
class Program:
    """`layout`: "image" (2, 3, 6, 6), "row" (2, 4) or "tokens" (2, 5, 4); `outputs`: the values returned."""

    layout: str
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    seed: int = 0

    def code(self) -> str:
        """Python that makes this program."""
        lines = [
            f"    Op({op.name!r}, {op.args}, {op.setting!r}, {op.width}, {op.seed}, {op.like}),  # {place + 1}"
            for place, op in enumerate(self.ops)
        ]
        return "\n".join([f"Program({self.layout!r}, (", *lines, f"), outputs={self.outputs}, seed={self.seed})"])


# ---- operations -----------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in ("relu", "tanh", "sigmoid", "abs", "sin", "cos", "erf", "atan",
                                               "asinh", "square", "exp", "neg")},
    **{name: getattr(F, name) for name in ("leaky_relu", "relu6", "gelu", "silu", "elu", "celu", "selu", "mish",
                                           "softplus", "hardswish", "hardsigmoid", "hardtanh", "softshrink",
                                           "hardshrink", "logsigmoid", "softsign", "tanhshrink")},
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "clamp_min": lambda x: x.clamp_min(0),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "sqrt": lambda x: (x.square() + 1).sqrt(),
    "cube": lambda x: x**3,
    "where": lambda x: torch.where(x > 0, x, 0.3 * x),
}  # fmt: skip
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max3": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "avg counting padding": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "avg without padding": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "adaptive avg": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, size=SIDE, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, size=SIDE, mode="bilinear", align_corners=False),
    "zero pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "transpose": lambda x: x.transpose(2, 3),
    "crop": lambda x: x[:, :, 1:, :-1],
}
JOINS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - 0.5 * y,
    "mul": lambda x, y: x * y,
    "gate": lambda x, y: x * torch.sigmoid(y),
}


def _rearranged(kind: str, x: Tensor) -> Tensor:
    """Movement among the channels, sizes taken from the tensor."""
    axis = 1 if x.ndim == 4 else x.ndim - 1
    if kind == "chunk and multiply":
        one, two = x.chunk(2, axis)
        return one * two.sigmoid()
    if kind == "chunk and swap":
        return torch.cat(x.chunk(2, axis)[::-1], axis)
    if kind == "shuffle":
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    if kind == "pixel shuffle":
        return F.pixel_shuffle(x, 2)
    if kind == "pixel unshuffle":
        return F.pixel_unshuffle(x, 2)
    if kind == "channels last":
        return x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)
    raise KeyError(kind)


MOVES = ("chunk and multiply", "chunk and swap", "shuffle", "pixel shuffle", "pixel unshuffle", "channels last")
# kernel, stride, padding, dilation, groups (0: depthwise), bias
CONVS = ("1 1 0 1 1 1", "1 1 0 1 1 0", "3 1 1 1 1 1", "3 1 1 1 1 0", "3 2 1 1 1 1", "3 1 0 1 1 1", "3 1 2 2 1 1",
         "3 1 1 1 0 1", "3 1 1 1 0 0", "3 1 1 1 2 1", "2 2 0 1 1 1")  # fmt: skip
RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
NORMS = ("batch norm", "layer norm", "group norm", "instance norm", "rms norm")
LAYERS = ("conv", "transposed", "linear", *NORMS, "prelu", "squeeze", "parameter", "attention", *RECURRENT)


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class SelfAttention(nn.Module):
    """Two heads of `inner` channels each, from (batch, tokens, width) to as much; `causal` or not."""

    def __init__(self, width: int, inner: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(width, 6 * inner), nn.Linear(2 * inner, width), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        blended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(blended.transpose(1, 2).flatten(2))


class Recurrence(nn.Module):
    """All outputs of a recurrent layer, with the batch first."""

    def __init__(self, kind: str, width: int, inner: int, both_ways: bool) -> None:
        super().__init__()
        self.cells = RECURRENT[kind](width, inner, batch_first=True, bidirectional=both_ways)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.cells(x)[0]
        return found


class PerChannel(nn.Module):
    """A gain and a shift of one number a channel."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


def _layer(op: Op, x: Tensor) -> nn.Module:
    """The layer of an operation with weights, for an input like `x`, its weights drawn by the operation's seed."""
    image, width = x.ndim == 4, x.shape[1 if x.ndim == 4 else -1]
    if op.name == "conv":
        kernel, stride, padding, dilation, groups, bias = map(int, op.setting.split())
        out = width if groups == 0 else op.width
        made: nn.Module = nn.Conv2d(width, out, kernel, stride, padding, dilation, groups or width, bool(bias))
    elif op.name == "transposed":
        made = nn.ConvTranspose2d(width, op.width, *op.setting)
    elif op.name == "linear":
        made = nn.Linear(x.shape[-1], op.width, bias=op.setting)
    elif op.name == "batch norm":
        made = nn.BatchNorm2d(width) if image else nn.BatchNorm1d(width)
    elif op.name == "layer norm":
        made = nn.LayerNorm(x.shape[-1])
    elif op.name == "group norm":
        made = nn.GroupNorm(2, width)
    elif op.name == "instance norm":
        made = nn.InstanceNorm2d(width, affine=True)
    elif op.name == "rms norm":
        made = nn.RMSNorm(x.shape[-1])
    elif op.name == "attention":
        made = SelfAttention(width, op.width, op.setting)
    elif op.name in RECURRENT:
        made = Recurrence(op.name, width, op.width, op.setting)
    elif op.name == "prelu":
        made = nn.PReLU(width if op.setting else 1)
    elif op.name == "squeeze":
        made = Squeeze(width, op.width)
    else:
        made = PerChannel((width, 1, 1) if image else (width,))
    draw = torch.Generator().manual_seed(op.seed)
    made = made.double().eval()
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            fresh = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
            if name.endswith("running_var"):
                fresh = fresh.abs() + 0.5
            elif tensor.ndim > 1 and op.name != "parameter":
                fresh *= 1.5 / math.sqrt(tensor[0].numel())
            elif name == "weight" or name == "gain":
                fresh = fresh * 0.3 + fresh.sign()
            tensor.copy_(fresh)
    return made


def _apply(op: Op, layer: nn.Module | None, values: Sequence[Tensor]) -> Tensor:
    if layer is not None:
        found: Tensor = layer(values[0])
        return found
    if op.name == "act":
        return ACTIVATIONS[op.setting](values[0])
    if op.name == "pool":
        return POOLS[op.setting](values[0])
    if op.name == "move":
        return _rearranged(op.setting, values[0])
    if op.name == "join":
        return JOINS[op.setting](*values)
    if op.name == "cat":
        return torch.cat(list(values), 1 if values[0].ndim == 4 else -1)
    if op.name == "mean":
        return values[0].mean((2, 3) if values[0].ndim == 4 else 1)
    if op.name == "flatten":
        return values[0].flatten(1)
    assert op.name == "scale"
    return values[0] * op.setting + 0.25


class Network(nn.Module):
    """Runs a program."""

    def __init__(self, program: Program, x: Tensor) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleDict()
        values = [x]
        for place, op in enumerate(program.ops):
            if op.name in LAYERS and op.like < 0:
                self.layers[f"v{place + 1}"] = _layer(op, values[op.args[0]])
            with torch.no_grad():
                values.append(self._step(op, place, values))
            if not bool(values[-1].isfinite().all()) or float(values[-1].abs().max()) > 1e6:
                raise ValueError("values out of range")
        if not all(bool((values[place].abs() > 0).any()) for place in program.outputs):
            raise ValueError("an output that is 0")

    def _step(self, op: Op, place: int, values: Sequence[Tensor]) -> Tensor:
        own = place + 1 if op.like < 0 else op.like
        layer = self.layers[f"v{own}"] if op.name in LAYERS else None
        return _apply(op, layer, [values[arg] for arg in op.args])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for place, op in enumerate(self.program.ops):
            values.append(self._step(op, place, values))
        return tuple(values[place] for place in self.program.outputs)


def example(program: Program, batch: int = BATCH, seed: int = 0) -> Tensor:
    """Inputs of a program."""
    shape = {"image": (batch, 3, SIDE, SIDE), "row": (batch, 4), "tokens": (batch, TOKENS, 4)}[program.layout]
    draw = torch.Generator().manual_seed(program.seed + 7919 * seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def build(program: Program) -> tuple[nn.Module, Tensor]:
    """The module and an example. Raises ValueError or RuntimeError where shapes do not fit."""
    x = example(program)
    return Network(program, x).eval(), x


# ---- programs -------------------------------------------------------------------------------------------


def generate(seed: int) -> Program:
    """A program of 4 to 12 operations and one or two outputs, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    def choice(items: Sequence[Any]) -> Any:
        return items[integer(0, len(items) - 1)]

    program = Program(choice(("image", "image", "image", "row", "tokens", "tokens")), (), (0,), seed)
    shapes: list[tuple[int, ...]] = [tuple(example(program).shape)]

    def attempt(op: Op, outputs: tuple[int, ...] | None = None) -> bool:
        nonlocal program
        longer = replace(program, ops=(*program.ops, op), outputs=(len(shapes),))
        try:
            net, x = build(longer)
            shape = tuple(net(x)[0].shape)
        except UNFIT:
            return False
        if shape[1 if len(shape) == 4 else -1] > 12:
            return False
        program = longer
        shapes.append(shape)
        return True

    def pick() -> int:
        return len(shapes) - 1 if integer(0, 3) else integer(0, len(shapes) - 1)

    def draw_op() -> Op:
        x = pick()
        image = len(shapes[x]) == 4
        same = [k for k in range(len(shapes)) if shapes[k] == shapes[x] and k != x] or [x]
        fitting = [
            k for k in range(len(shapes)) if image and len(shapes[k]) == 4 and shapes[k][2:] == shapes[x][2:]
        ]
        width, weight_seed = integer(2, 4), integer(0, 10**6)
        weighted = "conv" if image else "linear"
        if len(shapes[x]) == 3 and not integer(0, 4):
            return Op(
                choice(("attention", "attention", *RECURRENT)), (x,), bool(integer(0, 1)), width, weight_seed
            )
        kind = choice((weighted, weighted, weighted, "act", "act", "act", "norm", "join", "join", "cat", "pool",
                       "move", "other", "again"))  # fmt: skip
        if kind == "conv":
            return Op("conv", (x,), choice(CONVS), width, weight_seed)
        if kind == "linear":
            return Op("linear", (x,), bool(integer(0, 3)), width, weight_seed)
        if kind == "act":
            return Op("act", (x,), choice(list(ACTIVATIONS)))
        if kind == "norm":
            name = choice(("batch norm", "batch norm", "group norm", "instance norm") if image
                          else ("batch norm", "batch norm", "layer norm", "rms norm"))  # fmt: skip
            return Op(name, (x,), None, 0, weight_seed)
        if kind == "join":
            return Op("join", (x, choice(same)), choice(list(JOINS)))
        if kind == "cat":
            return Op("cat", (x, choice(fitting or same)))
        if kind == "pool":
            return Op("pool", (x,), choice(list(POOLS)))
        if kind == "move":
            return Op("move", (x,), choice(MOVES))
        if kind == "again":
            earlier = [k + 1 for k, op in enumerate(program.ops) if op.name in ("conv", "linear") and op.like < 0]
            place = choice(earlier or [1])
            if earlier:
                return replace(program.ops[place - 1], args=(x,), like=place)
        name = choice(("prelu", "squeeze", "parameter", "transposed", "mean", "flatten", "scale"))
        setting = {
            "prelu": bool(integer(0, 1)),
            "transposed": choice(((2, 2), (3, 2, 1), (3, 1, 1))),
            "scale": -1.5,
        }
        return Op(name, (x,), setting.get(name), width, weight_seed)

    wanted, tries = integer(4, 12), 0
    while len(program.ops) < wanted and tries < 60:
        tries += 1
        attempt(draw_op())
    ends = [len(shapes) - 1] + ([integer(1, len(shapes) - 1)] if integer(0, 2) == 0 and len(shapes) > 1 else [])
    heads = []
    for end in dict.fromkeys(ends):
        name = "conv" if len(shapes[end]) == 4 else "linear"
        if attempt(Op(name, (end,), "1 1 0 1 1 1" if name == "conv" else True, 2, integer(0, 10**6))):
            heads.append(len(shapes) - 1)
    return pruned(replace(program, outputs=tuple(heads or [len(shapes) - 1])))


def pruned(program: Program) -> Program:
    """Without the operations that no output needs."""
    needed = set(program.outputs)
    for place in range(len(program.ops), 0, -1):
        if place in needed:
            op = program.ops[place - 1]
            needed |= {*op.args, *([op.like] if op.like > 0 else [])}
    order = {0: 0}
    for place in range(1, len(program.ops) + 1):
        if place in needed:
            order[place] = len(order)
    ops = tuple(
        replace(op, args=tuple(order[arg] for arg in op.args), like=order[op.like] if op.like > 0 else -1)
        for place, op in enumerate(program.ops, 1)
        if place in needed
    )
    return replace(program, ops=ops, outputs=tuple(order[place] for place in program.outputs))


def without(program: Program, place: int) -> Program:
    """The program without value `place`, its first operand in its stead; a layer called again gets its own."""
    stand_in = program.ops[place - 1].args[0]

    def moved(value: int) -> int:
        value = stand_in if value == place else value
        return value - (value > place)

    ops = tuple(
        replace(op, args=tuple(map(moved, op.args)), like=-1 if op.like in (-1, place) else moved(op.like))
        for k, op in enumerate(program.ops, 1)
        if k != place
    )
    return pruned(replace(program, ops=ops, outputs=tuple(dict.fromkeys(map(moved, program.outputs)))))
