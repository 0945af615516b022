"""The benchmark of architectures: three tiny ones through its own code, and that it tells what goes wrong."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ep_prune as ep

# benchmarks/ is no part of the installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import families as bench
from benchmarks import families_measure as measuring
from benchmarks.families_measure import Row, measure
from benchmarks.families_networks import Family, families, normal
from benchmarks.families_table import failures, summary

TINY = "tuple output"


def run(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, `families.json` and `families.md` of a run of one tiny family in this process."""
    code = bench.main(["--only", TINY, "--here", "--out", str(folder), *options])
    return code, json.loads((folder / "families.json").read_text()), (folder / "families.md").read_text()


def test_a_small_network_comes_back_whole_and_the_run_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, figures, table = run(tmp_path)
    (row,) = figures["rows"]
    assert code == 0
    assert row["exports"] and row["exact"] == len(row["widened"]) == row["spaces"] == 2
    assert all(after > before for before, after in row["widened"].values())
    assert set(row["differences"]) == {"reduce", "embed", "reduce again"} and row["difference"] <= 1e-12
    assert figures["totals"]["share that came back"] == 1.0 and not figures["totals"]["failures"]
    assert "| tuple output | 1,293 | yes | 2 | 2 | 2 |" in table
    assert set(figures["not measured"]) == set(families()) - {TINY} and "NOT MEASURED" in table

    monkeypatch.setattr(bench, "measure", None)  # a second run takes the rows over
    assert run(tmp_path)[0] == 0


def test_what_has_no_rule_is_named_and_not_counted_as_back() -> None:
    row = measure(families()["lstm language model"])
    assert row.status == "done" and not row.broken
    assert (row.spaces, list(row.widened), row.exact) == (4, ["hidden"], 1)
    ((reason, names), (other, read)) = row.closed.items()
    assert "recurrent" in reason and names == ["recurrent.l0", "recurrent.l1"]
    assert "lstm" in other and read == ["embedding"]


def test_two_inputs_and_two_outputs_are_compared() -> None:
    row = measure(families()["two inputs, two outputs"])
    assert row.status == "done" and row.exact == len(row.widened) == row.spaces == 5
    assert row.difference is not None and row.difference <= 1e-12 and not row.lifeless


def changed(kept: Callable[..., Any], change: Callable[[nn.Module], None], call: int) -> Callable[..., Any]:
    """`ep.reduce`, but of the given call's model one thing is changed after all checks."""
    calls = []

    def reduce(model: nn.Module, *args: Any, **options: Any) -> Any:
        calls.append(model)
        result = kept(model, *args, **options)
        if len(calls) == call:
            change(result.model)
        return result

    return reduce


@pytest.mark.parametrize(("call", "step"), [(1, "reduce"), (2, "reduce again")])
def test_a_wrong_output_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, step: str) -> None:
    def corrupt(model: nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).flatten()[0].mul_(1 + 1e-6)

    monkeypatch.setattr(ep, "reduce", changed(ep.reduce, corrupt, call))
    code, figures, table = run(tmp_path)
    assert code == 1
    (row,) = figures["rows"]
    assert step in row["wrong"] and 1e-10 < row["differences"][step] < 1e-4
    assert f"WRONG OUTPUT after {step}" in table
    assert figures["totals"]["within the limit"] == 0


def test_a_space_that_does_not_come_back_is_a_miss_and_no_wrong_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ep.reduce

    def reduce(model: nn.Module, example: Any, **options: Any) -> Any:
        protect = ["stem.0"] if len(model.state_dict()["stem.0.weight"]) > 8 else []
        return kept(model, example, protect=protect, **options)

    monkeypatch.setattr(ep, "reduce", reduce)
    code, figures, table = run(tmp_path)
    assert code == 0
    assert figures["rows"][0]["missed"] == {"stem.0": "8 -> 12 -> 12: protected"}
    assert figures["totals"]["share that came back"] == 0.5
    assert "tuple output: stem.0 8 -> 12 -> 12: protected" in table and "missed" in table


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(ep.InputError("no"), "refused", 0), (ep.TraceError("no"), "refused", 0), (KeyError("no"), "crashed", 1)],
)
def test_errors_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, code: int
) -> None:
    def embed(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(ep, "embed", embed)
    found, figures, _ = run(tmp_path)
    (row,) = figures["rows"]
    assert (row["status"], row["phase"], found) == (status, "embed", code)
    assert row["exports"] and row["differences"] == {"reduce": 0.0}
    assert figures["totals"]["failures"]


def test_what_does_not_export_is_told_from_what_the_package_does_not_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Branches(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (2 if float(x.sum()) > 0 else 3)

    row = measure(Family("branches", "own", lambda: Branches(3, 3), normal(3)))
    assert (row.status, row.exports, row.broken) == ("refused", False, False)
    assert "Branches" in row.error or "test_families.py" in row.error

    def reduce(*_: Any, **__: Any) -> Any:
        raise ep.TraceError("the model cannot be exported")

    monkeypatch.setattr(ep, "reduce", reduce)
    row = measure(Family("linear", "own", lambda: nn.Linear(3, 3), normal(3)))
    assert (row.status, row.broken) == ("crashed", True) and "torch.export takes it" in row.error


def test_a_family_that_takes_too_long_is_stopped_and_one_without_its_package_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = bench.in_a_process(families()[TINY], 0, limit=0.2, memory=6)
    assert row.status == "stopped" and row.error == "stopped after 0 s, at the step: start"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--only", "Llama", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "families.json").read_text())
    assert figures["rows"][0]["error"] == "transformers is not installed"
    assert (figures["totals"]["skipped"], figures["totals"]["failures"]) == (1, [])


def test_an_output_that_does_not_depend_on_its_input_tests_nothing() -> None:
    class Still(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(0 * x)

    row = measure(Family("still", "own", lambda: Still(3, 3), normal(3)))
    assert row.lifeless and "nothing is tested" in " ".join(failures(row))
    assert not row.broken


def test_nothing_is_trivial_after_randomising() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.LayerNorm(4))
    again = copy.deepcopy(model)
    measuring.randomise_(model, torch.Generator().manual_seed(0))
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert all(bool((value != 0).all()) for value in state.values())
    assert all(len(value.flatten().unique()) == value.numel() for value in state.values())
    measuring.randomise_(again, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_registry_has_the_families_of_the_issue() -> None:
    groups: dict[str, int] = {}
    for family in families().values():
        groups[family.group] = groups.get(family.group, 0) + 1
    assert groups["torchvision"] >= 24 and groups["timm"] >= 15 and groups["transformers"] >= 8
    assert set(bench.QUICK) <= set(families())


def test_totals_of_no_rows() -> None:
    assert summary([])["share that came back"] is None
    assert summary([Row("x", "own", "skipped")])["skipped"] == 1
