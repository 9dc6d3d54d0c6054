"""Cutting a row of units into consecutive components so that the slowest component is as fast as possible.

Times are seconds, or any other unit of time that all devices share. Given as one sequence, ``costs[unit]``, they hold
for every device; devices of different speed give ``costs[rank][unit]``, and ranks take components in that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from numbers import Real
from typing import cast

Costs = Sequence[float] | Sequence[Sequence[float]]
Bounds = Sequence[tuple[int, int]]
PerRank = float | Sequence[float]
"""One number for all ranks, or one for each."""

EQUALLY_FAST = 1 + 1e-9
"""Sums of the same times in another order differ by less than this factor."""


def partition(
    costs: Costs,
    components: int | None = None,
    *,
    stem: PerRank = 0.0,
    head: PerRank = 0.0,
    nbytes: Sequence[int] | None = None,
    limits: Sequence[int | None] | None = None,
    slack: float = 0.0,
) -> tuple[tuple[int, int], ...]:
    """Bounds ``(first, last)`` (inclusive) of one run of consecutive units per rank, none empty.

    ``components`` says how many ranks there are where ``costs`` is one sequence. Every component also pays ``stem``,
    the parts that every rank runs, and the last one ``head``. ``limits[rank]`` is how many of the units' bytes
    ``nbytes`` the rank may hold, None for any number (what all ranks hold besides is the caller's to subtract).

    Of all cuts that fit, one whose slowest component is fastest; of those, one whose largest sum of bytes is smallest.
    Measured times are uncertain: with ``slack`` 0.02 cuts at most 2 % slower than the fastest count as equally fast.
    Exact, O(units^2 * ranks). Raises ValueError, with the numbers, for more components than units, for arguments that
    contradict each other, and where no cut fits the limits.
    """
    rows, stems, heads = _per_rank(costs, components, stem, head)
    ranks, units = len(rows), len(rows[0])
    if ranks > units:
        raise ValueError(f"{units} units cannot be cut into {ranks} components: each needs one unit at least")
    if nbytes is not None and len(nbytes) != units:
        raise ValueError(f"{len(nbytes)} sizes were given for {units} units")
    if limits is not None and nbytes is None:
        raise ValueError("limits in bytes need the units' sizes, nbytes")
    if limits is not None and len(limits) != ranks:
        raise ValueError(f"{len(limits)} limits were given for {ranks} components")
    sizes = nbytes or [0] * units
    rooms = [math.inf if limit is None else limit for limit in limits or [None] * ranks]
    seconds_before = [[0.0, *accumulate(row)] for row in rows]
    bytes_before = [0, *accumulate(sizes)]

    def held(begin: int, end: int) -> int:
        return bytes_before[end] - bytes_before[begin]

    def seconds(rank: int, begin: int, end: int) -> float:
        if held(begin, end) > rooms[rank]:
            return math.inf
        fixed = stems[rank] + (heads[rank] if rank == ranks - 1 else 0.0)
        return fixed + seconds_before[rank][end] - seconds_before[rank][begin]

    slowest, edges = _best_cut(ranks, units, seconds)
    if slowest == math.inf:
        raise ValueError(_no_fit(sizes, rooms))
    if nbytes is not None:
        allowed = slowest * max(1 + slack, EQUALLY_FAST)
        _, edges = _best_cut(
            ranks, units, lambda rank, a, b: held(a, b) if seconds(rank, a, b) <= allowed else math.inf
        )
    return tuple((begin, end - 1) for begin, end in pairwise(edges))


def component_seconds(costs: Costs, bounds: Bounds, *, stem: PerRank = 0.0, head: PerRank = 0.0) -> list[float]:
    """Time of each component of a cut, ``stem`` and ``head`` included as in :func:`partition`."""
    rows, stems, heads = _per_rank(costs, len(bounds), stem, head)
    spans = zip(rows, stems, bounds, strict=True)
    times = [fixed + sum(row[first : last + 1]) for row, fixed, (first, last) in spans]
    times[-1] += heads[-1]
    return times


def slowest_share(costs: Costs, bounds: Bounds, *, stem: PerRank = 0.0, head: PerRank = 0.0) -> float:
    """Time of the slowest component against the whole denoiser on the one device that is fastest at it.

    At best 1/N for N devices that are alike.
    """
    rows, stems, heads = _per_rank(costs, len(bounds), stem, head)
    alone = min(fixed + sum(row) + last for row, fixed, last in zip(rows, stems, heads, strict=True))
    return max(component_seconds(costs, bounds, stem=stem, head=head)) / alone


def _per_rank(
    costs: Costs, components: int | None, stem: PerRank, head: PerRank
) -> tuple[Sequence[Sequence[float]], list[float], list[float]]:
    """``(costs[rank][unit], stem[rank], head[rank])`` of every rank."""
    if not costs or isinstance(costs[0], Real):
        if components is None:
            raise ValueError("one sequence of times says nothing about the number of components: give it")
        rows, ranks = [cast(Sequence[float], costs)] * max(components, 1), components
    else:
        rows = cast(Sequence[Sequence[float]], costs)
        ranks = len(rows) if components is None else components
    units = [len(row) for row in rows]
    if ranks < 1:
        raise ValueError(f"{units[0]} units cannot be cut into {ranks} components")
    if len(rows) != ranks:
        raise ValueError(f"times of {len(rows)} devices were given for {ranks} components")
    if len(set(units)) > 1:
        raise ValueError(f"the devices' times are of different numbers of units: {units}")
    if not all(math.isfinite(cost) and cost >= 0 for row in rows for cost in row):
        raise ValueError("a unit's time is negative or not a number")
    return rows, _each(stem, ranks, "stem"), _each(head, ranks, "head")


def _each(value: PerRank, ranks: int, name: str) -> list[float]:
    if isinstance(value, Real):
        return [float(value)] * ranks
    values = [float(v) for v in cast(Sequence[float], value)]
    if len(values) != ranks:
        raise ValueError(f"{len(values)} values of {name} were given for {ranks} components")
    return values


def _best_cut(ranks: int, units: int, cost: Callable[[int, int, int], float]) -> tuple[float, list[int]]:
    """``(largest cost, edges)`` of the cut whose largest ``cost(rank, begin, end)`` is smallest; inf: none fits."""
    # best[end]: largest cost with units [0, end) given to the ranks so far; begin_of[end]: where the newest starts
    best = [math.inf, *(cost(0, 0, end) for end in range(1, units + 1))]
    begins = []
    for rank in range(1, ranks):
        row, begin_of = [math.inf] * (units + 1), [rank] * (units + 1)
        for end in range(rank + 1, units + 1):
            row[end], begin_of[end] = min((max(best[at], cost(rank, at, end)), at) for at in range(rank, end))
        begins.append(begin_of)
        best = row
    edges = [units]
    for begin_of in reversed(begins):
        edges.append(begin_of[edges[-1]])
    return best[units], [0, *reversed(edges)]


def _no_fit(sizes: Sequence[int], rooms: Sequence[float]) -> str:
    total, room = sum(sizes), sum(rooms)
    given = " + ".join(_written(r) for r in rooms)
    if total > room:
        return f"the units are {_written(total)}, the ranks may hold {given} = {_written(room)}"
    largest = max(range(len(sizes)), key=lambda unit: sizes[unit])
    return (
        f"no cut of the {len(sizes)} units "
        f"({_written(total)}, the largest, unit {largest}, {_written(sizes[largest])}) "
        f"into {len(rooms)} consecutive components fits ranks that may hold {given}"
    )


def _written(nbytes: float) -> str:
    if nbytes == math.inf:
        return "any size"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes:,.0f} bytes"
