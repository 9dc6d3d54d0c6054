"""Drawn clips of one moving shape and their captions: the data of the video model.

A clip is one shape that moves steadily over a plain light background. Its caption names three attributes, for example
"a red circle moving right". Every eighth caption is held out: no training script ever sees it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shapes import BACKGROUNDS, COLOUR_JITTER, COLOURS, RADIUS_JITTER, SHAPES, paint

DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}  # right and down
FRAMES = 6
SIDE = 64  # pixels of a frame
STEP = 4.0  # pixels from frame to frame
RADIUS = 12.0  # pixels
JITTER = 5.0  # pixels, in x and in y, of the whole path


class Attributes(NamedTuple):
    """What a caption says."""

    shape: str
    colour: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


VOCABULARY: tuple[tuple[str, ...], ...] = (SHAPES, tuple(COLOURS), tuple(DIRECTIONS))
ALL = tuple(Attributes(*values) for values in itertools.product(*VOCABULARY))


def _split() -> tuple[tuple[Attributes, ...], tuple[Attributes, ...]]:
    """(trained, held out): 84 and 12 of the 96 combinations, every word being held out equally often."""
    held = []
    for (i, shape), (j, colour) in itertools.product(enumerate(SHAPES), enumerate(COLOURS)):
        if (i + j) % 2 == 0:
            held.append(Attributes(shape, colour, tuple(DIRECTIONS)[(i + j // 2) % 4]))
    return tuple(a for a in ALL if a not in held), tuple(held)


TRAINED, HELD_OUT = _split()


class Look(NamedTuple):
    """What stays the same in all frames of a clip."""

    shape: str
    colour: Tensor
    radius: float
    level: int
    shift: tuple[float, float]

    def frame(self, right: float, down: float) -> Tensor:
        """The picture [3, 64, 64] in 0..1 of the shape so many pixels off the middle of its path."""
        centre = (SIDE / 2 + self.shift[0] + right, SIDE / 2 + self.shift[1] + down)
        back = torch.full((3,), BACKGROUNDS[self.level])
        return paint(self.shape, self.colour, self.radius, centre, back, SIDE)


def look(shape: str, colour: str, rng: torch.Generator) -> Look:
    """A jittered shape of that colour on a random grey."""
    noise = torch.rand(7, generator=rng)
    right, down = ((noise[:2] * 2 - 1) * JITTER).tolist()
    radius = RADIUS * (1 + RADIUS_JITTER * (2 * float(noise[2]) - 1))
    paint = (torch.tensor(COLOURS[colour]) + COLOUR_JITTER * (2 * noise[3:6] - 1)).clamp(0, 1)
    return Look(shape, paint, radius, int(noise[6] * len(BACKGROUNDS)), (right, down))


def path(direction: str) -> list[tuple[float, float]]:
    """Where the shape is in each frame: pixels right and down of the middle of the path."""
    right, down = DIRECTIONS[direction]
    return [(right * way, down * way) for way in (STEP * (i - (FRAMES - 1) / 2) for i in range(FRAMES))]


def clips(attributes: Sequence[Attributes], seed: int) -> Tensor:
    """Clips [N, 6, 64, 64, 3] in 0..1, one for each caption; the same seed draws the same clips."""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for a in attributes:
        seen = look(a.shape, a.colour, rng)
        out.append(torch.stack([seen.frame(*place) for place in path(a.direction)]))
    return torch.stack(out).movedim(2, -1)
