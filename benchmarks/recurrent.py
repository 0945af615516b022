"""Widened recurrent networks: `ep_prune.reduce` beside torch-pruning's magnitude pruner.

    python -m benchmarks.recurrent [--only NAME,NAME] [--out bench-out/]

Random networks (a table of tokens, LSTM, GRU or plain recurrent layers of 32 units, a linear head) are widened
to 64 (`recurrent_networks.py`): 20 copies with random shares of every weight that reads them, flipped in sign or
scaled where the cell allows it, 8 units that nobody reads, 4 that are zero for ever. The widening is exact, so
the narrow widths are known. `reduce` gets the wide network and one batch of tokens. torch-pruning gets the same,
and is told how many units there are to take off (`pruning_ratio`), with head and table left out, by magnitude
(L2) as its README does; it does not promise to keep the output, and where it takes nothing off, or stops, that
is said.

Differences are relative to the largest output, on fresh tokens of another length and batch, in the stored type.
Rows go to `recurrent.jsonl` in `--out`, an interrupted run goes on from there; `recurrent.md` is the table. Exit
code 1 where ours does not come back to the narrow widths, or differs by more than 1e-10 (float64) or 1e-5
(float32).
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import ep_prune as ep
from benchmarks.common import Log, head, machine, names_of
from benchmarks.recurrent_networks import Tagger, Widener, tagger, widened

UNITS, COPIES, UNREAD, ZERO = 32, 20, 8, 4
LIMIT = {"float64": 1e-10, "float32": 1e-5}
BOTH = {"num_layers": 2, "bidirectional": True}
NETWORKS: dict[str, tuple[type[nn.RNNBase], dict[str, Any], str, torch.dtype]] = {
    "lstm": (nn.LSTM, {}, "all", torch.float64),
    "lstm, float32": (nn.LSTM, {}, "all", torch.float32),
    "lstm, 2 layers": (nn.LSTM, {"num_layers": 2}, "last", torch.float64),
    "lstm, both ways": (nn.LSTM, {"bidirectional": True}, "all", torch.float64),
    "lstm, 2 layers, both ways": (nn.LSTM, BOTH, "last", torch.float64),
    "lstm, projected": (nn.LSTM, {"proj_size": 16}, "all", torch.float64),
    "gru": (nn.GRU, {}, "all", torch.float64),
    "gru, float32": (nn.GRU, {}, "all", torch.float32),
    "gru, 2 layers, both ways": (nn.GRU, BOTH, "last", torch.float64),
    "rnn, tanh": (nn.RNN, {}, "all", torch.float64),
    "rnn, relu": (nn.RNN, {"nonlinearity": "relu"}, "all", torch.float64),
}


@dataclass
class Row:
    """What one tool made of one network. difference: None where it did not come to an end (`error`)."""

    network: str
    tool: str
    narrow: int
    wide: int
    units: int | None
    parameters: int
    left: int | None
    difference: float | None
    limit: float
    exact: bool
    seconds: float
    error: str = ""

    @property
    def fine(self) -> bool:
        """Whether the narrow network is back, and computes the same."""
        return self.exact and self.difference is not None and self.difference <= self.limit


def ours(wide: Tagger, tokens: Tensor) -> nn.Module:
    return ep.reduce(wide, tokens).model


def magnitude(wide: Tagger, tokens: Tensor) -> nn.Module:
    """torch-pruning as its README uses it, told which share of the units there is to take off."""
    pruned = copy.deepcopy(wide)
    pruner = tp.pruner.MagnitudePruner(
        pruned,
        tokens,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=1 - UNITS / wide.layers.hidden_size,
        ignored_layers=[pruned.head, pruned.table],
    )
    pruner.step()
    return pruned


TOOLS: dict[str, Callable[[Tagger, Tensor], nn.Module]] = {
    f"ep_prune {ep.__version__}": ours,
    f"torch-pruning {tp.__version__}": magnitude,
}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure(name: str, tool: str) -> Row:
    kind, options, use, dtype = NETWORKS[name]
    narrow = tagger(kind, use, seed=0, units=UNITS, size=16, tokens=50, **options)
    wide = widened(narrow, Widener(0, unread=UNREAD, zero=ZERO, copies=COPIES)).to(dtype)
    draw = torch.Generator().manual_seed(1)
    example, fresh = (torch.randint(50, shape, generator=draw) for shape in ((6, 4), (20, 16)))
    with torch.no_grad():
        expected = wide(fresh)
    start = time.process_time()
    row = Row(name, tool, UNITS, wide.layers.hidden_size, None, size(wide), None, None,
              LIMIT[str(dtype).removeprefix("torch.")], False, 0.0)  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = TOOLS[tool](wide, example)
        row.seconds = time.process_time() - start
        with torch.no_grad():
            found = model(fresh)
        row.difference = float((found - expected).abs().max() / expected.abs().max())
        row.units, row.left = model.get_submodule("layers").hidden_size, size(model)  # type: ignore[assignment]
        shapes = [parameter.shape for parameter in model.parameters()]
        row.exact = shapes == [parameter.shape for parameter in narrow.parameters()]
    except Exception as error:  # a peer's crash is a row
        row.seconds = time.process_time() - start
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        row.error = f"{type(error).__name__} at {where} {' '.join(str(error).split())[:80]}".rstrip()
    return row


def table(rows: Sequence[Row]) -> str:
    lines = ["# Widened recurrent networks", ""]
    said = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines += [f"Made by `python -m benchmarks.recurrent`, which says what is measured. {said}.", ""]
    lines += head(["network", "tool", "units", "parameters", "difference", "outcome", "seconds"])
    for row in rows:
        units = f"{row.wide} -> {'-' if row.units is None else row.units} (planted {row.narrow})"
        left = "-" if row.left is None else f"{row.left:,}"
        difference = "-" if row.difference is None else f"{row.difference:.0e}"
        outcome = "the narrow network, exact" if row.fine else row.error or "another network"
        if row.left == row.parameters:
            outcome = "nothing taken off"
        lines.append(
            f"| {row.network} | {row.tool} | {units} | {row.parameters:,} -> {left} | {difference} | {outcome} "
            f"| {row.seconds:.1f} |"
        )
    for tool in dict.fromkeys(row.tool for row in rows):
        own = [row for row in rows if row.tool == tool]
        lines += ["", f"{tool}: {sum(row.fine for row in own)} of {len(own)} back to the narrow network."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", type=names_of(NETWORKS), default=list(NETWORKS), help="networks; all")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    log = Log(options.out / "recurrent.jsonl", lambda data: Row(**data), lambda row: (row.network, row.tool))
    for name in options.only:
        for tool in TOOLS:
            if (name, tool) not in log.rows:
                log.add(measure(name, tool))
    rows = [log.rows[name, tool] for name in NETWORKS for tool in TOOLS if (name, tool) in log.rows]
    text = table(rows)
    (options.out / "recurrent.md").write_text(text, encoding="utf-8")
    print(text)
    return int(not all(row.fine for row in rows if row.tool.startswith("ep_prune")))


if __name__ == "__main__":
    raise SystemExit(main())
