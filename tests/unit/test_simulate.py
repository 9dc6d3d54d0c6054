from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend.schedules.simulate import Link, crossing, rounds_seconds, rounds_taken, run_seconds

FREE = Link()
SECONDS = st.floats(0.01, 5)
COMPONENTS = st.lists(SECONDS, min_size=1, max_size=6)
MODES = st.sampled_from([("exact", 1), ("asyncdiff", 1), ("asyncdiff", 2), ("lookahead", 1)])


@st.composite
def runs(draw: st.DrawFn) -> dict:
    components = draw(COMPONENTS)
    pairs = [(a, b) for b in range(len(components)) for a in range(b)]
    mode, stride = draw(MODES)
    return {
        "mode": mode,
        "stride": stride,
        "steps": draw(st.integers(1, 12)),
        "warmup": draw(st.integers(1, 5)),
        "components": components,
        "traffic": {pair: draw(st.floats(0, 1e6)) for pair in pairs if pair[1] == pair[0] + 1 or draw(st.booleans())},
        "link": Link(draw(st.floats(1e5, 1e9)), draw(st.floats(0, 0.1))),
        "stem": draw(st.floats(0, 0.5)),
        "host": draw(st.floats(0, 0.5)),
        "last_exact": draw(st.booleans()),
    }


@given(COMPONENTS, st.integers(1, 30), st.integers(1, 9))
def test_over_a_free_link_asyncdiff_reaches_its_bound(components: list[float], steps: int, warmup: int):
    whole = sum(components)
    seconds = run_seconds("asyncdiff", steps, components, {}, FREE, warmup=warmup)
    assert seconds == pytest.approx(min(steps, warmup) * whole + max(0, steps - warmup) * max(components))


@given(COMPONENTS, st.integers(3, 30), st.integers(2, 9), st.booleans())
def test_over_a_free_link_lookahead_reaches_its_bound(components: list[float], steps: int, warmup: int, last: bool):
    whole = sum(components)
    seconds = run_seconds("lookahead", steps, components, {}, FREE, warmup=warmup, last_exact=last)
    exact = min(steps, warmup + last)
    assert seconds == pytest.approx(exact * whole + (steps - exact) * max(components))


def test_over_a_free_link_one_batch_of_stride_two_serves_two_steps():
    # 5 exact steps, then batches for steps 5-6, 7-8 and 9 alone
    assert run_seconds("asyncdiff", 10, [1.0, 3.0, 2.0], {}, FREE, warmup=5, stride=2) == pytest.approx(5 * 6 + 3 * 3)
    assert run_seconds("asyncdiff", 9, [1.0, 3.0, 2.0], {}, FREE, warmup=5, stride=2) == pytest.approx(5 * 6 + 2 * 3)


@given(runs())
def test_an_exact_run_is_the_sum_of_everything(run: dict):
    run["mode"], run["stride"] = "exact", 1
    components, count = run["components"], len(run["components"])
    run["traffic"] = {(rank, rank + 1): 1e5 for rank in range(count - 1)}
    once = run["host"] + run["stem"] + sum(components) + (count - 1) * run["link"].seconds(1e5)
    assert run_seconds(**run) == pytest.approx(run["steps"] * once)


@given(runs(), st.sampled_from(["host", "stem", "latency", "bytes", "component"]), st.floats(0, 3))
def test_nothing_gets_faster_by_costing_more(run: dict, what: str, more: float):
    before = run_seconds(**run)
    if what == "latency":
        run["link"] = Link(run["link"].bytes_per_second, run["link"].latency + more)
    elif what == "bytes":
        run["traffic"] = {pair: nbytes * (1 + more) for pair, nbytes in run["traffic"].items()}
    elif what == "component":
        run["components"] = [*run["components"][:-1], run["components"][-1] + more]
    else:
        run[what] += more
    assert run_seconds(**run) >= before - 1e-9


@given(runs())
def test_no_mode_is_slower_than_exact_steps_nor_faster_than_its_slowest_component(run: dict):
    seconds, batches = run_seconds(**run), -(-run["steps"] // run["stride"])
    assert seconds >= batches * (max(run["components"]) + run["stem"]) - 1e-9
    assert seconds >= run["steps"] * run["host"]
    exact = run_seconds(**{**run, "mode": "exact", "stride": 1})
    slack = 1e-9
    if run["stride"] == 2:  # the last component's input is sent twice
        slack += sum(map(run["link"].seconds, run["traffic"].values())) * run["steps"]
    assert seconds <= exact + slack


def test_a_transfer_costs_lookahead_a_share_of_itself_and_the_slowest_component_hides_it():
    link, traffic = Link(1.0, 0.0), {(0, 1): 0.25}
    steps = {n: run_seconds("lookahead", n, [1.0, 1.0], traffic, link, warmup=2, last_exact=False) for n in (20, 30)}
    assert (steps[30] - steps[20]) / 10 == pytest.approx((1 + 1 + 0.25) / 2)
    steps = {n: run_seconds("lookahead", n, [1.0, 1.5], traffic, link, warmup=2, last_exact=False) for n in (20, 30)}
    assert (steps[30] - steps[20]) / 10 == pytest.approx(1.5)


def test_asyncdiff_pays_the_host_at_every_step():
    steps = {n: run_seconds("asyncdiff", n, [1.0, 1.0], {}, FREE, warmup=2, host=0.1) for n in (20, 30)}
    assert (steps[30] - steps[20]) / 10 == pytest.approx(1.1)


def test_a_message_takes_the_latency_and_its_bytes():
    assert Link(4.0, 0.5).seconds(2.0) == pytest.approx(1.0)
    assert FREE.seconds(1e12) == 0


def test_asyncdiff_waits_for_what_was_sent_a_step_ago():
    def step(stride: int) -> float:
        run = {"components": [1.0, 1.0], "traffic": {(0, 1): 3.0}, "link": Link(1.0), "stride": stride}
        return (run_seconds("asyncdiff", 30, **run) - run_seconds("asyncdiff", 20, **run)) / 10 * stride

    assert step(1) == pytest.approx(3)  # one message follows the other
    assert step(2) == pytest.approx(6)  # each goes to both ranks that run the last component


def test_a_rank_sends_one_message_after_another():
    traffic = {(0, 1): 4.0, (0, 2): 4.0, (1, 2): 0.0}
    # the first rank ends at 1; its messages arrive at 5 and at 9, when the second rank has long ended
    assert run_seconds("exact", 1, [1.0, 1.0, 1.0], traffic, Link(1.0)) == pytest.approx(10)


def test_cfg_lanes_scale_times_and_bytes():
    run = {"mode": "exact", "steps": 10, "components": [1.0, 1.0], "traffic": {(0, 1): 8.0}, "link": Link(4.0)}
    assert run_seconds(**run, stem=0.5) == pytest.approx(10 * (0.5 + 1 + 2 + 1))
    assert run_seconds(**run, stem=0.5, row_scale=0.6, row_bytes=0.5) == pytest.approx(10 * (0.3 + 0.6 + 1 + 0.6))


def test_what_crosses_goes_once_to_each_rank_that_needs_it():
    # a U-Net of 5 units: 0 and 1 make skip tensors for 4 and 3
    needs, nbytes = [(), (0,), (1,), (2, 1), (3, 0)], [1.0, 10.0, 100.0, 1000.0, 10000.0]
    assert crossing(nbytes, needs, [(0, 4)]) == {}
    assert crossing(nbytes, needs, [(0, 1), (2, 4)]) == {(0, 1): 11.0}
    assert crossing(nbytes, needs, [(0, 1), (2, 2), (3, 4)]) == {(0, 1): 10.0, (0, 2): 11.0, (1, 2): 100.0}


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"components": []}, {"warmup": -1}, {"stride": 3}, {"mode": "lookahead", "stride": 2}]
)
def test_arguments_that_mean_nothing_are_refused(wrong: dict):
    run = {"mode": "asyncdiff", "steps": 5, "components": [1.0], "traffic": {}, "link": FREE}
    with pytest.raises(ValueError, match=r"steps|stride"):
        run_seconds(**{**run, **wrong})


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 9), st.booleans())
def test_rounds_take_every_step_once_and_the_first_and_the_last_alone(steps: int, lanes: int, warmup: int, grows: bool):
    rounds = rounds_taken(steps, lanes, warmup, grows=grows)
    assert sum(rounds) == steps
    assert 1 <= min(rounds) <= max(rounds) <= lanes
    assert rounds[0] == rounds[-1] == 1
    assert all(size == 1 for size in rounds[: min(steps, warmup)])


def test_an_automatic_warmup_grows_by_a_lane_a_round():
    assert rounds_taken(20, 4, grows=True) == [1, 1, 2, 3, 4, 4, 4, 1]
    assert rounds_taken(20, 4) == [1, 4, 4, 4, 4, 2, 1]
    assert rounds_taken(9, 3, warmup=4) == [1, 1, 1, 1, 3, 1, 1]


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 9))
def test_as_published_the_last_step_is_in_a_round(steps: int, lanes: int, warmup: int):
    singles = min(steps, warmup)
    expected = singles + -(-(steps - singles) // lanes)
    assert len(rounds_taken(steps, lanes, warmup, last_alone=False)) == expected


def test_a_round_ends_with_the_rank_that_has_most_rows():
    def rows(count: int) -> float:
        return {1: 3.0, 2: 4.0, 3: 5.0}[count]

    assert rounds_seconds([1], 2, 2, rows, host=0.5) == pytest.approx(3.5)  # a conditioning each
    assert rounds_seconds([2], 2, 3, rows, host=0.5) == pytest.approx(4.5)  # 1, 1 and 2 of four
    assert rounds_seconds([1, 3], 1, 2, rows, crowd=2.0) == pytest.approx(3 + 2 * 4)  # one alone is not slowed down


def test_ranks_that_compute_at_once_take_longer():
    run = {"components": [1.0, 1.0], "traffic": {}, "link": FREE, "steps": 10, "crowd": 1.5}
    assert run_seconds("exact", **run) == pytest.approx(20)
    assert run_seconds("asyncdiff", **run, warmup=2) == pytest.approx(2 * 2 + 8 * 1.5)
    assert run_seconds("lookahead", **run, warmup=2) == pytest.approx(
        run_seconds("lookahead", **{**run, "crowd": 1.0}, warmup=2) + 0.5 * (7 + 1)
    )
