from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend.schedules.asyncdiff import Streams, ideal_speedup


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 5))
def test_every_stream_has_a_warm_up_of_its_own(arrivals: list[str], warmup: int):
    streams, seen = Streams(warmup, asynchronous=True), dict.fromkeys("abc", 0)
    order = list(dict.fromkeys(arrivals))
    for key in arrivals:
        number, exact = streams.next(key)
        assert number == order.index(key)
        assert exact == (seen[key] < warmup)
        seen[key] += 1


@given(st.lists(st.integers(0, 3), max_size=20))
def test_the_exact_mode_never_goes_asynchronous(arrivals: list[int]):
    streams = Streams(1, asynchronous=False)
    assert all(streams.next(key)[1] for key in arrivals)


def test_the_ideal_bound_is_warm_up_plus_the_slowest_component():
    assert ideal_speedup(50, 1, 1 / 2) == pytest.approx(50 / 25.5)
    assert ideal_speedup(4, 10, 1 / 2) == 1
