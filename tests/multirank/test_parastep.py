"""ParaStep Sampler on two ranks against ComfyUI alone."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sd
import pytest
import torch

import tiny_models
from generation import Request, distance, generate, noise, prompt
from leapfrog.nodes import rounds_sampler
from leapfrog.parallel_backend import LanesDenoiser
from ranks import EXACT, in_ranks, load, parastep, reference, split, the_pool, with_lora

REQUESTS = {
    "plain": {},
    "unguided": {"cfg": 1.0},
    "batch": {"batch": 2},
    "image to image": {"denoise": 0.5},
    "inpainting": {"masked": True},
    "inpainting a batch": {"masked": True, "batch": 2},
}


@pytest.fixture(scope="module", params=["flux", "unet"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("changed", REQUESTS.values(), ids=REQUESTS)
def test_one_lane_is_comfyui(family: str, changed: dict[str, Any]):
    request = Request(family, **changed, steps=4)
    assert distance(generate(load(family), request, parastep(1)), reference(request)) < EXACT


@pytest.mark.parametrize("masked", [False, True])
def test_one_lane_of_ddim_is_comfyuis_ddim(masked: bool):
    request = Request(masked=masked)
    assert distance(generate(load("flux"), request, parastep(1, base="ddim")), reference(request, "ddim")) < EXACT


@pytest.mark.parametrize("changed", REQUESTS.values(), ids=REQUESTS)
def test_two_lanes_come_close(changed: dict[str, Any]):
    request = Request(**changed, steps=12)
    ours = generate(load("flux"), request, parastep(2))
    assert EXACT < distance(ours, reference(request)) < 0.2
    assert torch.equal(generate(load("flux"), request, parastep(2)), ours)


@pytest.mark.parametrize("base", ["euler", "ddim"])
@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_any_number_of_lanes_on_two_ranks(family: str, lanes: int, base: str):
    request = Request(family, steps=10)
    seen = []
    sampler = parastep(lanes, base=base)
    ours = generate(load(family), request, sampler, on_step=lambda step, _denoised, _x: seen.append(step))
    assert seen == list(range(10))
    assert EXACT < distance(ours, reference(request, base)) < 0.3


@pytest.mark.parametrize("predictor", ["newest", "paper"])
def test_the_other_predictors(predictor: str):
    request = Request(steps=12)
    assert EXACT < distance(generate(load("flux"), request, parastep(2, predictor=predictor)), reference(request)) < 0.4


def test_warm_up_steps_are_exact_and_the_first_lane_after_them():
    request, ours, theirs = Request(steps=8), [], []
    generate(load("flux"), request, parastep(2, warmup=3), on_step=lambda _step, denoised, _x: ours.append(denoised))
    generate(load("flux"), request, on_step=lambda _step, denoised, _x: theirs.append(denoised))
    distances = [distance(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(distances[:4]) < EXACT
    assert distances[4] > EXACT


def test_what_the_mask_protects_stays_as_it_was():
    request = Request(masked=True)
    ours = generate(load("flux"), request, parastep(2))
    image = noise(request.shape, 11)
    torch.testing.assert_close(ours[..., :4], image[..., :4])
    assert distance(ours[..., 4:], image[..., 4:]) > 0.1


def test_each_picture_of_a_batch_is_the_picture_alone():
    """Rows are ordered lane by lane, then picture by picture: a mistake would mix pictures."""
    request = Request(batch=2, steps=8)
    seen: dict[int, torch.Tensor] = {}
    generate(load("flux"), request, parastep(3), on_step=lambda step, denoised, _x: seen.update({step: denoised}))
    theirs: dict[int, torch.Tensor] = {}
    generate(load("flux"), request, on_step=lambda step, denoised, _x: theirs.update({step: denoised}))
    for step, both in seen.items():
        for picture in (0, 1):
            own, other = (distance(both[picture], theirs[step][p]) for p in (picture, 1 - picture))
            assert own < 0.5 * other


def test_several_conditionings():
    request = Request(steps=12)
    positive = [*prompt(1, area=(4, 8, 0, 0), strength=0.7, set_area_to_bounds=False), *prompt(2)]
    theirs = generate(load("flux"), request, positive=positive)
    assert distance(generate(load("flux"), request, parastep(1), positive), theirs) < EXACT
    assert distance(generate(load("flux"), request, parastep(2), positive), theirs) < 0.2


@pytest.mark.parametrize("warmup", [2, 3])
def test_every_row_of_a_round_has_the_prompt_of_its_own_step(warmup: int, monkeypatch: pytest.MonkeyPatch):
    """ComfyUI looks up once per call which prompts a step has, so a change of prompt must not fall inside a call."""
    positive = [*prompt(1, start_percent=0.0, end_percent=0.5), *prompt(2, start_percent=0.5, end_percent=1.0)]
    seen: dict[float, bool] = {}
    theirs: dict[float, bool] = {}

    def look(args: tuple, into: dict[float, bool]) -> None:
        _, sigmas, contexts = args
        into.update(
            {
                float(sigma): torch.equal(row.cpu(), positive[0][0][0])
                for sigma, row in zip(sigmas, contexts, strict=True)
            }
        )

    def record(self: LanesDenoiser, inputs: tuple, *rest: Any) -> Any:
        look(inputs[0], seen)
        return original(self, inputs, *rest)

    def record_theirs(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        look(args[:3], theirs)
        return executor(*args, **kwargs)

    original = LanesDenoiser.submit
    monkeypatch.setattr(LanesDenoiser, "submit", record)
    request = Request(steps=12, cfg=1.0)
    generate(load("flux"), request, parastep(2, warmup=warmup), positive)
    watched = load("flux").clone()
    watched.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, record_theirs)
    generate(watched, request, "euler", positive)
    assert len(set(theirs.values())) == 2
    assert seen == theirs


def test_runs_never_mix_their_state():
    sampler = parastep(2)
    requests = [Request(), Request(prompt=2), Request(size=12), Request(batch=2), Request(cfg=1.0), Request(steps=4)]
    first = [generate(load("flux"), request, parastep(2)) for request in requests]
    for request, expected in reversed(list(zip(requests, first, strict=True))):
        assert torch.equal(generate(load("flux"), request, sampler), expected), request


def test_a_lora_is_applied_changed_and_taken_out():
    request, sampler = Request(), parastep(1)
    assert distance(generate(with_lora(load("flux")), request), reference(request)) > 0.05
    for model in (load("flux"), with_lora(load("flux")), with_lora(load("flux"), 0.5), load("flux")):
        assert distance(generate(model, request, sampler), generate(model, request)) < EXACT


def test_each_rank_holds_the_whole_denoiser_once():
    generate(load("flux"), Request(), parastep(2))
    pids, loaded = the_pool().pids, in_ranks().parts
    parameters = load("flux").model.diffusion_model.parameters()
    whole = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    assert [rank.nbytes for rank in loaded] == [whole, whole]
    generate(load("flux"), Request(prompt=2), parastep(3))
    assert the_pool().pids == pids
    assert in_ranks().parts is loaded


def test_comfyui_loads_its_own_copy_without_asking_the_ranks_for_room(monkeypatch: pytest.MonkeyPatch):
    model, manager = comfy.sd.load_diffusion_model(str(tiny_models.tiny_flux())), comfy.model_management
    known: list[int] = []
    load_models = manager.load_models_gpu

    def its_ranks() -> int:
        own = rounds_sampler._memories.get(model.model, {}).values()
        return sum(one.model in own for one in manager.current_loaded_models)

    def watched(*args: Any, **kwargs: Any) -> None:
        known.append(its_ranks())
        load_models(*args, **kwargs)

    monkeypatch.setattr(manager, "load_models_gpu", watched)
    for _ in range(3):
        generate(model, Request(steps=4), parastep(2))
        assert its_ranks() == 1
    generate(model, Request(steps=4))
    assert known == [0, 0, 0, 1], "only another sampler's run may ask for it"


def test_the_ranks_stay_for_the_next_sampler_as_long_as_the_model_lives():
    model = comfy.sd.load_diffusion_model(str(tiny_models.tiny_flux()))
    request = Request(steps=4)
    first = parastep(1)
    generate(model, request, first)
    denoiser = weakref.ref(first.denoiser)
    del first
    gc.collect()
    assert denoiser() in the_pool().users
    generate(model, request, second := parastep(2))
    assert second.denoiser is denoiser()
    del model, second
    gc.collect()
    assert denoiser() is None


def test_a_sampler_keeps_no_latents_of_its_last_run():
    sampler, counts = parastep(2), []
    for steps in (4, 12):
        shape = generate(load("flux"), Request(steps=steps), sampler).shape
        gc.collect()
        counts.append(sum(type(one) is torch.Tensor and one.shape == shape for one in gc.get_objects()))
    assert counts[1] <= counts[0]


def test_both_blocks_take_turns_on_one_pool():
    request = Request()
    generate(split(load("flux")), request)
    pids = the_pool().pids
    assert distance(generate(load("flux"), request, parastep(1)), reference(request)) < EXACT
    assert distance(generate(split(load("flux"), mode="exact"), request), reference(request)) < EXACT
    assert the_pool().pids == pids


def test_a_model_from_load_checkpoint():
    assert distance(generate(load("checkpoint"), Request(), parastep(1)), reference(Request())) < EXACT
