"""Leapfrog Adviser on two ranks: what it measures, and that its advice can be followed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from generation import Request, distance, generate, prompt
from leapfrog.nodes import LeapfrogAdviser
from leapfrog.nodes.adviser import measured
from leapfrog.nodes.rounds_sampler import in_rounds
from leapfrog.parallel_backend import LanesPlan, LeapfrogError, SplitPlan, Survey
from ranks import EXACT, in_ranks, load, parastep, reference, split
from where import devices


def ask(model: Any, family: str = "flux", **changes: Any) -> tuple[Any, str]:
    request = Request(family)
    inputs = {"steps": 20, "cfg": 3.0, "devices": devices(2), "wish": "balanced", **changes}
    latent = {"samples": torch.zeros(request.shape)}
    with torch.inference_mode():  # as ComfyUI executes nodes
        return LeapfrogAdviser.execute(model, prompt(1), latent, **inputs).args


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_the_model_passes_through_and_the_advice_can_be_followed(family: str):
    model = load(family)
    same, text = ask(model, family)
    assert same is model
    lines = text.splitlines()
    assert re.match(r"balanced.*: (one device|ParaStep|Async UNet Split).*: \d+\.\d\dx, .* s for 20 steps, ", lines[0])
    assert sorted(wish for line in lines[:-2] for wish in line.split(":")[0].split(", ")) == sorted(Survey.WISHES)
    (least,) = (line for line in lines if "least memory" in line.split(":")[0])
    assert "Async UNet Split: components 2" in least
    request = Request(family)
    assert distance(generate(model, request, parastep(1)), reference(request)) < EXACT


def test_every_plan_that_was_timed_is_one_that_runs():
    survey = measured(load("flux"), prompt(1), {"samples": torch.zeros(Request().shape)}, devices(2))
    assert survey.facts
    assert survey.facts.nbytes == in_ranks().parts[0].nbytes
    assert survey.facts.whole(1) > 0
    assert 0 < survey.facts.host < 0.5, "a round trip, in seconds"
    assert survey.facts.crowd >= 1
    request, kinds = Request(steps=4), set()
    for advice in survey.advise(4, 2, "fastest"):
        plan = advice.plan
        if not plan or (type(plan), advice.exact) in kinds:
            continue
        kinds.add((type(plan), advice.exact))
        if isinstance(plan, LanesPlan):
            ours = generate(load("flux"), request, in_rounds(plan, parastep(1).base))
        else:
            ours = generate(
                split(load("flux"), plan.degree, plan.mode, plan.warmup, devices=len(plan.devices),
                      cfg_lanes=plan.cfg_lanes, stride=plan.stride), request,
            )  # fmt: skip
        assert distance(ours, reference(request)) < (EXACT if advice.exact else 0.5)
    assert kinds == {(kind, exact) for kind in (LanesPlan, SplitPlan) for exact in (True, False)}


def test_a_model_that_is_split_already_is_refused():
    with pytest.raises(LeapfrogError, match="split already"):
        ask(split(load("flux")))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(LeapfrogError, match="no GPU 77"):
        ask(load("flux"), devices="77,cpu")
