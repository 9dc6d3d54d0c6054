"""What both nodes tell a user before they start."""

from __future__ import annotations

import pytest

from leapfrog.parallel_backend import LanesPlan, SplitPlan


@pytest.mark.parametrize(
    ("devices", "lanes", "conditionings", "steps", "said"),
    [
        (2, 2, 1, 20, "at most 1.67x (20 steps, 2 at once, 2 devices)"),
        (2, 2, 1, 4, "at most 1.00x (4 steps, 2 at once, 2 devices): not worth it here"),
        (2, 2, 2, 20, "at most 2.00x (20 steps, 2 at once, 2 devices); lanes 1 gives 2.00x, exact"),
        (2, 0, 2, 20, "at most 2.00x (20 steps one by one, the prompts on 2 devices), exact"),
        (4, 0, 2, 20, "at most 3.33x (20 steps, 2 at once, 4 devices)"),
        (8, 8, 1, 20, "at most 2.50x (20 steps, 8 at once, 8 devices)"),
        (4, 4, 1, 50, "at most 3.12x (50 steps, 4 at once, 4 devices)"),
        (2, 1, 1, 20, "20 steps one by one, nothing to do for a second device; set lanes to 2 or more"),
        (
            1,
            4,
            1,
            20,
            "20 steps, 4 as one batch on one device; faster only where one leaves it partly idle",
        ),
    ],
)
def test_the_promise(devices: int, lanes: int, conditionings: int, steps: int, said: str):
    plan = LanesPlan(("cpu",) * devices, lanes, bound=0.012)
    assert plan.promise(steps, conditionings) == said


def test_the_promise_counts_the_pictures_of_a_batch():
    plan = LanesPlan(("cpu",) * 2, 1)
    assert plan.promise(20, 1, batch=4) == "at most 2.00x (20 steps one by one, the pictures on 2 devices), exact"
    assert plan.promise(20, 1, batch=3) == "at most 1.50x (20 steps one by one, the pictures on 2 devices), exact"
    said = LanesPlan(("cpu",) * 2, 2, bound=0.012).promise(20, 1, batch=3)
    assert said == "at most 1.88x (20 steps, 2 at once, 2 devices)"


@pytest.mark.parametrize(
    ("steps", "lanes", "warmup", "speed"), [(50, 8, 5, 4.55), (50, 4, 5, 2.94), (50, 2, 13, 1.56), (200, 8, 5, 6.67)]
)
def test_as_published_the_bound_is_the_published_one(steps: int, lanes: int, warmup: int, speed: float):
    """Which is steps / (warm-up + ceil((steps - warm-up) / lanes))."""
    plan = LanesPlan(("cpu",) * lanes, lanes, warmup, "paper")
    assert plan.ideal_speedup(steps, 1) == pytest.approx(speed, abs=0.006)


@pytest.mark.parametrize(
    ("mode", "lanes", "components", "slowest", "steps", "said"),
    [
        ("exact", 1, 2, 0.5, 20, "no faster than one device, exact"),
        ("exact", 2, 2, 0.5, 20, "at most 2.00x, exact"),
        ("lookahead", 2, 1, 1.0, 20, "at most 2.00x, exact"),
        ("lookahead", 1, 2, 0.5, 20, "at most 1.74x (20 steps, 2 components, the slowest takes 50% of a step)"),
        ("lookahead", 2, 2, 0.5, 20, "at most 3.48x (20 steps, 2 components, the slowest takes 50% of a step)"),
        ("lookahead", 1, 2, 0.9, 20, "at most 1.09x (20 steps, 2 components, the slowest takes 90% of a step): "
         "not worth it here"),
        ("asyncdiff", 1, 4, 0.25, 20, "at most 3.48x (20 steps, 4 components, the slowest takes 25% of a step)"),
    ],
)  # fmt: skip
def test_the_promise_of_a_split(mode: str, lanes: int, components: int, slowest: float, steps: int, said: str):
    plan = SplitPlan(("cpu",) * lanes * components, components, mode=mode)
    assert plan.promise(steps, lanes, components, slowest) == said
