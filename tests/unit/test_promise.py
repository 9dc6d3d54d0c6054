"""What ParaStep tells a user before it starts."""

from __future__ import annotations

import pytest

from leapfrog.parallel_backend import LanesPlan


@pytest.mark.parametrize(
    ("devices", "lanes", "conditionings", "steps", "said"),
    [
        (2, 2, 1, 20, "at most 1.67x (20 steps, 2 at once, 2 devices)"),
        (2, 2, 1, 4, "at most 1.00x (4 steps, 2 at once, 2 devices): not worth it here"),
        (2, 2, 2, 20, "at most 1.90x (20 steps, 2 at once, 2 devices); lanes 1 gives 2.00x, exact"),
        (2, 0, 2, 20, "at most 2.00x (20 steps one by one, the prompts on 2 devices), exact"),
        (4, 0, 2, 20, "at most 3.33x (20 steps, 2 at once, 4 devices)"),
        (2, 1, 1, 20, "20 steps one by one, nothing to do for a second device; set lanes to 2 or more"),
        (1, 4, 1, 20, "20 steps, 4 as one batch on one device; pays only where one does not fill it"),
    ],
)
def test_the_promise(devices: int, lanes: int, conditionings: int, steps: int, said: str):
    plan = LanesPlan(("cpu",) * devices, lanes)
    assert plan.promise(steps, conditionings) == said
