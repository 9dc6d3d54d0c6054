from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import emulate
from emulated_device import Pace, waiting


def test_a_pace_is_on_the_line_through_one_row_and_those_profiled():
    pace = Pace(seconds=2.0, rows=2, one_row=0.75)
    assert [pace.of(rows) for rows in (1, 2, 4)] == [1.5, 2.0, 3.0]
    assert [Pace(2.0, rows=1, one_row=1.0).of(rows) for rows in (1, 3)] == [2.0, 6.0]


def test_a_layer_waits_for_what_is_left_of_its_time(monkeypatch: pytest.MonkeyPatch):
    clock, waits = iter([10.0, 10.5, 20.0, 29.0]), []
    monkeypatch.setattr("emulated_device.time", SimpleNamespace(perf_counter=lambda: next(clock), sleep=waits.append))
    layer: Any = torch.nn.Linear(3, 4)
    x = torch.ones(2, 3)
    before = layer(x)
    layer.__class__ = waiting(type(layer))
    layer.pace = Pace(seconds=2.0, rows=2, one_row=0.75)
    assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)
    assert waits == [1.5], "the second time computing took longer than the pace"
    assert isinstance(layer, torch.nn.Linear)
    assert waiting(torch.nn.Linear) is type(layer)


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("guided", [True, False])
def test_plans_use_all_devices(count: int, guided: bool):
    found = dict(emulate.plans(("cpu",) * count, guided, 2))
    assert len(found) >= 4
    for title, plan in found.items():
        assert len(plan.devices) == count, title
        at_best = emulate.at_best(plan, 20, 2 if guided else 1, Pace(1.0, rows=2, one_row=0.6))
        assert at_best == pytest.approx(1) if "exact" in title else at_best > 1.1, title


def test_rows_that_are_divided_gain_no_more_than_a_device_takes_less_for_them():
    pace = Pace(1.0, rows=2, one_row=0.8)
    two, four = (dict(emulate.plans(("cpu",) * count, True, 2)) for count in (2, 4))
    assert emulate.at_best(two["CFG lanes"], 20, 2, pace) == pytest.approx(1 / 0.8)
    together = emulate.at_best(two["lookahead, N=2"], 20, 2, pace)
    assert emulate.at_best(four["lookahead, CFG lanes x N=2"], 20, 2, pace) == pytest.approx(together / 0.8)
