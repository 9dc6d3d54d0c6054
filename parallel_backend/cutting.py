"""Where a denoiser is cut, from unit times measured on every device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .errors import LeapfrogError
from .plan import SplitPlan, check_components
from .protocol import Cut, Traced
from .schedules.partition import partition, slowest_share

log = logging.getLogger("leapfrog")
# A new resolution moves the bounds of the components, and so weights, only where that is worth the reading.
WORTH_RECUTTING = 0.9
# Of a GPU's free memory, what weights may take; the rest is for activations.
FOR_WEIGHTS = 0.85
# Measured times differ by as much from one measurement to the next.
SLACK = 0.02
# Of all weights, by how much a rank may hold more than an equal share where memory is balanced.
FAIR_SHARE_PLUS = 0.1


class Chosen(NamedTuple):
    """A cut, and its slowest component's time as a share of the whole denoiser's on one device."""

    cut: Cut
    slowest: float


def choose_cut(
    traces: Sequence[Traced], free: Sequence[int | None], pipelines: Sequence[Sequence[int]], plan: SplitPlan,
    current: Cut | None,
) -> Chosen:  # fmt: skip
    """The cut whose slowest component is fastest; ``current`` where that is nearly as good.

    With stride 2 the last rank of a pipeline holds the last component once more.

    ``traces[rank]`` is what each rank measured, ``free`` as of :meth:`Pool.free`, ``pipelines`` the ranks of each in
    the order of their components. Where the plan balances memory, no rank holds more than its share of the weights by a
    tenth of them. Raises LeapfrogError no_fit where the components do not fit their devices, bad_plan for a cut that
    cannot be.
    """
    units = [unit.path for unit in traces[0].units]
    components = plan.components(pipelines[0])
    twins = plan.stride - 1
    # the ranks that hold the component at each position
    holders = [[pipeline[at] for pipeline in pipelines] for at in range(components)]
    holders[-1] += [rank for pipeline in pipelines for rank in pipeline[components:]]
    seconds = _seconds(traces)
    costs = [[max(seconds[rank][u] for rank in ranks) for u in range(len(units))] for ranks in holders]
    stem, head = traces[0].stem, traces[0].head
    if plan.cut.strip():
        bounds = _bounds_by_hand(plan.cut, len(units), components)
        return Chosen(Cut(units, bounds + bounds[-1:] * twins), slowest_share(costs, bounds, stem=stem, head=head))
    limits = [_limit([free[rank] for rank in ranks], traces[0].shared) for ranks in holders]
    nbytes = [unit.nbytes for unit in traces[0].units]
    check_components(components, len(units))
    try:
        bounds = best_bounds(costs, nbytes, traces[0].shared, limits, stem, head, plan.balance)
    except ValueError as error:
        raise LeapfrogError.of("no_fit", f"The model's weights do not fit these devices: {error}.") from None
    share = slowest_share(costs, bounds, stem=stem, head=head)
    if (
        current
        and current.units == units
        and _held_twice(current) == twins
        and len(current.bounds) == len(pipelines[0])
    ):
        now = slowest_share(costs, current.bounds[:components], stem=stem, head=head)
        if WORTH_RECUTTING * now <= share:
            return Chosen(current, now)
    log.info(
        "Leapfrog: components %s of %d units, the slowest is %.0f %% of the denoiser", bounds, len(units), 100 * share
    )
    return Chosen(Cut(units, bounds + bounds[-1:] * twins), share)


def best_bounds(
    costs: Sequence[Sequence[float]], nbytes: Sequence[int], shared: int, limits: Sequence[int | None], stem: float,
    head: float, balance: str,
) -> list[tuple[int, int]]:  # fmt: skip
    """Bounds of the components; ``costs[position][unit]`` are seconds, ``limits`` as those of :func:`partition`.

    ``shared`` are the bytes that every rank holds besides its units. Raises ValueError where nothing fits.
    """
    components = len(costs)
    fair = [min(filter(None, (limit, _fair_share(nbytes, shared, components)))) for limit in limits]
    if balance == "memory" and min(fair) < _smallest_possible(nbytes, components):
        return list(partition([nbytes] * components, nbytes=nbytes, limits=limits))  # too uneven for a tenth
    room = fair if balance == "memory" else limits
    return list(partition(costs, stem=stem, head=head, nbytes=nbytes, limits=room, slack=SLACK))


def _held_twice(cut: Cut) -> int:
    return len(cut.bounds) - len(set(cut.bounds))


def _seconds(traces: Sequence[Traced]) -> list[list[float]]:
    """Unit times per rank; those of like devices are one measurement, its noise averaged away."""
    kinds = {t.device: [other for other in traces if other.device == t.device] for t in traces}
    return [[median(same.units[u].seconds for same in kinds[t.device]) for u in range(len(t.units))] for t in traces]


def _limit(free: Sequence[int | None], shared: int) -> int | None:
    """Bytes of units' weights that every one of these devices can hold, None where nobody counts."""
    room = [int(FOR_WEIGHTS * there) - shared for there in free if there is not None]
    return min(room) if room else None


def _fair_share(nbytes: Sequence[int], shared: int, components: int) -> int:
    """Bytes of units' weights with which a rank holds a tenth of all weights more than an equal share."""
    return int((1 / components + FAIR_SHARE_PLUS) * (shared + sum(nbytes))) - shared


def _smallest_possible(nbytes: Sequence[int], components: int) -> int:
    """The largest component's bytes in the cut that divides the weights best."""
    return max(sum(nbytes[first : last + 1]) for first, last in partition(nbytes, components))


def _bounds_by_hand(text: str, units: int, components: int) -> list[tuple[int, int]]:
    try:
        starts = [0, *(int(part) for part in text.split(","))]
    except ValueError:
        raise LeapfrogError.of("bad_plan", f"cut '{text}' is not a list of unit numbers such as '7, 12'.") from None
    if len(starts) != components or sorted(set(starts)) != starts or starts[-1] >= units:
        raise LeapfrogError.of(
            "bad_plan",
            f"cut '{text}': {components} components need {components - 1} rising number(s) from 1 to {units - 1}, the "
            "first unit of each component but the first.",
        )
    return [(first, after - 1) for first, after in zip(starts, [*starts[1:], units], strict=True)]
