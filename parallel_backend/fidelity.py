"""How close plans come to ComfyUI alone, and at which pace: what was measured once, for want of the user's own model.

From docs/quality: the trained proving models (a small Flux, U-Net and Wan), Euler, steps 20, 30 and 50. Of the three
models, the lowest fidelity and the lowest speed count.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedules.simulate import Link, rounds_taken, run_seconds

SPLIT_WARMUP = {"lookahead": 1, "extrapolated": 3, "asyncdiff": 3}
"""Exact evaluations at the start in what was measured; lookahead's is the automatic one."""


@dataclass(frozen=True)
class Measured:
    """PSNR to ComfyUI alone, in dB; ``pace`` is the speed with free links and equal parts, all that was rejected
    paid for."""

    decibels: float
    pace: float


# (mode or preset, components or lanes) -> steps -> what was measured.
TABLE: dict[tuple[str, int], dict[int, Measured]] = {
    ("lookahead", 2): {20: Measured(62.2, 1.74), 30: Measured(70.3, 1.82), 50: Measured(71.2, 1.89)},
    ("lookahead", 4): {20: Measured(51.2, 1.66), 30: Measured(56.0, 2.37), 50: Measured(62.9, 3.31)},
    ("lookahead", 8): {20: Measured(51.4, 1.87), 30: Measured(47.7, 2.40), 50: Measured(52.7, 3.11)},
    ("extrapolated", 2): {20: Measured(41.6, 1.74), 30: Measured(44.6, 1.82), 50: Measured(49.0, 1.89)},
    ("extrapolated", 4): {20: Measured(28.1, 2.76), 30: Measured(28.3, 3.08), 50: Measured(34.1, 3.39)},
    ("extrapolated", 8): {20: Measured(12.0, 3.90), 30: Measured(10.8, 4.71), 50: Measured(10.4, 5.63)},
    ("asyncdiff", 2): {20: Measured(31.2, 1.74), 30: Measured(33.5, 1.82), 50: Measured(36.4, 1.89)},
    ("asyncdiff", 4): {20: Measured(24.6, 2.76), 30: Measured(26.7, 3.08), 50: Measured(29.1, 3.39)},
    ("asyncdiff", 8): {20: Measured(20.6, 3.90), 30: Measured(22.2, 4.71), 50: Measured(24.6, 5.63)},
    ("faithful", 2): {20: Measured(64.9, 1.55), 30: Measured(65.4, 1.75), 50: Measured(79.1, 1.85)},
    ("faithful", 4): {20: Measured(70.8, 1.57), 30: Measured(61.5, 2.20), 50: Measured(67.8, 2.92)},
    ("faithful", 8): {20: Measured(70.8, 1.57), 30: Measured(61.0, 2.20), 50: Measured(63.8, 3.12)},
    ("balanced", 2): {20: Measured(63.0, 1.65), 30: Measured(65.4, 1.76), 50: Measured(79.1, 1.85)},
    ("balanced", 4): {20: Measured(57.1, 1.82), 30: Measured(59.5, 2.47), 50: Measured(64.1, 3.10)},
    ("balanced", 8): {20: Measured(57.1, 1.82), 30: Measured(58.2, 2.50), 50: Measured(59.0, 3.51)},
    ("fast", 2): {20: Measured(63.0, 1.67), 30: Measured(65.4, 1.76), 50: Measured(79.1, 1.85)},
    ("fast", 4): {20: Measured(49.3, 1.98), 30: Measured(58.4, 2.70), 50: Measured(63.8, 3.12)},
    ("fast", 8): {20: Measured(49.4, 1.98), 30: Measured(52.6, 2.73), 50: Measured(53.4, 3.74)},
}


@dataclass(frozen=True)
class Expected:
    """PSNR to ComfyUI alone, in dB, and by which factor a run takes longer than if nothing is rejected."""

    decibels: float
    longer: float


def expected(kind: str, degree: int, steps: int) -> Expected | None:
    """What may be expected of a split in mode ``kind`` with so many components, or of ParaStep's preset with so many
    lanes; None where nothing like it was measured.

    Between what was measured counts the harder case: the next higher degree, the next lower number of steps.
    """
    degrees = [known for name, known in TABLE if name == kind and known >= degree]
    counts = [known for known in (20, 30, 50) if known <= steps]
    if not degrees or not counts:
        return None
    harder, fewer = min(degrees), max(counts)
    found = TABLE[kind, harder][fewer]
    return Expected(found.decibels, max(1.0, _pace_without_rejection(kind, harder, fewer) / found.pace))


def _pace_without_rejection(kind: str, degree: int, steps: int) -> float:
    if kind in SPLIT_WARMUP:
        mode = "lookahead" if kind == "lookahead" else "asyncdiff"
        return steps / run_seconds(mode, steps, [1 / degree] * degree, {}, Link(), warmup=SPLIT_WARMUP[kind])
    return steps / len(rounds_taken(steps, degree, grows=True))
