"""The language of operations: what a traced model does, reduced to ten algebraic kinds.

`trace` turns a model into a `Graph` of `Node`s (one ATen call each, sizes concrete at the example).
`rules` then reads every node as one *kind* of operation, and everything after that (numbering,
liveness, widening) knows the kinds alone, never an operator's name:

    Contract   y_o = sum_i W_oi * x_i + b_o     linear, convolution, transposed convolution
    Lookup     y = W[index]                     embedding table
    Normalize  y_i = g_i x_i + s_i              batch norm at inference
    Standardize                                 layer norm: sees all channels
    Instance, GroupStandardize, RootMeanSquare, MeanSquare  the other norms
    Pointwise  y_i = f(x_i)                     activations, with the symmetries of f
    Sum, Product, Choice                        of two tensors, or of a tensor and a number
    Stencil    a linear map over space, the same for every channel (average pool, mean, resize)
    Extreme    max pool: commutes with positive scale and with offsets
    Pad        zeros or a constant around space or channels
    Move       data movement; acts on channel labels exactly as on data
    Split      Move into several tensors, whose sizes stand in the user's code
    Pick       Move to places that are computed
    Create     a tensor of numbers that stand in the user's code (arange, zeros)
    Matmul     of two computed tensors: attention's scores, and the mean of the values by them
    Softmax    over an axis of positions
    Attention  both at once, with the softmax between them (scaled_dot_product_attention)
    Recurrent  layers of LSTM, GRU or plain recurrent units, over all of their time
    Barrier    anything else: inputs stay as they are, outputs are unknown

A kind never guesses: whatever a rule is not sure about is a `Barrier` with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of the trace. A tensor operand in `args` is the `Node` that makes it."""

    name: str
    op: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    layer: str = ""
    source: str = ""
    target: Callable[..., Any] | None = None
    tensor: str | None = None
    """Full name of the parameter, buffer or constant that this node reads, if it reads one."""
    sized: bool = False
    """Whether a free size (the batch) stands in its arguments: they are those of the example alone."""

    def operands(self) -> Iterator[Node]:
        yield from _nodes((self.args, self.kwargs))

    @property
    def where(self) -> str:
        """The place a user would look for: layer, operator and source line."""
        return f"{self.layer or '(top level)'} ({self.op}{', ' + self.source if self.source else ''})"

    def __repr__(self) -> str:
        return f"%{self.name}"


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _nodes(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _nodes(item)


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in execution order, the tensors that they read, and which names share a tensor.

    `tensors` maps the first name of every parameter, buffer and constant to its tensor;
    `aliases` maps it to all its names. `bias_free` are the paths of modules that could be given a
    bias; `untraced` the parameters that the trace never reads.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, tuple[str, ...]]
    bias_free: frozenset[str]
    untraced: tuple[str, ...]

    def users(self) -> dict[Node, list[Node]]:
        """The nodes that read each node."""
        readers: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for operand in node.operands():
                readers[operand].append(node)
        return readers


@dataclass(frozen=True)
class Symmetry:
    """What a function of one variable lets through.

    degree: f(s x) = s^degree f(x) for s > 0, or 0 for none.
    even: f(-x) = f(x). center (c, d): f(c + x) - d is odd in x.
    """

    degree: int = 0
    even: bool = False
    center: tuple[float, float] | None = None


@dataclass(frozen=True)
class Operation:
    """Base of the kinds."""


@dataclass(frozen=True)
class Layout:
    """How a weight's axes stand for outputs, inputs and taps; the canonical form is (G, O/G, C/G, taps).

    `interior` marks the taps that never fall on zero padding, whatever the input's size: what a constant
    input sends through these is a constant. `axis` is the input's and output's channel axis.
    """

    groups: int = 1
    inputs_first: bool = False
    axis: int = 1
    interior: tuple[bool, ...] = (True,)
    signature: str = "linear"

    def canonical(self, weight: Tensor) -> Tensor:
        """(O, C/G, *kernel), or (C, O/G, *kernel) where inputs come first -> (G, O/G, C/G, taps)."""
        grouped = weight.reshape(self.groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
        return grouped.transpose(1, 2) if self.inputs_first else grouped

    def original(self, canonical: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """The inverse of `canonical`, for any widths and number of groups."""
        grouped = canonical.transpose(1, 2) if self.inputs_first else canonical
        return grouped.reshape(grouped.shape[0] * grouped.shape[1], grouped.shape[2], *kernel)


@dataclass(frozen=True)
class Contract(Operation):
    """y_o = sum_i W_oi * x_i + b_o."""

    x: Node
    weight: Node
    bias: Node | None
    layout: Layout


@dataclass(frozen=True)
class Lookup(Operation):
    """Rows of a table."""

    table: Node
    index: Node


@dataclass(frozen=True)
class Normalize(Operation):
    """(x - mean) / sqrt(variance + eps) * weight + bias along axis 1."""

    x: Node
    weight: Node | None
    bias: Node | None
    mean: Node
    variance: Node
    eps: float


@dataclass(frozen=True)
class Standardize(Operation):
    """Layer norm: (x - mean) / sqrt(variance + eps) * weight + bias; moments over the channels, the last axis."""

    x: Node
    weight: Node | None
    bias: Node | None
    eps: float


@dataclass(frozen=True)
class Instance(Operation):
    """Instance norm: every channel of axis 1 by itself, with its moments over space."""

    x: Node
    weight: Node | None
    bias: Node | None


@dataclass(frozen=True)
class GroupStandardize(Operation):
    """Group norm: moments over space and the channels of one of `groups` groups, axis 1."""

    x: Node
    weight: Node | None
    bias: Node | None
    groups: int


@dataclass(frozen=True)
class RootMeanSquare(Operation):
    """RMS norm: x / sqrt(mean of x^2 + eps) * weight, the mean over the channels, the last axis."""

    x: Node
    weight: Node | None


@dataclass(frozen=True)
class MeanSquare(Operation):
    """The mean of x^2 over the channels, the last axis: an RMS norm written by hand."""

    x: Node


@dataclass(frozen=True)
class Pointwise(Operation):
    """f(x), element by element."""

    x: Node
    signature: str
    function: Callable[[Tensor], Tensor]
    symmetry: Symmetry = Symmetry()


@dataclass(frozen=True)
class Slope(Operation):
    """PReLU: max(x, 0) + a_i min(x, 0), one slope for all channels or one each."""

    x: Node
    slope: Node


@dataclass(frozen=True)
class Sum(Operation):
    """x + alpha * y."""

    x: Node | float
    y: Node | float
    alpha: float = 1.0


@dataclass(frozen=True)
class Product(Operation):
    """x * y, or x / y with a known y where `divide`."""

    x: Node | float
    y: Node | float
    divide: bool = False


@dataclass(frozen=True)
class Choice(Operation):
    """x where the condition holds, else y: linear in (x, y) together."""

    condition: Node
    x: Node | float
    y: Node | float


@dataclass(frozen=True)
class Stencil(Operation):
    """`keeps_constants`: a constant input comes out as the same constant, at every position."""

    x: Node
    signature: str
    space: tuple[int, ...]
    keeps_constants: bool


@dataclass(frozen=True)
class Extreme(Operation):
    """The maximum over windows or axes of space."""

    x: Node
    signature: str
    space: tuple[int, ...]


@dataclass(frozen=True)
class Pad(Operation):
    """`value` before and after every axis."""

    x: Node
    before: tuple[int, ...]
    after: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Move(Operation):
    """`act` does to integer labels what the node does to data; `regroup` forces the channel axes of the
    result (pixel shuffle: the channels that remain, not the positions)."""

    inputs: tuple[Node, ...]
    act: Callable[..., Tensor]
    regroup: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Pick(Operation):
    """x at computed places: `act` (labels, places) moves labels as the node moves data."""

    x: Node
    places: tuple[Node | None, ...]
    act: Callable[[Tensor, list[Tensor | None]], Tensor]


@dataclass(frozen=True)
class Create(Operation):
    """A tensor made of its settings alone: `arange`, `zeros`."""


@dataclass(frozen=True)
class Cat(Operation):
    """Joined along `axis`, a new one where `stack`."""

    inputs: tuple[Node, ...]
    axis: int
    stack: bool = False


@dataclass(frozen=True)
class Split(Operation):
    """Cut along `axis` into `sections`: all (a tuple), or the one at `take`, its axis dropped if `squeeze`."""

    x: Node
    axis: int
    sections: tuple[int, ...]
    take: int | None = None
    squeeze: bool = False


@dataclass(frozen=True)
class Pass(Operation):
    """The same values: dropout at inference, casts, clones."""

    x: Node


@dataclass(frozen=True)
class Item(Operation):
    """Element `index` of an operation that returns several tensors."""

    x: Node
    index: int


@dataclass(frozen=True)
class Matmul(Operation):
    """x @ y over the last axis of x and the last but one of y, or the last one where `transposed`."""

    x: Node
    y: Node
    transposed: bool = False


@dataclass(frozen=True)
class Softmax(Operation):
    """exp(x) over its sum along `axis`: what is the same all along the axis cancels."""

    x: Node
    axis: int


@dataclass(frozen=True)
class Attention(Operation):
    """softmax(scale * query @ key' + mask) @ value over the last two axes; heads stand on the axis before."""

    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool
    scale: float
    grouped: bool


@dataclass(frozen=True)
class Cell:
    """What one recurrent unit does with its `gates` rows of W_ih x + b_ih and W_hh h + b_hh.

    Its state changes sign with the row of the gate `odd`, and with no other; where `positive` (relu), that row
    lets through any positive factor instead. `split`: this gate's two parts meet each by itself (GRU).
    `function`: the state is f(row) and remembers nothing else; None where it does.
    """

    name: str
    gates: int
    odd: int
    positive: bool = False
    split: bool = False
    function: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Direction:
    """The parameters of one layer in one direction. `project`: of LSTM with projections, the state's weight."""

    weight_ih: Node
    weight_hh: Node
    bias_ih: Node | None
    bias_hh: Node | None
    project: Node | None = None


@dataclass(frozen=True)
class Recurrent(Operation):
    """Layers of recurrent units that start from zeros; each layer has one direction or two, side by side.

    Gives the last layer's states at all times, every layer's last state, and for LSTM every layer's last cell.
    """

    x: Node
    cell: Cell
    layers: tuple[tuple[Direction, ...], ...]
    batch_axis: int


@dataclass(frozen=True)
class Zeros(Operation):
    """Zeros of a shape: where a recurrent layer starts from. To others they are as unknown as an input."""


@dataclass(frozen=True)
class Barrier(Operation):
    """Not covered: inputs stay as they are, outputs are unknown."""

    reason: str
