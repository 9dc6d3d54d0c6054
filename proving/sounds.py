"""Simple sounds and their captions: the data of the audio proving model.

A sound is one to four equal events in three seconds. Its caption names three attributes, for example "four high
chirps". A chirp rises, a sigh falls. A fifth of the captions is held out: no training script ever sees them.

A latent is not learned here: its 64 channels are the levels of 64 sinusoids a semitone apart, its frames are as far
apart as Stable Audio's. Drawing a sound writes the levels, and waveforms() adds the sinusoids up.
"""

from __future__ import annotations

import itertools
import math
import wave
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("tone", "chirp", "sigh", "drum")
PITCHES = {"deep": 9, "low": 24, "high": 39, "shrill": 54}  # the band in the middle of an event
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
RATE = 11025  # samples a second
HOP = 512  # samples a frame: with this rate as long as Stable Audio's frames, 2048 / 44100 s
FRAMES = 64
BANDS = 64
LOWEST, HIGHEST = 100.0, 3500.0  # Hz
PITCH_JITTER = 2  # bands
GLIDE = 12  # bands from the start of a chirp or a sigh to its end
DECIBELS = 40.0  # of one unit of a level; 1 is full, -1 is silence
MEAN, SPREAD = -0.96, 0.23  # about those of the levels: latents have mean 0 and deviation 1
LOUDNESS = 0.25  # amplitude of a sinusoid at full level


class Attributes(NamedTuple):
    """What a caption says."""

    kind: str
    pitch: str
    count: str

    @property
    def caption(self) -> str:
        return said(*self)


def said(kind: str = "", pitch: str = "", count: str = "") -> str:
    """Words for a sound of which only so much is told."""
    return " ".join(filter(None, (count, pitch, (kind or "sound") + ("" if count == "one" else "s"))))


VOCABULARY: tuple[tuple[str, ...], ...] = (KINDS, tuple(PITCHES), tuple(COUNTS))
ALL = tuple(Attributes(*values) for values in itertools.product(*VOCABULARY))
HELD_OUT = tuple(
    Attributes(KINDS[i], tuple(PITCHES)[(i + j) % 4], tuple(COUNTS)[(2 * i + 3 * j) % 4])
    for i in range(4)
    for j in range(3)
)
"""Every kind and every pitch three times, every count two to four times."""
TRAINED = tuple(a for a in ALL if a not in HELD_OUT)


def _event(kind: str, pitch: float, rng: torch.Generator) -> Tensor:
    """Levels [64, frames] of one event; pitch is a band."""
    chance = torch.rand(3, generator=rng).tolist()
    frames = 5 if kind == "drum" else 9 + int(3 * chance[0])
    time = torch.arange(frames, dtype=torch.float32)
    bands = torch.arange(BANDS, dtype=torch.float32)[:, None]
    loudest = 0.85 + 0.15 * chance[1]
    if kind == "drum":
        rough = 0.1 * torch.rand(BANDS, 1, generator=rng)
        return loudest - 0.15 - rough - ((bands - pitch) / 18).square() - (0.3 + 0.15 * chance[2]) * time
    glide = {"tone": 0.0, "chirp": GLIDE, "sigh": -GLIDE}[kind]
    track = pitch + glide * (time / (frames - 1) - 0.5)
    return loudest - 0.375 * (bands - track).square() - (0.01 + 0.02 * chance[2]) * time


def draw(attributes: Attributes, rng: torch.Generator) -> Tensor:
    """The latent [64, 64] (bands, frames) of a jittered sound that the caption describes."""
    count = COUNTS[attributes.count]
    gap = {1: 0, 2: 28, 3: 20, 4: 15}[count]
    latest = {1: 24, 2: 12, 3: 8, 4: 6}[count]
    chance = torch.rand(2, generator=rng).tolist()
    pitch = PITCHES[attributes.pitch] + round(PITCH_JITTER * (2 * chance[0] - 1))
    first = 1 + int(latest * chance[1])
    out = torch.full((BANDS, FRAMES), -1.0)
    for i in range(count):
        event = _event(attributes.kind, pitch, rng)
        late = int(torch.randint(2, (), generator=rng))
        start = first + i * gap + late
        end = min(start + event.shape[1], FRAMES)
        out[:, start:end] = event[:, : end - start].clamp(-1, 1)
    return (out - MEAN) / SPREAD


def latents(attributes: Sequence[Attributes], seed: int) -> Tensor:
    """Latents [N, 64, 64], one for each caption; the same seed draws the same sounds."""
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([draw(a, rng) for a in attributes])


@cache
def _oscillators() -> Tensor:
    """[64, samples]: the sinusoids, with phases that keep their peaks apart."""
    bands = torch.arange(BANDS, dtype=torch.float64)[:, None]
    frequency = LOWEST * (HIGHEST / LOWEST) ** (bands / (BANDS - 1))
    time = torch.arange(FRAMES * HOP, dtype=torch.float64) / RATE
    return torch.sin(2 * math.pi * (frequency * time + bands * bands * 0.381966)).float()


def waveforms(latent: Tensor) -> Tensor:
    """Sound [N, 32768] in -1..1 at 11025 Hz of latents [N, 64, 64]: the decoder of this model."""
    level = (latent.float() * SPREAD + MEAN).clamp(-1.5, 1.1)
    amplitude = 10 ** ((level - 1) * DECIBELS / 20)
    sounds = torch.empty(len(latent), FRAMES * HOP)
    for sound, one in zip(sounds, amplitude, strict=True):
        smooth = F.interpolate(one[None], scale_factor=HOP, mode="linear")[0]
        sound.copy_((smooth * _oscillators()).sum(0))
    return sounds.mul_(LOUDNESS).clamp_(-1, 1)


def write_wav(waveform: Tensor, path: Path) -> None:
    """Writes one sound [samples] in -1..1 as 16 bit mono."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((waveform * 32767).round().to(torch.int16).numpy().tobytes())
