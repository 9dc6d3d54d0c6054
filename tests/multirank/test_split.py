"""Async UNet Split on two ranks against ComfyUI alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode

from generation import Request, distance, generate, prompt
from leapfrog.parallel_backend import cutting, supervisor
from leapfrog.parallel_backend.pool import Pool
from leapfrog.parallel_backend.protocol import Evaluate, Load, Trace
from leapfrog.parallel_backend.schedules.partition import partition
from ranks import EXACT, in_ranks, load, reference, split, the_pool, with_lora

REQUESTS = {
    "plain": {},
    "unguided": {"cfg": 1.0},
    "batch": {"batch": 2},
    "image to image": {"denoise": 0.5, "steps": 4},
    "inpainting": {"masked": True},
    "another size": {"size": 12, "steps": 3},
}


@pytest.fixture(scope="module", params=["flux", "unet"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def steps_of(model: Any, request: Request, sampler: Any = "euler") -> list[torch.Tensor]:
    """The denoised latent of every step."""
    seen = []
    generate(model, request, sampler, on_step=lambda _step, denoised, _x: seen.append(denoised))
    return seen


@pytest.mark.parametrize("changed", REQUESTS.values(), ids=REQUESTS)
def test_exact_mode_is_comfyui(family: str, changed: dict[str, Any]):
    request = Request(family, **changed)
    assert distance(generate(split(load(family), mode="exact"), request), reference(request)) < EXACT


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "ddim"])
def test_exact_mode_serves_any_sampler(sampler: str):
    request = Request(steps=4)
    ours = generate(split(load("flux"), mode="exact"), request, sampler)
    assert distance(ours, reference(request, sampler)) < EXACT


def test_asynchronous_steps_come_close_and_repeat_exactly(family: str):
    model, request = split(load(family)), Request(family, steps=8)
    ours = generate(model, request)
    assert EXACT < distance(ours, reference(request)) < 0.3
    assert torch.equal(generate(model, request), ours)


def test_warm_up_steps_are_exact_and_the_next_is_not(family: str):
    request = Request(family)
    ours, theirs = steps_of(split(load(family), warmup=3), request), steps_of(load(family), request)
    distances = [distance(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(distances[:3]) < EXACT
    assert distances[3] > EXACT


def test_more_warm_up_is_closer():
    request = Request(steps=12)
    far, near = (distance(generate(split(load("flux"), warmup=w), request), reference(request)) for w in (1, 10))
    assert near < far


def test_a_second_prompt_reuses_ranks_and_weights(family: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    # cut by hand: measured times of another size may move the cut on a busy machine
    model = split(load(family), cut="2")
    generate(model, Request(family))
    pids, loaded = the_pool().pids, in_ranks().parts
    caplog.clear()
    generate(model, Request(family, prompt=2))
    generate(split(load(family), warmup=1, cut="2"), Request(family, batch=2))  # the node run again, as after an edit
    assert the_pool().pids == pids
    assert in_ranks().parts is loaded
    assert "weights in place" not in caplog.text
    assert caplog.text.count("denoiser calls") == 2


def test_each_rank_holds_its_part_of_the_weights_only(family: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    dm = load(family).model.diffusion_model
    whole = sum(t.numel() * t.element_size() for t in (*dm.parameters(), *dm.buffers()))
    generate(split(load(family)), Request(family))
    ranks = in_ranks().parts
    assert all(rank.nbytes < whole for rank in ranks)
    assert len({rank.shared for rank in ranks}) == 1
    assert sum(rank.nbytes - rank.shared for rank in ranks) + ranks[0].shared == whole
    units = [name for rank in ranks for name in rank.units]
    assert len(units) == len(set(units)) == {"flux": 6, "unet": 11}[family]
    for rank in ranks:
        assert f"{rank.units[0]} to {rank.units[-1]}: {rank.nbytes / 1e6:.1f} MB of weights" in caplog.text


def test_the_host_holds_no_weights_of_the_denoiser(family: str):
    model = split(load(family))
    generate(model, Request(family))
    dm = model.model.diffusion_model
    assert all(parameter.is_meta for parameter in dm.parameters())
    assert dm.state_dict().keys() == load(family).model.diffusion_model.state_dict().keys()
    assert type(dm) is type(load(family).model.diffusion_model)
    assert not any(parameter.is_meta for parameter in load(family).model.diffusion_model.parameters())


def test_unloaded_weights_come_back_without_a_trace_of_the_last_run():
    model = split(load("flux"))
    expected = generate(model, Request())
    pids = the_pool().pids
    for _ in range(3):
        model.partially_unload(model.offload_device)
        assert the_pool().memory.held is None
        assert torch.equal(generate(model, Request()), expected)
    assert the_pool().pids == pids


@pytest.mark.parametrize("free", [lambda model: model.partially_unload(None), lambda model: model.detach()])
def test_memory_taken_away_in_the_middle_of_a_run_costs_a_second_warm_up(free: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    model, request = split(load("flux")), Request()
    undisturbed, theirs = steps_of(model, request), steps_of(load("flux"), request)
    ours: list[torch.Tensor] = []

    def on_step(step: int, denoised: torch.Tensor, _x: torch.Tensor) -> None:
        ours.append(denoised)
        if step == 3:
            free(model)

    generate(model, request, on_step=on_step)
    assert all(torch.equal(a, b) for a, b in zip(ours[:4], undisturbed[:4], strict=True))
    assert all(distance(ours[i], theirs[i]) < distance(undisturbed[i], theirs[i]) for i in (4, 5))
    assert "(4 exact, 2 async)" in caplog.text


def test_a_checkpoint_is_served_like_a_diffusion_model():
    request = Request()
    assert distance(generate(split(load("checkpoint"), mode="exact"), request), reference(request)) < EXACT


def conditionings() -> dict[str, Any]:
    half = {"area": (4, 8, 0, 0), "strength": 0.7, "set_area_to_bounds": False}
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    return {
        "two": [*prompt(1), *prompt(2)],
        "an area": [*prompt(1), *prompt(2, **half)],
        "two areas of one size": [*prompt(1, **half), *prompt(2, **half | {"area": (4, 8, 4, 0)})],
        "a mask": [*prompt(1), *prompt(2, mask=mask, mask_strength=1.0, set_area_to_bounds=False)],
        "a change of prompt": [*prompt(1, end_percent=0.5), *prompt(2, start_percent=0.5)],
        "a longer prompt": [[torch.cat([prompt(1)[0][0], prompt(2)[0][0]], 1), prompt(1)[0][1]]],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name"), [*(("flux", name) for name in conditionings()), ("unet", "two areas of one size")]
)
def test_several_conditionings_have_streams_of_their_own(family: str, name: str):
    request, positive = Request(family), conditionings()[name]
    theirs = generate(load(family), request, positive=positive)
    assert distance(generate(split(load(family), mode="exact"), request, positive=positive), theirs) < EXACT
    model = split(load(family))
    ours = generate(model, request, positive=positive)
    assert distance(ours, theirs) < 0.3
    assert torch.equal(generate(model, request, positive=positive), ours)


def test_runs_never_mix_their_state(monkeypatch: pytest.MonkeyPatch):
    # cut by number of units, because measured times differ from pool to pool
    monkeypatch.setattr(
        cutting, "partition", lambda costs, **_limits: partition([1.0] * len(costs[0]), components=len(costs))
    )
    requests = [
        Request(), Request(prompt=2), Request(size=12), Request(batch=2), Request(cfg=1.0), Request(steps=4),
        Request("unet", size=4), Request(),
    ]  # fmt: skip
    models = {family: split(load(family), warmup=1) for family in ("flux", "unet")}
    first = [generate(models[request.family], request) for request in requests]
    supervisor.close_all()
    for request, expected in reversed(list(zip(requests, first, strict=True))):
        assert torch.equal(generate(split(load(request.family), warmup=1), request), expected), request


class TestLora:
    request = Request()

    def test_before_the_node_and_after_it(self):
        theirs = generate(with_lora(load("flux")), self.request)
        assert distance(theirs, reference(self.request)) > 0.05
        for model in (split(with_lora(load("flux")), mode="exact"), with_lora(split(load("flux"), mode="exact"))):
            assert distance(generate(model, self.request), theirs) < EXACT

    def test_on_both_sides(self):
        theirs = generate(with_lora(with_lora(load("flux"), 0.5), -0.25), self.request)
        ours = generate(with_lora(split(with_lora(load("flux"), 0.5), mode="exact"), -0.25), self.request)
        assert distance(ours, theirs) < EXACT

    def test_taken_out_again(self):
        plain = split(load("flux"), mode="exact")
        before = generate(plain, self.request)
        generate(with_lora(plain), self.request)
        assert torch.equal(generate(plain, self.request), before)
        assert distance(before, reference(self.request)) < EXACT

    def test_another_strength(self):
        split_model = split(load("flux"), mode="exact")
        for strength in (1.0, 0.5):
            theirs = generate(with_lora(load("flux"), strength), self.request)
            assert distance(generate(with_lora(split_model, strength), self.request), theirs) < EXACT

    def test_on_the_asynchronous_split(self):
        theirs = generate(with_lora(load("flux")), Request(steps=8))
        ours = generate(with_lora(split(load("flux"))), Request(steps=8))
        assert EXACT < distance(ours, theirs) < 0.3


def test_a_cache_node_on_the_model_works_as_ever():
    """EasyCache wraps the denoiser's forward, in the host."""
    request = Request(steps=10)
    theirs = generate(EasyCacheNode.execute(load("flux"), 0.9, 0.1, 0.9, False).args[0], request)
    assert distance(theirs, reference(request)) > EXACT, "nothing was skipped"
    before = EasyCacheNode.execute(split(load("flux"), mode="exact"), 0.9, 0.1, 0.9, False).args[0]
    after = split(EasyCacheNode.execute(load("flux"), 0.9, 0.1, 0.9, False).args[0], mode="exact")
    for model in (before, after):
        assert distance(generate(model, request), theirs) < EXACT


@contextmanager
def sent() -> Iterator[list[Any]]:
    """What the pool's ranks are sent meanwhile."""
    messages: list[Any] = []
    pool = the_pool()

    def submit(to: Any, *args: Any, **kwargs: Any) -> Any:
        messages.extend(to.values())
        return Pool.submit(pool, to, *args, **kwargs)

    pool.submit = submit  # type: ignore[method-assign]
    yield messages
    del pool.submit


def test_a_prompt_of_another_length_is_not_measured_again():
    model = split(load("flux"), mode="exact", cfg_lanes="off")
    request = Request(cfg=1.0, size=6)
    generate(model, request)
    longer = [[torch.cat([tokens, tokens[:, :5]], 1), rest] for tokens, rest in prompt(1)]
    with sent() as messages:
        ours = generate(model, request, positive=longer)
        generate(model, Request(cfg=1.0, size=10))
    assert distance(ours, generate(load("flux"), request, positive=longer)) < EXACT
    repeats = [message.repeats for message in messages if isinstance(message, Trace)]
    assert repeats == [0, 3, 3], "one rank says what flows; a size that is new is timed by both"


@pytest.mark.parametrize("count", [3, 4])
def test_two_lanes_share_any_number_of_conditionings(count: int):
    positive = [one for seed in range(1, count) for one in prompt(seed)]
    model = split(load("flux"), mode="exact", components=1)
    generate(model, Request(steps=2))
    with sent() as messages:
        ours = generate(model, Request(), positive=positive)
    assert distance(ours, generate(load("flux"), Request(), positive=positive)) < EXACT
    shares = [one.inputs.heads[0].shape[0] for one in messages if isinstance(one, Evaluate) and one.inputs]
    assert {*shares[:2], sum(shares[:2])} == {count // 2, count - count // 2, count}


@pytest.mark.parametrize("mode", ["exact", "asyncdiff"])
def test_weights_that_one_rank_gave_back(mode: str):
    model = split(load("flux"), mode=mode, cut="2")
    before = generate(model, Request())
    held = [rank.nbytes for rank in in_ranks().parts]
    model.denoiser.unload([0])
    with sent() as messages:
        after = generate(model, Request())
    assert torch.equal(before, after)
    assert sum(isinstance(message, Load) for message in messages) == 2
    assert [rank.nbytes for rank in in_ranks().parts] == held


def test_a_new_stand_in_knows_of_weights_that_are_there_and_can_give_them_back():
    generate(split(load("flux"), cut="2"), Request())
    other = split(load("flux"), cut="2")
    assert other.denoiser.loaded_bytes(0) == in_ranks().parts[0].nbytes > 0
    other.denoiser.unload()
    assert the_pool().memory.held is None
    assert other.denoiser.loaded_bytes(0) == 0


def test_whether_the_whole_denoiser_fits_is_asked_at_each_run(monkeypatch: pytest.MonkeyPatch):
    request, room = Request(), list[int]()
    monkeypatch.setattr(Pool, "free", lambda _pool, _tick: room)
    model = split(load("flux"), mode="exact", components=0)
    scarce = [model.denoiser.nbytes] * 2  # of which weights may take a part
    room[:] = scarce
    assert distance(generate(model, request), reference(request)) < EXACT
    assert in_ranks().cut, "no device holds all of it"
    room[:] = [1 << 40, 1 << 40]
    assert distance(generate(model, request), reference(request)) < EXACT
    assert in_ranks().cut is None, "another model went meanwhile"
    room[:] = scarce
    assert distance(generate(model, request), reference(request)) < EXACT
    assert in_ranks().cut is None, "what is there fits"


def test_a_new_pool_is_cut_by_the_memory_that_there_is_now(monkeypatch: pytest.MonkeyPatch):
    model = split(load("flux"), mode="exact")
    room = [2 * model.denoiser.nbytes] * 2
    monkeypatch.setattr(Pool, "free", lambda _pool, _tick: room)
    generate(model, Request())
    held = in_ranks().parts[1].nbytes
    supervisor.close_all()
    room[1] = held
    assert distance(generate(model, Request()), reference(Request())) < EXACT
    assert in_ranks().parts[1].nbytes < held
