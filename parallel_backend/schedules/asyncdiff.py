"""AsyncDiff (arXiv 2406.06911, section 3): when a stream's evaluation is exact and when asynchronous.

In an exact evaluation each component waits for the one before it (a synchronous pipeline). In an asynchronous one every
component computes at once, on what the components before it produced at the previous evaluation of the same stream.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

NO_STATE = -1


@dataclass
class Stream:
    """One conditioning batch of a run: how many evaluations it has had, and whether its states hold still by now."""

    number: int
    evaluations: int = 0
    settled: bool = False


@dataclass(frozen=True)
class Evaluation:
    """How a stream's next evaluation is to be done; with ``measure``, :meth:`Streams.drifted` is to be told."""

    stream: int
    exact: bool
    measure: bool = False


class Streams:
    """Counts the evaluations of each stream of a run and says which of them are exact.

    A stream is whatever key the caller gives: its stale state must never serve another key. The first ``warmup``
    evaluations of every stream are exact, so a stream that appears late, or regrouped, starts from true states. With
    ``warmup`` 0 they are exact until the states of one differ from those of the one before by at most ``bound``.
    """

    def __init__(self, warmup: int, asynchronous: bool, bound: float):
        self._warmup = warmup
        self._asynchronous = asynchronous
        self._bound = bound
        self._streams: dict[Hashable, Stream] = {}

    def next(self, key: Hashable) -> Evaluation:
        """The next evaluation of the stream with this key; streams are numbered as they first appear."""
        if not self._asynchronous:
            return Evaluation(NO_STATE, exact=True)
        stream = self._streams.setdefault(key, Stream(len(self._streams)))
        stream.evaluations += 1
        if self._warmup:
            return Evaluation(stream.number, exact=stream.evaluations <= self._warmup)
        return Evaluation(stream.number, exact=not stream.settled, measure=not stream.settled)

    def drifted(self, evaluation: Evaluation, drift: float) -> None:
        """What was measured in an evaluation: the relative distance of the states from those of the one before."""
        for stream in self._streams.values():
            if stream.number == evaluation.stream:
                stream.settled = drift <= self._bound


def ideal_speedup(steps: int, warmup: int, slowest: float) -> float:
    """Speed against one device: ``warmup`` full evaluations, then the slowest component's share of one each."""
    exact = min(warmup, steps)
    return steps / (exact + (steps - exact) * slowest)
