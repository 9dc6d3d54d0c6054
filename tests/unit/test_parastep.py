"""The mathematics of ParaStep, without a sampler: predictors, guard, who evaluates what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend.schedules.parastep import Guard, Predictor, position, row_shares

SIGMA = 2.0


def latent(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tell(predictor: Predictor, step: int, slope: torch.Tensor, lane: int = 0) -> None:
    """A fresh output at ``step`` whose slope is given, at some latent."""
    x = latent(step)
    predictor.add(step, step, x, SIGMA, (x - SIGMA * slope,), lane)


def guessed_slope(predictor: Predictor, step: int, lane: int = 0) -> torch.Tensor:
    x = latent(1000 + step)
    return (x - predictor.guess(step, step, x, SIGMA, lane)[0]) / SIGMA


@given(st.integers(1, 3), st.integers(4, 12), st.integers(1, 8))
def test_linear_continues_what_is_linear_in_the_step(apart: int, known: int, ahead: int):
    predictor = Predictor("linear", apart)
    for step in range(known):
        tell(predictor, step, latent(500) + step * latent(501))
    step = known - 1 + ahead
    torch.testing.assert_close(guessed_slope(predictor, step), latent(500) + step * latent(501))


@pytest.mark.parametrize("apart", [1, 2])
def test_linear_takes_points_so_many_steps_apart(apart: int):
    predictor = Predictor("linear", apart)
    for step, slope in enumerate([0.0, 1.0, 4.0, 9.0]):
        tell(predictor, step, torch.full((2, 3), slope, dtype=torch.float64))
    expected = 9.0 + (5.0 if apart == 1 else (9.0 - 1.0) / 2)
    torch.testing.assert_close(guessed_slope(predictor, 4), torch.full((2, 3), expected, dtype=torch.float64))


def test_linear_repeats_the_only_output_it_knows():
    predictor = Predictor()
    tell(predictor, 0, latent(7))
    torch.testing.assert_close(guessed_slope(predictor, 1), latent(7))


def test_two_evaluations_at_the_same_time_make_no_slope():
    predictor = Predictor()
    x = latent(1)
    for index, at in enumerate([0.0, 1.0, 1.0]):
        predictor.add(index, at, x, SIGMA, (x - SIGMA * (at + index * 1e-3),), 0)
    guess = predictor.guess(3, 2.0, x, SIGMA, 0)[0]
    torch.testing.assert_close((x - guess) / SIGMA, torch.full_like(x, 2.0), atol=0.01, rtol=0)


def test_newest_repeats_the_newest_and_paper_the_lanes_own():
    for kind, expected in (("newest", 30), ("paper", 31)):
        predictor = Predictor(kind)
        tell(predictor, 0, latent(29))
        tell(predictor, 1, latent(31), lane=1)
        tell(predictor, 2, latent(30), lane=0)
        torch.testing.assert_close(guessed_slope(predictor, 4, lane=1), latent(expected))


def test_a_rejected_output_is_the_prediction_for_its_evaluation_until_the_fresh_one_comes():
    predictor = Predictor()
    for step in range(3):
        tell(predictor, step, latent(500) + step * latent(501))
    x = latent(3)
    predictor.reject(3, 3, x, SIGMA, (x - SIGMA * latent(99),))
    torch.testing.assert_close(guessed_slope(predictor, 3), latent(99))
    tell(predictor, 3, latent(500) + 3 * latent(501))
    torch.testing.assert_close(guessed_slope(predictor, 4), latent(500) + 4 * latent(501))


def test_what_was_forgotten_is_not_continued():
    predictor = Predictor()
    tell(predictor, 0, latent(1))
    tell(predictor, 1, latent(2))
    predictor.forget()
    tell(predictor, 2, latent(3))
    torch.testing.assert_close(guessed_slope(predictor, 3), latent(3))


def test_outputs_are_carried_in_the_space_that_foretells_better():
    """Where latents jump (fresh noise) and what is denoised does not, slopes foretell nothing."""
    jumping, smooth = Predictor(), Predictor()
    for step in range(6):
        x = 10 * latent(step)
        jumping.add(step, step, x, SIGMA, (latent(500) + step * latent(501),), 0)
        smooth.add(step, step, x, SIGMA, (x - SIGMA * (latent(500) + step * latent(501)),), 0)
    assert (jumping.space, smooth.space) == ("denoised", "slope")
    torch.testing.assert_close(jumping.guess(6, 6, latent(77), SIGMA, 0)[0], latent(500) + 6 * latent(501))
    point, x, found = latent(1), latent(2), latent(3)
    assert jumping.transfer((found,), point, x)[0] is found
    torch.testing.assert_close(smooth.transfer((found,), point, x)[0], found + x - point)
    assert smooth.transfer((found,), x, x)[0] is found


def test_all_outputs_of_an_evaluation_are_predicted():
    predictor = Predictor()
    x = latent(0)
    for step in range(3):
        predictor.add(step, step, x, SIGMA, (x - SIGMA * step, x + SIGMA * 2 * step), 0)
    first, second = predictor.guess(3, 3, x, SIGMA, 0)
    torch.testing.assert_close(first, x - SIGMA * 3)
    torch.testing.assert_close(second, x + SIGMA * 6)


def test_no_more_is_remembered_than_is_of_use():
    predictor = Predictor("linear", 2)
    for step in range(100):
        tell(predictor, step, latent(step))
    assert len(predictor._known) <= 4


SCHEDULE = [10.0, 6.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("sigma", "at"), [(12.0, 0), (10.0, 0), (8.0, 0.5), (6.0, 1), (2.0, 2.5), (1.0, 3), (0.25, 3.75), (0.0, 4)]
)
def test_an_evaluation_lies_between_the_steps_of_its_sigma(sigma: float, at: float):
    assert position(sigma, SCHEDULE) == pytest.approx(at)
    if sigma <= SCHEDULE[0]:
        assert position(sigma, SCHEDULE[::-1]) == pytest.approx(len(SCHEDULE) - 1 - at), "as with FlipSigmas"


def test_a_guard_without_a_bound_has_all_lanes_after_the_warm_up():
    guard = Guard(4, warmup=3)
    assert [guard.length(index) for index in range(5)] == [1, 1, 1, 4, 4]
    assert guard.accepts(latent(0), latent(1))


def test_a_guard_accepts_within_its_bound_the_worst_sample_of_the_batch():
    guard = Guard(2, bound=0.1)
    x = torch.ones(2, 4)
    assert guard.accepts(x * 1.09, x)
    assert not guard.accepts(x * 1.11, x)
    assert not guard.accepts(x * torch.tensor([[1.0], [1.2]]), x)
    assert not guard.accepts(x * torch.nan, x)


def test_a_round_grows_by_one_where_one_more_would_have_been_accepted_and_shrinks_to_what_was():
    guard, x = Guard(3, bound=0.1), torch.ones(1, 4)
    assert guard.length(5) == 1
    guard.spare(1, x * 1.2, x)
    assert guard.length(5) == 1
    guard.spare(1, x * 1.01, x)
    assert guard.length(5) == 2
    guard.spare(2, x, x)
    guard.spare(3, x, x)
    assert guard.length(5) == 3
    guard.shrink(1)
    assert guard.length(5) == 1


def test_an_eager_guard_always_has_all_lanes():
    guard = Guard(4, bound=1e-5, eager=True)
    guard.shrink(1)
    assert [guard.length(index) for index in range(3)] == [1, 4, 4]


@pytest.mark.parametrize("wrong", [{"lanes": 0}, {"lanes": 2, "warmup": -1}, {"lanes": 2, "bound": float("nan")}])
def test_a_guard_that_makes_no_sense(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="no such guard"):
        Guard(**wrong)  # pyright: ignore[reportArgumentType]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=5), st.integers(1, 8))
def test_every_row_is_evaluated_once_and_groups_stay_together(sizes: list[tuple[int, int]], ranks: int):
    calls = [(groups * group, group) for groups, group in sizes]
    shares = row_shares(calls, ranks)
    for (rows, group), share in zip(calls, shares, strict=True):
        assert [row for rank in sorted(share) for row in range(*share[rank])] == list(range(rows))
        assert all(begin % group == 0 and begin < end for begin, end in share.values())
    load = [0] * ranks
    for (_, group), share in zip(calls, shares, strict=True):
        for rank, (begin, end) in share.items():
            load[rank] += (end - begin) // group
    assert max(load) - min(load) <= 1


def test_two_ranks_get_the_two_halves_of_a_guided_batch_or_an_evaluation_each():
    assert row_shares([(4, 1)], 2) == [{0: (0, 2), 1: (2, 4)}]
    assert row_shares([(2, 1), (2, 1)], 2) == [{0: (0, 2)}, {1: (0, 2)}]
