from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend.schedules.partition import component_seconds, partition, slowest_share

SECONDS = st.floats(0.001, 10)
COSTS = st.lists(SECONDS, min_size=1, max_size=9)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[float], int]:
    costs = draw(COSTS)
    return costs, draw(st.integers(1, len(costs)))


@st.composite
def clusters(draw: st.DrawFn) -> dict:
    """Arguments for devices of different speed, of which some have little memory."""
    units = draw(st.integers(1, 8))
    ranks = draw(st.integers(1, min(4, units)))

    def per_rank(values: st.SearchStrategy) -> st.SearchStrategy:
        return st.lists(values, min_size=ranks, max_size=ranks)

    # few different values make many cuts equally fast
    seconds = draw(st.sampled_from([SECONDS, st.sampled_from([1.0, 2.0, 5.0])]))
    return {
        "costs": draw(per_rank(st.lists(seconds, min_size=units, max_size=units))),
        "stem": draw(st.floats(0, 2) | per_rank(st.floats(0, 2))),
        "head": draw(st.floats(0, 5)),
        "nbytes": draw(st.lists(st.integers(0, 9), min_size=units, max_size=units)),
        "limits": draw(st.none() | per_rank(st.none() | st.integers(0, 40))),
    }


def every_cut(units: int, components: int) -> Iterator[list[tuple[int, int]]]:
    for inner in combinations(range(1, units), components - 1):
        yield [(begin, end - 1) for begin, end in pairwise((0, *inner, units))]


def held(nbytes: list[int], bounds: list[tuple[int, int]]) -> list[int]:
    return [sum(nbytes[first : last + 1]) for first, last in bounds]


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
    best = min(max(component_seconds(costs, bounds)) for bounds in every_cut(len(costs), components))
    assert slowest_share(costs, partition(costs, components)) * sum(costs) == pytest.approx(best)


@given(clusters())
def test_no_cut_that_fits_is_faster_and_none_as_fast_is_spread_better(case: dict):
    ranks, units = len(case["costs"]), len(case["nbytes"])
    fixed = {"stem": case["stem"], "head": case["head"]}
    rooms = [float("inf") if limit is None else limit for limit in case["limits"] or [None] * ranks]
    fitting = [
        bounds
        for bounds in every_cut(units, ranks)
        if all(size <= room for size, room in zip(held(case["nbytes"], bounds), rooms, strict=True))
    ]
    if not fitting:
        with pytest.raises(ValueError, match=r"the ranks may hold|fits ranks that may hold"):
            partition(**case)
        return
    chosen = list(partition(**case))
    assert chosen in fitting
    slowest = {tuple(bounds): max(component_seconds(case["costs"], bounds, **fixed)) for bounds in fitting}
    best = min(slowest.values())
    assert slowest[tuple(chosen)] == pytest.approx(best)
    as_fast = [bounds for bounds, seconds in slowest.items() if seconds <= best * (1 + 1e-12)]
    assert max(held(case["nbytes"], chosen)) <= min(max(held(case["nbytes"], list(bounds))) for bounds in as_fast)


def test_a_slow_device_gets_less():
    fast, slow = [1.0] * 9, [2.0] * 9
    assert partition([fast, slow]) == ((0, 5), (6, 8))
    assert partition([slow, fast]) == ((0, 2), (3, 8))
    # six units take the fast device 6 s, three the slow one as long; the fast device alone needs 9 s
    assert component_seconds([fast, slow], partition([fast, slow])) == [6.0, 6.0]
    assert slowest_share([fast, slow], partition([fast, slow])) == pytest.approx(6 / 9)


def test_what_every_rank_runs_and_what_the_last_one_runs_count():
    costs = [1.0] * 6
    assert partition(costs, 2) == ((0, 2), (3, 5))
    assert partition(costs, 2, head=2.0) == ((0, 3), (4, 5))
    assert partition(costs, 2, stem=[2.0, 0.0]) == ((0, 1), (2, 5))
    assert component_seconds(costs, ((0, 3), (4, 5)), stem=0.5, head=2.0) == [4.5, 4.5]
    assert slowest_share(costs, ((0, 3), (4, 5)), stem=0.5, head=2.0) == pytest.approx(4.5 / 8.5)


def test_a_device_with_little_memory_holds_what_fits():
    costs, nbytes = [1.0, 1.0, 1.0, 1.0], [10, 10, 10, 30]
    assert partition(costs, 2, nbytes=nbytes, limits=[None, None]) == ((0, 1), (2, 3))
    assert partition(costs, 2, nbytes=nbytes, limits=[None, 30]) == ((0, 2), (3, 3))
    assert partition(costs, 2, nbytes=nbytes, limits=[10, None]) == ((0, 0), (1, 3))


def test_of_equally_fast_cuts_the_one_with_even_weights_is_taken():
    costs = [5.0, 1.0, 1.0, 1.0]
    assert partition(costs, 3, nbytes=[1, 9, 1, 1]) == ((0, 0), (1, 1), (2, 3))
    assert partition(costs, 3, nbytes=[1, 1, 1, 9]) == ((0, 0), (1, 2), (3, 3))


def test_speed_goes_before_evenness_but_for_the_slack():
    # 5 s against 5.9 s, 50 bytes against 40
    costs, nbytes = [4.0, 1.0, 0.9, 4.0], [10, 10, 10, 40]
    assert partition(costs, 2, nbytes=nbytes, slack=0.17) == ((0, 1), (2, 3))
    assert partition(costs, 2, nbytes=nbytes, slack=0.19) == ((0, 2), (3, 3))


@pytest.mark.parametrize("components", [0, 4, -1])
def test_more_components_than_units_or_none_are_refused(components: int):
    with pytest.raises(ValueError, match="3 units cannot be cut"):
        partition([1, 1, 1], components)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": [1.0, 2.0]}, "number of components: give it"),
        ({"costs": [[1.0], [1.0]]}, "1 units cannot be cut into 2"),
        ({"costs": [[1.0, 1.0]] * 2, "components": 3}, "2 devices were given for 3"),
        ({"costs": [[1.0, 1.0], [1.0]]}, r"\[2, 1\]"),
        ({"costs": [1.0, -1.0], "components": 2}, "negative"),
        ({"costs": [1.0, float("nan")], "components": 2}, "not a number"),
        ({"costs": [1.0, 1.0], "components": 2, "stem": [1.0]}, "1 values of stem were given for 2"),
        ({"costs": [1.0, 1.0], "components": 2, "nbytes": [1]}, "1 sizes were given for 2 units"),
        ({"costs": [1.0, 1.0], "components": 2, "limits": [1, 1]}, "need the units' sizes"),
        ({"costs": [1.0, 1.0], "components": 2, "nbytes": [1, 1], "limits": [1]}, "1 limits were given for 2"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        partition(**arguments)


def test_the_error_says_by_how_much_the_weights_do_not_fit():
    with pytest.raises(
        ValueError, match=r"the units are 5,000\.0 MB, the ranks may hold 2,000\.0 MB \+ 2,000\.0 MB = 4,000\.0 MB"
    ):
        partition([1.0] * 5, 2, nbytes=[1_000_000_000] * 5, limits=[2_000_000_000] * 2)
    with pytest.raises(ValueError, match=r"unit 2, 6 bytes\) into 2 consecutive components .* any size \+ 4 bytes"):
        partition([1.0] * 3, 2, nbytes=[3, 3, 6], limits=[None, 4])


def test_equal_units_share_equally():
    assert slowest_share([1.0] * 8, partition([1.0] * 8, 4)) == pytest.approx(0.25)
