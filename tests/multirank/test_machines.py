"""Ranks on another machine against ComfyUI alone, and against the same ranks on this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from generation import Request, distance, generate
from leapfrog.nodes import AsyncUNetSplit, ParaStepSampler
from leapfrog.parallel_backend import supervisor
from other_machine import OtherMachine, cannot
from ranks import EXACT, load, reference, the_pool

pytestmark = pytest.mark.skipif(bool(cannot()), reason=cannot())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherMachine]:
    supervisor.close_all()
    made = OtherMachine(tmp_path_factory.mktemp("machines"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAPFROG_MACHINES", str(made.file))
        try:
            yield made
        finally:
            supervisor.close_all()
            made.close()


def split(model: Any, devices: str = "cpu,b/cpu", mode: str = "exact") -> Any:
    return AsyncUNetSplit.execute(model, devices, components=2, warmup_steps=2, mode=mode, stride=1).args[0]


def parastep_on(devices: str, lanes: int = 2) -> Any:
    return ParaStepSampler.execute(
        base_sampler="euler", fidelity="unguarded", lanes=lanes, devices=devices, warmup_steps=2, predictor="linear",
        drift_bound=0.0, calibrate=False,
    ).args[0]  # fmt: skip


def listeners(pid: int) -> set[str]:
    found = psutil.Process(pid).net_connections("all")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}  # type: ignore[union-attr]


def test_a_component_on_another_machine(machine: OtherMachine):
    machine.join()
    assert not listeners(os.getpid())
    assert distance(generate(split(load("flux")), Request()), reference(Request())) < EXACT
    (rank,) = machine.ranks()
    assert rank.is_running()
    assert machine.listeners() == {machine.address}
    (own,) = the_pool().pids
    assert listeners(own) == {machine.listen}
    assert not listeners(os.getpid()), "the gate is open only while joiners are wanted"
