from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from leapfrog.parallel_backend.schedules.lookahead import Decision, Lookahead, ideal_speedup

SIGMAS = [1.0, 0.95, 0.88, 0.8, 0.7, 0.61, 0.5, 0.42, 0.3, 0.21, 0.1, 0.0]
STEPS = len(SIGMAS) - 1


def latents(slope: Callable[[int], float], sigmas: list[float] = SIGMAS, batch: int = 2) -> list[torch.Tensor]:
    """The latents before each step of a run whose slope at step i is ``slope(i)`` times a fixed tensor."""
    draw = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, batch, 3, 4, 4, generator=draw, dtype=torch.float64)
    run = [x]
    for i in range(len(sigmas) - 2):
        run.append(run[-1] + slope(i) * direction * (sigmas[i + 1] - sigmas[i]))
    return run


def play(schedule: Lookahead, run: list[torch.Tensor]) -> list[Decision]:
    return [schedule.step(i, x) for i, x in enumerate(run)]


def exact_steps(decisions: list[Decision]) -> list[int]:
    return [i for i, decision in enumerate(decisions) if decision.exact]


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
@pytest.mark.parametrize("spacing", [1, 2, 3])
def test_slopes_linear_in_step_index_are_predicted_to_rounding(depth: int, spacing: int):
    run = latents(lambda i: 1 + 0.3 * i)
    decisions = play(Lookahead(SIGMAS, depth, warmup=3, bound=1e-12, spacing=spacing), run)
    assert exact_steps(decisions) == [0, 1, 2, STEPS - 1]
    for decision in decisions:
        for step, point in decision.ahead:
            assert torch.allclose(point, run[step], rtol=0, atol=1e-12)


def test_a_constant_slope_needs_one_exact_step_beside_the_first_and_the_last():
    decisions = play(Lookahead(SIGMAS, 2, warmup=0, bound=1e-12), latents(lambda i: 1.0))
    assert exact_steps(decisions) == [0, 1, STEPS - 1]


def test_the_pipeline_fills_behind_an_exact_step_and_then_gets_one_wave_per_step():
    decisions = play(Lookahead(SIGMAS, 3, warmup=4, bound=math.inf), latents(lambda i: 1.0))
    sent = [[step for step, _ in decision.ahead] for decision in decisions]
    assert sent == [[], [], [], [4, 5, 6], [7], [8], [9], [], [], [], []]
    assert [decision.drift < 1e-12 for decision in decisions] == [False] * 4 + [True] * 6 + [False]


def test_the_guard_empties_the_pipeline_where_the_run_bends():
    run = latents(lambda i: 1.0 if i < 5 else -1.0)  # x_6 is the first latent that nobody could foresee
    decisions = play(Lookahead(SIGMAS, 2, warmup=2, bound=1e-3), run)
    assert exact_steps(decisions)[:3] == [0, 1, 6]
    assert decisions[6].drift > 1e-3 > decisions[5].drift
    assert [step for step, _ in decisions[6].ahead] == [7, 8]
    assert exact_steps(play(Lookahead(SIGMAS, 2, warmup=2, bound=math.inf), run)) == [0, 1, STEPS - 1]


def test_drift_is_that_of_the_worst_sample_of_the_batch():
    run = latents(lambda i: 1.0)
    run[5][1] *= 1.5
    decisions = play(Lookahead(SIGMAS, 1, warmup=2, bound=0.3), run)
    assert decisions[5].drift == pytest.approx(1 / 3, rel=1e-5)
    assert decisions[5].exact


def test_automatic_warm_up_lasts_until_predictions_hold():
    run = latents(lambda i: (-1.0) ** i if i < 4 else 1.0)
    automatic = play(Lookahead(SIGMAS, 1, warmup=0, bound=1e-3, spacing=1), run)
    assert exact_steps(automatic) == [0, 1, 2, 3, 4, 5, 6, STEPS - 1]
    assert exact_steps(play(Lookahead(SIGMAS, 1, warmup=5, bound=math.inf), run)) == [0, 1, 2, 3, 4, STEPS - 1]


def rough(i: int) -> float:
    """What a sampler adds to the model's output: the larger, the more of its corrections are noise."""
    return 0.5 * (-1.0) ** i


@pytest.mark.parametrize("heard", [True, False])
def test_outputs_foretell_a_path_that_is_rougher_than_they_are(heard: bool):
    run, smooth = latents(lambda i: 1 + rough(i)), latents(lambda i: 1.0)
    direction = (smooth[1] - smooth[0]) / (SIGMAS[1] - SIGMAS[0])
    schedule, drifts = Lookahead(SIGMAS, 1, warmup=4, bound=math.inf, spacing=1), []
    for i, x in enumerate(run):
        drifts.append(schedule.step(i, x).drift)
        if heard:
            schedule.evaluated(x - SIGMAS[i] * direction)
    # the next output is known: what remains is one correction, not four of them in a line
    expected = [float(((SIGMAS[i] - SIGMAS[i - 1]) * 0.5 * direction).norm() / run[i].norm()) for i in range(5, 9)]
    assert (sum(drifts[5:9]) < 2 * sum(expected)) == heard


def test_a_kept_part_of_the_picture_is_foretold_by_its_path():
    run = latents(lambda i: 1.0)
    schedule, exact = Lookahead(SIGMAS, 2, warmup=0, bound=1e-12), []
    for i, x in enumerate(run):
        exact.append(schedule.step(i, x).exact)
        schedule.evaluated(torch.zeros_like(x))  # the model sees something else there
    assert exact == [True, True, *[False] * (STEPS - 3), True]


def test_an_evaluation_belongs_to_a_step():
    with pytest.raises(ValueError, match="before the first step"):
        Lookahead(SIGMAS, 1).evaluated(torch.zeros(1, 4))


def test_fresh_noise_makes_every_step_exact():
    draw = torch.Generator().manual_seed(1)
    run = [x + 0.3 * torch.randn(x.shape, generator=draw) for x in latents(lambda i: 1.0)]
    decisions = play(Lookahead(SIGMAS, 1, warmup=0, bound=0.02), run)
    assert exact_steps(decisions) == list(range(STEPS))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_latents_that_are_no_numbers_are_evaluated_exactly(bad: float):
    run = latents(lambda i: 1.0)
    run[5] = run[5] * bad
    decisions = play(Lookahead(SIGMAS, 1, warmup=2, bound=1.0), run)
    assert decisions[5].exact and decisions[6].exact


def test_a_repeated_sigma_keeps_the_slope():
    sigmas = [*SIGMAS[:5], *SIGMAS[4:]]
    run = latents(lambda i: 1.0, sigmas)
    assert exact_steps(play(Lookahead(sigmas, 2, warmup=2, bound=1e-12), run)) == [0, 1, STEPS]


def test_the_sampler_may_change_its_latent_in_place():
    run = latents(lambda i: 1.0)
    schedule, x, exact = Lookahead(SIGMAS, 1, warmup=2, bound=1e-12), run[0].clone(), []
    for i, now in enumerate(run):
        exact.append(schedule.step(i, x.copy_(now)).exact)
    assert exact == [True, True, *[False] * (STEPS - 3), True]


def test_steps_come_in_order():
    schedule, run = Lookahead(SIGMAS, 1), latents(lambda i: 1.0)
    with pytest.raises(ValueError, match="step 1 came where step 0"):
        schedule.step(1, run[0])
    play(schedule, run)
    with pytest.raises(ValueError, match="expected"):
        schedule.step(STEPS, run[0])


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"warmup": -1}, {"bound": -0.1}, {"bound": math.nan}, {"spacing": 0}])
def test_impossible_schedules_are_refused(wrong: dict):
    with pytest.raises(ValueError, match="no such schedule"):
        Lookahead(SIGMAS, **{"depth": 1, **wrong})
    with pytest.raises(ValueError, match="no such schedule"):
        Lookahead([1.0], 1)


@given(
    slopes=st.lists(st.floats(-2, 2), min_size=0, max_size=24),
    depth=st.integers(1, 7),
    warmup=st.integers(0, 6),
    bound=st.sampled_from([0.0, 1e-3, 0.02, 0.2, math.inf]),
    spacing=st.integers(1, 4),
)
@example(slopes=[], depth=1, warmup=0, bound=0.0, spacing=1)
def test_every_step_is_exact_or_served_by_the_one_wave_sent_for_it(
    slopes: list[float], depth: int, warmup: int, bound: float, spacing: int
):
    steps = len(slopes) + 1
    sigmas = [1 - i / steps for i in range(steps + 1)]
    schedule = Lookahead(sigmas, depth, warmup, bound, spacing)
    in_flight: set[int] = set()
    for i, x in enumerate(latents(lambda i: slopes[i], sigmas)):
        decision = schedule.step(i, x)
        assert decision.exact or i in in_flight
        assert decision.exact or decision.drift <= bound
        assert decision.exact or warmup <= i < steps - 1
        in_flight = set() if decision.exact else in_flight - {i}
        for step, point in decision.ahead:
            assert step not in in_flight
            assert point.shape == x.shape
            in_flight.add(step)
        assert len(in_flight) <= depth
        assert sorted(in_flight) == list(range(i + 1, i + 1 + len(in_flight)))  # none is missing, none comes too late
    assert not in_flight


def test_ideal_speed_counts_exact_steps_whole_and_others_by_the_slowest_component():
    assert ideal_speedup([True] * 3 + [False] * 46 + [True], 1 / 2) == pytest.approx(50 / 27)
    assert ideal_speedup([True] * 5, 1 / 3) == 1
    decisions = play(Lookahead(SIGMAS, 2, warmup=3), latents(lambda i: 1.0))
    assert ideal_speedup((decision.exact for decision in decisions), 0.4) == pytest.approx(11 / (4 + 7 * 0.4))
