"""`ep-prune compress`, and what `verify` says of a file that it wrote.

compress    reads the calibration inputs from one file, compresses to the budgets, writes model, plan and report
verify      no equality is claimed at grade fitted, so none is judged: the weights in the file are compared with
            those that its plan makes of the wide model, and the change of the outputs on the probes is measured
            and told. With --tol it is judged
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ep_prune.calibrate import SAMPLES
from ep_prune.cli_files import check_plot, check_targets, publish, write_text
from ep_prune.cli_models import given, load_probes
from ep_prune.compress import Compressed, compress
from ep_prune.divergence import agreement
from ep_prune.errors import VerificationError
from ep_prune.narrowing import tensors_of
from ep_prune.plan import Plan, fingerprint
from ep_prune.probes import synthetic_probes
from ep_prune.storage import save
from ep_prune.trace import prepare
from ep_prune.verification import verify

DRIFT = 1e3
"""Rounding units by which a weight may be off the plan's: folds are sums, which other machines take otherwise."""
ANY = 1e300
"""A limit that no difference of finite outputs reaches: what has no limit is measured, and not judged."""


def add_options(added: argparse.ArgumentParser) -> None:
    """The options that `compress` alone has."""
    added.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="unlabelled inputs to fit on: the first floating array of an .npz, .safetensors or .pt file, some "
        "hundreds of samples, as the model takes them; without it, synthetic inputs stand in",
    )  # fmt: skip
    for name, what in (("macs", "multiply-accumulates"), ("params", "parameters")):
        added.add_argument(
            f"--keep-{name}", type=float, metavar="SHARE",
            help=f"what may stay of the {what}: a share up to 1, as 0.5, or an absolute number",
        )  # fmt: skip
    added.add_argument(
        "--latency", type=float, metavar="MS", help="milliseconds that a call on --input may take on this machine"
    )
    added.add_argument(
        "--tol", type=float, metavar="T",
        help="accepted relative change of any output on calibration inputs that nothing was fitted on",
    )  # fmt: skip
    added.add_argument(
        "--round-to", type=int, default=1, metavar="N", help="narrowed widths become multiples of N (default: 1)"
    )
    added.add_argument(
        "--min-width",
        type=int,
        default=1,
        metavar="N",
        help="channels that every layer keeps, at least (default: 1); 0: residual branches may go as a whole",
    )
    added.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N",
        help=f"calibration samples to use, at most (default: {SAMPLES})",
    )  # fmt: skip
    added.add_argument(
        "--resume", type=Path, metavar="FILE",
        help="keep what is measured in this file, as it comes: an interrupted run goes on from it, and one with "
        "another budget measures nothing anew",
    )  # fmt: skip
    added.add_argument(
        "--fold-batch-norm", action="store_true",
        help="fold every batch norm into the layer before it: the same function, faster, not for training",
    )  # fmt: skip


def run_compress(options: argparse.Namespace) -> None:
    """Compress, write what was asked for, and print the report."""
    targets = [path for path in (options.out, options.report, options.plot) if path is not None]
    check_targets(targets, options.force)
    if options.plot is not None:
        check_plot(options.plot)
    model, inputs, _ = given(options)
    calibration = None
    if options.calibration is not None:
        calibration = load_probes(options.calibration, inputs, "--calibration", "compress")
    result = compress(
        model,
        inputs,
        calibration,
        keep_macs=options.keep_macs,
        keep_params=options.keep_params,
        latency=options.latency,
        tol=options.tol,
        round_to=options.round_to,
        protect=options.protect,
        min_width=options.min_width,
        samples=options.samples,
        seed=options.seed,
        replace_modules=options.replace_modules,
        fold_batch_norm=options.fold_batch_norm,
        resume=options.resume,
    )
    publish(_writers(options, result))
    print(result.report)
    for path in targets:
        print(f"wrote {path}")


def _writers(options: argparse.Namespace, result: Compressed) -> dict[Path, Callable[[Path], None]]:
    writers: dict[Path, Callable[[Path], None]] = {}
    if options.out is not None:
        writers[options.out] = lambda path: save(result, path)
    if options.report is not None:
        told = json.dumps(result.report.to_dict(), indent=2) + "\n"
        writers[options.report] = lambda path: write_text(path, told)
    if options.plot is not None:
        writers[options.plot] = result.report.plot
    return writers


# ---- verify --------------------------------------------------------------------------------------------


def verify_fitted(
    wide: nn.Module,
    narrow: nn.Module,
    plan: Plan,
    inputs: tuple[Tensor, ...],
    probes: Sequence[tuple[Tensor, ...]] | None,
    options: argparse.Namespace,
) -> None:
    """Say what a file of grade fitted is and how far its outputs are from the wide model's; nothing is called the
    same. Raises `VerificationError` for weights that are not the plan's, and beyond --tol."""
    file = options.narrow
    prepared = prepare(wide, plan.replace_modules)[0]
    if plan.fingerprint == fingerprint(prepared.state_dict()):
        _check_weights(plan.apply(wide), narrow, file)
        weights = "as the plan in the file makes them of this model"
    else:
        weights = "not checked: the plan in the file was made for other weights"
    measured = probes if probes is not None else synthetic_probes(prepared, inputs, options.seed)
    checked = verify(
        wide, narrow, inputs, probes=measured, seed=options.seed, limit=options.tol or ANY, judged=("user",),
        count=1, ascent_steps=0, reach=False,
    )  # fmt: skip
    samples = (
        f"{sum(len(batch[0]) for batch in measured)} {'samples' if probes is not None else 'synthetic samples'}"
    )
    print(f"grade       fitted: {file} approximates the model, and no equality is claimed")
    print(f"weights     {weights}")
    print(f"change      {checked.difference:.2g} of the largest output, in float64, on {samples}")
    same = _same_decisions(prepared, narrow, measured)
    if same is not None:
        print(f"decisions   {same:.1%} equal")
    if options.tol > 0:
        checked.raise_if_different()
        print(f"within      --tol {options.tol:g}")


def _check_weights(expected: nn.Module, found: nn.Module, file: Path) -> None:
    stored = found.state_dict()
    for name, tensor in expected.state_dict().items():
        other = stored.get(name)
        same = other is not None and other.shape == tensor.shape
        if same and other is not None and tensor.is_floating_point() and tensor.numel():
            off = (tensor.double() - other.double()).abs().max()
            same = bool(off <= DRIFT * torch.finfo(tensor.dtype).eps * tensor.double().abs().max())
        elif same and other is not None:
            same = torch.equal(tensor, other)
        if not same:
            raise VerificationError(
                f"{name!r} in {file} is not what the plan there makes of this model: the file was altered, "
                "compress the model again"
            )


@torch.no_grad()
def _same_decisions(wide: nn.Module, narrow: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> float | None:
    """The share of samples with the same largest score; None where the models give no scores of classes."""
    narrow.eval()
    equal, count = 0.0, 0
    for batch in batches:
        outputs = [tensors_of(model(*batch)) for model in (wide, narrow)]
        same = agreement(*outputs)
        if same is None:
            return None
        equal, count = equal + same * len(batch[0]), count + len(batch[0])
    return equal / max(count, 1)
