"""What all recipes of this folder share: the command line, progress, figures, tables, and resuming.

A recipe writes `NAME.json` (every figure that it prints, with its settings), `NAME.png`, and while it runs a
state file from which the same command goes on after an interruption. Files are written beside their place and
moved there, so none is ever half-written; a state is used again only with exactly the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

DATA = Path(os.environ.get("EP_PRUNE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
"""Where `mnist/` and `cifar10/` are looked for (NumPy archives, see the README)."""


def parse(
    name: str,
    text: str | None,
    argv: list[str] | None,
    extend: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The command line of the recipe `name`; sets the number of threads and makes the folder `--out`."""
    first = (text or "").strip().splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m recipes.embedding_principle.{name}", description=first)
    parser.add_argument("--quick", action="store_true", help="seconds instead of the paper's setting")
    parser.add_argument("--out", type=Path, default=Path("recipe-out"), help="folder of the table and the figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    if extend is not None:
        extend(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide the figures, for the table and for the state; where it is written is not one."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in ("out", "threads")}


def progress(total: int | None, text: str) -> tqdm[Any]:
    """A bar on a terminal, nothing in a pipe."""
    return tqdm(total=total, desc=text, disable=None)


def write_json(path: Path, args: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """The table: settings, versions and figures."""
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": args.threads}
    text = json.dumps({"settings": settings_of(args), "made with": about, **figures}, indent=1, default=_plain)
    temporary = path.with_suffix(".json.part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} in a table")


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no screen."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write the picture whole or not at all."""
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def save_state(
    path: Path, args: argparse.Namespace, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """What a run needs to go on: tensors, and plain values. Nothing is pickled."""
    temporary = path.with_suffix(".part")
    header = {"settings": json.dumps(settings_of(args)), "values": json.dumps(dict(values))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary), header)
    temporary.replace(path)


def load_state(path: Path, args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_state` wrote with the same settings; None where there is none."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None
    if header.get("settings") != json.dumps(settings_of(args)):
        return None
    return tensors, json.loads(header["values"])
