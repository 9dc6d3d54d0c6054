"""Ranks that die, hang or fail. Every test leaves a pool behind that it found working, for the next to break."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import psutil
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_custom_sampler import DualModelGuider

import tiny_models
from generation import Request, distance, generate, prompt
from leapfrog.parallel_backend import LeapfrogError, denoiser, supervisor
from leapfrog.parallel_backend.pool import Pool
from ranks import EXACT, load, parastep, reference, split, the_pool, with_lora
from where import ON_GPUS

NOTICED_S = 10.0
"""How soon a prompt has to fail after its rank is gone."""
Run = Callable[..., torch.Tensor]


@pytest.fixture(params=["exact", "asyncdiff", "lookahead", "parastep"], scope="module")
def run(request: pytest.FixtureRequest) -> Run:
    """Samples the tiny Flux through one of the nodes."""

    def sample(wanted: Request, **options: Any) -> torch.Tensor:
        if request.param == "parastep":
            return generate(load("flux"), wanted, parastep(2), **options)
        return generate(split(load("flux"), mode=request.param), wanted, **options)

    return sample


@pytest.fixture
def exact() -> Run:
    return lambda wanted, **options: generate(split(load("flux"), mode="exact"), wanted, **options)


def gone(pids: list[int], within: float = 5) -> bool:
    """Whether the processes end in time; one that has ended but was not waited for counts as there."""
    deadline = time.monotonic() + within
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(psutil.pid_exists, pids))


class Failing:
    """``with Failing(code, rank)``: the block raises a LeapfrogError of that code for that rank, and its pool is gone.

    The time runs from ``struck``, or from the start of the block; the pool is the one alive at the start.
    """

    def __init__(self, code: str, rank: int | None, within: float = NOTICED_S):
        self.code, self.rank, self.within = code, rank, within

    def __enter__(self) -> Failing:
        self.pool = the_pool()
        self.struck = time.monotonic()
        return self

    def __exit__(self, kind: Any, error: Any, _where: Any) -> bool:
        seconds = time.monotonic() - self.struck
        assert isinstance(error, LeapfrogError), error
        self.error, self.report = error, error.report
        assert (self.report.code, self.report.rank) == (self.code, self.report.rank if self.rank is None else self.rank)
        assert seconds < self.within
        assert not self.pool.alive
        assert gone(self.pool.pids, 0)
        return True


def hang(rank: int) -> None:
    os.kill(the_pool().pids[rank], signal.SIGSTOP)


def kill_while_it_computes(rank: int, failing: Failing) -> Callable[..., None]:
    """For ``on_step``: after step 2 the rank stops, so that the next evaluation is under way when it is killed."""

    def strike() -> None:
        failing.struck = time.monotonic()
        os.kill(failing.pool.pids[rank], signal.SIGKILL)

    def on_step(step: int, *_: Any) -> None:
        if step == 2:
            hang(rank)
            threading.Timer(0.3, strike).start()

    return on_step


def killed(pool: Pool, rank: int) -> None:
    os.kill(pool.pids[rank], signal.SIGKILL)
    while not pool.dead:
        time.sleep(0.005)


def test_a_rank_killed_between_prompts_costs_no_prompt(exact: Run, caplog: pytest.LogCaptureFixture):
    before = exact(Request())
    pids = the_pool().pids
    killed(the_pool(), 1)
    assert torch.equal(exact(Request()), before)
    assert not set(pids) & set(the_pool().pids)
    assert gone(pids, 0)
    assert "rank 1 was ended by SIGKILL" in caplog.text


def test_a_rank_killed_between_steps_costs_no_prompt(exact: Run):
    exact(Request())
    pool = the_pool()
    assert (
        distance(
            exact(Request(), on_step=lambda step, *_: killed(pool, 0) if step == 2 else None), reference(Request())
        )
        < EXACT
    )
    assert the_pool() is not pool


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_the_middle_of_a_step(exact: Run, rank: int):
    exact(Request())
    with Failing("rank_died", rank) as failing:
        exact(Request(), on_step=kill_while_it_computes(rank, failing))
    assert "was ended by SIGKILL" in failing.report.message
    assert failing.report.step in (3, 4), "the first rank of two may still owe word that it has done the third"
    assert distance(exact(Request()), reference(Request())) < EXACT


def test_a_lane_killed_in_the_middle_of_a_round():
    request, sampler = Request(), parastep(1)
    generate(load("flux"), request, sampler)
    with Failing("rank_died", 0) as failing:
        generate(load("flux"), request, sampler, on_step=kill_while_it_computes(0, failing))
    assert distance(generate(load("flux"), request, sampler), reference(request)) < EXACT


@pytest.fixture
def carries_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAPFROG_CARRY_ON", "1")


def lose(ranks: dict[int, int], seen: list[int]) -> Callable[..., None]:
    """For ``on_step``: after these steps these ranks are killed in the middle of the next evaluation. ``seen`` is told
    how many there were before each step."""

    def on_step(step: int, *_: Any) -> None:
        seen.append(len(the_pool().pids))
        if step in ranks:
            pid = the_pool().pids[ranks[step]]
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()

    return on_step


@pytest.mark.usefixtures("carries_on")
def test_a_picture_is_finished_on_the_device_that_is_left(run: Run, caplog: pytest.LogCaptureFixture):
    expected, wanted = run(Request()), reference(Request())
    seen: list[int] = []
    made = run(Request(), on_step=lose({2: 0}, seen))
    assert distance(made, wanted) < max(EXACT, 1.01 * distance(expected, wanted))
    assert (seen[0], seen[-1]) == (2, 1)
    assert "ended by SIGKILL" in caplog.text
    assert "without rank 0 on " in caplog.text
    assert torch.equal(run(Request()), expected)
    assert len(the_pool().pids) == 2


@pytest.mark.usefixtures("carries_on")
def test_one_rank_after_another_is_lost():
    model = split(load("flux"), ranks=3, mode="exact")
    seen: list[int] = []
    made = generate(model, Request(), on_step=lose({1: 2, 3: 0}, seen))
    assert distance(made, reference(Request())) < EXACT
    assert [seen[0], seen[-1]] == [3, 1]
    assert distance(generate(model, Request()), reference(Request())) < EXACT


@pytest.mark.usefixtures("carries_on")
def test_the_last_rank_is_lost(exact: Run):
    seen: list[int] = []
    with pytest.raises(LeapfrogError) as raised:
        exact(Request(), on_step=lose({1: 1, 2: 0}, seen))
    assert raised.value.report.code == "rank_died", "no other is left"
    assert [seen[0], seen[-1]] == [2, 1]
    assert distance(exact(Request()), reference(Request())) < EXACT


@pytest.mark.usefixtures("carries_on")
def test_who_shares_the_ranks_with_another_run_does_not_go_on_alone():
    """One of a guider's two models would start ranks on its devices in step after step, and the other on all."""
    models = [split(load("flux"), mode="lookahead", warmup=1) for _ in range(2)]
    guider = DualModelGuider.execute(models[0], prompt(1), 3.0, models[1], prompt(100)).args[0]
    noise, sigmas = torch.randn(1, 16, 8, 8), torch.linspace(1, 0, 7)

    def sample(on_step: Callable[..., None] | None = None) -> torch.Tensor:
        with torch.inference_mode():
            euler = comfy.samplers.sampler_object("euler")
            return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, callback=on_step, seed=5)

    expected = sample()
    with Failing("rank_died", 1):
        sample(lose({2: 1}, []))
    assert torch.equal(sample(), expected)


@pytest.mark.usefixtures("carries_on")
def test_a_rank_is_lost_while_the_weights_load(exact: Run):
    exact(Request())
    pid = the_pool().pids[1]
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    other = with_lora(split(load("flux"), mode="exact"))
    assert distance(generate(other, Request()), generate(with_lora(load("flux")), Request())) < EXACT


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(exact: Run, rank: int, monkeypatch: pytest.MonkeyPatch):
    """The deadline is made of the time that evaluations took: that set from outside is 10 minutes."""
    exact(Request())
    with Failing("rank_timeout", rank) as failing:
        monkeypatch.setattr(denoiser, "WARM_TIMEOUT_S", 1.0)
        monkeypatch.setattr(denoiser, "WARM_TIMEOUT_FACTOR", 3)
        exact(Request(), on_step=lambda step, *_: hang(rank) if step == 2 else None)
    assert "halted" in failing.report.message
    assert failing.report.step == 4
    assert "LEAPFROG_STEP_TIMEOUT" in failing.report.hint
    monkeypatch.undo()
    assert distance(exact(Request()), reference(Request())) < EXACT


def test_a_first_call_that_takes_long_does_not_put_the_deadline_off(monkeypatch: pytest.MonkeyPatch):
    """As where NCCL connects in it."""
    model, size = split(load("flux"), mode="exact"), Request(size=12)
    generate(model, size)
    supervisor.close_all()
    generate(model, Request())  # all is loaded and known by now
    calls: list[int] = []

    def slow_at_first(apply_model: Any, call: dict[str, Any]) -> Any:
        if not calls:
            hang(0)
            threading.Timer(4, os.kill, (the_pool().pids[0], signal.SIGCONT)).start()
        calls.append(len(calls))
        return apply_model(call["input"], call["timestep"], **call["c"])

    slow = model.clone()
    slow.set_model_unet_function_wrapper(slow_at_first)
    monkeypatch.setattr(denoiser, "WARM_TIMEOUT_S", 1.0)
    monkeypatch.setattr(denoiser, "WARM_TIMEOUT_FACTOR", 3)
    with Failing("rank_timeout", 0) as failing:

        def hang_later(step: int, *_: Any) -> None:
            if step == 2:
                failing.struck = time.monotonic()
                hang(0)

        generate(slow, size, on_step=hang_later)
    monkeypatch.undo()
    assert distance(generate(model, size), reference(size)) < EXACT


def test_a_rank_that_cannot_read_its_file(exact: Run, tmp_path: Path):
    exact(Request())
    path = tmp_path / "torn.safetensors"
    shutil.copyfile(tiny_models.tiny_flux(), path)
    model = split(comfy.sd.load_diffusion_model(str(path)))
    torn = path.with_suffix(".part")
    torn.write_bytes(path.read_bytes()[:100_000])
    torn.replace(path)
    with Failing("bad_file", None) as failing:
        generate(model, Request())
    assert "torn.safetensors cannot be read" in failing.report.message
    assert "Traceback" in failing.report.traceback
    assert distance(exact(Request()), reference(Request())) < EXACT


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """What Cancel does."""
    yield lambda: comfy.model_management.interrupt_current_processing(True)
    comfy.model_management.interrupt_current_processing(False)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "with replies that come late"])
def test_a_prompt_cancelled_midway(run: Run, late: bool, interrupt: Callable[[], None]):
    expected, other = run(Request(prompt=2)), run(Request())
    pids = the_pool().pids
    steps: list[int] = []

    def cancel(step: int, *_: Any) -> None:
        steps.append(step)
        if step != 3:
            return
        if late:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)).start()
        interrupt()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(Request(), on_step=cancel)
    assert steps == [0, 1, 2, 3]
    assert torch.equal(run(Request(prompt=2)), expected)
    assert torch.equal(run(Request()), other)
    assert the_pool().pids == pids


def test_cancelled_while_the_weights_load(exact: Run, interrupt: Callable[[], None]):
    expected = exact(Request())
    pool = the_pool()
    for pid in pool.pids:
        os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.5, interrupt).start()
    other = with_lora(split(load("flux"), mode="exact"))
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            generate(other, Request())
        calls = [(call.step, call.complete) for call in pool._calls.values()]
        assert set(calls) == {(0, False)}
        assert len(calls) == 1 or ON_GPUS
    finally:
        for pid in pool.pids:
            os.kill(pid, signal.SIGCONT)
    assert torch.equal(exact(Request()), expected)
    assert distance(generate(other, Request()), generate(with_lora(load("flux")), Request())) < EXACT
    assert the_pool() is pool


def test_an_exception_in_a_block_tells_where():
    calls: list[int] = []

    def spoil(apply_model: Any, call: dict[str, Any]) -> Any:
        calls.append(len(calls))
        inputs = dict(call["c"])
        if len(calls) == 3:
            inputs["transformer_options"] = {**inputs["transformer_options"], "rope_options": {"scale_x": "wide"}}
        return apply_model(call["input"], call["timestep"], **inputs)

    generate(load("flux"), Request(), parastep(1))
    spoiled = load("flux").clone()
    spoiled.set_model_unet_function_wrapper(spoil)
    with Failing("rank_error", None) as failing:
        generate(spoiled, Request(), parastep(1))
    assert failing.report.step == 3
    assert "scale_x" in failing.report.traceback
    assert distance(generate(load("flux"), Request(), parastep(1)), reference(Request())) < EXACT


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")
def test_memory_that_runs_out_while_loading_is_comfyuis_own_error(exact: Run):
    import resource

    exact(Request())
    pool = the_pool()
    for pid in pool.pids:
        size = psutil.Process(pid).memory_info().vms
        resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
    with Failing("rank_oom", None) as failing:
        generate(split(load("unet"), mode="exact"), Request("unet"))
    assert comfy.model_management.is_oom(failing.error)
    assert distance(exact(Request()), reference(Request())) < EXACT


def unload() -> None:
    """What /free and 'Unload models' do."""
    comfy.model_management.free_memory(1e30, comfy.model_management.get_torch_device())


@pytest.mark.parametrize("lanes", [False, True])
def test_freeing_memory_ends_the_ranks_but_making_room_for_a_node_does_not(
    lanes: bool, monkeypatch: pytest.MonkeyPatch
):
    supervisor.close_all()
    model, sampler = (load("flux"), parastep(1)) if lanes else (split(load("flux"), mode="exact"), "euler")
    generate(model, Request(), sampler)
    pool = the_pool()
    assert pool.memory.held
    with CurrentNodeContext("prompt", "node"):
        unload()
    assert pool.memory.held is None
    assert distance(generate(model, Request(), sampler), reference(Request())) < EXACT
    assert the_pool() is pool, "who comes back soon finds the ranks"
    unload()
    assert gone(pool.pids)
    assert distance(generate(model, Request(), sampler), reference(Request())) < EXACT
    pool = the_pool()
    monkeypatch.setattr(supervisor, "UNUSED_S", 0.5)
    with CurrentNodeContext("prompt", "node"):
        unload()
    assert gone(pool.pids)


def test_the_ranks_end_some_time_after_the_last_model_that_used_them(exact: Run, monkeypatch: pytest.MonkeyPatch):
    """ComfyUI's cache drops a MODEL when the next workflow does without the node, or when memory runs low."""
    monkeypatch.setattr(supervisor, "UNUSED_S", 0.5)
    exact(Request())
    pool = the_pool()
    comfy.model_management.cleanup_models_gc()
    gc.collect()
    assert not pool.users
    assert gone(pool.pids, 10)


def test_memory_is_freed_although_a_rank_died(exact: Run):
    model = split(load("flux"), mode="exact")
    generate(model, Request())
    pool = the_pool()
    held = model.loaded_size()
    killed(pool, 0)
    assert model.partially_unload(None) == held
    assert gone(pool.pids, 0)
    assert distance(generate(model, Request()), reference(Request())) < EXACT


def test_closing_leaves_nothing(exact: Run):
    exact(Request())
    pool = the_pool()
    (segment, *_) = pool.arenas
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("leapfrog-")]
    assert threads
    supervisor.close_all()
    assert gone(pool.pids, 0)
    with pytest.raises(FileNotFoundError):
        shared_memory.SharedMemory(segment)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("leapfrog-")]
    supervisor.close_all()
