"""How long a run of a split denoiser takes: arithmetic on times and bytes, for machines that are not at hand.

What is modelled. A rank computes one component at a time. After a component its messages leave one after another, each
taking the link's latency plus its bytes, while the rank already computes on. The host starts a step ``host`` seconds
after the step before has its result; that is all of its own work. Samplers and everything around the denoiser take the
same time on one device as on many, and are left out of both. Nothing is rejected: every prediction is good enough.

``crowd`` is how many times as long a rank computes while others compute, too: more than 1 where they share memory or
cores, as on a CPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .parastep import row_shares

Mode = Literal["exact", "asyncdiff", "lookahead"]


@dataclass(frozen=True)
class Link:
    """Between any two ranks, both ways at once."""

    bytes_per_second: float = math.inf
    latency: float = 0.0

    def seconds(self, nbytes: float) -> float:
        return self.latency + nbytes / self.bytes_per_second


Traffic = Mapping[tuple[int, int], float]
"""Bytes of the one message that each evaluation sends from a rank to a later one: ``{(from, to): bytes}``. Neighbours
that are not named pass on something of no size."""


def crossing(nbytes: Sequence[float], needs: Sequence[Sequence[int]], bounds: Sequence[tuple[int, int]]) -> Traffic:
    """What travels between the components of a cut.

    ``nbytes[unit]`` is the size of a unit's output, ``needs[unit]`` the earlier units whose outputs it reads. An output
    goes from the rank that has it straight to each rank that needs it, once.
    """
    rank_of = [rank for rank, (first, last) in enumerate(bounds) for _ in range(first, last + 1)]
    sent = {
        (rank_of[source], rank_of[unit], source)
        for unit, sources in enumerate(needs)
        for source in sources
        if rank_of[source] != rank_of[unit]
    }
    total: dict[tuple[int, int], float] = {}
    for source_rank, rank, source in sent:
        total[source_rank, rank] = total.get((source_rank, rank), 0.0) + nbytes[source]
    return total


def run_seconds(
    mode: Mode,
    steps: int,
    components: Sequence[float],
    traffic: Traffic,
    link: Link,
    *,
    stem: float = 0.0,
    warmup: int = 1,
    stride: int = 1,
    last_exact: bool = True,
    host: float = 0.0,
    row_scale: float = 1.0,
    row_bytes: float = 1.0,
    crowd: float = 1.0,
) -> float:
    """Seconds that ``steps`` evaluations take on one rank per component.

    ``components`` are the components' seconds without ``stem``, which every rank pays on top at each evaluation. The
    first ``warmup`` steps are exact: the sum of all components. Then, by ``mode``:

    * ``exact``: exact to the end.
    * ``asyncdiff``: all components at once, on what those before them sent a step ago; the step ends with the slowest.
      ``stride`` 2 takes one more rank, which also runs the last component, and one such evaluation serves two steps.
    * ``lookahead``: the first component starts on a step as many steps ahead as there are components, behind the exact
      evaluations where those still run. With ``last_exact`` the last step waits for its true input.

    CFG lanes are two such pipelines side by side, each with half the rows: ``row_scale`` is what a component's time
    then is as a share of its time with all rows, ``row_bytes`` the same for the traffic.
    Raises ValueError for arguments that mean nothing.
    """
    if steps < 1 or warmup < 0 or not components:
        raise ValueError(f"{steps} steps, {warmup} warm-up steps, {len(components)} components")
    if stride not in (1, 2) or (stride == 2 and mode != "asyncdiff"):
        raise ValueError(f"stride {stride} in mode {mode}")
    pipeline = _Pipeline(
        [row_scale * seconds for seconds in components],
        row_scale * stem,
        {pair: link.seconds(row_bytes * nbytes) for pair, nbytes in traffic.items()},
        host,
        crowd,
    )
    warmup = min(max(warmup, 1), steps)  # the first step has nothing to guess from
    if mode == "asyncdiff":
        return pipeline.asyncdiff(steps, warmup, stride)
    exact = [mode == "exact" or step < warmup or (last_exact and step == steps - 1) for step in range(steps)]
    return pipeline.waves(exact)


def rounds_taken(steps: int, lanes: int, warmup: int = 0, *, grows: bool = False, last_alone: bool = True) -> list[int]:
    """Evaluations of each round of ParaStep, in order, if nothing is rejected.

    The first ``warmup`` evaluations, one at least, and with ``last_alone`` the last one are rounds of their own.
    ``grows``: the automatic warm-up, in which the second round is single as well and each has one lane more than the
    one before.
    """
    if steps < 1 or lanes < 1 or warmup < 0:
        raise ValueError(f"{steps} steps, {lanes} lanes, {warmup} warm-up steps")
    found: list[int] = []
    begin, length = 0, 1 if grows else lanes
    while begin < steps:
        size = 1 if begin < max(1, warmup) else max(1, min(length, steps - last_alone - begin))
        if begin and size < lanes:
            length = max(length, size + 1)
        found.append(size)
        begin += size
    return found


def rounds_seconds(
    rounds: Sequence[int],
    rows: int,
    devices: int,
    seconds: Callable[[int], float],
    *,
    host: float = 0.0,
    crowd: float = 1.0,
) -> float:
    """Seconds that rounds of so many evaluations take, one after another.

    An evaluation has so many ``rows``, one for each picture and conditioning. Those of a round are dealt to the
    ``devices`` as ParaStep does, and the round ends with the device that has most. ``seconds(n)`` is how long a rank
    takes for n of them as one batch while no other computes.
    """
    total = 0.0
    for lanes, times in Counter(rounds).items():
        (shares,) = row_shares([(lanes * rows, 1)], devices)
        most = max(end - begin for begin, end in shares.values())
        total += times * (host + seconds(most) * (crowd if len(shares) > 1 else 1.0))
    return total


class _Pipeline:
    """Clocks of ranks and links. ``send[from, to]`` is the time that a message takes."""

    def __init__(
        self, components: list[float], stem: float, send: Mapping[tuple[int, int], float], host: float, crowd: float
    ):
        self.components, self.stem, self.send, self.host, self.crowd = components, stem, send, host, crowd
        self.ranks = len(components)

    def waves(self, exact: Sequence[bool]) -> float:
        """End of a run of evaluations that pass through the ranks in order, one per step.

        An exact one starts when the step before has its result. Others start as soon as the result that is as many
        steps back as there are ranks is known (the first result, where there are fewer).
        """
        free, wire = [0.0] * self.ranks, [0.0] * self.ranks
        results: list[float] = []
        for step, alone in enumerate(exact):
            known = step - 1 if alone else max(step - self.ranks, 0)
            begin = (results[known] if known >= 0 else 0.0) + self.host
            arrived = [begin] * self.ranks
            end, slower = 0.0, 1.0 if alone else self.crowd
            for rank in range(self.ranks):
                # what every rank runs needs no hidden state
                ready = max(begin, free[rank]) + slower * self.stem
                end = max(ready, arrived[rank]) + slower * self.components[rank]
                free[rank] = end
                self._send(rank, end, wire, arrived)
            results.append(max(end, results[-1] if results else 0.0))
        return results[-1]

    def asyncdiff(self, steps: int, warmup: int, stride: int) -> float:
        now = self.waves([True] * warmup)
        extra = [self.ranks] if stride == 2 else []  # runs the last component too
        owner = [*range(self.ranks), *([self.ranks - 1] if extra else [])]
        wire, arrived = [now] * len(owner), [now] * len(owner)
        for step in range(warmup, steps, stride):
            ready = now + self.host + self.crowd * self.stem
            ends = [max(ready, arrived[rank]) + self.crowd * self.components[owned] for rank, owned in enumerate(owner)]
            for rank in range(self.ranks):
                self._send(rank, ends[rank], wire, arrived, extra)
            now = max(ends) + (self.host if stride == 2 and step + 1 < steps else 0.0)
        return now

    def _send(self, rank: int, end: float, wire: list[float], arrived: list[float], extra: Sequence[int] = ()) -> None:
        """Messages of ``rank``, which ended at ``end``, nearest receiver first; ``extra`` gets what the last gets."""
        for other in range(rank + 1, self.ranks):
            seconds = self.send.get((rank, other), 0.0 if other == rank + 1 else None)
            if seconds is not None:
                for receiver in [other, *(extra if other == self.ranks - 1 else [])]:
                    wire[rank] = max(wire[rank], end) + seconds
                    arrived[receiver] = max(arrived[receiver], wire[rank])
