"""`benchmarks/compress_cost`: stages and passes add up, memory is this process's, runs go on where they ended."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# benchmarks/ is no part of the installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import compress_cost as bench
from benchmarks.wide_networks import noise


def test_a_stage_inside_of_another_counts_on_its_own():
    now = [0.0]
    watch = bench.Stopwatch(lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds
        watch.count(seconds)

    def outer() -> str:
        wait(1)
        watch.wrapped("inner", wait)(2)
        wait(4)
        return "done"

    wait(8)
    assert watch.wrapped("outer", outer)() == "done"
    with pytest.raises(TypeError):
        watch.wrapped("outer", wait)("no number")
    wait(16)
    watch.lap()
    assert watch.seconds == watch.passes == {"other": 24, "outer": 5, "inner": 2}


def tiny(network: str, count: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 4, 7)]
    return nn.Sequential(*layers, nn.Flatten()).eval(), noise(0, count)


def test_stages_and_passes_of_a_measurement_add_up(monkeypatch):
    monkeypatch.setattr(bench, "case", tiny)
    originals = [vars(bench.Program)["call"], sys.modules["ep_prune.measurements"].curves]
    row = bench.measure(bench.Row("tiny", 40, 1))
    assert [vars(bench.Program)["call"], sys.modules["ep_prune.measurements"].curves] == originals
    assert {"other", *bench.STAGES} == set(row.stages)
    assert sum(row.stages.values()) == pytest.approx(row.seconds, rel=0.05)
    assert row.used == 40 and 0.2 < row.macs <= 0.5
    # 8 chunks of 5, one held out, and curves measured on every second of the others; while fitting, both networks
    # run, and pairs again as they are moved
    assert row.passes["covariances"] == pytest.approx(20)
    assert 70 < row.passes["fit"] < 400
    assert row.choosing == row.passes["curves"] > 0
    assert row.peak >= row.loaded > 0
    assert bench.broken({"limits": [row]}) == []


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="only Linux tells what is held now")
def test_the_high_water_mark_rises_with_what_is_held_and_stays():
    before = bench.high_water()
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    held = torch.ones((before - now) // 4 + 8 * 2**20)
    risen = bench.high_water()
    assert risen - before > 16 * 2**20
    del held
    assert bench.high_water() > risen - 2**22  # the kernel counts in batches of pages


def test_cases_by_name():
    model, images = bench.case("wrn10_2", 5)
    assert model.linear.in_features == 128 and images.shape == (5, 3, 32, 32)


def row(network: str = "net", images: int = 8, **figures) -> bench.Row:
    told = {"used": images, "seconds": 3.0, "processor_seconds": 5.0, "stages": {"other": 1.0, "reduce": 2.0},
            "passes": {"curves": 10.0, "fit": 5.0}, "peak": 2 * 10**9, "loaded": 10**9, "macs": 0.5,
            "wide_macs": 100, "divergence": 0.1, "agreement": 0.9, "load": 0.0}  # fmt: skip
    return bench.Row(network, images, 1, **{**told, **figures})


def test_what_is_broken_is_said():
    assert bench.broken({"limits": [row()], "width": [row(seconds=1e4, peak=10**11)]}) == []
    over = row(seconds=151.0, peak=5 * 10**9, passes={"curves": 15_001.0, "fit": 1.0}, macs=0.51)
    assert bench.broken({"limits": [over]}) == [
        "net on 8 images keeps 0.5100 of the MACs, 0.5 allowed",
        "net on 8 images takes 151.0 s, 150 promised",
        "net on 8 images needs 5.0 GB, 4 promised",
        "net on 8 images chooses widths with 15,001.0 whole passes, 15,000 promised",
    ]
    assert bench.broken({"images": [bench.Row("net", 8, 1, error="no luck")]}) == ["net on 8 images: no luck"]


def test_a_process_that_fails_is_a_row(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert bench.in_child(bench.Row("net", 8, 1)).error == "the process ended with 1: no message"


def test_runs_go_on_where_they_ended(tmp_path, monkeypatch, capsys):
    calls, fails = [], {"b"}

    def measured(asked: bench.Row) -> bench.Row:
        calls.append(asked.network)
        if asked.network in fails:
            asked.error = "no luck"
            return asked
        return row(asked.network, asked.images)

    monkeypatch.setattr(bench, "in_child", measured)
    series = {"limits": [("a", 8)], "images": [("a", 8), ("a", 16)], "width": [("b", 8), ("c", 8)]}
    monkeypatch.setattr(bench, "SERIES", series)
    arguments = ["--threads", "1", "--out", str(tmp_path)]
    assert bench.main(arguments) == 1 and calls == ["a", "a", "b", "c"]  # what is in two series runs once
    assert "* b on 8 images: no luck" in capsys.readouterr().out
    log = tmp_path / "results.jsonl"
    log.write_text(log.read_text() + '{"network": "c", "ima')  # cut off while it wrote
    calls.clear()
    fails.clear()
    assert bench.main(arguments) == 0 and calls == ["b"]
    calls.clear()
    assert bench.main(arguments) == 0 and calls == []
    text = (tmp_path / "table.md").read_text()
    assert "| b | 8 | 1 | 3.0 | 5.0 | 2.00 (+1.00) | 15 (10) | 0.500 | 0.1 | 0.0 |" in text
    assert "| network | images | reduce | other |" in text and "All limits hold." in text
    document = json.loads((tmp_path / "results.json").read_text())
    assert [one["network"] for one in document["width"]] == ["b", "c"] and "torch" in document["machine"]
    assert (tmp_path / "plot.png").stat().st_size > 5000
