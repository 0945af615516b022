"""Float64 throughout for models that are stored in less, without a copy of their weights in float64.

`widened` casts buffers and shares parameters; `InFloat64` casts the operands of every operation, so that a weight
is there in float64 only while something reads it. What comes out is what `model.double()` gives. For gradients the
same: what autograd saves of a cast weight is where it came from (`weights_cast_again`), and gradients with respect
to weights are handed on one by one (`Slopes`).
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

LOW = (torch.float32, torch.float16, torch.bfloat16)
CAST = (*LOW, torch.complex64)
BORN_LOW = (Tensor.float, Tensor.half, Tensor.bfloat16)
GATHERS = (F.embedding, torch.embedding, torch.index_select, Tensor.index_select)  # exact in any type
TELLS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_complex", "__len__"}
Casts = dict[int, tuple[StorageWeakRef, Tensor]]


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating and complex tensors in the precision of `dtype`; others as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def sharing(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own that share the memory of the model's."""
    own: dict[int, Any] = {}
    for p in model.parameters():
        if type(p) is nn.Parameter:
            own[id(p)] = nn.Parameter(p.detach(), p.requires_grad)
    return copy.deepcopy(model, own)


def widened(model: nn.Module, share: bool = False) -> nn.Module:
    """A copy in float64, tensors kept as plain attributes included.

    share: parameters keep their type and share the model's memory; the copy is to be run in `InFloat64`. Only for
    models that do not write into their parameters as they run.
    """
    model = sharing(model) if share else copy.deepcopy(model)
    buffers: dict[int, Tensor] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):  # a tensor kept as a plain attribute, not as a buffer
            if isinstance(value, Tensor):
                setattr(module, name, cast(value, torch.float64))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffers.setdefault(id(buffer), cast(buffer, torch.float64))
    if not share:
        model._apply(lambda t: cast(t, torch.float64))  # type: ignore[no-untyped-call]
    return model


class InFloat64(TorchFunctionMode):
    """In here all is computed in float64: operands are cast, and no tensor is born below it.

    A model's `x.float()`, `torch.zeros(n)` or `to(torch.float32)` would put float32 rounding into the figure.
    slopes: told of the gradients with respect to parameters. casts: notes which storage is which parameter's cast.
    """

    def __init__(self, slopes: Slopes | None = None, casts: Casts | None = None) -> None:
        super().__init__()
        self.slopes, self.casts = slopes, casts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__") or name in TELLS:
            result = func(*args, **kwargs)
        elif func is F.embedding and self._looks_up(*args, **kwargs):
            result = _Rows.apply(args[1], args[0], self.slopes)
        else:
            func = Tensor.double if func in BORN_LOW else func
            gathers = func in GATHERS and not torch.is_grad_enabled()
            higher = _higher_type if gathers else self.higher
            result = func(*map(higher, args), **{key: higher(value) for key, value in kwargs.items()})
        if isinstance(result, torch.dtype):
            return _higher_type(result)
        return result.double() if isinstance(result, Tensor) and result.dtype in LOW else result

    def _follows(self, value: Any) -> bool:
        parameter = self.slopes is not None and isinstance(value, nn.Parameter) and value.requires_grad
        return parameter and torch.is_grad_enabled() and value.is_floating_point()

    def _looks_up(self, index: Tensor, table: Any = None, *options: Any, **named: Any) -> bool:
        """Whether this is a lookup and no more, in a table whose gradient is asked for."""
        return self._follows(table) and not any(value for value in (*options, *named.values()))

    def higher(self, value: Any) -> Any:
        """An operand, or a container of some, in float64."""
        if isinstance(value, Tensor):
            if self._follows(value):
                made: Tensor = _Cast.apply(value, self.slopes)
            elif value.dtype in CAST:
                made = cast(value, torch.float64)
            else:
                return value
            if self.casts is not None and value.dtype in CAST:
                storage = made.untyped_storage()
                self.casts[storage._cdata] = StorageWeakRef(storage), value.detach()  # type: ignore[no-untyped-call]
            return made
        if type(value) in (tuple, list):
            return type(value)(map(self.higher, value))
        return _higher_type(value)


def _higher_type(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in LOW else value


@contextlib.contextmanager
def weights_cast_again(casts: Casts) -> Iterator[None]:
    """In here autograd saves a weight in place of its cast, and casts it again when it goes backwards."""

    def pack(saved: Tensor) -> Any:
        if saved.layout != torch.strided:
            return saved
        _, source = casts.get(saved.untyped_storage()._cdata, (None, None))
        return saved if source is None else (source, saved.size(), saved.stride(), saved.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        source, size, stride, offset = packed
        return cast(source, torch.float64).as_strided(size, stride, offset)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        casts.clear()


class Slopes:
    """Gradients with respect to parameters, in float64: `take(parameter, gradient)` once those of all its uses are
    summed up, so that there need not be room for all of them at once."""

    def __init__(self, take: Callable[[Tensor, Tensor], None]) -> None:
        self.take = take
        self.uses: dict[int, int] = {}
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, parameter: Tensor, slope: Tensor) -> None:
        """One use's part, strided, or sparse rows of a lookup."""
        key = id(parameter)
        _, total = self.sums.pop(key, (None, None))
        if total is None:
            total = slope.double()
        else:
            total = slope + total if total.is_sparse and not slope.is_sparse else total.add_(slope)
        self.uses[key] = self.uses.get(key, 0) - 1
        if self.uses[key] > 0:  # a sum is written into from the second use on: it must be nobody else's
            self.sums[key] = parameter, total.clone() if total is slope else total
        else:
            self.take(parameter, total.to_dense() if total.is_sparse else total)

    def climb(self, value: Tensor, parameters: list[Tensor]) -> None:
        """Go backwards from `value`, which was computed in `InFloat64(self)`."""
        direct = torch.autograd.grad(value, parameters, allow_unused=True)  # of uses that no mode sees
        for parameter, slope in zip(parameters, direct, strict=True):
            if slope is not None:
                self.add(parameter, slope)
        for parameter, total in self.sums.values():  # where a use leads nowhere
            self.take(parameter, total.to_dense() if total.is_sparse else total)
        self.sums.clear()
        self.uses.clear()


def hand_back() -> None:
    """Return to the system what is free: the C library keeps it, in pieces between what is in use."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has this
        ctypes.CDLL(None).malloc_trim(0)


class _Rows(torch.autograd.Function):
    """A lookup, in float64, whose gradient goes to `Slopes` as a list of rows."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, slopes: Slopes) -> Tensor:
        ctx.table, ctx.index, ctx.slopes = table, index, slopes
        slopes.uses[id(table)] = slopes.uses.get(id(table), 0) + 1
        return F.embedding(index, table.detach()).double()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, None, None]:
        rows = slope.reshape(-1, slope.shape[-1])
        ctx.slopes.add(ctx.table, torch.sparse_coo_tensor(ctx.index.reshape(1, -1), rows, ctx.table.shape))
        return None, None, None


class _Cast(torch.autograd.Function):
    """A parameter in float64, whose gradient goes to `Slopes`, not to the parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, slopes: Slopes) -> Tensor:
        ctx.parameter, ctx.slopes = parameter, slopes
        slopes.uses[id(parameter)] = slopes.uses.get(id(parameter), 0) + 1
        return parameter.detach().double()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, None]:
        ctx.slopes.add(ctx.parameter, slope)
        return None, None
