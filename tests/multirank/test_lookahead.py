"""The asynchronous modes of Async UNet Split on a trained model, and what lookahead does with ComfyUI's samplers."""

from __future__ import annotations

import logging
import math
import threading
from functools import cache
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_custom_sampler import CFGOverride
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_model_advanced import RescaleCFG

import trained
from generation import Request, distance, generate
from ranks import EXACT, load, reference, split

STEPS = 20
ATTACHED: dict[str, Any] = {
    "APG": lambda model: APG.execute(model, 1.0, 5.0, 0.5).args[0],
    "RescaleCFG": lambda model: RescaleCFG().patch(model, 0.7)[0],
    "CFGOverride": lambda model: CFGOverride.execute(model, 1.0, 0.3, 0.7).args[0],
    "EasyCache": lambda model: EasyCacheNode.execute(model, 0.9, 0.1, 0.9, False).args[0],
}


@cache
def alone(sampler: str = "euler") -> torch.Tensor:
    return trained.pictures(trained.load(), STEPS, sampler)


def fidelity(sampler: str = "euler", **options: Any) -> float:
    """PSNR in dB to ComfyUI alone."""
    return trained.psnr(trained.pictures(split(trained.load(), **options), STEPS, sampler), alone(sampler))


def kinds(caplog: pytest.LogCaptureFixture) -> str:
    """The report's line about denoiser calls."""
    return next(r.getMessage() for r in reversed(caplog.records) if "denoiser calls" in r.getMessage())


def test_lookahead_is_close_and_asyncdiff_is_not():
    lookahead, published = fidelity(mode="lookahead", warmup=0), fidelity(mode="asyncdiff", warmup=3)
    assert lookahead > 50
    assert published < lookahead - 10
    assert published > 20


@pytest.mark.parametrize(("warmup", "exact"), [(1, 3), (2, 3), (3, 4), (5, 6)])
def test_as_many_evaluations_are_exact_as_the_warm_up_has(warmup: int, exact: int, caplog: pytest.LogCaptureFixture):
    """And the last one. The second is never predicted: it starts where the first has brought the sampler."""
    caplog.set_level(logging.INFO, "leapfrog")
    generate(split(load("flux"), mode="lookahead", warmup=warmup, drift_bound=math.inf), Request(steps=8))
    assert f"8 denoiser calls ({exact} exact, {8 - exact} ahead)" in kinds(caplog)


def test_extrapolated_states_are_closer_than_stale_ones():
    assert fidelity(mode="extrapolated", warmup=3) > fidelity(mode="asyncdiff", warmup=3) + 3


def test_time_shift_changes_asynchronous_steps_only():
    assert fidelity(mode="asyncdiff", warmup=3, time_shift=True) != fidelity(mode="asyncdiff", warmup=3)
    assert fidelity(mode="exact", time_shift=True) > 100


def test_a_tighter_bound_is_closer():
    assert fidelity(mode="lookahead", warmup=0, drift_bound=0.0005) > fidelity(mode="lookahead", warmup=0) + 3


def test_an_automatic_warm_up_ends_by_itself(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    assert fidelity(mode="asyncdiff", warmup=0, drift_bound=0.2) > 20
    assert "exact" in kinds(caplog)
    assert "async" in kinds(caplog)
    assert fidelity(mode="asyncdiff", warmup=0, drift_bound=1e-6) > 100, "the states never hold that still"
    assert any("no step was asynchronous" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "uni_pc", "deis", "res_multistep", "lms", "ipndm", "ddpm"])
def test_lookahead_serves_samplers_that_evaluate_once_per_step(sampler: str):
    assert fidelity(sampler, mode="lookahead", warmup=0) > 35


@pytest.mark.parametrize(
    ("sampler", "at_least"),
    [
        ("heun", 65), ("dpm_2", 65), ("euler_cfg_pp", 40), ("euler_ancestral", 38), ("dpmpp_2m_sde", 38),
        ("dpmpp_sde", 38),
    ],
)  # fmt: skip
def test_lookahead_serves_samplers_that_evaluate_twice_or_draw_noise(sampler: str, at_least: float):
    assert fidelity(sampler, mode="lookahead", warmup=0) > at_least


def test_a_sampler_that_is_none_of_comfyuis_is_exact_and_named(caplog: pytest.LogCaptureFixture):
    class Own(comfy.samplers.Sampler):
        def sample(self, *args: Any, **kwargs: Any) -> Any:
            return comfy.samplers.sampler_object("euler").sample(*args, **kwargs)

    ours = generate(split(load("flux"), mode="lookahead", warmup=0), Request(), Own())
    assert distance(ours, reference(Request())) < EXACT
    assert any("cannot look ahead" in r.getMessage() and "Own" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("name", ATTACHED)
def test_nodes_that_keep_state_from_step_to_step(name: str):
    theirs = trained.pictures(ATTACHED[name](trained.load()), STEPS)
    assert trained.psnr(theirs, alone()) < 60, "it changes nothing"
    for model in (
        ATTACHED[name](split(trained.load(), mode="lookahead", warmup=0)),
        split(ATTACHED[name](trained.load()), mode="lookahead", warmup=0),
    ):
        assert trained.psnr(trained.pictures(model, STEPS), theirs) > 40


def test_waves_end_with_a_run_that_is_cancelled():
    model = split(trained.load(), mode="lookahead", warmup=1)

    def waves() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "leapfrog wave"]

    def cancel(step: int, *_: Any) -> None:
        if step == 5:
            assert waves()
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        generate(split(load("flux"), mode="lookahead", warmup=1, drift_bound=1.0), Request(steps=8), on_step=cancel)
    assert not waves()
    assert trained.psnr(trained.pictures(model, STEPS), alone()) > 50


@pytest.mark.parametrize("family", ["flux", "unet"])
@pytest.mark.parametrize(("ranks", "components"), [(2, 1), (4, 2)])
def test_conditionings_on_lanes_of_their_own_are_exact(family: str, ranks: int, components: int):
    for request in (Request(family), Request(family, batch=2), Request(family, cfg=1.0)):
        model = split(load(family), ranks=ranks, components=components, mode="exact", cfg_lanes="on")
        assert distance(generate(model, request), reference(request)) < EXACT


def test_lanes_of_components_that_look_ahead():
    assert fidelity(mode="lookahead", ranks=4, components=2, cfg_lanes="on", warmup=0) > 50


def test_a_cut_by_hand(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    model = split(load("flux"), ranks=3, mode="exact", cut="1, 5")
    assert distance(generate(model, Request()), reference(Request())) < EXACT
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "double_blocks.0 to double_blocks.0" in text
    assert "double_blocks.1 to single_blocks.2" in text
    assert "single_blocks.3 to single_blocks.3" in text


def test_three_components_look_two_steps_ahead():
    assert fidelity(mode="lookahead", ranks=3, warmup=0) > 40


def test_two_steps_per_parallel_batch():
    striding = fidelity(mode="asyncdiff", ranks=2, stride=2, devices=3, warmup=3)
    assert 15 < striding < fidelity(mode="asyncdiff", warmup=3)
