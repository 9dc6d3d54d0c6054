"""Cutting a row of units into consecutive components so that the slowest component is as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def partition(costs: Sequence[float], components: int) -> tuple[tuple[int, int], ...]:
    """Bounds ``(first, last)`` (inclusive) of ``components`` consecutive runs of units, none empty.

    ``costs`` are the units' times in any one unit of time. The largest sum is minimal over all contiguous cuts
    (dynamic programming, O(units^2 * components)). Raises ValueError for more components than units.
    """
    units = len(costs)
    if not 1 <= components <= units:
        raise ValueError(f"{units} units cannot be cut into {components} components")
    before = [0.0, *accumulate(costs)]
    # best[end] = (slowest component, start of the last one) with units [0, end) in the components placed so far
    best = [(before[end], 0) for end in range(units + 1)]
    starts = []
    for placed in range(2, components + 1):
        row = [(float("inf"), 0)] * (units + 1)
        for end in range(placed, units + 1):
            row[end] = min((max(best[cut][0], before[end] - before[cut]), cut) for cut in range(placed - 1, end))
        starts.append(row)
        best = row
    bounds = []
    end = units
    for row in reversed(starts):
        start = row[end][1]
        bounds.append((start, end - 1))
        end = start
    bounds.append((0, end - 1))
    return tuple(reversed(bounds))


def slowest_share(costs: Sequence[float], bounds: Sequence[tuple[int, int]]) -> float:
    """Cost of the slowest component as a share of the whole, 1/N at best."""
    return max(sum(costs[first : last + 1]) for first, last in bounds) / sum(costs)
