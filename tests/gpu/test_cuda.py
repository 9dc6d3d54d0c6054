"""The same promises on CUDA: ranks on GPUs of their own where there are two, else two ranks that share one."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import comfy.samplers
import pytest
import torch

from generation import Request, distance, generate
from leapfrog.nodes import AsyncUNetSplit
from leapfrog.nodes.rounds_sampler import in_rounds
from leapfrog.parallel_backend import LanesPlan, LeapfrogError
from ranks import load, reference, the_pool, with_lora

TOLERANCE = 2e-2
"""Relative; the denoiser computes in half precision."""
NEAR = 0.2
"""Relative, for modes that are not exact, on a denoiser with random weights."""
FAMILIES = ["flux", "unet"]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> str:
    if torch.cuda.device_count() > 1:
        return "0,1"
    monkeypatch.setenv("LEAPFROG_SHARE_GPU", "1")
    return "0,0"


def split(model: Any, devices: str, mode: str = "exact") -> Any:
    return AsyncUNetSplit.execute(model, devices, 2, 2, 1, mode).args[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_mode_is_comfyui(family: str, devices: str):
    request = Request(family=family)
    assert distance(generate(split(load(family), devices), request), reference(request)) < TOLERANCE


@pytest.mark.parametrize("mode", ["lookahead", "asyncdiff", "extrapolated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_modes_come_close(family: str, mode: str, devices: str):
    request = Request(family=family, steps=12)
    assert distance(generate(split(load(family), devices, mode), request), reference(request)) < NEAR


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_take_turns(family: str, devices: str):
    model = split(load(family), devices)
    for size in (8, 16, 8, 12):
        request = Request(family=family, size=size, batch=2)
        assert distance(generate(model, request), reference(request)) < TOLERANCE


def test_a_lora_is_baked_in_and_taken_out(devices: str):
    plain, changed = load("flux"), with_lora(load("flux"))
    with_it = generate(changed, Request())
    assert distance(with_it, reference(Request())) > 2 * TOLERANCE
    for _ in range(2):
        assert distance(generate(split(changed, devices), Request()), with_it) < TOLERANCE
        assert distance(generate(split(plain, devices), Request()), reference(Request())) < TOLERANCE


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_are_comfyui(family: str, lanes: int, devices: str):
    request = Request(family=family)
    sampler = in_rounds(LanesPlan.choose(devices, lanes, fidelity="exact"), comfy.samplers.sampler_object("euler"))
    assert distance(generate(load(family), request, sampler), reference(request)) < TOLERANCE


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_it_computes_is_told_soon_and_replaced(rank: int, devices: str):
    model = split(load("flux"), devices)
    generate(model, Request())
    pool = the_pool()
    struck: list[float] = []

    def kill(step: int, *_: Any) -> None:
        if step == 2:
            struck.append(time.monotonic())
            os.kill(pool.pids[rank], signal.SIGKILL)

    with pytest.raises(LeapfrogError) as caught:
        generate(model, Request(steps=200), on_step=kill)
    assert (caught.value.report.code, caught.value.report.rank) == ("rank_died", rank)
    assert time.monotonic() - struck[0] < 10
    assert not pool.alive
    assert distance(generate(model, Request()), reference(Request())) < TOLERANCE
