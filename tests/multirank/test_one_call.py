"""A round as one guided evaluation of all lanes: the same rows as in several, for one call of ComfyUI's."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import pytest
import torch

from generation import Request, distance, generate, prompt
from leapfrog.nodes import rounds_sampler
from leapfrog.parallel_backend import LanesDenoiser
from ranks import EXACT, load, parastep

STEPS = 8
REQUESTS = {
    "flux": Request("flux", steps=STEPS),
    "unet": Request("unet", steps=STEPS),
    "unguided": Request("unet", steps=STEPS, cfg=1.0),
    "batch": Request("unet", steps=STEPS, batch=2),
}


def counted(request: Request, sampler: Any, patch: pytest.MonkeyPatch, **how: Any) -> tuple[torch.Tensor, list[int]]:
    """The latent, and for each denoiser call how many lanes had rows in it."""
    seen: list[int] = []

    def record(self: LanesDenoiser, *args: Any) -> Any:
        seen.append(args[-1])
        return original(self, *args)

    original = LanesDenoiser.submit
    with patch.context() as during:
        during.setattr(LanesDenoiser, "submit", record)
        return generate(load(request.family), request, sampler, **how), seen


@pytest.mark.parametrize("base", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_round_is_one_call_and_gives_what_several_give(request_: Request, base: str, monkeypatch: pytest.MonkeyPatch):
    together, lanes = counted(request_, parastep(3, base=base), monkeypatch)
    assert max(lanes) == 3
    monkeypatch.setattr(rounds_sampler, "can_be_one", lambda guider, questions: False)
    apart, each = counted(request_, parastep(3, base=base), monkeypatch)
    assert set(each) == {1}
    assert sum(lanes) == len(each)
    assert distance(together, apart) < EXACT


def test_several_prompts_go_along(monkeypatch: pytest.MonkeyPatch):
    positive = [*prompt(1, strength=0.7), *prompt(2)]
    together, lanes = counted(REQUESTS["flux"], parastep(2), monkeypatch, positive=positive)
    monkeypatch.setattr(rounds_sampler, "can_be_one", lambda guider, questions: False)
    apart, _ = counted(REQUESTS["flux"], parastep(2), monkeypatch, positive=positive)
    assert max(lanes) == 2
    assert distance(together, apart) < EXACT


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
    seen: list[int] = []
    original = LanesDenoiser.submit

    def record(self: LanesDenoiser, *args: Any) -> Any:
        seen.append(args[-1])
        return original(self, *args)

    monkeypatch.setattr(LanesDenoiser, "submit", record)
    generate(change(load("flux")), REQUESTS["flux"], parastep(3))
    assert set(seen) == {1}


def test_a_mask_and_an_area_are_for_one_evaluation_at_a_time(monkeypatch: pytest.MonkeyPatch):
    _, lanes = counted(Request(steps=STEPS, masked=True), parastep(3), monkeypatch)
    assert set(lanes) == {1}
    area = prompt(1, area=(4, 8, 0, 0), strength=0.7, set_area_to_bounds=False)
    _, lanes = counted(REQUESTS["flux"], parastep(3), monkeypatch, positive=[*area, *prompt(2)])
    assert set(lanes) == {1}
