"""Drawn shapes and their captions: the data of the proving model.

A picture is one shape on a plain light background. Its caption names four attributes, for example
"a large red circle on the left". Every tenth caption is held out: no training script ever sees it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.13, 0.27, 0.86),
    "yellow": (0.95, 0.80, 0.10),
    "purple": (0.56, 0.17, 0.68),
    "black": (0.07, 0.07, 0.08),
}
SIZES = {"large": 27.0, "small": 12.5}  # radius in pixels
PLACES = {
    "on the left": (-32, 0),
    "on the right": (32, 0),
    "at the top": (0, -32),
    "at the bottom": (0, 32),
    "in the middle": (0, 0),
}  # centre of the shape against the centre of the picture: right and down, in pixels
BACKGROUNDS = tuple(0.84 + 0.02 * i for i in range(8))  # grey levels
PICTURE = 128  # pixels a side
JITTER = 4.0  # pixels, in x and in y
RADIUS_JITTER = 0.08
COLOUR_JITTER = 0.04


class Attributes(NamedTuple):
    """What a caption says."""

    shape: str
    colour: str
    size: str
    place: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} {self.place}"

    @property
    def labels(self) -> tuple[int, int, int, int]:
        """Class numbers in the order of VOCABULARY."""
        return tuple(names.index(value) for names, value in zip(VOCABULARY, self, strict=True))


VOCABULARY: tuple[tuple[str, ...], ...] = (SHAPES, tuple(COLOURS), tuple(SIZES), tuple(PLACES))
ALL = tuple(Attributes(*values) for values in itertools.product(*VOCABULARY))


def _split() -> tuple[tuple[Attributes, ...], tuple[Attributes, ...]]:
    """(trained, held out): 216 and 24 of the 240 combinations, every word being held out about equally often."""
    held = []
    for (i, shape), (j, colour) in itertools.product(enumerate(SHAPES), enumerate(COLOURS)):
        held.append(Attributes(shape, colour, tuple(SIZES)[(i + j) % 2], tuple(PLACES)[(i + j) % 5]))
    return tuple(a for a in ALL if a not in held), tuple(held)


TRAINED, HELD_OUT = _split()


def distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels (negative inside) of points x, y against the centre; y points down."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "triangle":
        outer = 1.25 * radius
        y = y - 0.2 * radius
        return torch.maximum(y, x.abs() * 0.75**0.5 - y / 2) - outer / 2
    if shape == "cross":
        arm = 0.36 * radius
        across = torch.maximum(x.abs() - radius, y.abs() - arm)
        return torch.minimum(across, torch.maximum(x.abs() - arm, y.abs() - radius))
    raise ValueError(f"unknown shape {shape!r}")


def paint(shape: str, colour: Tensor, radius: float, centre: Sequence[float], back: Tensor, side: int) -> Tensor:
    """One anti-aliased picture [3, side, side] in 0..1; centre is (x, y) in pixels, colour and back are [3]."""
    axis = torch.arange(side, dtype=torch.float32) + 0.5
    outside = distance(shape, axis[None] - centre[0], axis[:, None] - centre[1], torch.tensor(radius))
    inside = (0.5 - outside).clamp(0, 1)
    return (back[:, None, None] + (colour - back)[:, None, None] * inside).clamp(0, 1)


def draw(
    attributes: Attributes,
    rng: torch.Generator,
    side: int = PICTURE,
    centre: Sequence[float] | None = None,
    level: float | None = None,
) -> Tensor:
    """A jittered picture [3, side, side] in 0..1 of what the caption says.

    centre (pixels) replaces the place that the caption names, level replaces the random grey of the background.
    """
    noise = torch.rand(8, generator=rng)
    move = (noise[:2] * 2 - 1) * JITTER
    if centre is None:
        centre = [side / 2 + offset for offset in PLACES[attributes.place]]
    centre = [float(c + m) for c, m in zip(centre, move, strict=True)]
    radius = SIZES[attributes.size] * (1 + RADIUS_JITTER * (2 * float(noise[2]) - 1))
    colour = torch.tensor(COLOURS[attributes.colour]) + COLOUR_JITTER * (2 * noise[3:6] - 1)
    if level is None:
        level = BACKGROUNDS[int(noise[6] * len(BACKGROUNDS))]
    return paint(attributes.shape, colour.clamp(0, 1), radius, centre, torch.full((3,), level), side)
