"""How critical a point is: gradient norms layer by layer, and the inertia of the Hessian.

The embedding principle (Zhang, Zhang, Luo, Xu, NeurIPS 2021, arXiv 2105.14573) says that an embedding keeps more
than the output: the image of a critical point is critical (theorem 1), and the counts of positive, zero and
negative eigenvalues of the Hessian never decrease (JML 2022, arXiv 2111.15527, theorem 6.2). Here both are
measured for a loss that the user gives as

    loss(model, batch) -> scalar tensor          e.g. lambda model, batch: mse_loss(model(batch[0]), batch[1])

theta are the parameters with `requires_grad`, a tied one once. The gradient is grad L(theta); the inertia counts
the eigenvalues of H = grad^2 L(theta) above, within and below +-tolerance. Small networks: every eigenvalue of the
full H. Large ones: stochastic Lanczos quadrature (Ubaru, Chen, Saad, SIMAX 2017). A probe v of random signs has

    E[v^T f(H) v] = trace f(H),    v^T f(H) v ~ |v|^2 sum_i s_i1^2 f(theta_i),    T = S diag(theta) S^T,

with T the tridiagonal matrix of k Lanczos steps from v; f is the indicator of one of the three ranges.

Guarantees: all is computed on copies, of the model in float64 and eval mode, and of the batch; the user's model,
its mode, gradients and buffers, and the random state stay as they were, after an error too. Left out: a model
that casts to float32 inside rounds to float32 here too, and has no clear gap between zero and the rest.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ep_prune.errors import InputError

Loss = Callable[[nn.Module, Any], Tensor]

METHODS = ("auto", "exact", "lanczos")
EXACT_UP_TO = 3000  # parameters: the full Hessian then takes 72 MB and some seconds
ROUNDINGS = 16  # eigenvalues of an n x n matrix are found within a small multiple of n eps max |lambda|
RESOLUTION = 1e-2  # of max |lambda|: what some hundred Lanczos steps tell from zero
TINY = 1e-300  # keeps a division by a width of 0 from NaN
CHUNK = 128  # rows of the Hessian in one batched backward pass, to bound its memory


@dataclass(frozen=True)
class LayerGradient:
    """The gradient in one layer's own parameters: how many there are, its L2 and its L1 norm."""

    layer: str
    parameters: int
    l2: float
    l1: float


@dataclass(frozen=True)
class Criticality:
    """The loss and the norms of its gradient, whole and by layer. `frozen` parameters are not differentiated."""

    loss: float
    l2: float
    l1: float
    layers: tuple[LayerGradient, ...]
    parameters: int
    frozen: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(r.layer or "(top level)", f"{r.parameters:,}", f"{r.l2:.3e}", f"{r.l1:.3e}") for r in self.layers]
        rows.append(("all", f"{self.parameters:,}", f"{self.l2:.3e}", f"{self.l1:.3e}"))
        lines = _table(("layer", "parameters", "gradient L2", "gradient L1"), rows)
        lines.append(f"loss {self.loss:.6g}" + (f"; {self.frozen:,} frozen parameters" if self.frozen else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Inertia:
    """Counts of eigenvalues of the Hessian: `positive` + `zero` + `negative` = `parameters`.

    Whole numbers if `method` is "exact". If it is "lanczos", estimates with their standard errors over the probes
    in `errors` (positive, zero, negative; all 0 if exact), and `unresolved`: about how many eigenvalues, at most,
    the finite number of steps may have put on the wrong side of +-tolerance, beside the error of the probes.
    `tolerance` is absolute; `largest` is max |lambda|. The count is clear where `smallest_nonzero` is far above
    `largest_zero` (None where there is no such eigenvalue): see `gap`. `eigenvalues`: (parameters,) ascending,
    float64; None if not exact.
    """

    positive: float
    zero: float
    negative: float
    parameters: int
    method: str
    tolerance: float
    largest: float
    largest_zero: float | None
    smallest_nonzero: float | None
    errors: tuple[float, float, float]
    unresolved: float
    eigenvalues: Tensor | None

    @property
    def gap(self) -> float | None:
        """smallest_nonzero / largest_zero; None where nothing, or all, counts as zero."""
        if self.largest_zero is None or self.smallest_nonzero is None:
            return None
        return self.smallest_nonzero / self.largest_zero if self.largest_zero else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        spectrum = None if self.eigenvalues is None else self.eigenvalues.tolist()
        return asdict(self) | {"eigenvalues": spectrum, "gap": self.gap}

    def __str__(self) -> str:
        counts = (("positive", self.positive), ("zero", self.zero), ("negative", self.negative))
        exact = self.method == "exact"
        rows = [
            (name, f"{count:,.0f}" if exact else f"{count:,.1f} +- {error:.1f}")
            for (name, count), error in zip(counts, self.errors, strict=True)
        ]
        lines = _table(("eigenvalues", self.method), rows)
        lines.append(f"zero is |lambda| <= {self.tolerance:.1e}; the largest |lambda| is {self.largest:.3e}")
        if self.largest_zero is not None:
            lines.append(f"largest |lambda| counted as zero: {self.largest_zero:.1e}")
        if self.smallest_nonzero is not None:
            lines.append(f"smallest |lambda| not counted as zero: {self.smallest_nonzero:.1e}")
        if not exact:
            lines.append(f"not resolved from the tolerance: {self.unresolved:,.1f} eigenvalues")
        return "\n".join(lines)


def criticality(model: nn.Module, loss: Loss, batch: Any) -> Criticality:
    """The norms of the gradient of `loss(model, batch)`, in float64 and eval mode, by layer.

    `loss` takes the model and the batch and returns a scalar tensor; it is called once, with a copy of the model
    and of `batch` (any nesting of tensors), floating tensors in float64. A layer is a module with parameters of
    its own; a tied parameter counts once, in the first layer that has it; frozen ones do not count. L1 is the norm
    in which arXiv 2105.14573 states its gradients. Raises `InputError`.
    """

    def norms(gradient: Tensor) -> tuple[float, float]:
        return float(gradient.norm()), float(gradient.abs().sum())

    with _scene(model, loss, batch) as scene:
        parts: dict[str, list[Tensor]] = {}
        for name, slope in zip(scene.names, scene.slopes, strict=True):
            parts.setdefault(name.rpartition(".")[0], []).append(slope.detach().flatten())
        flat = {layer: torch.cat(slopes) for layer, slopes in parts.items()}
        layers = tuple(LayerGradient(name, g.numel(), *norms(g)) for name, g in flat.items())
        whole = torch.cat(list(flat.values()))
        return Criticality(float(scene.value), *norms(whole), layers, whole.numel(), scene.frozen)


def hessian_inertia(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    *,
    tolerance: float | None = None,
    method: str = "auto",
    probes: int = 16,
    steps: int = 128,
    seed: int = 0,
) -> Inertia:
    """How many eigenvalues of the Hessian of `loss(model, batch)` are positive, zero and negative.

    `model`, `loss` and `batch` as in `criticality`. Zero is |lambda| <= `tolerance`, an absolute figure; None
    means 16 n eps max |lambda| for n parameters if the count is exact (eps = 2.2e-16), and 1e-2 max |lambda| if it
    is by Lanczos, since a cluster of eigenvalues about zero is resolved no finer. `method`: "exact" (n x n floats
    of memory, n^3 time), "lanczos" (`probes` times `steps` products of the Hessian with a vector; `steps` * n
    floats, for the full reorthogonalization) or "auto", which is exact up to 3,000 parameters. `seed` draws the
    probes. Raises `InputError`.
    """
    if method not in METHODS:
        raise InputError(f"no method {method!r}: choose one of {', '.join(METHODS)}")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f"a tolerance of {tolerance} is no bound on |lambda|: pass a figure of at least 0")
    if probes < 2 or steps < 1:
        raise InputError("pass at least 2 probes, for their standard error, and at least 1 step")
    with _scene(model, loss, batch, twice=True) as scene:
        if method == "exact" or (method == "auto" and scene.count <= EXACT_UP_TO):
            return _exact(torch.linalg.eigvalsh(scene.hessian()), tolerance)
        generator = torch.Generator().manual_seed(seed)
        nodes = [_lanczos(scene, generator, steps) for _ in range(probes)]
        return _estimate(nodes, scene.count, tolerance)


@dataclass(frozen=True)
class _Scene:
    """The loss on the private copy, and its first derivatives, as functions of the trainable parameters."""

    names: list[str]
    parameters: list[nn.Parameter]
    frozen: int
    value: Tensor
    slopes: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def products(self, vectors: Tensor) -> Tensor:
        """H v for every row v of `vectors` (k, n): (k, n)."""
        pieces = torch.split(vectors, [parameter.numel() for parameter in self.parameters], dim=1)
        split = [v.reshape(-1, *p.shape) for v, p in zip(pieces, self.parameters, strict=True)]
        reached = [(s, v) for s, v in zip(self.slopes, split, strict=True) if s.requires_grad]
        if not reached:  # the loss is affine in the parameters
            return torch.zeros_like(vectors)
        slopes, weights = zip(*reached, strict=True)
        many = len(vectors) > 1  # batching costs more than it saves on one vector
        found = torch.autograd.grad(
            slopes,
            self.parameters,
            weights if many else [v[0] for v in weights],
            retain_graph=True,
            is_grads_batched=many,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([rows.reshape(len(vectors), -1) for rows in found], dim=1)

    def hessian(self) -> Tensor:
        """The full Hessian, (n, n), made symmetric to the last bit."""
        like = self.parameters[0]
        unit = torch.eye(self.count, dtype=like.dtype, device=like.device)
        full = torch.cat([self.products(rows) for rows in torch.split(unit, CHUNK)])
        return (full + full.T) / 2


@contextlib.contextmanager
def _scene(model: nn.Module, loss: Loss, batch: Any, twice: bool = False) -> Iterator[_Scene]:
    """The loss of a float64 copy in eval mode and its gradient, differentiable once more if `twice`."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, got {type(model).__name__}: pass the model itself")
    cuda = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(cuda)))  # a loss may draw from it
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(device.type for device in cuda)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if twice:  # kernels that can be differentiated once only
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            own = copy.deepcopy(model).eval().double()
        except Exception as error:
            raise InputError(
                f"the model cannot be copied ({_short(error)}): detach tensors kept as attributes"
            ) from error
        trained = {name: p for name, p in own.named_parameters() if p.requires_grad and p.numel()}
        if not trained:
            raise InputError("the model has no trainable parameter: set requires_grad on what is to be judged")
        value = _value(own, loss, batch)
        slopes = torch.autograd.grad(value, list(trained.values()), create_graph=twice, allow_unused=True)
        if all(slope is None for slope in slopes):
            raise InputError("the loss does not depend on the model that it is given: compute it with that model")
        slopes = tuple(
            torch.zeros_like(p) if slope is None else slope
            for slope, p in zip(slopes, trained.values(), strict=True)
        )
        frozen = sum(p.numel() for p in own.parameters() if not p.requires_grad)
        yield _Scene(list(trained), list(trained.values()), frozen, value.detach(), slopes)


def _value(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    """The loss, or one sentence on why it is none."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        return leaf.double() if leaf.is_floating_point() else leaf

    form = "loss takes (model, batch), e.g. lambda model, batch: mse_loss(model(batch[0]), batch[1])"
    try:
        value = loss(model, pytree.tree_map(cast, batch))
    except Exception as error:
        raise InputError(f"the loss does not run on the float64 copy ({_short(error)}); {form}") from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the loss is no real scalar tensor ({shown}): reduce it, e.g. by its mean; {form}")
    if not value.isfinite():
        raise InputError(f"the loss is {value.item()}: judge the model at a point where it is finite")
    if not value.requires_grad:
        raise InputError(f"the loss does not depend on the model that it is given; {form}")
    return value.reshape(())


def _exact(eigenvalues: Tensor, tolerance: float | None) -> Inertia:
    """Counts in the full spectrum (n,)."""
    eigenvalues = eigenvalues.detach().cpu()
    n, sizes = len(eigenvalues), eigenvalues.abs()
    largest = float(sizes.max())
    limit = ROUNDINGS * n * torch.finfo(torch.float64).eps * largest if tolerance is None else tolerance
    zero = sizes <= limit
    positive, negative = int((eigenvalues > limit).sum()), int((eigenvalues < -limit).sum())
    return Inertia(
        positive=positive,
        zero=n - positive - negative,
        negative=negative,
        parameters=n,
        method="exact",
        tolerance=limit,
        largest=largest,
        largest_zero=float(sizes[zero].max()) if zero.any() else None,
        smallest_nonzero=float(sizes[~zero].min()) if not zero.all() else None,
        errors=(0.0, 0.0, 0.0),
        unresolved=0.0,
        eigenvalues=eigenvalues,
    )


def _lanczos(scene: _Scene, generator: torch.Generator, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values, weights (they sum to 1) and residuals, each (k,), of one probe of random signs."""
    like, steps = scene.parameters[0], min(steps, scene.count)
    signs = torch.randint(2, (scene.count,), generator=generator).to(like) * 2 - 1
    basis = torch.empty(steps, scene.count, dtype=like.dtype, device=like.device)
    basis[0] = signs.detach() / signs.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        vector = scene.products(basis[step : step + 1])[0].detach()
        diagonal.append(float(vector @ basis[step]))
        known = basis[: step + 1]
        for _ in range(2):  # once more: rounding leaves a trace of the old directions
            vector = vector - known.T @ (known @ vector)
        beside.append(float(vector.norm()))
        scale = max(map(abs, [*diagonal, *beside]))
        if beside[-1] <= scene.count * torch.finfo(torch.float64).eps * scale:
            break  # the Krylov space is exhausted, and holds the probe's whole spectral measure
        if step + 1 < steps:
            basis[step + 1] = vector / beside[-1]
    inner = torch.tensor(beside[:-1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(inner, 1) + torch.diag(inner, -1)
    ritz, vectors = torch.linalg.eigh(matrix)
    return ritz, vectors[0] ** 2, beside[-1] * vectors[-1].abs()


def _estimate(nodes: list[tuple[Tensor, Tensor, Tensor]], n: int, tolerance: float | None) -> Inertia:
    """Means of the counts over the probes, their standard errors, and what is left open."""
    sizes = torch.cat([ritz for ritz, _, _ in nodes]).abs()
    limit = RESOLUTION * float(sizes.max()) if tolerance is None else tolerance
    counts, unresolved = [], []
    for node in nodes:
        above, split_above = _mass_above(*node, limit)
        reaching, split_below = _mass_above(*node, -limit)
        counts.append([n * above, n * (reaching - above), n * (1 - reaching)])
        unresolved.append(n * (split_above + split_below))
    table = torch.tensor(counts, dtype=torch.float64)
    positive, zero, negative = table.mean(dim=0).tolist()
    first, second, third = (table.std(dim=0) / math.sqrt(len(table))).tolist()
    small = sizes <= limit
    return Inertia(
        positive=positive,
        zero=zero,
        negative=negative,
        parameters=n,
        method="lanczos",
        tolerance=limit,
        largest=float(sizes.max()),
        largest_zero=float(sizes[small].max()) if small.any() else None,
        smallest_nonzero=float(sizes[~small].min()) if not small.all() else None,
        errors=(first, second, third),
        unresolved=sum(unresolved) / len(unresolved),
        eigenvalues=None,
    )


def _mass_above(ritz: Tensor, weights: Tensor, residuals: Tensor, bound: float) -> tuple[float, float]:
    """The share of one probe's spectral measure above `bound`, and the weight of the node that straddles it.

    A converged Ritz value is an eigenvalue, and all its weight lies there. One that is not stands for the
    eigenvalues about it, half of its weight for those on either side, as far as half the way to its neighbours:
    so the measure has no steps where the spectrum has none. By the inequalities of Chebyshev, Markov and Stieltjes
    the true share differs by about the weight of the node at the bound, at most.
    """
    halves = ritz.diff() / 2
    end = torch.tensor([math.inf], dtype=ritz.dtype)
    below = torch.minimum(residuals, torch.cat([end, halves]))
    above = torch.minimum(residuals, torch.cat([halves, end]))
    upper = ((ritz + above - bound) / above.clamp_min(TINY)).clamp(0, 1)
    lower = ((ritz - bound) / below.clamp_min(TINY)).clamp(0, 1)
    straddles = (ritz - below <= bound) & (bound < ritz + above)
    return float((weights * (upper + lower)).sum() / 2), float(weights[straddles].sum())


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table, the first column to the left and the others to the right."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    ruled = [header, tuple("-" * width for width in widths), *rows]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in ruled
    ]


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
