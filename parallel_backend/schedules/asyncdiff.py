"""AsyncDiff (arXiv 2406.06911, section 3) with stride 1: when a stream's evaluation is exact and when asynchronous.

In an exact evaluation each component waits for the one before it (a synchronous pipeline). In an asynchronous one every
component computes at once, on what the components before it produced at the previous evaluation of the same stream.
"""

from __future__ import annotations

from collections.abc import Hashable


class Streams:
    """Counts the evaluations of each stream of a run and says which of them are exact.

    A stream is whatever key the caller gives: its stale state must never serve another key. The first ``warmup``
    evaluations of every stream are exact, so a stream that appears late, or regrouped, starts from true states.
    """

    def __init__(self, warmup: int, asynchronous: bool):
        self._warmup = warmup
        self._asynchronous = asynchronous
        self._seen: dict[Hashable, int] = {}

    def next(self, stream: Hashable) -> tuple[int, bool]:
        """``(number of the stream, exact?)`` for its next evaluation; streams are numbered as they first appear."""
        done = self._seen.get(stream, 0)
        self._seen[stream] = done + 1
        number = list(self._seen).index(stream)
        return number, not self._asynchronous or done < self._warmup


def ideal_speedup(steps: int, warmup: int, slowest: float) -> float:
    """Speed against one device: ``warmup`` full evaluations, then the slowest component's share of one each."""
    exact = min(warmup, steps)
    return steps / (exact + (steps - exact) * slowest)
