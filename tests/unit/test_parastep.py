"""The mathematics of ParaStep, without a model: a 'denoiser' here is a formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend.schedules.parastep import ideal_speedup, rounds, row_shares, sample_in_rounds

STEPS = st.integers(1, 40)
LANES = st.integers(1, 8)
WARMUP = st.integers(1, 12)
KINDS = st.sampled_from(["linear", "newest", "paper"])


def schedule(steps: int) -> torch.Tensor:
    return torch.cat([torch.linspace(14.6, 0.1, steps), torch.zeros(1)])


def derivative_to_denoised(derivative: Callable[[torch.Tensor, int], torch.Tensor], sigmas: torch.Tensor):
    """The ``evaluate`` of a denoiser whose derivative at a latent and a step is given."""

    def evaluate(points: list[torch.Tensor], first: int) -> list[torch.Tensor]:
        return [point - sigmas[first + i] * derivative(point, first + i) for i, point in enumerate(points)]

    return evaluate


def euler(
    derivative: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor
) -> torch.Tensor:
    """ComfyUI's sample_euler, line by line."""
    for i in range(len(sigmas) - 1):
        denoised = x - sigmas[i] * derivative(x, i)
        d = (x - denoised) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


@given(STEPS, LANES, WARMUP)
def test_rounds_cover_every_step_once_and_in_order(steps: int, lanes: int, warmup: int):
    plan = rounds(steps, lanes, warmup)
    assert [step for first, length in plan for step in range(first, first + length)] == list(range(steps))
    assert all(1 <= length <= lanes for _, length in plan)
    assert [length for first, length in plan if first < warmup] == [1] * min(warmup, steps)
    assert plan[-1][1] == 1, "the last step starts from a latent that was never predicted"


@given(STEPS, LANES, WARMUP, KINDS)
def test_every_step_gets_exactly_one_fresh_prediction(steps: int, lanes: int, warmup: int, kind: str):
    sigmas, seen, told = schedule(steps), [], []
    evaluate = derivative_to_denoised(lambda x, step: seen.append(step) or x * 0.1, sigmas)
    sample_in_rounds(
        evaluate, torch.ones(1, 2), sigmas, lanes, warmup, kind, on_step=lambda step, _x, _denoised: told.append(step)
    )
    assert seen == told == list(range(steps))


@given(STEPS, WARMUP, KINDS)
def test_one_lane_is_eulers_method_bit_for_bit(steps: int, warmup: int, kind: str):
    sigmas = schedule(steps)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(steps))
    derivative = lambda x, step: torch.sin(x * (step + 1))  # noqa: E731
    ours = sample_in_rounds(derivative_to_denoised(derivative, sigmas), x, sigmas, 1, warmup, kind)
    assert torch.equal(ours, euler(derivative, x, sigmas))


@given(st.integers(6, 30), LANES, st.integers(3, 12))
def test_linear_prediction_is_exact_where_predictions_are_linear_in_the_step(steps: int, lanes: int, warmup: int):
    sigmas = schedule(steps).double()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(steps)).double()
    trajectory, points_seen = [], {}
    derivative = lambda _x, step: torch.full_like(x, 0.3 + 0.07 * step)  # noqa: E731
    euler(lambda x, step: trajectory.append(x) or derivative(x, step), x, sigmas)

    def record(point: torch.Tensor, step: int) -> torch.Tensor:
        points_seen[step] = point
        return derivative(point, step)

    sample_in_rounds(derivative_to_denoised(record, sigmas), x, sigmas, lanes, warmup, "linear")
    for step, true in enumerate(trajectory):
        torch.testing.assert_close(points_seen[step], true)


@pytest.mark.parametrize("kind", ["newest", "paper"])
def test_reuse_is_exact_where_predictions_are_constant(kind: str):
    sigmas = schedule(11).double()
    x = torch.zeros(1, 3).double()
    derivative = lambda x, _step: torch.ones_like(x)  # noqa: E731
    ours = sample_in_rounds(derivative_to_denoised(derivative, sigmas), x, sigmas, 3, 2, kind)
    torch.testing.assert_close(ours, euler(derivative, x, sigmas))


def test_the_paper_predictor_repeats_a_lanes_own_last_prediction():
    sigmas, points = schedule(8), {}

    def evaluate(at: list[torch.Tensor], first: int) -> list[torch.Tensor]:
        points.update({first + i: point for i, point in enumerate(at)})
        return [point - sigmas[first + i] * (first + i) for i, point in enumerate(at)]  # derivative: the step's number

    sample_in_rounds(evaluate, torch.zeros(1), sigmas, 2, 1, "paper")
    # rounds (0) (1 2) (3 4) (5 6) (7): lane 1 reaches step 4 with its own last prediction, of step 2
    torch.testing.assert_close(points[4], points[3] + 2 * (sigmas[4] - sigmas[3]))


@pytest.mark.parametrize(
    ("steps", "lanes", "warmup", "published"),
    [(50, 2, 5, 1.79), (50, 4, 5, 2.94), (50, 8, 5, 4.55), (50, 2, 13, 1.56), (50, 4, 13, 2.17), (50, 8, 13, 2.78),
     (200, 2, 5, 1.94), (200, 4, 5, 3.70), (200, 8, 5, 6.67), (8, 2, 2, 1.6), (4, 2, 1, 1.33)],
)  # fmt: skip
def test_the_ideal_bound_is_the_published_one(steps: int, lanes: int, warmup: int, published: float):
    assert ideal_speedup(steps, lanes, warmup) == pytest.approx(published, abs=0.006)


@given(STEPS, LANES, WARMUP)
def test_no_plan_beats_the_ideal_bound(steps: int, lanes: int, warmup: int):
    assert steps / len(rounds(steps, lanes, warmup)) <= ideal_speedup(steps, lanes, warmup) + 1e-9


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 8))
def test_rows_are_shared_evenly_in_whole_groups(groups: int, group: int, ranks: int):
    shares = row_shares(groups * group, group, ranks)
    assert len(shares) == ranks
    assert [row for begin, end in shares for row in range(begin, end)] == list(range(groups * group))
    sizes = [end - begin for begin, end in shares]
    assert all(size % group == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= group


def test_two_ranks_get_the_two_halves_of_a_guided_batch():
    assert list(row_shares(4, 1, 2)) == [(0, 2), (2, 4)]
