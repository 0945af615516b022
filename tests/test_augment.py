"""Copies of calibration images: made where the network answers them alike, and nowhere else."""

import pytest
import torch
from torch import nn

import ep_prune as ep
from ep_prune import augment
from ep_prune.augment import augmented
from ep_prune.calibrate import Program
from ep_prune.structure import Structure
from ep_prune.trace import trace


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(count: int = 8, seed: int = 0) -> torch.Tensor:
    """Images (count, 3, 16, 16), each of one colour: mirrored or moved they are what they were."""
    return noise(count, 3, 1, 1, seed=seed).expand(-1, -1, 16, 16).contiguous()


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def copies(model: nn.Module, chunks: list[list[torch.Tensor]]) -> list:
    program = Program(trace(model.eval(), chunks[0][0]))
    with torch.no_grad():
        return augmented(program, Structure(program, {}, dict(model.named_parameters())).readers, chunks, 0)


def test_images_that_are_answered_alike_are_copied_once_in_order():
    chunks = [[smooth(seed=k)] for k in range(9)]
    found = copies(convolution(), chunks)
    assert len(found) == 18
    for (image,), (copy,) in zip(chunks, found[9:], strict=True):
        assert torch.allclose(image, copy)


def test_where_places_matter_there_are_no_copies():
    chunks = [[noise(8, 3, 16, 16, seed=k)] for k in range(3)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 5))
    assert copies(model, chunks) == chunks


def test_a_weight_with_few_rows_asks_for_more_copies():
    chunks = [[smooth(seed=k)] for k in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 5))
    assert len(copies(model, chunks)) == (1 + augment.COPIES) * 3


def test_without_memory_there_are_no_copies(monkeypatch):
    monkeypatch.setattr(augment, "MEMORY", 0)
    chunks = [[smooth()]]
    assert copies(convolution(), chunks) == chunks


@pytest.mark.parametrize("mirrored", [True, False])
def test_a_copy_is_moved_by_a_sixteenth_at_most_and_filled_up(mirrored):
    image = torch.arange(32.0).expand(1, 1, 32, 32)
    (copy,) = augment._copy([image], mirrored, torch.Generator().manual_seed(1))
    expected = image.flip(3) if mirrored else image
    assert copy.shape == image.shape
    assert 0 < float((copy - expected).abs().max()) <= 2


def test_what_is_no_image_has_no_copies():
    chunks = [[noise(8, 6)]]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    assert copies(model, chunks) == chunks


def test_compress_fits_on_copies(monkeypatch):
    model, images = convolution().eval(), smooth(64)
    asked = []
    monkeypatch.setattr(
        "ep_prune.narrowing.augmented", lambda *given: asked.append(augmented(*given)) or asked[-1]
    )
    ep.compress(model, images[:2], calibration=[images], keep_macs=0.5)
    assert len(asked[-1]) == 14  # seven chunks of eight are fitted on
