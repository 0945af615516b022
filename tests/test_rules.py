"""One table, one row per operator: planted redundancy in front of it, and exactly what must be left.

A row is a small network `producer -> operator -> consumer` (or a small module of its own). The producer's
channels have known roles (`planted`); the row states which of them stay. Rows with the same input are reduced
together, as independent branches of one model, which changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ep_prune as ep
from ep_prune import pipeline
from ep_prune.graph import Barrier, Graph, Node, Pass
from ep_prune.rules import REGISTRY
from ep_prune.trace import trace
from tests.attention import operators
from tests.planted import (
    ROLES,
    Bundle,
    Case,
    Chain,
    inputs,
    kept,
    plant_,
    plant_layer_,
    randomize_,
    relative,
    unread_,
)

# Places of ROLES = "a b k.5 a 2.5a -a n k-.75".
A, B, K, COPY, SCALED, FLIPPED, NULL, K2 = range(8)
ALL = tuple(range(8))
LINEAR = (A, B)
POSITIVE = (A, B, FLIPPED)
ODD = EVEN = (A, B, SCALED)
EQUAL = (A, B, SCALED, FLIPPED)

CASES: list[Case] = []


def add(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], left: tuple[int, ...], **more: Any
) -> None:
    CASES.append(Case(name, build, shape, left, **more))


def chain(
    operator: Callable[..., Any],
    *,
    space: int = 0,
    consumer: Callable[[], nn.Module] | None = None,
    roles: str = ROLES,
    inner: Callable[[Any], Any] | None = None,
    reads: Callable[[nn.Module], Tensor] | None = None,
    **options: Any,
) -> Callable[[], nn.Module]:
    """A producer of planted channels (linear for space 0, else a convolution), `operator`, and a consumer.

    `operator` is a function, or a module class or factory (made new each time). `reads` gives the consumer's
    weight with the planted channels first, where that is not plain.
    """
    width = len(roles.split())

    def build() -> nn.Module:
        operation = operator() if isinstance(operator, type) else operator
        model = Chain(_producer(space, width), operation, consumer() if consumer else _consumer(space, width))
        randomize_(model)
        plant_layer_(model.producer, roles, **options)
        if inner is not None:
            inner(operation)
        weight = reads(model.consumer) if reads else model.consumer.get_parameter("weight").transpose(0, 1)
        unread_(weight, roles)
        return model

    return build


def _producer(space: int, width: int) -> nn.Module:
    convolution = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[space]
    return convolution(4, width) if space == 0 else convolution(2, width, 1 if space == 3 else 2)


def _consumer(space: int, width: int) -> nn.Module:
    convolution = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[space]
    return convolution(width, 3) if space == 0 else convolution(width, 3, 1)


VECTOR, LINE, PLANE, SOLID = (4,), (2, 9), (2, 7, 7), (2, 4, 4, 4)
SHAPES = (VECTOR, LINE, PLANE, SOLID)


# ---- functions of one variable ------------------------------------------------------------------------------

POINTWISE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "relu": (F.relu, POSITIVE),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), POSITIVE),
    "rrelu in eval": (nn.RReLU, POSITIVE),
    "clamp from 0": (lambda x: x.clamp(min=0), POSITIVE),
    "clamp to 0": (lambda x: x.clamp(max=0), POSITIVE),
    "clamp_min 0": (lambda x: torch.clamp_min(x, 0), POSITIVE),
    "clamp_max 0": (lambda x: torch.clamp_max(x, 0), POSITIVE),
    "clamp_min of a tenth": (lambda x: torch.clamp_min(x, 0.1), EQUAL),
    "clamp_max of a tenth": (lambda x: torch.clamp_max(x, 0.1), EQUAL),
    "abs": (torch.abs, LINEAR),
    "square": (torch.square, LINEAR),
    "pow 2": (lambda x: x**2, LINEAR),
    "pow 3": (lambda x: x**3, EQUAL),
    "tanh": (torch.tanh, ODD),
    "erf": (torch.erf, ODD),
    "atan": (torch.atan, ODD),
    "sin": (torch.sin, ODD),
    "sinh": (torch.sinh, ODD),
    "asinh": (torch.asinh, ODD),
    "tan": (torch.tan, ODD),
    "softshrink": (lambda x: F.softshrink(x, 0.1), ODD),
    "hardshrink": (lambda x: F.hardshrink(x, 0.1), ODD),
    "sign": (torch.sign, ODD),
    "hardtanh": (F.hardtanh, ODD),
    "sigmoid": (torch.sigmoid, ODD),
    "hardsigmoid": (F.hardsigmoid, ODD),
    "cos": (torch.cos, EVEN),
    "cosh": (torch.cosh, EVEN),
    "gelu": (F.gelu, EQUAL),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), EQUAL),
    "silu": (F.silu, EQUAL),
    "mish": (F.mish, EQUAL),
    "elu": (F.elu, EQUAL),
    "selu": (F.selu, EQUAL),
    "celu": (lambda x: F.celu(x, 0.7), EQUAL),
    "softplus": (F.softplus, EQUAL),
    "log sigmoid": (F.logsigmoid, EQUAL),
    "hardswish": (F.hardswish, EQUAL),
    "threshold": (lambda x: F.threshold(x, 0.1, -0.3), EQUAL),
    "exp": (torch.exp, EQUAL),
    "expm1": (torch.expm1, EQUAL),
    "log": (lambda x: torch.log(x + 4), EQUAL),
    "log2": (lambda x: torch.log2(x + 4), EQUAL),
    "log1p": (lambda x: torch.log1p(x + 4), EQUAL),
    "sqrt": (lambda x: torch.sqrt(x + 4), EQUAL),
    "rsqrt": (lambda x: torch.rsqrt(x + 4), EQUAL),
    "reciprocal": (lambda x: torch.reciprocal(x + 4), EQUAL),
    **{
        f"compared by {function.__name__}": (lambda x, f=function: x * f(x, 0.1), EQUAL)
        for function in (torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne)
    },
    "where": (lambda x: torch.where(x > 0.1, x, x.sin()), EQUAL),
    "where of numbers": (lambda x: torch.where(x > 0.1, 1.0, -0.3) * x, EQUAL),
    "where or number": (lambda x: torch.where(x > 0.1, x, -0.3), EQUAL),
    # compositions: the symmetry follows from the parts
    "softsign": (F.softsign, ODD),
    "tanhshrink": (F.tanhshrink, ODD),
    "gaussian": (lambda x: torch.exp(-x * x), EVEN),
    "x tanh x": (lambda x: x * torch.tanh(x), EVEN),
    "lorentz": (lambda x: 1 / (1 + x**2), EVEN),
    "x abs x": (lambda x: x * x.abs(), LINEAR),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), EQUAL),
    "snake": (lambda x: x + torch.sin(x) ** 2, EQUAL),
    "relu squared": (lambda x: F.relu(x).square(), POSITIVE),
    "relu times relu": (lambda x: F.relu(x) * F.relu(x), POSITIVE),
    "hardtanh of relus": (lambda x: F.relu(x + 1) - F.relu(x - 1) - 1, EQUAL),
}
for _name, (_function, _left) in POINTWISE.items():
    add(_name, chain(_function), VECTOR, _left)

# Mirror images about the middle of the ramp, and pre-activations that cross both bends.
add("relu6", chain(F.relu6, center=3.0, gain=6.0), VECTOR, ODD)
add("relu6 about 0", chain(F.relu6, gain=6.0), VECTOR, EQUAL)
add("clamp", chain(lambda x: x.clamp(0.5, 2), center=1.25, gain=3.0), VECTOR, ODD)
add("hardtanh -1 2", chain(lambda x: F.hardtanh(x, -1, 2), center=0.5, gain=3.0), VECTOR, ODD)
add("tanh about 1", chain(torch.tanh, center=1.0), VECTOR, EQUAL)
for _name, _function in {"asin": torch.asin, "atanh": torch.atanh, "erfinv": torch.erfinv}.items():
    add(_name, chain(_function, gain=0.3), VECTOR, ODD)


def prelu(slopes: list[float]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = chain(lambda x: x)()
        model.operator = nn.PReLU(len(slopes)).double()
        with torch.no_grad():
            model.operator.weight.copy_(torch.tensor(slopes))
        return model.eval()

    return build


add("prelu", prelu([0.3]), VECTOR, POSITIVE)
add("prelu per channel", prelu([0.3, 0.2, 0.1, 0.3, 0.3, 0.3, 0.5, 0.6]), VECTOR, POSITIVE)
add("prelu unequal", prelu([0.3, 0.2, 0.1, 0.4, 0.5, 0.3, 0.5, 0.6]), VECTOR, (A, B, COPY, SCALED, FLIPPED))
add("relu on a plane", chain(F.relu, space=2), PLANE, POSITIVE)
add("tanh on a line", chain(torch.tanh, space=1), LINE, ODD)


# ---- weights ------------------------------------------------------------------------------------------------


def reading(make: Callable[[], nn.Module], space: int) -> Callable[[], nn.Module]:
    """The consumer is the operator under test."""

    def inputs_first(layer: nn.Module) -> Tensor:
        weight = layer.get_parameter("weight")
        return weight if isinstance(layer, nn.modules.conv._ConvTransposeNd) else weight.transpose(0, 1)

    return chain(lambda x: x, space=space, consumer=make, reads=inputs_first)


add("linear", reading(lambda: nn.Linear(8, 3), 0), VECTOR, LINEAR)
add("linear without bias", reading(lambda: nn.Linear(8, 3, bias=False), 0), VECTOR, LINEAR)
for _space, _shape in ((1, LINE), (2, PLANE), (3, SOLID)):
    _make: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[_space]
    _back: Any = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[_space]
    _size = 2 if _space == 3 else 3
    add(f"conv{_space}d", reading(lambda m=_make, k=_size: m(8, 3, k), _space), _shape, LINEAR)
    add(f"conv{_space}d zeros", reading(lambda m=_make: m(8, 3, 3, padding=1), _space), _shape, (A, B, K2))
    add(f"conv{_space}d same", reading(lambda m=_make: m(8, 3, 3, padding="same"), _space), _shape, (A, B, K2))
    add(f"conv{_space}d valid", reading(lambda m=_make: m(8, 3, 2, padding="valid"), _space), _shape, LINEAR)
    for _mode in ("circular", "reflect", "replicate"):
        add(
            f"conv{_space}d {_mode}",
            reading(lambda m=_make, mode=_mode: m(8, 3, 3, padding=1, padding_mode=mode), _space),
            _shape,
            LINEAR,
        )
    add(f"transposed{_space}d", reading(lambda m=_back: m(8, 3, 2, stride=2), _space), _shape, (A, B, K2))
    add(
        f"transposed{_space}d settings",
        reading(lambda m=_back: m(8, 3, 3, stride=2, padding=1, output_padding=1), _space),
        _shape,
        (A, B, K2),
    )
add("conv2d even same", reading(lambda: nn.Conv2d(8, 3, 2, padding="same"), 2), PLANE, (A, B, K2))
add("conv2d strided", reading(lambda: nn.Conv2d(8, 3, 3, 2, dilation=2), 2), PLANE, LINEAR)


def grouped(padding: int) -> Callable[[], nn.Module]:
    """Two groups of four inputs: what leads is found group by group, and both groups stay equally wide."""

    def build() -> nn.Module:
        model = Chain(_producer(2, 8), lambda x: x, nn.Conv2d(8, 6, 3, padding=padding, groups=2))
        randomize_(model)
        plant_layer_(model.producer, ROLES)
        with torch.no_grad():
            model.consumer.weight[3:, 2] = 0.0  # the null channel is third of the second group
        return model

    return build


# First group: a, b, k, a; second: 2.5a, -a, n, k2.
add("grouped", grouped(0), PLANE, (A, B, SCALED, FLIPPED), widths={"consumer": 6})
add("grouped zeros", grouped(1), PLANE, (A, B, K, SCALED, FLIPPED, K2), widths={"consumer": 6})


def depthwise(space: int, padding: int, equal: bool = True, transposed: bool = False) -> Callable[[], nn.Module]:
    make: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[space]
    if transposed:
        make = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[space]

    def build() -> nn.Module:
        model = chain(lambda x: x, space=space)()
        model.operator = randomize_(make(8, 8, 3, padding=padding, groups=8), seed=1)
        with torch.no_grad():
            for place in (COPY, SCALED, FLIPPED) if equal else ():
                model.operator.weight[place] = model.operator.weight[A]
            model.operator.weight[K2] = model.operator.weight[K]
            model.operator.bias[K2] = model.operator.bias[K] * -1.5  # so that k2 stays a multiple of k
        return model

    return build


add("depthwise", depthwise(2, 0), PLANE, LINEAR, widths={"operator": 2})
add("depthwise line", depthwise(1, 0), LINE, LINEAR, widths={"operator": 2})
add("depthwise solid", depthwise(3, 1), SOLID, (A, B, K), widths={"operator": 3})
add("depthwise zeros", depthwise(2, 1), PLANE, (A, B, K), widths={"operator": 3})
add("depthwise transposed", depthwise(2, 0, transposed=True), PLANE, (A, B, K), widths={"operator": 3})
add(
    "depthwise unequal",
    depthwise(2, 0, equal=False),
    PLANE,
    (A, B, COPY, SCALED, FLIPPED),
    widths={"operator": 5},
)


class Transposed(nn.Module):
    """Planted channels come out of a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.producer = nn.ConvTranspose2d(2, 8, 2, stride=2)
        self.consumer = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.consumer(F.relu(self.producer(x)))


class Product(nn.Module):
    """Planted columns of bare parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(4, 8))
        self.bias = nn.Parameter(torch.empty(8))
        self.second = nn.Parameter(torch.empty(8, 3))
        self.third = nn.Parameter(torch.empty(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "addmm":
            hidden = torch.addmm(self.bias, x, self.weight)
            return torch.addmm(self.third, torch.tanh(hidden), self.second)
        if self.kind == "mm":
            return torch.mm(torch.tanh(torch.mm(x, self.weight) + self.bias), self.second) + self.third
        return torch.tanh(x @ self.weight + self.bias) @ self.second + self.third


def transposed() -> nn.Module:
    model = randomize_(Transposed())
    plant_layer_(model.producer, ROLES)
    unread_(model.consumer.weight.transpose(0, 1), ROLES)
    return model


def product(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = randomize_(Product(kind))
        plant_(model.weight.detach().T, model.bias.detach(), ROLES)
        unread_(model.second.detach(), ROLES)
        return model

    return build


add("from transposed", transposed, PLANE, POSITIVE)
for _kind in ("addmm", "mm", "matmul"):
    # the constants have a bias to go to in addmm alone
    add(_kind, product(_kind), VECTOR, ODD if _kind == "addmm" else (A, B, SCALED, K2), producer="")


# ---- other norms: instance norm lets a sign through, the others keep their channels ---------------------------

add("instance norm", chain(lambda x: F.instance_norm(x), space=2), PLANE, ODD)
add("group norm", chain(lambda x: F.group_norm(x, 2), space=2), PLANE, ALL)
add("rms norm", chain(lambda x: F.rms_norm(x, (8,))), VECTOR, ALL)


# ---- batch norm -----------------------------------------------------------------------------------------------


def normalized(act: Callable[[Tensor], Tensor], follow: bool) -> Callable[[], nn.Module]:
    """`follow`: the statistics are such that the roles hold behind the batch norm, too."""

    def build() -> nn.Module:
        model = chain(act, space=2)()
        norm = randomize_(nn.BatchNorm2d(8), seed=2)
        if follow:
            with torch.no_grad():
                for place, factor in ((COPY, 1.0), (SCALED, 2.5), (FLIPPED, -1.0)):
                    # the producer already has the factor: keep gain / deviation, scale mean and shift
                    norm.running_var[place] = norm.running_var[A]
                    norm.weight[place] = norm.weight[A]
                    norm.running_mean[place] = factor * norm.running_mean[A]
                    norm.bias[place] = factor * norm.bias[A]
        model.producer = nn.Sequential(model.producer, norm)
        return model.eval()

    return build


_bn = {"producer": "producer.0"}
add("batch norm", normalized(lambda x: x, False), PLANE, LINEAR, widths={"producer.1": 2}, **_bn)
add("batch norm relu", normalized(F.relu, True), PLANE, POSITIVE, widths={"producer.1": 3}, **_bn)
add("batch norm relu unequal", normalized(F.relu, False), PLANE, (A, B, COPY, SCALED, FLIPPED), **_bn)
add("batch norm tanh", normalized(torch.tanh, True), PLANE, ODD, widths={"producer.1": 3}, **_bn)


# ---- sums, products, gates ------------------------------------------------------------------------------------

add("add number", chain(lambda x: x + 0.7), VECTOR, LINEAR)
add("add number then tanh", chain(lambda x: torch.tanh(x + 0.7)), VECTOR, EQUAL)
add("subtract number", chain(lambda x: x - 0.7), VECTOR, LINEAR)
add("subtract from number", chain(lambda x: 0.7 - x), VECTOR, LINEAR)
add("rsub", chain(lambda x: torch.rsub(x, 0.7)), VECTOR, LINEAR)
add("times number", chain(lambda x: -1.3 * x), VECTOR, LINEAR)
add("times number then relu", chain(lambda x: F.relu(-1.3 * x)), VECTOR, POSITIVE)
add("over number", chain(lambda x: x / 1.3), VECTOR, LINEAR)
add("negative", chain(lambda x: -x), VECTOR, LINEAR)


class WithBuffer(nn.Module):
    def __init__(self, kind: str, space: int = 0) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("table", torch.empty(8, *[1] * space))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "add":
            return x + self.table
        if self.kind == "subtract":
            return x - self.table
        if self.kind == "multiply":
            return x * self.table
        return x / self.table


for _kind in ("add", "subtract", "multiply", "divide"):
    add(
        f"{_kind} buffer",
        lambda kind=_kind: randomize_wrap(WithBuffer(kind), 0),
        VECTOR,
        LINEAR,
    )
    add(f"{_kind} buffer on a plane", lambda kind=_kind: randomize_wrap(WithBuffer(kind, 2), 2), PLANE, LINEAR)


def randomize_wrap(operator: nn.Module, space: int) -> nn.Module:
    model = chain(lambda x: x, space=space)()
    model.operator = randomize_(operator, seed=3)
    return model


class Gate(nn.Module):
    """Two producers meet; `other` has roles of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.producer = nn.Linear(4, 8)
        self.other = nn.Linear(4, 8)
        self.consumer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.producer(x), self.other(x)
        if self.kind == "add":
            h = torch.tanh(u + g)
        elif self.kind == "subtract":
            h = torch.tanh(torch.sub(u, g, alpha=2))
        elif self.kind == "silu":
            h = F.silu(g) * u
        elif self.kind == "glu":
            h = F.glu(torch.cat([u, g], -1), -1)
        elif self.kind == "maximum of squares":
            h = u.square() * g.abs()
        else:
            h = u / (2 + torch.sigmoid(g))
        return self.consumer(h)


def gate(kind: str, other: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = randomize_(Gate(kind))
        plant_layer_(model.producer, ROLES)
        plant_layer_(model.other, other, seed=7)
        unread_(model.consumer.weight.transpose(0, 1), ROLES)
        return model

    return build


_same = "a b k.3 a a a n k.2"
_both = "a b k.3 a 2.5a -a n k.2"
add("add branch", gate("add", _both), VECTOR, ODD, widths={"other": 3})
add("add branch unequal", gate("add", "a b k.3 c a a n k.2"), VECTOR, (A, B, COPY, SCALED, FLIPPED))
add("subtract branch", gate("subtract", _both), VECTOR, ODD, widths={"other": 3})
add("gate", gate("silu", _same), VECTOR, LINEAR, widths={"other": 2})
add("gate of flipped", gate("silu", "a b k.3 a a -a n k.2"), VECTOR, (A, B, FLIPPED))
add("gate of scaled", gate("silu", "a b k.3 a 2a a n k.2"), VECTOR, (A, B, SCALED))
add("gate of constant", gate("silu", "a b a a a a n k.2"), VECTOR, (A, B, K))
add("glu", gate("glu", _same), VECTOR, LINEAR, widths={"other": 2})
add("product of even", gate("maximum of squares", "a b k.3 a -2a 3a n k.2"), VECTOR, LINEAR)
add("divide by branch", gate("divide", _same), VECTOR, LINEAR, widths={"other": 2})


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.producer = nn.Conv2d(2, 8, 2)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.consumer = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.producer(x)
        s = self.expand(F.relu(self.reduce(h.mean((2, 3), keepdim=True))))
        return self.consumer(h * torch.sigmoid(s))


def squeeze_excite(equal: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = randomize_(SqueezeExcite())
        plant_layer_(model.producer, ROLES)
        plant_layer_(model.reduce, "a b 2a -a")
        plant_layer_(model.expand, "a b k.3 a a a n k.2" if equal else "a b c d e a n k.2", seed=5)
        unread_(model.consumer.weight.transpose(0, 1), ROLES)
        unread_(model.reduce.weight.transpose(0, 1), ROLES)
        return model

    return build


add("squeeze excite", squeeze_excite(True), PLANE, LINEAR, widths={"reduce": 3, "expand": 2})
add(
    "squeeze excite unequal",
    squeeze_excite(False),
    PLANE,
    (A, B, K, COPY, SCALED),  # the flipped one shares the gate of a; the constant has a gate that varies
    widths={"reduce": 3, "expand": 5},
)


# ---- over space -----------------------------------------------------------------------------------------------

POOLS: dict[str, tuple[int, Any, tuple[int, ...]]] = {
    "max pool": (2, lambda x: F.max_pool2d(x, 2), POSITIVE),
    "max pool padded": (2, lambda x: F.max_pool2d(x, 3, 2, padding=1), POSITIVE),
    "max pool line": (1, lambda x: F.max_pool1d(x, 2), POSITIVE),
    "max pool solid": (3, lambda x: F.max_pool3d(x, 2), POSITIVE),
    "max pool with places": (2, lambda x: F.max_pool2d(x, 2, return_indices=True)[0], POSITIVE),
    "max pool solid with places": (3, lambda x: F.max_pool3d(x, 2, return_indices=True)[0], POSITIVE),
    "adaptive max": (2, lambda x: F.adaptive_max_pool2d(x, 2), POSITIVE),
    "adaptive max line": (1, lambda x: F.adaptive_max_pool1d(x, 2), POSITIVE),
    "adaptive max solid": (3, lambda x: F.adaptive_max_pool3d(x, 2), POSITIVE),
    "amax": (2, lambda x: x.amax((2, 3), keepdim=True), POSITIVE),
    "average": (2, lambda x: F.avg_pool2d(x, 2), LINEAR),
    "average line": (1, lambda x: F.avg_pool1d(x, 2), LINEAR),
    "average solid": (3, lambda x: F.avg_pool3d(x, 2), LINEAR),
    "average counts padding": (2, lambda x: F.avg_pool2d(x, 3, 2, 1), (A, B, K)),
    "average line counts padding": (1, lambda x: F.avg_pool1d(x, 3, 2, 1), (A, B, K)),
    "average leaves padding out": (2, lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), LINEAR),
    "average by divisor": (2, lambda x: F.avg_pool2d(x, 2, divisor_override=3), (A, B, K)),
    "adaptive average": (2, lambda x: F.adaptive_avg_pool2d(x, 2), LINEAR),
    "adaptive average line": (1, lambda x: F.adaptive_avg_pool1d(x, 3), LINEAR),
    "adaptive average solid": (3, lambda x: F.adaptive_avg_pool3d(x, 2), LINEAR),
    "mean": (2, lambda x: x.mean((2, 3), keepdim=True), LINEAR),
    "mean of one axis": (2, lambda x: x.mean(-1, keepdim=True), LINEAR),
    "sum": (2, lambda x: x.sum((2, 3), keepdim=True), (A, B, K)),
    "nearest": (2, lambda x: F.interpolate(x, scale_factor=2), LINEAR),
    "nearest to size": (2, lambda x: F.interpolate(x, size=(9, 5)), LINEAR),
    "nearest line": (1, lambda x: F.interpolate(x, scale_factor=2), LINEAR),
    "nearest solid": (3, lambda x: F.interpolate(x, scale_factor=2), LINEAR),
    "nearest exact": (2, lambda x: F.interpolate(x, size=(9, 5), mode="nearest-exact"), LINEAR),
    "nearest exact line": (1, lambda x: F.interpolate(x, size=9, mode="nearest-exact"), LINEAR),
    "nearest exact solid": (3, lambda x: F.interpolate(x, size=5, mode="nearest-exact"), LINEAR),
    "linear resize": (1, lambda x: F.interpolate(x, scale_factor=2, mode="linear"), LINEAR),
    "bilinear": (2, lambda x: F.interpolate(x, size=(9, 5), mode="bilinear"), LINEAR),
    "bilinear corners": (2, lambda x: F.interpolate(x, size=9, mode="bilinear", align_corners=True), LINEAR),
    "bilinear antialias": (2, lambda x: F.interpolate(x, size=(4, 5), mode="bilinear", antialias=True), LINEAR),
    "trilinear": (3, lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), LINEAR),
    "bicubic": (2, lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), LINEAR),
    "bicubic antialias": (2, lambda x: F.interpolate(x, size=(4, 5), mode="bicubic", antialias=True), LINEAR),
    "pad zeros": (2, lambda x: F.pad(x, (1, 1, 1, 1)), (A, B, K)),
    "pad zeros line": (1, lambda x: F.pad(x, (1, 0)), (A, B, K)),
    # Padding with the constant's own value leaves that one constant; multiples of a are none behind it.
    "pad value": (2, lambda x: F.pad(x, (1, 0, 0, 1), value=0.5), (A, B, SCALED, FLIPPED, K2)),
    "zero pad module": (2, nn.ZeroPad2d((1, 0, 2, 0)), (A, B, K)),
    **{
        f"pad {mode} {name}": (space, lambda x, m=mode, s=space: F.pad(x, (1, 1) * s, mode=m), LINEAR)
        for mode in ("reflect", "replicate", "circular")
        for space, name in ((1, "line"), (2, "plane"), (3, "solid"))
    },
}
_aten = torch.ops.aten
for _mode in ("reflection", "replication"):
    for _space, _name in ((1, "line"), (2, "plane"), (3, "solid")):
        _op = getattr(_aten, f"{_mode}_pad{_space}d")
        POOLS[f"{_mode} of a {_name}"] = (_space, lambda x, f=_op, s=_space: f(x, (1, 1) * s), LINEAR)
for _name, _space in {"nearest": 1, "linear": 1, "trilinear": 3}.items():
    _op = getattr(_aten, f"upsample_{_name}{_space}d")
    _more = () if _name == "nearest" else (False,)
    POOLS[f"upsample {_name}"] = (_space, lambda x, f=_op, s=_space, m=_more: f(x, (9,) * s, *m), LINEAR)
POOLS["upsample nearest plane"] = (2, lambda x: _aten.upsample_nearest2d(x, (9, 5)), LINEAR)
POOLS["upsample nearest solid"] = (3, lambda x: _aten.upsample_nearest3d(x, (5, 5, 5)), LINEAR)
for _name, (_space, _function, _left) in POOLS.items():
    add(_name, chain(_function, space=_space), SHAPES[_space], _left)
for _name, _function in {
    "mean away": lambda x: x.mean((2, 3)),
    "amax away": lambda x: x.amax((2, 3)),
    "sum away": lambda x: x.sum((2, 3)),
}.items():
    _left = {"mean away": LINEAR, "amax away": POSITIVE, "sum away": (A, B, K)}[_name]
    add(_name, chain(_function, space=2, consumer=lambda: nn.Linear(8, 3)), PLANE, _left)


def shifted_reads(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").transpose(0, 1)[1:9]


add(
    "pad channels",
    chain(
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        space=2,
        consumer=lambda: nn.Conv2d(11, 3, 1),
        reads=shifted_reads,
    ),
    PLANE,
    LINEAR,
)


# ---- data movement --------------------------------------------------------------------------------------------

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll(1, 2),
    "slice of space": lambda x: x[:, :, 1:, ::2],
    "negative slice of space": lambda x: x[:, :, -3:],
    "narrow space": lambda x: x.narrow(2, 1, 3),
    "transposed space": lambda x: x.transpose(2, 3),
    "swapped space": lambda x: x.swapaxes(2, 3),
    "moved axes": lambda x: x.movedim(1, 3).movedim(3, 1),
    "permuted": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "unsqueezed": lambda x: x.unsqueeze(1).squeeze(1),
    "squeezed dims": lambda x: x.unsqueeze(1).unsqueeze(1).squeeze((1, 2)),
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    "repeated space": lambda x: x.repeat(1, 1, 2, 1),
    "tiled space": lambda x: x.tile(1, 1, 2, 1),
    "viewed": lambda x: x.view(x.shape[0], x.shape[1], -1).unsqueeze(-1),
    "reshaped": lambda x: x.reshape(x.shape[0], x.shape[1], x.shape[3], x.shape[2]),
    "flattened space": lambda x: x.flatten(2).unsqueeze(2),
    "unflattened": lambda x: x.flatten(2).unflatten(2, (3, -1)),
    "selected row": lambda x: x.select(2, 1).unsqueeze(2),
    "indexed rows": lambda x: x[:, :, [0, 2, 1]],
    "index selected rows": lambda x: x.index_select(2, torch.tensor([0, 3, 3])),
    "stacked with itself": lambda x: torch.stack([x, x], 2).flatten(2, 3),
    "joined along space": lambda x: torch.cat([x, x], 2),
    "split space": lambda x: sum(x.split(3, 2)),
    "chunked space": lambda x: torch.cat(x.chunk(2, 2)[::-1], 2),
    "split with sizes": lambda x: torch.cat(x.split([1, 2, 3], 3)[::-1], 3),
    "sections of space": lambda x: torch.cat(x.tensor_split(4, 3), 3),
    "unfolded": lambda x: x.unfold(2, 3, 1).mean(-1),
    "contiguous": lambda x: x.transpose(2, 3).contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "positive": lambda x: torch.positive(x),
    "alias": lambda x: torch.ops.aten.alias(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "identity": lambda x: nn.Identity()(x),
}
for _name, _function in MOVES.items():
    add(_name, chain(_function, space=2), PLANE, LINEAR)
add("flip channels", chain(lambda x: x.flip(1), space=2, roles="a b k.5 a 2.5a -a c k-.75"), PLANE, (1, 5, 6))
for _name, _module in {
    "dropout module": nn.Dropout(0.3),
    "dropout of channels": nn.Dropout2d(0.3),
    "alpha dropout": nn.AlphaDropout(0.3),
    "feature alpha dropout": nn.FeatureAlphaDropout(0.3),
}.items():
    add(_name, chain(_module, space=2), PLANE, LINEAR)
add("cast to float32", chain(lambda x: x.float().double()), VECTOR, LINEAR, tolerance=1e-6)
add("cast by type_as", chain(lambda x: x.to(torch.float32).type_as(x)), VECTOR, LINEAR, tolerance=1e-6)
add("squeezed", chain(lambda x: x.unsqueeze(1).squeeze()), VECTOR, LINEAR)
add("addcmul", chain(lambda x: torch.addcmul(x, x, torch.tensor(0.5), value=2)), VECTOR, LINEAR)
add("transposed matrix", chain(lambda x: x.t().t()), VECTOR, LINEAR)
add("numpy transposed", chain(lambda x: x.T.T), VECTOR, LINEAR)
add(
    "channels last",
    chain(lambda x: x.permute(0, 2, 3, 1), space=2, consumer=lambda: nn.Linear(8, 3)),
    PLANE,
    LINEAR,
)


def flattened(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").reshape(3, 8, 36).permute(1, 0, 2)


for _name, _function in {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
}.items():
    add(
        _name,
        chain(_function, space=2, consumer=lambda: nn.Linear(8 * 36, 3), reads=flattened),
        PLANE,
        LINEAR,
        widths={"consumer": 3},
    )


def doubled(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight")
    return weight.reshape(3, 2, 8, -1).permute(2, 0, 1, 3)


for _name, _function in {
    "joined with itself": lambda x: torch.cat([x, x], 1),
    "repeated channels": lambda x: x.repeat(1, 2, 1, 1),
    "expanded channels": lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2),
    "stacked channels": lambda x: torch.stack([x, -x], 1).flatten(1, 2),
}.items():
    add(_name, chain(_function, space=2, consumer=lambda: nn.Conv2d(16, 3, 1), reads=doubled), PLANE, LINEAR)


class Halves(nn.Module):
    """The channels cut in two, each half read by a layer of its own; the halves stay equally wide."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.producer = nn.Linear(4, 8)
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.producer(x)
        half = h.shape[1] // 2
        if self.kind == "chunk":
            u, v = h.chunk(2, 1)
        elif self.kind == "split":
            u, v = h.split(half, 1)
        elif self.kind == "slice":
            u, v = h[:, :half], h[:, half:]
        elif self.kind == "narrow":
            u, v = h.narrow(1, 0, half), h.narrow(1, half, half)
        elif self.kind == "tensor_split":
            u, v = h.tensor_split(2, 1)
        else:
            u, v = h.view(h.shape[0], 2, half).unbind(1)
        return self.first(u) + self.second(v)


def halves(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = randomize_(Halves(kind))
        plant_layer_(model.producer, ROLES)
        with torch.no_grad():
            model.second.weight[:, 2] = 0.0
        return model

    return build


# First half: a, b, k, a; second half: 2.5a, -a, n, k2.
for _kind in ("chunk", "split", "slice", "narrow", "tensor_split"):
    add(f"halves by {_kind}", halves(_kind), VECTOR, (A, B, SCALED, FLIPPED))

add(
    "channel shuffle",
    chain(
        lambda x: x.view(x.shape[0], 2, x.shape[1] // 2, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.shape),
        space=2,
        roles="a c 2a k.5 b d -b k.2",  # columns (a, b), (c, d), (2a, -b), constants
    ),
    PLANE,
    (0, 1, 4, 5),
)
add(
    "channel shuffle module",
    chain(  # as many outputs as channels: with fewer, the rank of the product would be lower still
        nn.ChannelShuffle(2), space=2, roles="a c 2a k.5 b d -b k.2", consumer=lambda: nn.Conv2d(8, 6, 1)
    ),
    PLANE,
    (0, 1, 4, 5),
)
add(
    "pixel shuffle",
    chain(
        nn.PixelShuffle(2),
        space=2,
        roles="a b c d 2a 2b 2c 2d k.5 k.5 k.5 k.5",
        consumer=lambda: nn.Conv2d(3, 2, 1),
    ),
    PLANE,
    (0, 1, 2, 3),
)
add(
    "pixel shuffle unequal",
    chain(
        nn.PixelShuffle(2),
        space=2,
        roles="a b c d 2a 2b 2c 3d a b c d",
        consumer=lambda: nn.Conv2d(3, 2, 1),
    ),
    PLANE,
    tuple(range(8)),
)
add(
    "pixel unshuffle",
    chain(
        nn.PixelUnshuffle(2),
        space=2,
        consumer=lambda: nn.Conv2d(32, 3, 1),
        reads=lambda layer: layer.get_parameter("weight").reshape(3, 8, 4).permute(1, 0, 2),
    ),
    PLANE,
    LINEAR,
)


class Joined(nn.Module):
    """Two producers side by side: copies are found across them."""

    def __init__(self) -> None:
        super().__init__()
        self.producer = nn.Conv2d(2, 8, 2)
        self.other = nn.Conv2d(2, 4, 2)
        self.consumer = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.consumer(F.relu(torch.cat([self.producer(x), self.other(x)], 1)))


def joined() -> nn.Module:
    model = randomize_(Joined())
    plant_layer_(model.producer, ROLES)
    plant_layer_(model.other, "a 2b c k.5")  # the same a and b
    with torch.no_grad():
        model.other.weight[2] += 0.1
        model.consumer.weight[:, NULL] = 0.0
    return model


add("joined", joined, PLANE, POSITIVE, widths={"other": 1, "consumer": 3})


# ---- barriers -------------------------------------------------------------------------------------------------

# no barrier: what comes out is known, though all channels stay that go in
add("layer norm over channels", chain(lambda x: F.layer_norm(x, x.shape[1:])), VECTOR, ALL)
add(
    "layer norm over two axes",
    chain(lambda x: F.layer_norm(x[..., None], (8, 1))[..., 0]),
    VECTOR,
    ALL,
    barrier="layer_norm",
)
add("softmax over channels", chain(lambda x: x.softmax(1)), VECTOR, ALL, barrier="softmax")
add("cumsum over channels", chain(lambda x: x.cumsum(1)), VECTOR, ALL, barrier="cumsum")
add("sort over channels", chain(lambda x: x.sort(1)[0]), VECTOR, ALL, barrier="sort")
add("mean over channels", chain(lambda x: x - x.mean(1, keepdim=True)), VECTOR, ALL, barrier="mean")
add("max over channels", chain(lambda x: x - x.amax(1, keepdim=True)), VECTOR, ALL, barrier="amax")
add("mean of all", chain(lambda x: x + x.mean()), VECTOR, ALL, barrier="mean")
add("sum of all", chain(lambda x: x + x.sum()), VECTOR, ALL, barrier="sum")
add("power of a tensor", chain(lambda x: x.abs() ** x), VECTOR, ALL, barrier="pow")
add("flip then softmax", chain(lambda x: x.flip(1).softmax(-1), space=0), VECTOR, ALL, barrier="softmax")
add(
    "dropout in training",
    chain(lambda x: 0 * F.dropout(x, 0.5, training=True) + x),
    VECTOR,
    ALL,
    barrier="dropout",
)


# ---- embedding tables and indices ------------------------------------------------------------------------------


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.producer = nn.Embedding(20, 8)
        self.consumer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.consumer(torch.tanh(self.producer(x)))


def table() -> nn.Module:
    model = randomize_(Table())
    with torch.no_grad():
        weight = model.producer.weight
        for place, factor in ((COPY, 1.0), (SCALED, 2.5), (FLIPPED, -1.0)):
            weight[:, place] = factor * weight[:, A]
        weight[:, K], weight[:, K2] = 0.5, -0.75
        model.consumer.weight[:, NULL] = 0.0
    return model


add("embedding", table, (5,), ODD, tokens=True)


class Placed(nn.Module):
    """Rows of a table at places that are computed of numbers in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.producer, self.table, self.consumer = nn.Linear(4, 8), nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.arange(1), torch.arange(1, 2), torch.arange(2, 6, 2), torch.zeros(1, dtype=torch.long)]
        parts += [torch.ones(1, dtype=torch.long), torch.full((1,), 6)]
        places = torch.cat(parts)
        return self.consumer(torch.tanh(self.producer(x) + self.table(places) + self.table.weight[places]))


def placed() -> nn.Module:
    model = randomize_(Placed())
    plant_layer_(model.producer, ROLES)
    with torch.no_grad():
        weight = model.table.weight
        for place, factor in ((COPY, 1.0), (SCALED, 2.5), (FLIPPED, -1.0), (K, 0.0), (K2, 0.0)):
            weight[:, place] = factor * weight[:, A]
        unread_(model.consumer.weight.T, ROLES)
    return model


add("fixed places", placed, (7, 4), ODD)


class Picked(nn.Module):
    """Channels picked by numbers in the code: these cannot follow the width."""

    def __init__(self) -> None:
        super().__init__()
        self.producer = nn.Linear(4, 8)
        self.consumer = nn.Linear(8, 3)
        self.register_buffer("order", torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.consumer(self.producer(x)[:, self.order])


def picked() -> nn.Module:
    model = randomize_(Picked())
    plant_layer_(model.producer, ROLES)
    return model


add("picked channels", picked, VECTOR, ALL, rolled_back=True)


class OneChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.producer = nn.Linear(4, 8)
        self.consumer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.producer(x)
        return self.consumer(h) + h.select(1, 0).unsqueeze(1)


def one_channel() -> nn.Module:
    model = randomize_(OneChannel())
    plant_layer_(model.producer, ROLES)
    return model


add("selected channel", one_channel, VECTOR, ALL)


# ---- the tests ------------------------------------------------------------------------------------------------

CHUNK = 32


ELSEWHERE = {
    "aten._prelu_kernel": "aten.prelu",
    "aten.add.Scalar": "aten.add.Tensor",
    "aten.sub.Scalar": "aten.sub.Tensor",
    "aten.rsub.Tensor": "aten.rsub.Scalar",
    "aten.mul.Scalar": "aten.mul.Tensor",
    "aten.div.Scalar": "aten.div.Tensor",
    "aten.concat": "aten.cat",
    "aten.narrow": "aten.slice.Tensor",
    "aten.constant_pad_nd": "aten.pad",
    "aten.upsample_bilinear2d": "aten.upsample_bilinear2d.vec",
    "aten.upsample_bicubic2d": "aten.upsample_bicubic2d.vec",
    **dict.fromkeys(
        ("chunk", "unsafe_chunk", "unsafe_split.Tensor", "tensor_split.sections"), "aten.split.Tensor"
    ),
    **dict.fromkeys(("unflatten.int", "view_copy", "permute_copy"), "aten.view"),
    "aten._native_batch_norm_legit_no_training": "aten.batch_norm",
    "aten.native_layer_norm": "aten.layer_norm",
    "aten.native_group_norm": "aten.group_norm",
    "aten.where.ScalarSelf": "aten.where.self",
    **dict.fromkeys(("expand_copy", "movedim.intlist", "swapaxes", "numpy_T"), "aten.view"),
    "aten.native_channel_shuffle": "aten.view",
    "aten.repeat_interleave.self_int": "aten.view",
    **dict.fromkeys(("_softmax", "_safe_softmax"), "aten.softmax.int"),
    "aten.masked_fill.Tensor": "aten.masked_fill.Scalar",
    **dict.fromkeys(("contiguous", "detach_", "lift_fresh_copy", "resolve_conj"), "aten.clone"),
    **dict.fromkeys(("resolve_neg", "to.device", "to.dtype", "to.dtype_layout"), "aten.clone"),
}
"""Registered operators that torch never leaves in a trace -> one in the table that has the same rule."""
ELSEWHERE = {name if name.startswith("aten.") else f"aten.{name}": other for name, other in ELSEWHERE.items()}


def _parts() -> dict[str, tuple[Case, ...]]:
    parts: dict[str, tuple[Case, ...]] = {}
    keys: dict[tuple[Any, ...], list[Case]] = {}
    for case in CASES:
        alone = case.name if case.rolled_back else ""
        keys.setdefault((case.shape, case.tokens, bool(case.barrier), alone), []).append(case)
    for cases in keys.values():
        for start in range(0, len(cases), CHUNK):
            part = tuple(cases[start : start + CHUNK])
            parts |= {case.name: part for case in part}
    return parts


PARTS = _parts()


@cache
def reduced(cases: tuple[Case, ...]) -> tuple[nn.Module, ep.Result, frozenset[str]]:
    """The wide networks, the result, and the operators of the trace."""
    wide = Bundle(cases).eval()
    x = inputs(cases[0].shape, 3, tokens=cases[0].tokens)
    operators: set[str] = set()

    def recorded(model: nn.Module, example: Any) -> Graph:
        graph = trace(model, example)
        operators.update(node.op for node in graph.nodes if node.target is not None)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "trace", recorded)
        return wide, ep.reduce(wide, x, verify_result=False), frozenset(operators)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    reduced.cache_clear()


def _parameter(case: Case) -> Any:
    return pytest.param(case, id=case.name)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", [_parameter(case) for case in CASES])
def test_operator(case: Case) -> None:
    wide, result, _ = reduced(PARTS[case.name])
    before, after = (model.get_submodule(f"cases.{case.name}") for model in (wide, result.model))
    for batch in (3, 5):
        x = inputs(case.shape, batch, seed=batch, tokens=case.tokens)
        with torch.no_grad():
            assert relative(before(x), after(x)) <= case.tolerance
    path = case.producer
    assert tuple(kept(before.get_submodule(path), after.get_submodule(path))) == case.kept
    widths = {path: len(after.get_submodule(path)._parameters["weight"]) for path in case.widths}
    assert widths == dict(case.widths)
    places = {place: why for place, why in result.report.barriers.items() if f"cases.{case.name}" in place}
    assert bool(case.barrier) == bool(places), places
    if case.barrier:
        assert any(case.barrier in place for place in places)
    if case.rolled_back:
        assert "rolled back" in str(result.report)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_every_registered_operator_has_a_row() -> None:
    found = operators().union(*(reduced(part)[2] for part in set(PARTS.values())))
    for layer in (
        nn.LSTM(4, 3),
        nn.GRU(4, 3),
        nn.RNN(4, 3),
        nn.RNN(4, 3, nonlinearity="relu"),
    ):  # test_recurrent.py
        found |= {node.op for node in trace(layer.eval(), torch.randn(5, 2, 4)).nodes}
    assert set(REGISTRY) - found == set(ELSEWHERE)
    for name, other in ELSEWHERE.items():
        assert other in found and REGISTRY[name] is REGISTRY[other]


@pytest.mark.parametrize("name", [name for name, other in ELSEWHERE.items() if not other])
def test_dropout_rule(name: str) -> None:
    x = Node("x", "placeholder", shape=(2, 3), dtype=torch.float64)
    target = getattr(torch.ops.aten, name.removeprefix("aten.")).default
    for train, rate, kind in ((False, 0.5, Pass), (True, 0.0, Pass), (True, 0.5, Barrier)):
        node = Node("y", name, (x, rate, train), shape=(2, 3), dtype=torch.float64, target=target)
        assert isinstance(REGISTRY[name](node, {}), kind)


@pytest.mark.parametrize("name", ["relu", "conv2d", "add branch"])
def test_a_second_reduction_changes_nothing(name: str) -> None:
    """On the rows that are reduced together with `name`: up to 32 small networks."""
    _, first, _ = reduced(PARTS[name])
    assert first.plan.rounds
    second = ep.reduce(first.model, inputs(PARTS[name][0].shape, 3), verify_result=False)
    assert not second.plan.rounds
    before, after = first.model.state_dict(), second.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_second_rule_for_an_operator_is_refused() -> None:
    from ep_prune.rules.registry import rule

    with pytest.raises(ValueError, match=r"duplicate rule for aten\.relu"):
        rule("aten.relu")(lambda node, tensors: None)
