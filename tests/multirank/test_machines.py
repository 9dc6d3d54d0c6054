"""Ranks on another machine against ComfyUI alone, and against the same ranks on this one."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from generation import Request, distance, generate
from leapfrog.nodes import AsyncUNetSplit, ParaStepSampler
from leapfrog.parallel_backend import supervisor
from leapfrog.parallel_backend.protocol import Echo
from other_machine import BACKEND, FLAGS, OtherMachine, another_machine, cannot
from ranks import EXACT, load, reference, the_pool, with_lora

pytestmark = pytest.mark.skipif(bool(cannot()), reason=cannot())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherMachine]:
    with another_machine(tmp_path_factory.mktemp("machines")) as made:
        yield made


def split(model: Any, devices: str = "cpu,b/cpu", mode: str = "exact", cut: str = "") -> Any:
    return AsyncUNetSplit.execute(model, devices, components=2, warmup_steps=2, mode=mode, stride=1, cut=cut).args[0]


def parastep(devices: str, lanes: int = 2) -> Any:
    return ParaStepSampler.execute(
        base_sampler="euler", fidelity="unguarded", lanes=lanes, devices=devices, warmup_steps=2, predictor="linear",
        drift_bound=0.0, calibrate=False,
    ).args[0]  # fmt: skip


def listeners(pid: int) -> set[str]:
    found = psutil.Process(pid).net_connections("all")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}  # type: ignore[union-attr]


ROUNDS = Request(steps=8, batch=2)
CUT = "2"


@pytest.fixture(scope="module")
def here(machine: OtherMachine) -> dict[str, torch.Tensor]:
    """What both blocks make of ROUNDS on two ranks of this machine."""
    model = load("flux")
    made = {
        "asyncdiff": generate(split(model, "cpu,cpu", "asyncdiff", CUT), ROUNDS),
        "parastep": generate(model, ROUNDS, parastep("cpu,cpu")),
    }
    for pid in the_pool().pids:
        assert listeners(pid)
        assert all(ipaddress.ip_address(address).is_loopback for address in listeners(pid))
    return made


@pytest.mark.usefixtures("here")
def test_a_component_on_another_machine(machine: OtherMachine, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    joiner = machine.join()
    assert not listeners(os.getpid())
    assert distance(generate(split(load("flux")), Request()), reference(Request())) < EXACT
    (rank,) = machine.ranks()
    assert rank.parent() == joiner
    assert machine.listeners() == {machine.address}
    (own,) = the_pool().pids
    assert listeners(own) == {machine.listen}
    assert not listeners(os.getpid()), "the gate is open only while joiners are wanted"
    assert re.search(r"rank 1 on b/cpu, (double|single)_blocks\.\d", caplog.text)


def test_stale_states_are_those_that_they_are_here(machine: OtherMachine, here: dict[str, torch.Tensor]):
    ours = generate(split(load("flux"), mode="asyncdiff", cut=CUT), ROUNDS)
    assert distance(ours, here["asyncdiff"]) < EXACT
    assert distance(ours, reference(ROUNDS)) > EXACT, "they are stale"


def test_parastep_gives_what_it_gives_here(machine: OtherMachine, here: dict[str, torch.Tensor]):
    assert distance(generate(load("flux"), ROUNDS, parastep("cpu,b/cpu")), here["parastep"]) < EXACT


def test_weight_patches_travel(machine: OtherMachine):
    for model in (with_lora(load("flux")), load("flux")):
        assert distance(generate(split(model), Request()), generate(model, Request())) < EXACT


def test_a_larger_picture_and_another_model(machine: OtherMachine):
    """Arenas of the rank grow."""
    for request in (Request(size=32, steps=2), Request("unet", steps=2), Request(steps=2)):
        assert distance(generate(split(load(request.family)), request), reference(request)) < EXACT


def test_the_times_of_a_rank_are_those_of_this_machine(machine: OtherMachine):
    pool = the_pool()
    began = time.perf_counter()
    payload, out = pool.payload(torch.ones(1000), no_tick, reserve=4096)
    replies = pool.request({1: Echo(inputs=payload, out=out, out_size=4096)}, 10, no_tick, using=payload)
    assert began < replies[1].begin <= replies[1].end < time.perf_counter()
    assert torch.equal(pool.read(replies[1].output), torch.ones(1000))


def test_no_rank_here(machine: OtherMachine, here: dict[str, torch.Tensor]):
    """Two joiners from torchrun; rank 0, which has the ranks' store, is one of theirs."""
    pool = the_pool()
    machine.empty()
    torchrun = Path(sys.executable).with_name("torchrun")
    machine.start([torchrun, "--nproc-per-node", 2, BACKEND, *machine.arguments(), "--", *FLAGS])
    assert distance(generate(load("flux"), ROUNDS, parastep("b/cpu,b/cpu")), here["parastep"]) < EXACT
    assert not pool.alive
    assert len(machine.ranks()) == 2
    assert not the_pool().pids
    assert distance(generate(split(load("flux"), "b/cpu,b/cpu"), Request()), reference(Request())) < EXACT
    supervisor.close_all()
    assert not machine.ranks()


def no_tick() -> None:
    pass
