"""The table of what layers take: every layer runs at every width, and what is asked for is what was measured."""

import copy
import importlib

import pytest
import torch
from torch import nn

import ep_prune as ep
from ep_prune import layer_times as module
from ep_prune.budget import allowed_widths, descend
from ep_prune.calibrate import Program
from ep_prune.curves import Curve
from ep_prune.layer_times import LayerTimes, layer_times
from ep_prune.structure import Structure
from ep_prune.trace import trace


def structure_of(model: nn.Module, x: torch.Tensor) -> tuple[Program, Structure]:
    program = Program(trace(model.eval(), x))
    return program, Structure(program, {}, [name for name, _ in model.named_parameters()])


def test_between_the_measured_widths_time_is_linear_in_both() -> None:
    grid = torch.tensor([[2.0, 4.0, 6.0, 8.0]])
    times = LayerTimes(grid, grid, (grid.T @ grid).unsqueeze(0))  # inputs * outputs milliseconds
    widths = torch.tensor([[1], [2], [3], [5], [8]])
    found = times.at(widths[:, None], widths[None])
    torch.testing.assert_close(found, (widths * widths.T).double())


def blocks() -> nn.Module:
    torch.manual_seed(0)
    alike = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *alike, *copy.deepcopy(alike), nn.Conv2d(8, 8, 3, groups=8),
        nn.GELU(), nn.Conv2d(8, 8, 1, groups=2), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 12 * 12, 10), nn.Tanh(), nn.Linear(10, 3),
    )  # fmt: skip


def test_layers_are_measured_at_all_widths_and_alike_ones_once(monkeypatch) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []
    call = Program.call

    def noted(self, node, values):
        made = call(self, node, values)
        seen.append((node.name, tuple(made.shape)))
        return made

    monkeypatch.setattr(module, "CALLS", 1)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    program, structure = structure_of(blocks(), torch.randn(4, 3, 8, 8))
    monkeypatch.setattr(Program, "call", noted)
    times = layer_times(program, structure.readers, 0.5)
    assert times.milliseconds.shape == (len(structure.readers), 4, 4) and bool((times.milliseconds > 0).all())
    assert {shape[0] for _, shape in seen} == {2}  # the example's batch, not the trace's
    first, second = (next(k for k, r in enumerate(structure.readers) if r.name == f"{n}.weight") for n in (2, 5))
    assert torch.equal(times.milliseconds[first], times.milliseconds[second])
    layer = [shape for name, shape in seen if name == structure.readers[first].node.name]
    assert {shape[1] for shape in layer} == {2, 4, 6, 8}
    assert not [1 for name, _ in seen if name == structure.readers[second].node.name]
    wide = torch.tensor([len(r.roots) for r in structure.readers])
    written = torch.tensor([r.outputs.numel() for r in structure.readers])
    torch.testing.assert_close(times.at(wide, written), times.milliseconds[:, 3, 3].sum())


def test_what_takes_long_is_narrowed_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    _, structure = structure_of(model, torch.randn(4, 4))
    roots = [space.roots for space in structure.spaces]
    costs = torch.linspace(0.1, 1, 16, dtype=torch.float64).square()
    curves = [Curve(s, r, costs, ((1, 1.0),)) for s, r in zip(structure.spaces, roots, strict=True)]
    allowed = allowed_widths(structure, curves, 1, lambda _: 1)
    names = [r.name for r in structure.readers]

    def first(slow: str) -> str:
        """The space that the path gives more channels up of, where one layer takes nearly all of the time."""
        wide = torch.tensor([[0.25, 0.5, 0.75, 1.0]], dtype=torch.float64)
        read = torch.stack([wide[0] * len(r.roots) for r in structure.readers])
        written = torch.stack([wide[0] * r.outputs.numel() for r in structure.readers])
        share = torch.tensor([100.0 if name == slow else 0.01 for name in names], dtype=torch.float64)
        times = LayerTimes(read, written, share[:, None, None] * (wide.T @ wide))
        path = descend(structure, curves, allowed, None, times)
        return structure.spaces[int(path.states[len(path.states) // 4].argmax())].name

    assert first("0.weight") == "0" and first("4.weight") == "2"


@pytest.mark.parametrize("batch", [1, 8])
def test_compress_for_a_latency_makes_the_table_once(monkeypatch, batch: int) -> None:
    asked = []
    narrowing = importlib.import_module("ep_prune.narrowing")

    def noted(program, readers, share, channels_last):
        asked.append((share, channels_last))
        return layer_times(program, readers, share, channels_last)

    monkeypatch.setattr(narrowing, "layer_times", noted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    x = torch.randn(96, 8)
    ep.compress(model, x[:batch], x.split(32), latency=1e3, progress=False)
    assert asked == [(batch / 12, False)]  # chunks of 12


def test_channels_last_models_are_timed_and_stay_so(monkeypatch) -> None:
    asked = []
    narrowing = importlib.import_module("ep_prune.narrowing")

    def noted(program, readers, share, channels_last):
        asked.append(channels_last)
        return layer_times(program, readers, share, channels_last)

    monkeypatch.setattr(narrowing, "layer_times", noted)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)]
    model = nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)
    x = torch.randn(48, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    narrow = ep.compress(model, x[:2], x.split(16), latency=1e3, keep_macs=0.5, progress=False).model
    assert asked == [True]
    for found in (narrow, ep.reduce(model, x[:2]).model):
        assert all(
            module.weight.is_contiguous(memory_format=torch.channels_last) for module in (found[0], found[2])
        )
