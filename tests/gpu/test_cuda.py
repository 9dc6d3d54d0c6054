"""The same promises on CUDA: ranks on GPUs of their own where there are two, else two ranks that share one."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch

from generation import Request, generate
from leapfrog.nodes import AsyncUNetSplit
from leapfrog.nodes.rounds_sampler import in_rounds
from leapfrog.parallel_backend import LanesPlan
from ranks import load

TOLERANCE = 2e-2
"""Relative; the denoiser computes in half precision."""


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> str:
    if torch.cuda.device_count() > 1:
        return "0,1"
    monkeypatch.setenv("LEAPFROG_SHARE_GPU", "1")
    return "0,0"


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_exact_mode_is_comfyui(family: str, devices: str):
    request = Request(family=family)
    split = AsyncUNetSplit.execute(load(family), devices, 0, 2, 1, "exact").args[0]
    assert apart(generate(split, request), generate(load(family), request)) < TOLERANCE


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_one_lane_is_comfyui(family: str, devices: str):
    request = Request(family=family)
    sampler = in_rounds(LanesPlan.choose(devices, 1), comfy.samplers.sampler_object("euler"))
    assert apart(generate(load(family), request, sampler), generate(load(family), request)) < TOLERANCE
