"""AsyncDiff (arXiv 2406.06911, section 3): when a stream's evaluation is exact and when asynchronous.

In an exact evaluation each component waits for the one before it (a synchronous pipeline). In an asynchronous one every
component computes at once, on what the components before it produced at the previous evaluation of the same stream.

With stride 2 one parallel batch serves two steps (section 3.3): a device more computes the last component for the first
of the two, all others work for the second, whose result is there when its step comes.
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
    batches: int = 0


@dataclass(frozen=True)
class Evaluation:
    """How a stream's next evaluation is to be done; with ``measure``, :meth:`Streams.drifted` is to be told.

    ``rest``: nothing is computed, the parallel batch of the evaluation before has the result.
    """

    stream: int
    exact: bool
    measure: bool = False
    rest: bool = False


class Streams:
    """Counts the evaluations of each stream of a run and says which of them are exact.

    A stream is whatever key the caller gives: its stale state must never serve another key. The first ``warmup``
    evaluations of every stream are exact, so a stream that appears late, or regrouped, starts from true states. With
    ``warmup`` 0 they are exact until the states of one differ from those of the one before by at most ``bound``.
    """

    def __init__(self, warmup: int, asynchronous: bool, bound: float, stride: int = 1):
        self._warmup = warmup
        self._stride = stride
        self._asynchronous = asynchronous
        self._bound = bound
        self._streams: dict[Hashable, Stream] = {}

    def next(self, key: Hashable) -> Evaluation:
        """The next evaluation of the stream with this key; streams are numbered as they first appear."""
        if not self._asynchronous:
            return Evaluation(NO_STATE, exact=True)
        stream = self._streams.setdefault(key, Stream(len(self._streams)))
        stream.evaluations += 1
        exact = stream.evaluations <= self._warmup if self._warmup else not stream.settled
        if exact:
            return Evaluation(stream.number, exact=True, measure=not self._warmup)
        stream.batches += 1
        return Evaluation(stream.number, exact=False, rest=stream.batches % self._stride != 1 % self._stride)

    def drifted(self, evaluation: Evaluation, drift: float) -> None:
        """What was measured in an evaluation: the relative distance of the states from those of the one before."""
        for stream in self._streams.values():
            if stream.number == evaluation.stream:
                stream.settled = drift <= self._bound
