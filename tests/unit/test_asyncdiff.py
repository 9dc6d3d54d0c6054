from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend.schedules.asyncdiff import NO_STATE, Evaluation, Streams


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 5))
def test_every_stream_has_a_warm_up_of_its_own(arrivals: list[str], warmup: int):
    streams, seen = Streams(warmup, asynchronous=True, bound=0.1), dict.fromkeys("abc", 0)
    order = list(dict.fromkeys(arrivals))
    for key in arrivals:
        assert streams.next(key) == Evaluation(order.index(key), exact=seen[key] < warmup)
        seen[key] += 1


def test_an_automatic_warm_up_ends_when_the_states_of_a_stream_hold_still():
    streams = Streams(0, asynchronous=True, bound=0.1)
    for drift in (1.0, 0.5, 0.1):
        evaluation = streams.next("a")
        assert evaluation == Evaluation(0, exact=True, measure=True)
        streams.drifted(evaluation, drift)
    assert streams.next("b") == Evaluation(1, exact=True, measure=True)
    assert streams.next("a") == Evaluation(0, exact=False)


@given(st.lists(st.integers(0, 3), max_size=20))
def test_the_exact_mode_never_goes_asynchronous(arrivals: list[int]):
    streams = Streams(1, asynchronous=False, bound=0.1)
    assert all(streams.next(key) == Evaluation(NO_STATE, exact=True) for key in arrivals)
