"""What `compress` measures of a model, and keeps in a file as it comes, if asked: an interrupted run goes on where
it ended, and one for another budget begins with the curves.

One safetensors file, written whole or not at all after every space. It belongs to one model, one set of samples
and one seed: another's is refused, never written over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ep_prune.augment import augmented
from ep_prune.calibrate import Program
from ep_prune.curves import FORWARDS, FRACTIONS, Chunks, Curve, Step, curves, importances, moments
from ep_prune.errors import InputError
from ep_prune.plan import fingerprint, save_whole
from ep_prune.structure import Structure

IMPORTANCE_CHUNKS = 4
VERSION = 2
KEY = "ep_prune.measurements"


def digest_of(weights: str, structure: Structure, chunks: Iterable[Sequence[Tensor]], seed: int) -> str:
    """SHA-256 over all that curves depend on. weights: the fingerprint of the model's."""
    samples = fingerprint({f"{k}.{j}": t for k, chunk in enumerate(chunks) for j, t in enumerate(chunk)})
    spaces = [(space.name, space.roots.tolist()) for space in structure.spaces]
    told = [VERSION, weights, samples, seed, FORWARDS, FRACTIONS, spaces]
    if structure.branches:
        told.append(sorted(structure.branches))
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class Measurements:
    """The file's content. `curves`: by the space's name, in the order in which they were measured. `complete`:
    whether these are all."""

    def __init__(self, path: Path, digest: str, structure: Structure) -> None:
        self.path, self.digest = path, digest
        self.curves: dict[str, Curve] = {}
        self.complete = False
        if not path.exists():
            if not path.parent.is_dir():
                raise InputError(f"resume={str(path)!r}: there is no folder {str(path.parent)!r}")
            return
        try:
            with safe_open(str(path), "pt") as file:
                told = (file.metadata() or {}).get(KEY)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"resume={str(path)!r} cannot be read ({error}): name another file") from error
        if told is None:
            raise InputError(f"resume={str(path)!r} is another kind of file: name one that is not there yet")
        header = json.loads(told)
        if header.get("digest") != digest:
            raise InputError(
                f"resume={str(path)!r} was measured on another model, other samples or another seed, or where "
                "other branches may go (min_width=0): name another file"
            )
        spaces = {space.name: space for space in structure.spaces}
        for number, name in enumerate(header["spaces"]):
            order, costs, measured = (tensors[f"{number}.{part}"] for part in ("order", "costs", "measured"))
            points = tuple((int(width), float(loss)) for width, loss in measured.tolist())
            self.curves[name] = Curve(spaces[name], order, costs, points)
        self.complete = bool(header["complete"])

    def add(self, curve: Curve) -> None:
        self.curves[curve.space.name] = curve
        self._write()

    def finish(self) -> None:
        self.complete = True
        self._write()

    def _write(self) -> None:
        tensors = {}
        for number, curve in enumerate(self.curves.values()):
            tensors[f"{number}.order"], tensors[f"{number}.costs"] = curve.order.clone(), curve.costs.clone()
            tensors[f"{number}.measured"] = torch.tensor(curve.measured, dtype=torch.float64).reshape(-1, 2)
        header = {"digest": self.digest, "spaces": list(self.curves), "complete": self.complete}
        whole = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_whole(whole, self.path, {KEY: json.dumps(header)})


def measured(
    program: Program,
    structure: Structure,
    fit: Chunks,
    measure: Chunks,
    seed: int,
    step: Step,
    stored: Measurements | None = None,
) -> list[Curve]:
    """The curve of every space, on the chunks `measure`; from what is `stored`, as far as it goes.

    fit: all chunks that may be fitted on, of which `measure` are the last: weights are made from those before."""
    if stored is not None and stored.complete:
        return list(stored.curves.values())
    others = augmented(program, structure.readers, fit[: -len(measure)] or fit, seed)
    covariances = moments(program, structure.readers, others, seed, step)
    metrics = importances(program, structure.readers, fit[:IMPORTANCE_CHUNKS], seed, step)
    if stored is None:
        return curves(program, structure, covariances, metrics, measure, step)
    known = dict(stored.curves)
    found = curves(program, structure, covariances, metrics, measure, step, known=known, keep=stored.add)
    stored.finish()
    return found
