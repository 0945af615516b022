"""One family of `benchmarks.families`, measured: reduce, embed, reduce again, and compare on fresh inputs.

    given --reduce--> base --embed 1.5x--> wide --reduce--> back

A random network may have channels that the algebra takes off by itself (a product of low rank); so what is widened
is the base, which holds none any more, and *back exactly* means the widths of the base. All three steps must keep
the outputs: none is compared on inputs that the package has seen.
"""

from __future__ import annotations

import dataclasses
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import ep_prune as ep
from benchmarks.families_networks import Family
from benchmarks.families_reasons import closed, line, missed
from ep_prune.trace import trace
from ep_prune.verification import InFloat64
from ep_prune.widen import widenable

LIMIT = 1e-10
"""Largest accepted change of an output, relative to its largest absolute value."""
LIVELY = 1e-6
"""An output that differs by less between two batches tests nothing."""
EXAMPLE, FRESH = 2, 3  # samples: of the example, and of each fresh batch, which is of another size


@dataclass
class Row:
    """One family.

    status: done, skipped, refused (an error of the package, by design), crashed (of the package), stopped (time or
    memory), unbuilt (a fault on our side).
    spaces: those that are no output of the model; `widened` and `back` of them: name -> width. surplus: parameters
    (biases) that are left over all the same. differences: of reduce, embed, and reduce again. closed: reason ->
    spaces that `embed` does not open. missed: space -> why it did not come back.
    """

    name: str
    group: str
    status: str = "done"
    phase: str = "start"
    parameters: int = 0
    exports: bool | None = None
    reduced_parameters: int = 0
    varies: float = 0.0
    spaces: int = 0
    widened: dict[str, tuple[int, int]] = field(default_factory=dict)
    back: dict[str, int] = field(default_factory=dict)
    surplus: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    closed: dict[str, list[str]] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    megabytes: int = 0
    error: str = ""

    @property
    def exact(self) -> int:
        """How many of the widened spaces came back to exactly the widths that they had."""
        return sum(self.back.get(name) == before for name, (before, _) in self.widened.items())

    @property
    def difference(self) -> float | None:
        return max(self.differences.values(), default=None)

    @property
    def wrong(self) -> list[str]:
        """The steps that changed an output; a difference that is no number is one."""
        return [step for step, size in self.differences.items() if not size <= LIMIT]

    @property
    def lifeless(self) -> bool:
        return bool(self.differences) and not self.varies >= LIVELY

    @property
    def broken(self) -> bool:
        """Whether a promise is: a wrong output, or a crash."""
        return bool(self.wrong) or self.status == "crashed"

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Row:
        """From what `asdict` and JSON made of it."""
        row = cls(**plain)
        row.widened = {name: (before, after) for name, (before, after) in row.widened.items()}
        return row

    def public(self) -> dict[str, Any]:
        """All of it, with what is counted from it."""
        counted = {"exact": self.exact, "difference": self.difference, "wrong": self.wrong}
        return dataclasses.asdict(self) | counted

    def line(self) -> str:
        """What a run says of it as it comes."""
        if self.status != "done":
            return f"{self.name}: {self.status}: {self.error}"
        return (
            f"{self.name}: {self.exact} of {len(self.widened)} widened spaces back ({self.spaces} in all), "
            f"difference {self.difference or 0:.0e}, {sum(self.seconds.values()):.0f} s"
        )


@torch.no_grad()
def randomise_(model: nn.Module, generator: Generator) -> None:
    """Draw anew, in place, what initialisation leaves constant or too small to matter.

    Weights of linear layers and convolutions by He's rule; biases about zero; other parameters that are the same
    number throughout (gains, layer scales, class tokens) about one, or about zero where that number is zero; the
    moments of batch norms. All else keeps what it was drawn from.
    """
    for module in model.modules():
        kind = type(module).__name__
        for name, value in module.named_parameters(recurse=False):
            if name == "weight" and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                turned = isinstance(module, nn.modules.conv._ConvTransposeNd)
                _normal(value, (2 / value[:, 0].numel() if turned else 2 / value[0].numel()) ** 0.5, generator)
            elif name == "weight" and kind == "Conv1D":  # GPT-2's linear layer, (inputs, outputs)
                _normal(value, (2 / len(value)) ** 0.5, generator)
            elif value.numel() and bool((value == value.flatten()[0]).all()) and float(value.flatten()[0]) != 0:
                value.uniform_(0.5, 1.5, generator=generator)
            elif "bias" in name or not bool(value.any()):
                _normal(value, 0.3 if "Norm" in kind else 0.1, generator)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_var":
                buffer.uniform_(0.5, 1.5, generator=generator)
            elif name == "running_mean":
                _normal(buffer, 0.3, generator)
            elif kind == "FrozenBatchNorm2d":
                _normal(buffer, 0.3, generator) if name == "bias" else buffer.uniform_(
                    0.5, 1.5, generator=generator
                )


def _normal(tensor: Tensor, size: float, generator: Generator) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * size)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, in order: of tuples, dicts and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors(value)
    elif dataclasses.is_dataclass(output):
        for entry in dataclasses.fields(output):
            yield from tensors(getattr(output, entry.name))


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """In float64, also where the model's code casts to float32 (RMS norms do): that rounding is not ours."""
    with InFloat64():
        if isinstance(inputs, dict):
            found = list(tensors(model(**inputs)))
        else:
            found = list(tensors(model(*inputs) if isinstance(inputs, tuple) else model(inputs)))
    if not found:
        raise AssertionError("the model returns no tensor: nothing is compared")
    return found


def change(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Largest change of any output, relative to its largest absolute value; inf where shapes differ."""
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            return float("inf")
        gap = float((a.double() - b.double()).abs().max())
        size = float(a.double().abs().max())
        worst = max(worst, gap / size if size else gap)
    return worst


@dataclass
class Comparison:
    """Fresh inputs, and what the model that was given answers to them."""

    inputs: list[Any]
    wanted: list[list[Tensor]]

    @classmethod
    def of(cls, model: nn.Module, family: Family, seed: int) -> Comparison:
        generator = torch.Generator().manual_seed(1000 + seed)
        inputs = [family.draw(FRESH, generator) for _ in range(2)]
        return cls(inputs, [outputs(model, x) for x in inputs])

    @property
    def varies(self) -> float:
        return change(*self.wanted)

    def to(self, model: nn.Module) -> float:
        return max(change(wanted, outputs(model, x)) for x, wanted in zip(self.inputs, self.wanted, strict=True))


def given(family: Family, seed: int) -> tuple[nn.Module, Any]:
    """The model, float64, in eval mode, nothing in it trivial; and an example."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.build().double().eval()
    generator = torch.Generator().manual_seed(seed)
    randomise_(model, generator)
    return model, family.draw(EXAMPLE, generator)


def measure(family: Family, seed: int = 0, note: Callable[[Row], None] = lambda row: None) -> Row:
    """The row of one family; `note` gets it at the start of every step. What the package raises is in the row."""
    row = Row(family.name, family.group)
    start = time.perf_counter()
    try:
        _measure(row, family, seed, note)
    except ep.EpPruneError as error:
        row.status, row.error = "refused", f"{type(error).__name__}: {line(str(error))}"
        if isinstance(error, ep.TraceError) and row.phase == "reduce":
            row.exports = False
            _blame(row, family, seed)
    except Exception as error:
        own = row.phase in ("start", "build", "explain")  # a fault of this benchmark
        row.status = "unbuilt" if own else "crashed"
        row.error = f"{type(error).__name__}: {line(str(error))} ({_place(error)})"
        if row.phase == "reduce":
            row.exports = _exports(family, seed)
    row.wall = time.perf_counter() - start
    row.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _measure(row: Row, family: Family, seed: int, note: Callable[[Row], None]) -> None:
    clock = time.process_time()

    def enter(phase: str) -> None:
        nonlocal clock
        now = time.process_time()
        row.seconds[row.phase] = row.seconds.get(row.phase, 0.0) + now - clock
        row.phase, clock = phase, now
        note(row)

    enter("build")
    model, example = given(family, seed)
    row.parameters = sum(p.numel() for p in model.parameters())
    fresh = Comparison.of(model, family, seed)
    row.varies = fresh.varies
    enter("reduce")
    base = ep.reduce(model, example, progress=False)
    row.exports = True
    row.reduced_parameters = base.report.after.parameters
    enter("compare")
    row.differences["reduce"] = fresh.to(base.model)
    enter("embed")
    wide, report = ep.embed(base.model, example, critical=False, seed=seed, full_output=True)
    enter("compare")
    row.widened = {space.name: (space.before, space.after) for space in report.spaces}
    row.differences["embed"] = fresh.to(wide)
    enter("explain")
    row.closed = closed(base, wide, example, set(row.widened), report.left_alone)
    row.spaces = len(row.widened) + sum(map(len, row.closed.values()))
    if not row.widened:
        enter("done")
        return
    enter("reduce again")
    back = ep.reduce(wide, example, progress=False)
    enter("compare")
    row.differences["reduce again"] = fresh.to(back.model)
    enter("explain")
    row.back = widenable(back.model, example)
    row.back = {name: row.back[name] for name in row.widened if name in row.back}
    row.surplus = back.report.after.parameters - base.report.after.parameters
    reasons = {space.name: space.stayed for space in back.report.spaces}
    for name, (before, after) in row.widened.items():
        if row.back.get(name) != before:
            row.missed[name] = missed(before, after, row.back.get(name), reasons.get(name, {}))
    if not row.missed:  # the package's names of spaces are one way to count; the tensors are another
        shapes = {name: value.shape for name, value in back.model.state_dict().items()}
        for name, value in base.model.state_dict().items():
            if shapes[name] != value.shape:
                row.missed[name] = f"{tuple(value.shape)} -> {tuple(shapes[name])}: of no space that is named"
    enter("done")


def _exports(family: Family, seed: int) -> bool:
    """Whether the package's own trace takes the model."""
    try:
        trace(*given(family, seed))
    except ep.EpPruneError:
        return False
    return True


def _place(error: Exception) -> str:
    """The innermost line of the package, or of this benchmark, that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if {"ep_prune", "benchmarks"} & set(Path(frame.filename).parts)]
    frame = (own or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


def _blame(row: Row, family: Family, seed: int) -> None:
    """Whether torch.export itself takes the model: then the refusal is the package's own."""
    model, example = given(family, seed)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    try:
        torch.export.export(model, args if isinstance(args, tuple) else (args,), kwargs, strict=False)
    except Exception:
        return
    row.status, row.error = "crashed", f"torch.export takes it, the package does not: {row.error}"
