"""What the benchmarks share: a log of rows that an interrupted run goes on from, options, tables, the machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

Row = TypeVar("Row")


class Log(Generic[Row]):
    """The rows of a file, one JSON object a line, by `key`; of several with one key, the last counts.

    read: makes a row, a dataclass, of an object. What is cut off or of another version is passed over.
    """

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], Row], key: Callable[[Row], Hashable]) -> None:
        self.path, self.key = path, key
        self.rows: dict[Any, Row] = {}
        if path.is_file():
            text = path.read_text()
            if text and not text.endswith("\n"):  # cut off: what comes next needs a line of its own
                path.write_text(text + "\n")
            for line in text.splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    row = read(json.loads(line))
                    self.rows[key(row)] = row

    def add(self, row: Row) -> None:
        self.rows[self.key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")  # type: ignore[call-overload]


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An option's type: names with commas between, all of them known."""
    known = list(known)

    def parse(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",")]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return chosen

    return parse


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def machine() -> dict[str, Any]:
    """What figures are made with."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
