"""What a campaign of `make faults` has found, as figures: the last line, and each of them by itself."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NOTICED_S, AGAIN_S, CANCEL_S = 2.0, 1.0, 0.1


@dataclass
class Figures:
    """What the campaign found."""

    injected: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    hangs: int = 0
    orphans: int = 0
    wrong: int = 0
    unclear: int = 0
    finished: int = 0
    later: int = 0
    later_not_right: int = 0
    noticed: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    cancelled: list[float] = field(default_factory=list)
    cancelled_loading: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return self.hangs + self.orphans + self.wrong + self.unclear + self.later_not_right

    @property
    def late(self) -> list[str]:
        """What took longer than it should. A busy machine can be the reason."""
        found = []
        if self.noticed and statistics.median(self.noticed) > NOTICED_S:
            found.append(f"a killed rank is to be reported within {NOTICED_S:g} s")
        if self.again and self.cold and statistics.median(self.again) > statistics.median(self.cold) + AGAIN_S:
            found.append(f"a pool is to be back within its cold start and {AGAIN_S:g} s")
        if self.cancelled and percentile(self.cancelled, 95) > CANCEL_S:
            found.append(f"Cancel is to take no longer than an evaluation and {CANCEL_S * 1000:g} ms")
        return found

    def line(self) -> str:
        """Everything in one line."""
        parts = [
            f"{self.injected.total()} injected of {len(self.injected)} kinds",
            f"{self.hangs} hangs, {self.orphans} orphans, {self.wrong} wrong pictures, {self.unclear} unclear errors",
            f"{self.later - self.later_not_right} of {self.later} later prompts right",
        ]
        if self.finished:
            parts.append(f"{self.finished} times a picture was finished on the device that was left")
        if self.noticed:
            parts.append(f"killed rank reported after {statistics.median(self.noticed):.2f} s (median)")
        if self.again and self.cold:
            cold = statistics.median(self.cold)
            parts.append(f"pool back after {statistics.median(self.again):.1f} s (cold start {cold:.1f} s)")
        if self.cancelled:
            parts.append(f"cancel: one evaluation + {percentile(self.cancelled, 95) * 1000:.0f} ms (95th percentile)")
        return "faults: " + ", ".join(parts)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def print_details(figures: Figures, minutes: float) -> None:
    """Every figure by itself."""
    print(f"\n{minutes:.0f} minutes; " + ", ".join(f"{count} {kind}" for kind, count in figures.injected.items()))
    print("prompts that were hit: " + ", ".join(f"{count} {what}" for what, count in figures.answers.items()))
    rows: dict[str, list[Any]] = {
        "killed rank reported, s": figures.noticed,
        "cold start to the first step, s": figures.cold,
        "kill to the first step of the next prompt, s": figures.again,
        "cancel beyond one evaluation, s": figures.cancelled,
        "cancel while loading, s": figures.cancelled_loading,
    }
    for title, values in rows.items():
        if values:
            print(
                f"{title}: median {statistics.median(values):.2f}, 95th percentile {percentile(values, 95):.2f}, "
                f"largest {max(values):.2f} of {len(values)}"
            )
    if figures.open_files:
        print(f"open files of ComfyUI: {figures.open_files[0]} at first, {figures.open_files[-1]} at the end")
