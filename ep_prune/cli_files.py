"""Files of the command line: refused before the work, and after it there whole or not at all."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ep_prune.errors import InputError


def check_targets(paths: Sequence[Path], force: bool) -> None:
    """Refuse, before any work, what could not be written after it."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("two of --out, --report and --plot name one file: give each its own")
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file in it")
        if not path.parent.is_dir():
            raise InputError(f"the folder {path.parent} does not exist: make it first")
        if path.exists() and not force:
            raise InputError(f"{path} exists: name another file, or replace it with --force")


def publish(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write every file beside its place, then move all into place: whole or not at all."""
    partial = {path: path.with_name(f".{path.stem}.partial{path.suffix}") for path in writers}
    try:
        for path, write in writers.items():
            write(partial[path])
        for path in writers:
            os.replace(partial[path], path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """In UTF-8, whatever the system's encoding is."""
    path.write_text(text, encoding="utf-8")


def check_plot(path: Path) -> None:
    """Refuse, before any work, a picture that could not be drawn after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is missing: pip install 'ep-prune[plot]'")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--plot {path} is no picture's name: end it in .png, .pdf or .svg")
