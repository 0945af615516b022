"""Compare two networks by running them: the check on a narrow network that is to replace a wide one.

It does not look at what a prover claims. It runs both networks on the example inputs, the user's inputs,
seeded random ones and ones that climb the gradient of the difference, and measures for every output tensor

    max |wide(x) - narrow(x)| / max |wide(x)|        (both maxima over all elements and all probes)

once with weights and inputs widened to float64, once in the dtype in which the models are stored, beside the
wide model's own rounding, max |wide_stored(x) - wide_64(x)| / max |wide_64(x)|.

What it guarantees: the figures were measured on those probes, and the caller's models, inputs and random
state are as before, also after an exception, because only deep copies run. What it leaves out: weights that
no probe reaches (`reached` counts them), inputs far from the probes, training mode. It imports torch and the
error types alone, so that a mistake of the prover cannot be repeated here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ep_prune.errors import InputError
from ep_prune.verification.box import Box, boxes_of, check_inside, clamped, draw
from ep_prune.verification.figures import Record, Verification
from ep_prune.verification.float64 import Casts, InFloat64, Slopes, cast, hand_back, weights_cast_again, widened
from ep_prune.verification.trees import (
    Call,
    Outputs,
    all_tensors,
    as_batch,
    as_leaf,
    as_tuple,
    copied,
    flatten,
    gap_of,
    gradients,
    main_dtype,
    map_tensors,
    rows_of,
    shared_rows,
    short,
)

FAMILIES = ("normal", "matched", "uniform")  # "matched" has the example's mean and standard deviation
INSIDE = ("uniform", "corners", "matched")  # the families on a declared domain; "matched" is moved inside
MAX_BATCHES = 64  # of the user's probes: a loader may be endless
UNBATCHED_DRAWS = 4  # draws of each family where the number of samples cannot be chosen
REACH_ROWS = 8, 2  # samples in one backward pass, to bound its memory; of a model above REACH_ROOM
FLOAT64_LIMIT = 1e-10
ROUNDINGS = 16  # what is merged was equal up to rounding only: allow a small multiple of the wide model's own
LOOSEST_LIMIT = 0.1  # above this a default would let another function pass
REACH_LARGE = 2_000_000  # weights reached after which one backward pass a batch is enough
REACH_ROOM = 2**25  # weights whose gradients are held at once; above, they are made twice and looked at one by one
AGREE = 1e-13  # a relative difference that is rounding alone in float64
NOISE = 1e-12  # a gradient this far below the largest one is rounding of an exact zero (a key bias in attention)
TINY = 1e-300  # keeps a division by a norm of 0 from NaN


def verify(
    wide: nn.Module,
    narrow: nn.Module,
    inputs: Any,
    *,
    probes: Iterable[Any] | None = None,
    seed: int = 0,
    count: int = 32,
    ascent_steps: int = 16,
    ascent_starts: int = 4,
    limit: float | None = None,
    reach: bool = True,
    judged: Sequence[str] | None = None,
    domain: Any = None,
    share: bool = False,
) -> Verification:
    """Measure how far `narrow` is from `wide`, both in eval mode, on copies.

    `inputs`: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments; they may
    nest, and hold values that are no tensors. `probes`: batches in the same form; what a batch holds beyond
    the model's arguments (the y of (x, y)) is dropped, and at most 64 batches are read. `count`: samples of
    each random family along dimension 0 if all input tensors share it, else draws have the example's shape.
    `limit` judges the float64 figure; None means 1e-10 for a float64 model, and else max(16 * rounding, 64
    eps) in its dtype, with 4 eps for 16 bits (64 eps of bfloat16 is half the output), 0.1 at most. The stored
    figure may reach limit + 16 * max(rounding, eps): by the triangle inequality it is at most the float64
    figure and the rounding of both models, and the narrow one may round some times worse.

    `judged`: the probe families that the limit is a promise about (None: all); what the others show is
    reported as `beyond`, not judged.

    `domain`: a box (lo, hi) of inputs (see `box`): all probes lie in it, among them its corners.

    `share`: the copies have their parameters in the memory of the models given, and weights are cast to float64
    one operation at a time. Only where it is known that no forward pass writes into a parameter.

    Raises InputError if a model cannot be copied, the wide model does not take the inputs or a batch of
    `probes`, `probes` is empty, inputs lie outside `domain`, or an option is out of range. A narrow model that
    raises, or whose outputs have another structure or shape, is a difference of inf with its reason, not an
    exception.
    """
    if count < 1 or ascent_steps < 0 or ascent_starts < 0 or (limit is not None and not 0 <= limit < math.inf):
        raise InputError("count must be at least 1, and ascent_steps, ascent_starts and limit at least 0")
    example = ((), dict(inputs)) if isinstance(inputs, Mapping) else (as_tuple(inputs), {})
    cuda = {t.device for m in (wide, narrow) for t in [*m.parameters(), *m.buffers()] if t.is_cuda}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(cuda)))  # models and loaders draw from it too
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(device.type for device in cuda)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        boxes = None if domain is None else boxes_of(domain, *example)
        session = _Session(wide, narrow, example, seed, reach, judged, boxes, share)
        session.run(probes, count, ascent_steps, ascent_starts)
        return session.result(limit, synthetic=probes is None)


class _Session:
    """The copies, the probes and what has been measured so far."""

    def __init__(
        self,
        wide: nn.Module,
        narrow: nn.Module,
        example: Call,
        seed: int,
        reach: bool,
        judged: Sequence[str] | None,
        boxes: list[Box | None] | None = None,
        share: bool = False,
    ) -> None:
        self.wide, self.narrow = copied(wide, "wide", share), copied(narrow, "narrow", share)
        self.wide64, self.narrow64 = widened(self.wide, share), widened(self.narrow, share)
        self.dtype = main_dtype(self.wide, example)
        self.own = self.dtype != torch.float64  # else there is one figure, and no rounding to measure
        self.example = map_tensors(example, lambda t: t.detach().cpu())
        self.boxes = boxes
        self.box_of = {id(t): box for t, box in zip(all_tensors(self.example), boxes or (), strict=False)}
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.records: dict[str, Record] = {}
        self.notes: dict[str, None] = {}  # a dict is an ordered set
        self.samples = self.nonfinite = 0
        self.reach, self.batched, self.judged = reach, False, judged
        weights = {name: p for name, p in self.wide64.named_parameters() if p.is_floating_point() and reach}
        self.touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in weights.items() if p.numel()}
        self.large = sum(touched.numel() for touched in self.touched.values()) > REACH_ROOM

    def run(self, probes: Iterable[Any] | None, count: int, steps: int, starts: int) -> None:
        tensors = all_tensors(self.example)
        floating = any(t.is_floating_point() for t in tensors)
        drawable = any(t.dtype != torch.bool and not t.is_complex() for t in tensors)
        own = FAMILIES if self.boxes is None else INSIDE
        families: tuple[str, ...] = own if floating else ("integer",) if drawable else ()
        self.batched = bool(families) and shared_rows(self.example) > 0
        if self.batched:  # whether dimension 0 is the batch is asked of the wide model itself
            self.batched = self.evaluate(families[0], self.draw(families[0], count))
        self.evaluate("example", self.example)
        if probes is not None:
            self._run_user(probes)
        for family in families[1:] if self.batched else families:
            for _ in range(1 if self.batched else min(count, UNBATCHED_DRAWS)):
                self.evaluate(family, self.draw(family, count if self.batched else None))
        if floating and steps and starts and not any(record.reason for record in self.records.values()):
            worst = max(self.records.values(), key=lambda record: record.worst).probe
            family = worst if worst in families else "matched"
            for start in (starts,) if self.batched else (None,) * starts:
                self._ascend(self.draw(family, start), steps)

    def _run_user(self, probes: Iterable[Any]) -> None:
        if isinstance(probes, Tensor | Mapping) or not isinstance(probes, Iterable):
            raise InputError("probes must be an iterable of batches, such as a list or a DataLoader")
        read = 0
        for read, batch in enumerate(itertools.islice(probes, MAX_BATCHES), 1):  # noqa: B007
            self.evaluate("user", as_batch(batch, self.example))
        if not read:
            raise InputError("probes holds no batch: pass at least one, or None for synthetic probes")
        if read == MAX_BATCHES:
            self.notes[f"no more than {MAX_BATCHES} batches of the probes were read"] = None

    def forward(self, model: nn.Module, call: Call, dtype: torch.dtype, slopes: Slopes | None = None) -> Outputs:
        """One forward pass, from a fixed seed, on copies of the arguments (a model may write into them)."""
        state = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
        args, kwargs = map_tensors(call, lambda t: cast(t, dtype).to(state.device, copy=True))
        torch.manual_seed(self.seed)
        with contextlib.ExitStack() as stack:
            if dtype == torch.float64:
                casts: Casts | None = {} if torch.is_grad_enabled() else None
                if casts is not None:
                    stack.enter_context(weights_cast_again(casts))
                stack.enter_context(InFloat64(slopes, casts))
            outputs, unknown = flatten(model(*args, **kwargs))
        self.notes |= {f"{name} is not compared: no tensor, number or container": None for name in unknown}
        return outputs

    def attempt(self, model: nn.Module, call: Call, dtype: torch.dtype) -> Outputs | Exception:
        try:
            return self.forward(model, call, dtype)
        except Exception as error:
            return error

    def evaluate(self, probe: str, call: Call) -> bool:
        """Run all copies on one batch of probes; False if the wide model does not take a synthetic one."""
        if self.boxes is not None and probe in ("example", "user"):
            check_inside(self.boxes, call, "the example" if probe == "example" else "a batch of the probes")
        call = map_tensors(call, lambda t: cast(t.detach(), self.dtype))  # both figures from the same numbers
        wide64 = self.attempt(self.wide64, call, torch.float64)
        if isinstance(wide64, Exception):
            if probe in ("example", "user"):
                text = f"the wide model, in float64, does not take the {probe} inputs"
                raise InputError(f"{text}: {short(wide64)}") from wide64
            self.notes[f"probes '{probe}' were skipped: the wide model raises {short(wide64)}"] = None
            return False
        self.samples += shared_rows(call) if self.batched else 1
        self.compare(probe, wide64, self.attempt(self.narrow64, call, torch.float64))
        if self.own and self.is_judged(probe):
            self._evaluate_stored(probe, call, wide64)
        if self.reach and self.touched:
            self._reach(call)
        return True

    def _evaluate_stored(self, probe: str, call: Call, wide64: Outputs) -> None:
        wide = self.attempt(self.wide, call, self.dtype)
        narrow = self.attempt(self.narrow, call, self.dtype)
        if isinstance(wide, Exception):
            self.own = False
            self.notes[f"not measured in {self.dtype}: the wide model raises {short(wide)}"] = None
        elif isinstance(narrow, Exception):
            self._refuse("output", probe, f"the narrow model, in {self.dtype}, raises {short(narrow)}")
        else:
            for name, record in self.records.items():
                if not record.reason:
                    record.add_stored(wide64[name], wide[name], narrow[name].to(wide[name].device))

    def is_judged(self, probe: str) -> bool:
        return self.judged is None or probe in self.judged

    def compare(self, probe: str, wide: Outputs, narrow: Outputs | Exception) -> None:
        """Add one batch in float64; what cannot be compared gets a reason, hence a difference of inf."""
        if isinstance(narrow, Exception):
            return self._refuse("output", probe, f"the narrow model raises {short(narrow)}")
        if not wide or list(wide) != list(narrow):
            names = [", ".join(outputs) or "no tensor" for outputs in (wide, narrow)]
            return self._refuse("output", probe, f"the wide model returns {names[0]}, the narrow one {names[1]}")
        for name, value in wide.items():
            other = narrow[name].to(value.device)
            if other.shape != value.shape or other.is_floating_point() != value.is_floating_point():
                texts = [f"{str(t.dtype)[6:]}{[*t.shape]}" for t in (value, other)]
                self._refuse(name, probe, f"it is {texts[0]} in the wide model, {texts[1]} in the narrow one")
                continue
            record = self.records.setdefault(name, Record())
            record.shape = tuple(value.shape) if probe == "example" else record.shape
            self.nonfinite += int((~value.isfinite()).sum())
            record.add(probe, value, other, self.is_judged(probe))
        return None

    def _refuse(self, name: str, probe: str, reason: str) -> None:
        record = self.records.setdefault(name, Record())
        record.reason, record.probe = record.reason or reason, probe

    def draw(self, family: str, rows: int | None) -> Call:
        """Random inputs like the example's: `rows` samples along dimension 0, or None for its own shapes."""
        return map_tensors(self.example, functools.partial(self._draw, family, rows))

    def _draw(self, family: str, rows: int | None, example: Tensor) -> Tensor:
        shape = example.shape if rows is None else (rows, *example.shape[1:])
        masks = example.dtype == torch.bool or not example.isfinite().all()  # they have no distribution
        if masks or example.is_complex() or not example.numel():
            return example if rows is None else example[torch.arange(rows) % len(example)]
        low, high = float(example.min()), float(example.max())
        if not example.is_floating_point():
            bounds = (int(example.min()), int(example.max()) + 1)
            return torch.randint(*bounds, shape, generator=self.generator, dtype=example.dtype)
        box = self.box_of.get(id(example))
        if box is not None and family in ("uniform", "corners"):
            return draw(box, family, shape, self.generator)
        if family == "uniform":
            return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        normal = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        mean, std = example.double().mean(), example.double().std(correction=0)
        drawn = normal if family == "normal" else mean + std * normal
        return drawn if box is None else clamped(box, drawn)

    def inside(self, call: Call) -> Call:
        """The nearest point of the declared domain, if there is one."""
        if self.boxes is None:
            return call
        boxes = iter(self.boxes)
        return map_tensors(call, lambda t: t if (box := next(boxes)) is None else clamped(box, t))

    def _ascend(self, call: Call, steps: int) -> None:
        """Climb ||wide(x) - narrow(x)||^2 by normalised steps, |x| within its first norm; compare every x."""

        def norm(t: Tensor) -> Tensor:  # of each sample, or of the whole tensor
            rows: Tensor = torch.linalg.vector_norm(t.reshape(len(t) if self.batched else 1, -1), dim=1)
            return rows.reshape(-1, *[1] * (t.dim() - 1)) if self.batched else rows[0]

        radii: list[Tensor] = []
        try:
            for step in range(steps):
                points: list[Tensor] = []
                call = map_tensors(call, functools.partial(as_leaf, points))
                radii = radii or [norm(point.detach()) for point in points]
                with torch.enable_grad():
                    wide = self.forward(self.wide64, call, torch.float64)
                    narrow = self.forward(self.narrow64, call, torch.float64)
                    gaps = [wide[name] - narrow[name] for name in wide if wide[name].requires_grad]
                    square = torch.stack([gap[gap.isfinite()].square().sum() for gap in gaps]).sum()
                self.compare("ascent", wide, narrow)
                largest = {name: gap_of(wide[name], narrow[name])[0] for name in wide}
                if all(gap <= AGREE * self.records[name].scale for name, gap in largest.items()):
                    break  # equal up to rounding: nothing to climb
                for point, radius, slope in zip(points, radii, gradients(square, points), strict=True):
                    point += 0.3 / math.sqrt(1 + step) * radius * slope / norm(slope).clamp_min(TINY)
                    point *= (radius / norm(point).clamp_min(TINY)).clamp_max(1)
                call = self.inside(map_tensors(call, lambda t: t.detach()))
        except Exception as error:
            self.notes[f"the gradient ascent stopped: {short(error)}"] = None
        self.evaluate("ascent", call)

    def _reach(self, call: Call) -> None:
        """Mark the wide model's parameter elements that a random projection of the outputs depends on."""
        try:
            self.wide64.requires_grad_(True)
            size = REACH_ROWS[self.large]
            for start in range(0, shared_rows(call) if self.batched else 1, size):
                rows = slice(start, start + size) if self.batched else None
                piece = map_tensors(call, functools.partial(rows_of, rows))
                before = sum(int(touched.sum()) for touched in self.touched.values())
                self._reach_piece(piece)
                # Samples of one family reach much the same weights: for a large model the first ones stand for it.
                if before == sum(int(t.sum()) for t in self.touched.values()) or before > REACH_LARGE:
                    break
        except Exception as error:
            self.reach = False
            self.notes[f"the share of weights reached was not measured: {short(error)}"] = None
        finally:
            self.wide64.requires_grad_(False)

    def _reach_piece(self, call: Call) -> None:
        """One backward pass, or two where gradients are too large to be held until the largest is known."""
        weights = {id(p): name for name, p in self.wide64.named_parameters() if name in self.touched}
        slopes: dict[int, Tensor] = {}
        largest = 0.0
        held = not self.large

        def note(weight: Tensor, slope: Tensor) -> None:
            nonlocal largest
            if id(weight) in weights and held:
                slopes[id(weight)] = slopes[id(weight)] + slope if id(weight) in slopes else slope.abs()
            elif id(weight) in weights:
                largest = max(largest, float(slope.max()), -float(slope.min()))

        def mark(weight: Tensor, slope: Tensor) -> None:
            if id(weight) in weights:
                touched = self.touched[weights[id(weight)]]
                touched |= slope > NOISE * largest
                touched |= slope < -NOISE * largest

        self._climb(call, note)
        if held:
            largest = max((float(slope.max()) for slope in slopes.values()), default=0.0)
            for weight in self.wide64.parameters():
                if id(weight) in slopes:
                    mark(weight, slopes[id(weight)])
        else:
            self._climb(call, mark)

    def _climb(self, call: Call, take: Callable[[Tensor, Tensor], None]) -> None:
        """Gradients of a random projection of the wide model's outputs, the same one for the same call."""
        slopes = Slopes(take)
        if self.large:
            hand_back()
        with torch.enable_grad():
            outputs = self.forward(self.wide64, call, torch.float64, slopes).values()
            terms = [t * torch.randn_like(t) for t in outputs if t.requires_grad]
            total = torch.stack([term[term.isfinite()].sum() for term in terms]).sum()
        del outputs, terms
        if self.large:
            hand_back()
        slopes.climb(total, [p for name, p in self.wide64.named_parameters() if name in self.touched])

    def result(self, limit: float | None, synthetic: bool) -> Verification:
        eps, exact = torch.finfo(self.dtype).eps, self.dtype == torch.float64
        outputs = tuple(record.finish(name, self.own) for name, record in self.records.items())
        worst = max(outputs, key=lambda output: output.difference)
        rounding = max(output.rounding or 0.0 for output in outputs)
        if limit is None:
            limit = min(max(ROUNDINGS * rounding, (64 if eps < 1e-6 else 4) * eps), LOOSEST_LIMIT)
            limit = FLOAT64_LIMIT if exact else limit
        stored = max(output.stored_difference or 0.0 for output in outputs)
        shares = sorted((float(t.double().mean()), name) for name, t in self.touched.items())
        counts = [(int(t.sum()), t.numel()) for t in self.touched.values()]
        reached = sum(some for some, _ in counts) / sum(total for _, total in counts) if counts else 1.0
        outside = max(self.records.values(), key=lambda record: record.beyond / (record.scale or math.inf))
        return Verification(
            beyond=outside.beyond / (outside.scale or math.inf),
            beyond_probe=outside.beyond_probe,
            difference=worst.difference,
            stored_difference=worst.difference if exact else stored if self.own else None,
            rounding=0.0 if exact else rounding if self.own else None,
            limit=limit,
            stored_limit=limit if exact else limit + ROUNDINGS * max(rounding, eps),
            dtype=str(self.dtype)[6:],
            per_output=outputs,
            worst_probe=worst.probe,
            samples=self.samples,
            reached=reached if self.reach else None,
            unreached={name: share for share, name in shares if share < 1} if self.reach else {},
            nonfinite=self.nonfinite,
            notes=tuple(self.notes),
            synthetic=synthetic,
        )
