"""Where a denoiser is cut, from what ranks measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from leapfrog.parallel_backend import LeapfrogError, SplitPlan
from leapfrog.parallel_backend.cutting import choose_cut
from leapfrog.parallel_backend.protocol import Cut, Traced, UnitTrace
from leapfrog.parallel_backend.units import Flow

MB = 1 << 20


def seen(seconds: list[float], device: str = "cpu") -> Traced:
    units = [UnitTrace(f"blocks.{i}", s, MB) for i, s in enumerate(seconds)]
    flow = Flow([[] for _ in units], [], [None for _ in units])
    return Traced(units=units, flow=flow, device=device)


def cut(
    traces: list[Traced], lanes: list[list[int]], current: Cut | None = None, free: Sequence[int | None] = (),
    **plan: Any,
) -> list[tuple[int, int]]:  # fmt: skip
    chosen = SplitPlan(("cpu",) * len(traces), len(lanes[0]) - plan.get("stride", 1) + 1, **plan)
    return choose_cut(traces, free or [None] * len(traces), lanes, chosen, current).cut.bounds


def test_equal_devices_get_equal_times():
    assert cut([seen([1, 1, 1, 3])] * 2, [[0, 1]]) == [(0, 2), (3, 3)]


def test_a_slow_device_gets_less():
    assert cut([seen([1] * 6), seen([2] * 6, "old")], [[0, 1]]) == [(0, 3), (4, 5)]


def test_noise_between_like_devices_is_averaged_away():
    assert cut([seen([1, 1, 1, 1]), seen([3, 1, 1, 1]), seen([1, 1, 1, 1])], [[0, 1, 2]])[0] == (0, 0)


def test_a_device_with_less_memory_gets_what_fits():
    traces = [seen([1] * 6)] * 2
    assert cut(traces, [[0, 1]]) == [(0, 2), (3, 5)]
    assert cut(traces, [[0, 1]], free=[None, 3 * MB]) == [(0, 3), (4, 5)]
    with pytest.raises(LeapfrogError) as caught:
        cut(traces, [[0, 1]], free=[2 * MB] * 2)
    assert caught.value.report.code == "no_fit"


def test_the_slower_of_two_lanes_counts():
    traces = [seen([1] * 6), seen([1] * 6), seen([1] * 6), seen([2] * 6, "old")]
    assert cut(traces, [[0, 1], [2, 3]]) == [(0, 3), (4, 5)]


def test_balance_by_memory():
    traces = [seen([1, 1, 1, 1, 4])] * 2
    assert cut(traces, [[0, 1]]) == [(0, 3), (4, 4)]
    assert cut(traces, [[0, 1]], balance="memory") == [(0, 2), (3, 4)]


def test_stride_two_holds_the_last_component_twice():
    assert cut([seen([1] * 4)] * 3, [[0, 1, 2]], mode="asyncdiff", stride=2) == [(0, 1), (2, 3), (2, 3)]


def test_a_cut_is_moved_only_where_that_pays():
    names = [f"blocks.{i}" for i in range(4)]
    current = Cut(names, [(0, 2), (3, 3)])
    assert cut([seen([1, 1, 1.05, 3])] * 2, [[0, 1]], current) == current.bounds
    assert cut([seen([1, 1, 1, 1])] * 2, [[0, 1]], current) == [(0, 1), (2, 3)]
    twins = Cut(names, [(0, 2), (3, 3), (3, 3)])
    assert cut([seen([1, 1, 1, 3])] * 3, [[0, 1, 2]], twins) != twins.bounds


@pytest.mark.parametrize("text", ["x", "0", "4", "2, 3", "3, 2", "1.5", "-1"])
def test_a_cut_by_hand_that_cannot_be_is_refused(text: str):
    with pytest.raises(LeapfrogError, match="cut") as caught:
        cut([seen([1] * 4)] * 2, [[0, 1]], cut=text)
    assert caught.value.report.code == "bad_plan"


def test_a_cut_by_hand():
    assert cut([seen([1] * 4)] * 3, [[0, 1, 2]], cut="1, 3") == [(0, 0), (1, 2), (3, 3)]
