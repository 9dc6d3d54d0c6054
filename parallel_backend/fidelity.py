"""How close plans come to ComfyUI alone, and at which pace: what was measured once, for want of the user's own model.

From docs/results.md, "Fidelity of Async UNet Split" and "Fidelity of ParaStep": the trained proving model (a small
Flux), Euler, CFG 3, steps 20, 30 and 50.
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
    ("lookahead", 2): {20: Measured(66.8, 1.74), 30: Measured(76.7, 1.82), 50: Measured(82.9, 1.89)},
    ("lookahead", 3): {20: Measured(57.7, 2.02), 30: Measured(65.5, 2.50), 50: Measured(75.1, 2.68)},
    ("extrapolated", 2): {20: Measured(42.3, 1.74), 30: Measured(49.7, 1.82), 50: Measured(53.0, 1.89)},
    ("extrapolated", 3): {20: Measured(32.5, 2.31), 30: Measured(47.3, 2.50), 50: Measured(50.8, 2.68)},
    ("asyncdiff", 2): {20: Measured(36.8, 1.74), 30: Measured(37.5, 1.82), 50: Measured(43.1, 1.89)},
    ("asyncdiff", 3): {20: Measured(29.6, 2.31), 30: Measured(31.9, 2.50), 50: Measured(35.1, 2.68)},
    ("faithful", 2): {20: Measured(70.3, 1.60), 30: Measured(75.4, 1.76), 50: Measured(80.8, 1.85)},
    ("faithful", 4): {20: Measured(70.9, 1.62), 30: Measured(71.3, 2.17), 50: Measured(69.3, 2.94)},
    ("faithful", 8): {20: Measured(70.9, 1.62), 30: Measured(71.4, 2.17), 50: Measured(68.8, 3.09)},
    ("balanced", 2): {20: Measured(69.6, 1.67), 30: Measured(75.4, 1.76), 50: Measured(80.8, 1.85)},
    ("balanced", 4): {20: Measured(64.9, 1.88), 30: Measured(64.4, 2.50), 50: Measured(68.2, 3.12)},
    ("balanced", 8): {20: Measured(64.9, 1.88), 30: Measured(62.7, 2.47), 50: Measured(62.4, 3.53)},
    ("fast", 2): {20: Measured(69.6, 1.67), 30: Measured(75.4, 1.76), 50: Measured(80.8, 1.85)},
    ("fast", 4): {20: Measured(59.6, 2.03), 30: Measured(58.0, 2.73), 50: Measured(68.4, 3.12)},
    ("fast", 8): {20: Measured(59.6, 2.03), 30: Measured(56.6, 2.77), 50: Measured(59.2, 3.80)},
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
