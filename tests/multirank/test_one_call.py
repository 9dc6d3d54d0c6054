"""A round as one guided evaluation of all lanes: the same rows as in several, for one call of ComfyUI's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch

from generation import Request, distance, generate, prompt
from leapfrog.nodes import rounds_sampler
from leapfrog.nodes.ahead import lanes_in_call
from leapfrog.parallel_backend import LanesDenoiser
from ranks import EXACT, load, parastep

STEPS = 8
REQUESTS = {
    "flux": Request("flux", steps=STEPS),
    "unet": Request("unet", steps=STEPS),
    "unguided": Request("unet", steps=STEPS, cfg=1.0),
    "batch": Request("unet", steps=STEPS, batch=2),
}


@dataclass
class Call:
    """A denoiser call: how many lanes and how many rows it had."""

    lanes: int
    rows: int


def watched(
    model: Any, request: Request, sampler: Any, patch: pytest.MonkeyPatch, **how: Any
) -> tuple[torch.Tensor, list[Call]]:
    """The latent and the denoiser calls of a run."""
    seen: list[Call] = []

    def record(self: LanesDenoiser, inputs: Any, x: torch.Tensor, *args: Any) -> Any:
        seen.append(Call(lanes_in_call(), len(x)))
        return original(self, inputs, x, *args)

    original = LanesDenoiser.submit
    with patch.context() as during:
        during.setattr(LanesDenoiser, "submit", record)
        return generate(model, request, sampler, **how), seen


def both_ways(request: Request, patch: pytest.MonkeyPatch, base: str = "euler", **how: Any) -> tuple[float, set[int]]:
    """How far a run is from one whose lanes are calls of their own, and how many lanes its calls had."""
    together, calls = watched(load(request.family), request, parastep(3, base=base), patch, **how)
    with patch.context() as during:
        during.setattr(rounds_sampler, "can_be_one", lambda guider, questions: False)
        apart, each = watched(load(request.family), request, parastep(3, base=base), patch, **how)
    assert {call.lanes for call in each} == {1}
    assert sum(call.lanes for call in calls) == len(each)
    return distance(together, apart), {call.lanes for call in calls}


@pytest.mark.parametrize("base", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_round_is_one_call_and_gives_what_several_give(request_: Request, base: str, monkeypatch: pytest.MonkeyPatch):
    off, lanes = both_ways(request_, monkeypatch, base)
    assert off < EXACT
    assert max(lanes) == 3


def test_several_prompts_go_along(monkeypatch: pytest.MonkeyPatch):
    off, lanes = both_ways(REQUESTS["flux"], monkeypatch, positive=[*prompt(1, strength=0.7), *prompt(2)])
    assert off < EXACT
    assert max(lanes) == 3


@pytest.mark.parametrize(("pictures", "prompts", "joined"), [(2, 2, True), (1, 2, False), (3, 2, False)])
def test_a_prompt_for_each_picture_stays_with_it(
    pictures: int, prompts: int, joined: bool, monkeypatch: pytest.MonkeyPatch
):
    several = [prompt(seed)[0] for seed in range(1, prompts + 1)]
    positive = [
        [
            torch.cat([text for text, _ in several]),
            {"pooled_output": torch.cat([p["pooled_output"] for _, p in several])},
        ]
    ]
    off, lanes = both_ways(Request(steps=STEPS, batch=pictures), monkeypatch, positive=positive)
    assert off < EXACT
    assert (max(lanes) == 3) == joined


def only_of_one_row(model: Any) -> Any:
    """A function behind the guidance that would be wrong for rows of several evaluations."""

    def behind(args: dict[str, Any]) -> torch.Tensor:
        assert len(args["sigma"].unique()) == 1
        return args["denoised"]

    made = model.clone()
    made.set_model_sampler_post_cfg_function(behind)
    return made


def with_wrapper(model: Any) -> Any:
    made = model.clone()
    kind = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    made.add_wrapper_with_key(kind, "another pack", lambda executor, *args: executor(*args))
    return made


@pytest.mark.parametrize("change", [only_of_one_row, with_wrapper])
def test_what_others_put_around_an_evaluation_sees_one_at_a_time(change: Any, monkeypatch: pytest.MonkeyPatch):
    _, calls = watched(change(load("flux")), REQUESTS["flux"], parastep(3), monkeypatch)
    assert {call.lanes for call in calls} == {1}


def test_what_others_put_in_the_place_of_comfyuis_guidance_does_too(monkeypatch: pytest.MonkeyPatch):
    original = comfy.samplers.calc_cond_batch
    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", lambda *args: original(*args))
    _, calls = watched(load("flux"), REQUESTS["flux"], parastep(3), monkeypatch)
    assert {call.lanes for call in calls} == {1}


def test_a_mask_and_an_area_are_for_one_evaluation_at_a_time(monkeypatch: pytest.MonkeyPatch):
    _, calls = watched(load("flux"), Request(steps=STEPS, masked=True), parastep(3), monkeypatch)
    assert {call.lanes for call in calls} == {1}
    area = prompt(1, area=(4, 8, 0, 0), strength=0.7, set_area_to_bounds=False)
    assert both_ways(REQUESTS["flux"], monkeypatch, positive=[*area, *prompt(2)]) == (0, {1})


def test_no_call_is_divided_because_the_host_is_short_of_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1.0)
    model = load("flux")
    _, calls = watched(model, REQUESTS["flux"], parastep(3), monkeypatch)
    assert all(call.rows == 2 * call.lanes for call in calls)
    assert "memory_required" not in model.model.__dict__
