"""How close plans come to ComfyUI alone, and at which pace: what was measured once, for want of the user's own model.

From docs/quality: the trained proving models, steps 8, 20 and 50. For pictures and video the lowest fidelity and the
lowest speed of six runs count (a small Flux, U-Net and Wan, with Euler and, but for 8 steps, with DPM++ 2M); for sound
there is one (a small Stable Audio with Euler). All of these with CFG 3 to 4; what was measured with CFG 1, too, is in a
table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedules.simulate import Link, rounds_taken, run_seconds

SPLIT_WARMUP = {"lookahead": 1, "extrapolated": 3, "asyncdiff": 3}
"""Exact evaluations at the start in what was measured; lookahead's is the automatic one, and takes as long as two."""


@dataclass(frozen=True)
class Measured:
    """PSNR to ComfyUI alone, in dB; ``pace`` is the speed with free links and equal parts, all that was rejected
    paid for."""

    decibels: float
    pace: float


COUNTS = (8, 20, 50)
"""Steps of what was measured."""

# (mode or preset, components or lanes) -> steps -> what was measured.
Table = dict[tuple[str, int], dict[int, Measured]]
TABLE: Table = {
    ("lookahead", 2): {8: Measured(49.2, 1.03), 20: Measured(52.1, 1.67), 50: Measured(57.3, 1.89)},
    ("lookahead", 4): {8: Measured(49.6, 1.04), 20: Measured(49.4, 1.53), 50: Measured(53.6, 3.21)},
    ("lookahead", 8): {8: Measured(49.6, 1.05), 20: Measured(48.6, 1.68), 50: Measured(51.6, 2.91)},
    ("extrapolated", 2): {8: Measured(32.3, 1.45), 20: Measured(39.1, 1.74), 50: Measured(47.8, 1.89)},
    ("extrapolated", 4): {8: Measured(24.0, 1.88), 20: Measured(20.3, 2.76), 50: Measured(21.3, 3.39)},
    ("extrapolated", 8): {8: Measured(14.9, 2.21), 20: Measured(11.5, 3.90), 50: Measured(10.3, 5.63)},
    ("asyncdiff", 2): {8: Measured(27.4, 1.45), 20: Measured(30.0, 1.74), 50: Measured(35.7, 1.89)},
    ("asyncdiff", 4): {8: Measured(22.2, 1.88), 20: Measured(24.0, 2.76), 50: Measured(28.6, 3.39)},
    ("asyncdiff", 8): {8: Measured(19.9, 2.21), 20: Measured(20.1, 3.90), 50: Measured(24.3, 5.63)},
    ("faithful", 2): {8: Measured(120.0, 1.00), 20: Measured(63.3, 1.32), 50: Measured(73.5, 1.80)},
    ("faithful", 4): {8: Measured(120.0, 1.00), 20: Measured(66.2, 1.37), 50: Measured(62.4, 2.72)},
    ("faithful", 8): {8: Measured(120.0, 1.00), 20: Measured(66.2, 1.37), 50: Measured(63.5, 2.86)},
    ("balanced", 2): {8: Measured(61.5, 1.00), 20: Measured(59.5, 1.55), 50: Measured(73.5, 1.85)},
    ("balanced", 4): {8: Measured(61.5, 1.00), 20: Measured(58.7, 1.60), 50: Measured(60.7, 2.94)},
    ("balanced", 8): {8: Measured(61.5, 1.00), 20: Measured(58.7, 1.60), 50: Measured(57.6, 3.31)},
    ("fast", 2): {8: Measured(49.3, 1.14), 20: Measured(57.0, 1.63), 50: Measured(73.5, 1.85)},
    ("fast", 4): {8: Measured(49.4, 1.11), 20: Measured(47.8, 1.76), 50: Measured(57.8, 3.12)},
    ("fast", 8): {8: Measured(49.4, 1.11), 20: Measured(47.8, 1.76), 50: Measured(51.9, 3.51)},
}
UNGUIDED: Table = {
    ("lookahead", 2): {8: Measured(52.1, 1.38), 20: Measured(58.6, 1.74), 50: Measured(57.9, 1.89)},
    ("lookahead", 4): {8: Measured(41.8, 1.29), 20: Measured(50.9, 2.15), 50: Measured(52.9, 3.39)},
    ("lookahead", 8): {8: Measured(40.7, 1.36), 20: Measured(42.5, 2.26), 50: Measured(49.9, 4.08)},
    ("asyncdiff", 2): {8: Measured(31.2, 1.45), 20: Measured(33.7, 1.74), 50: Measured(38.7, 1.89)},
    ("asyncdiff", 4): {8: Measured(26.0, 1.88), 20: Measured(27.0, 2.76), 50: Measured(31.5, 3.39)},
    ("asyncdiff", 8): {8: Measured(23.7, 2.21), 20: Measured(23.6, 3.90), 50: Measured(27.1, 5.63)},
    ("faithful", 2): {8: Measured(58.5, 1.05), 20: Measured(62.9, 1.54), 50: Measured(76.9, 1.85)},
    ("faithful", 4): {8: Measured(57.4, 1.05), 20: Measured(56.4, 1.82), 50: Measured(57.0, 2.94)},
    ("faithful", 8): {8: Measured(57.4, 1.05), 20: Measured(55.6, 1.82), 50: Measured(58.1, 3.39)},
    ("balanced", 2): {8: Measured(58.5, 1.24), 20: Measured(56.9, 1.67), 50: Measured(76.9, 1.85)},
    ("balanced", 4): {8: Measured(57.4, 1.23), 20: Measured(52.5, 2.00), 50: Measured(57.0, 3.12)},
    ("balanced", 8): {8: Measured(57.4, 1.23), 20: Measured(51.4, 2.00), 50: Measured(54.5, 3.74)},
    ("fast", 2): {8: Measured(58.5, 1.33), 20: Measured(56.9, 1.67), 50: Measured(76.9, 1.85)},
    ("fast", 4): {8: Measured(46.5, 1.33), 20: Measured(45.4, 2.22), 50: Measured(57.0, 3.12)},
    ("fast", 8): {8: Measured(46.5, 1.33), 20: Measured(45.4, 2.22), 50: Measured(48.2, 4.08)},
}
SOUND: Table = {
    ("lookahead", 2): {8: Measured(53.0, 1.15), 20: Measured(49.4, 1.38), 50: Measured(61.0, 1.87)},
    ("lookahead", 4): {8: Measured(50.4, 1.23), 20: Measured(46.7, 1.54), 50: Measured(55.2, 2.35)},
    ("extrapolated", 2): {8: Measured(23.2, 1.45), 20: Measured(34.0, 1.74), 50: Measured(49.4, 1.89)},
    ("extrapolated", 4): {8: Measured(20.0, 1.88), 20: Measured(25.6, 2.76), 50: Measured(37.4, 3.39)},
    ("asyncdiff", 2): {8: Measured(22.8, 1.45), 20: Measured(26.6, 1.74), 50: Measured(33.2, 1.89)},
    ("asyncdiff", 4): {8: Measured(19.8, 1.88), 20: Measured(21.7, 2.76), 50: Measured(25.1, 3.39)},
    ("faithful", 2): {8: Measured(64.8, 1.12), 20: Measured(70.8, 1.21), 50: Measured(71.9, 1.78)},
    ("faithful", 4): {8: Measured(64.8, 1.12), 20: Measured(62.0, 1.28), 50: Measured(67.4, 2.21)},
    ("faithful", 8): {8: Measured(64.8, 1.12), 20: Measured(62.0, 1.28), 50: Measured(65.4, 2.28)},
    ("balanced", 2): {8: Measured(53.7, 1.14), 20: Measured(58.8, 1.28), 50: Measured(70.3, 1.82)},
    ("balanced", 4): {8: Measured(53.7, 1.14), 20: Measured(53.0, 1.35), 50: Measured(62.7, 2.44)},
    ("balanced", 8): {8: Measured(53.7, 1.14), 20: Measured(53.0, 1.35), 50: Measured(59.7, 2.50)},
    ("fast", 2): {8: Measured(53.7, 1.14), 20: Measured(52.0, 1.41), 50: Measured(69.8, 1.85)},
    ("fast", 4): {8: Measured(53.7, 1.14), 20: Measured(45.6, 1.50), 50: Measured(55.3, 2.67)},
    ("fast", 8): {8: Measured(53.7, 1.14), 20: Measured(45.6, 1.50), 50: Measured(52.8, 2.75)},
}


@dataclass(frozen=True)
class Expected:
    """PSNR to ComfyUI alone, in dB, and by which factor a run takes longer than if nothing is rejected."""

    decibels: float
    longer: float


def expected(kind: str, degree: int, steps: int, guided: bool = True, sound: bool = False) -> Expected | None:
    """What may be expected of a split in mode ``kind`` with so many components, or of ParaStep's preset with so many
    lanes; None where nothing like it was measured. ``guided``: with CFG above 1.

    Between what was measured counts the harder case: the next higher degree, more CFG, of the next lower and the next
    higher number of steps the lower fidelity, and the pace of the lower number.
    """
    table = SOUND if sound else TABLE if guided else TABLE | UNGUIDED
    degrees = [known for name, known in table if name == kind and known >= degree]
    if not degrees or steps < min(COUNTS):
        return None
    harder, fewer = min(degrees), max(known for known in COUNTS if known <= steps)
    more = min((known for known in COUNTS if known >= steps), default=fewer)
    found = table[kind, harder]
    decibels = min(found[fewer].decibels, found[more].decibels)
    return Expected(decibels, max(1.0, _pace_without_rejection(kind, harder, fewer) / found[fewer].pace))


def _pace_without_rejection(kind: str, degree: int, steps: int) -> float:
    if kind in SPLIT_WARMUP:
        mode = "lookahead" if kind == "lookahead" else "asyncdiff"
        return steps / run_seconds(mode, steps, [1 / degree] * degree, {}, Link(), warmup=SPLIT_WARMUP[kind])
    return steps / len(rounds_taken(steps, degree, grows=True))
