"""ParaStep's engine around ComfyUI's own samplers and a formula for a denoiser: no rank, nothing at the same time."""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leapfrog.nodes.ahead import Asking, evaluated
from leapfrog.nodes.coroutine import IDLE
from leapfrog.nodes.scout import NoiseState, Outputs, Question, Scout
from leapfrog.nodes.shared_noise import with_shared_noise
from leapfrog.parallel_backend import LeapfrogError, Rounds
from leapfrog.parallel_backend.schedules.parastep import Guard, Predictor
from leapfrog.parallel_backend.schedules.simulate import rounds_taken

STEPS = 12
SEED = 5
SHAPE = (2, 3, 4)
SAMPLERS = sorted(comfy.samplers.SAMPLER_NAMES)
FRESH_NOISE = re.compile("ancestral|sde|ddpm|lcm|seeds|sa_solver")
STOCHASTIC = set(filter(FRESH_NOISE.search, SAMPLERS))


class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    pass


SAMPLING = Sampling()
SIGMAS = comfy.samplers.calculate_sigmas(SAMPLING, "karras", STEPS)


class Formula:
    """A denoiser as a sampler sees a model: the best one for a normal distribution, bent a little."""

    def __init__(self) -> None:
        patcher = SimpleNamespace(get_model_object=lambda _name: SAMPLING)
        self.inner_model = SimpleNamespace(model_patcher=patcher, inner_model=SimpleNamespace(model_sampling=SAMPLING))
        self.calls = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **args: Any) -> torch.Tensor:
        self.calls += 1
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        mean = torch.linspace(-2, 3, x.numel()).view(x.shape)
        denoised = (0.5 * x + s**2 * mean) / (0.5 + s**2) + 0.02 * torch.sin(x / (1 + s))
        for function in args.get("model_options", {}).get("sampler_post_cfg_function", ()):
            function({"denoised": denoised, "uncond_denoised": denoised * 0.9, "cond_denoised": denoised * 1.1})
        return denoised


@dataclass
class Evaluated:
    """An evaluation that is there at once."""

    index: int
    question: Question
    outputs: Outputs
    fails: bool = False

    def finish(self) -> Outputs:
        if self.fails:
            raise LeapfrogError.of("rank_died", "A rank is gone.")
        return self.outputs

    def drop(self) -> None:
        pass


def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * SIGMAS[0]


def run(name: str, model: Any, **how: Any) -> torch.Tensor:
    sampler = comfy.samplers.sampler_object(name)
    how = {"callback": lambda info: None, "disable": True, **how}
    extra_args = {"seed": SEED, "model_options": {}}
    return sampler.sampler_function(model, noise(), SIGMAS, extra_args=extra_args, **how, **sampler.extra_options)


class Run:
    """A sampler's run in rounds. ``evaluated`` are the evaluations in the order in which they were started,
    ``lengths`` how many there were in each round, ``asked`` and ``answers`` what the true sampler asked and got.
    ``failing`` are those of ``evaluated`` that give no outputs."""

    def __init__(
        self, name: str, lanes: int, bound: float = math.inf, kind: str = "linear", warmup: int = 2,
        eager: bool = False, section: Callable[[float], Any] = lambda level: None, sample: Any = run,
        rolling: bool = False, failing: Sequence[int] = (), carry_on: bool = True,
    ):  # fmt: skip
        self.notes: list[str] = []
        self.evaluated: list[Evaluated] = []
        self.lengths: list[int] = []
        self.asked: list[Question] = []
        self.answers: list[Outputs] = []
        self.callbacks: list[int] = []
        formula = Formula()

        def start(questions: Sequence[Question], lane: int) -> list[Evaluated]:
            first = len(self.answers) + lane
            self.lengths.append(len(questions))
            found = []
            for index, one in enumerate(questions, first):
                found.append(Evaluated(index, one, evaluated(formula, (), one), len(self.evaluated) in failing))
                self.evaluated.append(found[-1])
            return found

        function = comfy.samplers.sampler_object(name).sampler_function
        shared = with_shared_noise(function, noise(), SIGMAS, SEED, {})

        def sampler(ask: Callable[[Question], Outputs], **how: Any) -> torch.Tensor:
            return sample(name, Asking(formula, ask, ()), **shared, **how)

        def ask(question: Question) -> Outputs:
            self.asked.append(Question(question.x.clone(), question.sigma, question.args))
            self.answers.append(self.rounds.ask(question))
            return self.answers[-1]

        state = NoiseState()
        self.rounds = Rounds(
            lambda question: start([question], 0)[0].outputs, start, lambda answers: Scout(sampler, state, answers),
            SIGMAS.tolist(),
            lambda: (Guard(lanes, warmup, bound, eager), Predictor(kind, 1 + (lanes > 3))) if lanes > 1 else None,
            section, self.notes.append, lambda error: carry_on, rolling,
        )  # fmt: skip
        try:
            self.result = sampler(ask, callback=lambda info: self.callbacks.append(info["i"]))
        finally:
            self.rounds.close()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_lane_is_the_sampler_bit_for_bit(name: str):
    torch.manual_seed(1)
    expected = run(name, Formula())
    torch.manual_seed(1)
    ours = Run(name, lanes=1)
    assert torch.equal(ours.result, expected)
    assert not ours.rounds._answers, "nobody will want them"


@pytest.mark.parametrize("lanes", [2, 3, 5, 8])
@pytest.mark.parametrize("warmup", [0, 2, 4])
@pytest.mark.parametrize("bound", [math.inf, 1e9])
def test_a_run_without_rejections_takes_the_rounds_that_are_simulated(lanes: int, warmup: int, bound: float):
    expected = rounds_taken(STEPS, lanes, warmup, grows=bound < math.inf)
    assert Run("euler", lanes, bound, warmup=warmup).lengths == expected


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - STOCHASTIC - {"dpm_adaptive"}))
@pytest.mark.parametrize("lanes", [2, 4])
def test_a_deterministic_sampler_comes_close_in_fewer_rounds(name: str, lanes: int):
    expected, sequential = run(name, formula := Formula()), formula.calls
    ours = Run(name, lanes)
    assert not ours.notes
    assert ours.rounds.taken.asked == sequential
    assert distance(ours.result, expected) < 0.07
    assert ours.rounds.taken.count < 0.8 * sequential
    assert ours.callbacks == list(range(len(ours.callbacks)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_a_guard_any_sampler_comes_close(name: str):
    """Of this denoiser's output much is the noise of its input, so fresh noise is as hard to foretell as can be."""
    torch.manual_seed(1)
    expected = run(name, Formula())
    torch.manual_seed(1)
    ours = Run(name, lanes=3, bound=0.02)
    assert not ours.notes
    assert distance(ours.result, expected) < 0.05


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_guard_gives_the_samplers_own_result(name: str):
    torch.manual_seed(1)
    expected = run(name, Formula())
    torch.manual_seed(1)
    assert distance(Run(name, lanes=3, bound=1e-5, eager=True).result, expected) < 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callers_random_numbers_are_left_alone(name: str):
    torch.manual_seed(1)
    run(name, Formula())
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    Run(name, lanes=3)
    assert torch.equal(torch.get_rng_state(), expected)


@given(
    st.integers(1, 8),
    st.integers(0, 6),
    st.sampled_from(["linear", "newest", "paper"]),
    st.sampled_from([math.inf, 0.3, 0.02, 1e-3]),
    st.sampled_from(["euler", "dpmpp_2m", "heun", "euler_ancestral"]),
)
@settings(max_examples=40, deadline=None)
def test_each_answer_is_the_one_fresh_output_for_its_evaluation(
    lanes: int, warmup: int, kind: str, bound: float, name: str
):
    ours = Run(name, lanes, bound, kind, warmup)
    assert len(ours.evaluated) == ours.rounds.taken.asked + ours.rounds.taken.rejected
    assert len(ours.lengths) == ours.rounds.taken.count
    used = {one.index: one for one in ours.evaluated}  # the last one for each
    assert sorted(used) == list(range(ours.rounds.taken.asked))
    for index, (question, answer) in enumerate(zip(ours.asked, ours.answers, strict=True)):
        fresh = used[index]
        assert fresh.question.level == question.level
        assert distance(fresh.question.x, question.x) <= bound + 1e-6
        moved = fresh.outputs[0] + question.x - fresh.question.x
        assert min(distance(answer[0], fresh.outputs[0]), distance(answer[0], moved)) < 1e-6
    assert all(length <= lanes for length in ours.lengths)
    assert all(length == 1 for length in ours.lengths[: max(1, min(warmup, len(ours.lengths)))])


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"dpm_adaptive"}))
@pytest.mark.parametrize("components", [2, 4])
def test_a_pipeline_is_kept_full_until_an_evaluation_is_rejected(name: str, components: int):
    torch.manual_seed(1)
    expected = run(name, Formula())
    torch.manual_seed(1)
    ours = Run(name, components, bound=0.05, eager=True, rolling=True)
    assert distance(ours.result, expected) < 0.1
    assert ours.rounds.taken.count < ours.rounds.taken.asked or name in STOCHASTIC
    assert max(ours.lengths) == components
    assert len({one.index for one in ours.evaluated}) == ours.rounds.taken.asked


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_evaluation_is_made_at_the_true_latent(name: str):
    ours = Run(name, lanes=4)
    assert torch.equal(ours.evaluated[-1].question.x, ours.asked[-1].x)
    assert ours.lengths[-1] == 1


def test_a_sampler_that_does_not_repeat_itself_goes_step_by_step():
    counter = itertools.count()

    def restless(name: str, model: Any, **how: Any) -> torch.Tensor:
        number = next(counter)
        return run(name, lambda x, sigma, **args: model(x + 0.01 * number, sigma, **args), **how)

    ours = Run("euler", lanes=4, sample=restless)
    assert ours.notes == ["the sampler does not repeat itself (at evaluation 1), so steps are taken one by one"]
    assert ours.lengths == [1] * STEPS


def test_a_sampler_that_fails_on_predictions_goes_step_by_step():
    true = [True]

    def fragile(name: str, model: Any, **how: Any) -> torch.Tensor:
        own, true[0] = true[0], False
        if own:
            return run(name, model, **how)
        raise RuntimeError("no second run")

    ours = Run("euler", lanes=4, sample=fragile)
    assert ours.lengths == [1] * STEPS
    assert "no second run" in ours.notes[0]


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_sde"])
def test_a_run_goes_on_from_an_evaluation_that_is_lost(name: str, rolling: bool):
    torch.manual_seed(1)
    expected = run(name, Formula())
    torch.manual_seed(1)
    ours = Run(name, lanes=3, bound=0.02, eager=True, rolling=rolling, failing=[4])
    assert not ours.notes
    assert distance(ours.result, expected) < 0.05
    assert ours.callbacks == list(range(STEPS))
    again = next(one for one in ours.evaluated[5:] if one.index == ours.evaluated[4].index)
    assert torch.equal(again.question.x, ours.asked[again.index].x), "at the true latent"


def test_an_evaluation_that_is_lost_is_an_error_where_nobody_carries_on():
    with pytest.raises(LeapfrogError, match="gone"):
        Run("euler", lanes=3, failing=[4], carry_on=False)


def test_no_round_crosses_a_change_of_conditioning():
    changes = SIGMAS[6].item()
    ours = Run("euler", lanes=4, section=lambda level: level > changes, warmup=2)
    first = 0
    for length in ours.lengths:
        sections = [one.question.level > changes for one in ours.evaluated[first : first + length]]
        assert len(set(sections)) == 1
        first += length
    assert max(ours.lengths) > 1


def test_all_threads_of_a_run_wait_for_the_next_one():
    def threads(idle: bool) -> int:
        return sum((thread.name == IDLE) == idle for thread in threading.enumerate())

    Run("dpmpp_2m", lanes=4)
    waiting, others = threads(idle=True), threads(idle=False)
    with pytest.raises(ZeroDivisionError):
        Run("dpmpp_2m", lanes=4, section=lambda level: 1 / (level > 1))
    Run("dpmpp_2m", lanes=4)
    assert waiting
    assert (threads(idle=True), threads(idle=False)) == (waiting, others)
