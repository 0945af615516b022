"""More inputs to fit on: mirror images, and images moved a little, where the wide network answers them much alike.

A fit wants the wide network's outputs and no labels, so any input will do that is like those to come. Where a
weight reads about as many numbers as there are samples, more of these are worth much. Whether mirror images are
alike is asked of the wide network itself: of photographs they are, of digits and of what is no image they are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ep_prune.calibrate import Program, positions
from ep_prune.divergence import divergence
from ep_prune.readers import Reader

COPIES = 3
"""Of every image, at most, beside itself: the other way round, as it is, and again the other way round."""
ROWS = 4
"""For each number that a weight reads: with fewer, there is more than one copy."""
SHIFT = 16
"""Copies are moved by up to one part in so many of their sides."""
ALIKE = 0.1
"""The most by which answers to copies may differ, as a share of what those to different samples do."""
ASKED = 4
"""Chunks that the wide network is asked about, at most."""
MEMORY = 3 * 2**29
"""Bytes of activations that chunks and copies may hold, about: two networks stand beside one another in a fit."""
Chunk = Sequence[Tensor]


def augmented(program: Program, readers: Sequence[Reader], chunks: Sequence[Chunk], seed: int) -> list[Chunk]:
    """The chunks, all in order, then copies of all of them in the same order: one, or more where any of the
    weights of `readers` has few rows, up to `COPIES`.

    No copies where no input is a floating tensor (N, C, H, W), where memory does not allow them, or where the
    network answers them otherwise.
    """
    samples = sum(len(chunk[0]) if chunk[0].ndim else 1 for chunk in chunks)
    scarce = max((r.columns.shape[1] / positions(r.node, r.op) for r in readers if not r.kept_whole), default=0.0)
    each = 2 * program.bytes_a_sample(samples // len(chunks)) * samples
    copies = min(COPIES, max(1, math.ceil(ROWS * scarce / samples) - 1), MEMORY // max(each, 1) - 1)
    if copies < 1 or not any(_is_image(value) for value in chunks[0]):
        return list(chunks)
    generator = torch.Generator().manual_seed(seed)
    found: list[Chunk] = [_copy(chunk, number % 2 == 0, generator) for number in range(copies) for chunk in chunks]
    each_kind = [found[k * len(chunks) :][:ASKED] for k in range(min(copies, 2))]  # mirrored, and not
    return [*chunks, *found] if _alike(program, chunks[:ASKED], each_kind) else list(chunks)


def _alike(program: Program, chunks: Sequence[Chunk], copies: Sequence[Sequence[Chunk]]) -> bool:
    """Whether the network tells a sample from its copy much less than from the next sample."""
    apart, different = [0.0] * len(copies), 0.0
    for number, chunk in enumerate(chunks):
        answer = program.finish(program.begin(chunk, {}))
        different += divergence(answer, [a.roll(1, 0) if a.ndim else a for a in answer])
        for kind, copied in enumerate(copies):
            apart[kind] += divergence(answer, program.finish(program.begin(copied[number], {})))
    return max(apart) <= ALIKE * different


def _copy(chunk: Chunk, mirrored: bool, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A chunk with its images moved, filled up with their borders, and perhaps the other way round."""

    def moved(image: Tensor) -> Tensor:
        sides = image.shape[2:]
        high, wide = (side // SHIFT for side in sides)
        padded = torch.nn.functional.pad(
            image.flip(3) if mirrored else image, (wide, wide, high, high), "replicate"
        )
        top, left = (int(torch.randint(2 * most + 1, (), generator=generator)) for most in (high, wide))
        return padded[:, :, top : top + sides[0], left : left + sides[1]]

    return tuple(moved(value) if _is_image(value) else value for value in chunk)


def _is_image(value: Tensor) -> bool:
    return value.ndim == 4 and value.is_floating_point()
