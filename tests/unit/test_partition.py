from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend.schedules.partition import partition, slowest_share

COSTS = st.lists(st.floats(0.001, 10), min_size=1, max_size=9)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[float], int]:
    costs = draw(COSTS)
    return costs, draw(st.integers(1, len(costs)))


@given(cuts())
def test_components_are_consecutive_and_cover_every_unit_once(case: tuple[list[float], int]):
    costs, components = case
    bounds = partition(costs, components)
    assert len(bounds) == components
    assert [unit for first, last in bounds for unit in range(first, last + 1)] == list(range(len(costs)))
    assert all(first <= last for first, last in bounds)


@given(cuts())
def test_no_cut_has_a_faster_slowest_component(case: tuple[list[float], int]):
    costs, components = case
    every_cut = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), components - 1))
    best = min(max(sum(costs[a:b]) for a, b in pairwise(edges)) for edges in every_cut)
    assert slowest_share(costs, partition(costs, components)) * sum(costs) == pytest.approx(best)


@pytest.mark.parametrize("components", [0, 4, -1])
def test_more_components_than_units_or_none_are_refused(components: int):
    with pytest.raises(ValueError, match="3 units cannot be cut"):
        partition([1, 1, 1], components)


def test_equal_units_share_equally():
    assert slowest_share([1.0] * 8, partition([1.0] * 8, 4)) == pytest.approx(0.25)
