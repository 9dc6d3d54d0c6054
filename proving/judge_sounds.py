"""Says what a sound is.

Nothing here is learned: the judge takes the waveform's short-time spectra on a scale of semitones, cuts it into events
where it is loud, and measures how broad each event is, where it lies and how far it glides. What fits no word is
"unclear", which is never right.

Usage: python proving/judge_sounds.py    tests the judge on drawn and on spoiled sounds
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from comfy_setup import parser
from sounds import ALL, BANDS, COUNTS, FRAMES, HIGHEST, LOWEST, PITCHES, RATE, Attributes, draw, latents, waveforms

UNCLEAR = "unclear"
WINDOW, STEP = 1024, 128  # samples of a short-time spectrum, and from one to the next
QUIET = 10**-2.0  # power against the loudest moment at which an event ends: -20 dB
BLIP_S, PAUSE_S = 0.05, 0.05  # shorter events and pauses do not count
FAINT = 10**-1.8  # energy against the strongest event's below which an event is no event
LOUD = 1.0  # power of the loudest moment of a sound that is heard at all; the quietest drawn ones have hundreds
LONGEST_S = 0.9  # of an event
NARROW, BROAD = 1.6, 2.6  # deviation of the spectrum, in semitones: at most of a tone, at least of a drum
STEADY, GLIDING = 2.0, 5.0  # semitones from start to end: at most of a tone, at least of a chirp or sigh
NEAR = 7.0  # semitones from the pitch that a word names


def spectra(waveform: Tensor) -> Tensor:
    """Power [64, moments] of a sound [samples], in bands a semitone wide."""
    window = torch.hann_window(WINDOW)
    power = torch.stft(waveform, WINDOW, STEP, window=window, return_complex=True).abs().square()
    hertz = torch.arange(1, len(power)) * RATE / WINDOW
    band = torch.log(hertz / LOWEST) / torch.log(torch.tensor(HIGHEST / LOWEST)) * (BANDS - 1)
    inside = (band > -1) & (band < BANDS)
    return torch.stack([power[1:][inside], band[inside, None].expand(-1, power.shape[1])])


def _events(loud: list[bool]) -> list[tuple[int, int]]:
    """(start, end) of the stretches that are loud, short pauses closed and short stretches left out."""
    edges = [i for i, (a, b) in enumerate(zip([False, *loud], [*loud, False], strict=True)) if a != b]
    stretches: list[tuple[int, int]] = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if stretches and start - stretches[-1][1] < PAUSE_S * RATE / STEP:
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((start, end))
    return [(a, b) for a, b in stretches if b - a >= BLIP_S * RATE / STEP]


def _event(power: Tensor, band: Tensor) -> tuple[str, float]:
    """(kind, middle of the pitch in bands) of one event: power and band of each bin [bins, moments]."""
    loudness = power.sum(0)
    if len(loudness) > LONGEST_S * RATE / STEP:
        return UNCLEAR, -1.0
    track = (power * band).sum(0) / loudness
    width = float((((power * (band - track).square()).sum(0) / loudness).sqrt() * loudness).sum() / loudness.sum())
    middle = float((track * loudness).sum() / loudness.sum())
    if width >= BROAD:
        return "drum", middle
    moments = torch.linspace(-0.5, 0.5, len(track))
    weight = loudness.sqrt()
    centred = moments - (moments * weight).sum() / weight.sum()
    glide = float((centred * track * weight).sum() / (centred.square() * weight).sum())
    if width > NARROW or STEADY < abs(glide) < GLIDING:
        return UNCLEAR, middle
    return ("tone" if abs(glide) <= STEADY else "chirp" if glide > 0 else "sigh"), middle


def judge(sounds: Tensor) -> list[Attributes]:
    """What each of the sounds [N, samples] at 11025 Hz is."""
    return [_judge(sound) for sound in sounds.float()]


def _judge(sound: Tensor) -> Attributes:
    power, band = spectra(sound)
    loudness = power.sum(0)
    if not torch.isfinite(loudness).all() or float(loudness.max()) < LOUD:
        return Attributes(UNCLEAR, UNCLEAR, UNCLEAR)
    stretches = _events((loudness > QUIET * loudness.max()).tolist())
    energy = [float(loudness[a:b].sum()) for a, b in stretches]
    stretches = [stretch for stretch, e in zip(stretches, energy, strict=True) if e > FAINT * max(energy)]
    found = [_event(power[:, a:b], band[:, a:b]) for a, b in stretches]
    kind = _agreed([kind for kind, _ in found])
    pitch = _agreed([_pitch(middle) for _, middle in found])
    count = {number: word for word, number in COUNTS.items()}.get(len(found), UNCLEAR)
    return Attributes(kind, pitch, count)


def _agreed(words: Sequence[str]) -> str:
    """The word that all of them are."""
    return words[0] if len(set(words)) == 1 else UNCLEAR


def _pitch(middle: float) -> str:
    """The word for a pitch in bands."""
    return next((word for word, band in PITCHES.items() if abs(middle - band) <= NEAR), UNCLEAR)


def spoiled(rng: torch.Generator) -> tuple[Tensor, str]:
    """A sound [samples] that no caption describes, and what was done to it."""
    which = torch.randperm(len(ALL), generator=rng)
    first = ALL[int(which[0])]
    second = next(ALL[int(i)] for i in which if ALL[int(i)].kind != first.kind and ALL[int(i)].pitch != first.pitch)
    a, b = draw(first, rng), draw(second, rng)
    ways = ("half of each of two sounds", "one sound, then another", "noise over it", "eight events", "nothing")
    way = ways[int(torch.randint(len(ways), (), generator=rng))]
    if way == ways[0]:
        return waveforms(torch.maximum(a, b)[None])[0], way
    if way == ways[1]:
        half = FRAMES // 2
        one = first._replace(count="four"), second._replace(count="four")
        return waveforms(torch.cat([draw(one[0], rng)[:, :half], draw(one[1], rng)[:, half:]], 1)[None])[0], way
    if way == ways[2]:
        return waveforms(a[None])[0] + 0.1 * torch.randn(FRAMES * 512, generator=rng), way
    if way == ways[3]:
        four = draw(first._replace(count="four"), rng)[:, ::2]
        return waveforms(torch.cat([four, four], 1)[None])[0], way
    return waveforms(torch.full((1, BANDS, FRAMES), float(a.min())))[0], way


def check(seed: int, each: int) -> None:
    """Judges drawn sounds, which should all be right, and spoiled ones, which should all be unclear somewhere."""
    drawn = list(ALL) * each
    seen = judge(waveforms(latents(drawn, seed)))
    for a, b in zip(drawn, seen, strict=True):
        if a != b:
            print(f"  drew {a.caption!r}, saw {b.caption!r}")
    right = sum(a == b for a, b in zip(drawn, seen, strict=True))
    print(f"drawn sounds: {right} of {len(drawn)} right = {right / len(drawn):.4f}")
    rng = torch.Generator().manual_seed(seed)
    caught: dict[str, list[bool]] = {}
    for _ in range(200):
        sound, way = spoiled(rng)
        caught.setdefault(way, []).append(UNCLEAR in judge(sound[None])[0])
    for way, unclear in sorted(caught.items()):
        print(f"spoiled, {way}: {sum(unclear)} of {len(unclear)} unclear")


def picture(sound: Tensor) -> Tensor:
    """The spectra of a sound [samples] as a picture [height, width, 1]: low pitches at the bottom, 60 dB from black."""
    power, band = spectra(sound)
    nearest = (band[:, 0] - torch.arange(BANDS - 1, -1, -1.0)[:, None]).abs().argmin(1)
    level = 1 + 10 * (power[nearest, ::2] / 1e4).clamp_min(1e-9).log10() / 60
    return level.clamp(0, 1).repeat_interleave(2, 0)[..., None]


def main() -> None:
    """Tests the judge."""
    command = parser(__doc__)
    command.add_argument("--seed", type=int, default=3, help="of the drawings")
    command.add_argument("--drawn", type=int, default=12, help="sounds of each caption to try the judge on")
    args = command.parse_args()
    torch.set_num_threads(args.threads)
    check(args.seed, args.drawn)


if __name__ == "__main__":
    main()
