"""`compress(resume=FILE)`: what was measured is not measured again, and the outcome is the same."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import ep_prune as ep

curves = importlib.import_module("ep_prune.curves")


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def narrow(path: Path | None, keep: float = 0.5, net: nn.Module | None = None, x: torch.Tensor = X, **more):
    net = model() if net is None else net
    return ep.compress(net, x[:2], x.split(16), keep_macs=keep, progress=False, resume=path, **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(tmp_path, monkeypatch):
    path, expected = tmp_path / "measured", narrow(None)
    measured, eliminate = [], curves.eliminate

    def interrupted(readings, **more):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(len(readings))
        return eliminate(readings, **more)

    monkeypatch.setattr(curves, "eliminate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        narrow(path)
    assert [p.name for p in tmp_path.iterdir()] == ["measured"]
    measured.append(-1)
    again = narrow(path)
    assert same(again.model, expected.model)
    assert any("1 spaces as they were measured before" in note for note in again.report.notes)
    assert len(measured) == 4  # two of the three spaces, and the mark between


def test_another_budget_measures_nothing_anew(tmp_path, monkeypatch):
    expected = narrow(None, 0.3)
    narrow(tmp_path / "measured")

    def never(*_, **__):
        raise AssertionError

    for name in ("moments", "importances", "curves"):
        monkeypatch.setattr(importlib.import_module("ep_prune.measurements"), name, never)
    assert same(narrow(tmp_path / "measured", 0.3).model, expected.model)


def test_what_belongs_to_others_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "measured"
    narrow(path)
    before = path.read_bytes()
    for other in ({"net": model(1)}, {"x": X + 1}, {"seed": 1}, {"protect": ["3"]}):
        with pytest.raises(ep.InputError, match="another model, other samples or another seed"):
            narrow(path, **other)
    assert path.read_bytes() == before
    ep.save(narrow(None), tmp_path / "model.safetensors")
    with pytest.raises(ep.InputError, match="another kind of file"):
        narrow(tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(ep.InputError, match="cannot be read"):
        narrow(tmp_path / "text")
    with pytest.raises(ep.InputError, match="no folder"):
        narrow(tmp_path / "nowhere" / "file")
