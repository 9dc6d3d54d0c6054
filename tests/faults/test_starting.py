"""Ranks that do not come up: no process is left, and the next prompt starts others."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import psutil
import pytest
import torch

from campaign import wait_until
from generation import Request, distance, generate
from leapfrog.nodes.recipe import comfy_host
from leapfrog.parallel_backend import ComfyHost, LeapfrogError, starting, supervisor
from ranks import EXACT, load, reference, split, the_pool

TWO = ("cpu", "cpu")


class User:
    pass


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    supervisor.close_all()
    yield
    assert not [one.pid for one in psutil.Process().children() if "parallel_backend" in " ".join(one.cmdline())]
    assert not [pool for pool in supervisor._pools.values() if pool.alive]


def once_they_start(function: Callable[[], object]) -> None:
    """Call it as soon as both ranks are processes, which need seconds from there until they are ready."""

    def wait() -> None:
        wait_until(lambda: any(pool.alive and len(pool.processes) == 2 for pool in supervisor._pools.values()), 60)
        function()

    threading.Thread(target=wait, daemon=True).start()


def prompt() -> None:
    assert distance(generate(split(load("flux"), mode="exact"), Request()), reference(Request())) < EXACT


def test_cancelled_while_they_start():
    once_they_start(lambda: comfy.model_management.interrupt_current_processing(True))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        prompt()
    assert not [pool for pool in supervisor._pools.values() if pool.alive]
    prompt()
    supervisor.close_all()


def test_comfyui_ends_while_they_start():
    once_they_start(supervisor.close_all)
    with pytest.raises(LeapfrogError, match="ended while they started"):
        prompt()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says that a process is halted")
def test_halted_while_they_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(starting, "HALTED_S", 0.5)
    once_they_start(lambda: os.kill(the_pool().pids[1], signal.SIGSTOP))
    with pytest.raises(LeapfrogError, match=r"The process of a rank is halted .*\(rank 1\)"):
        prompt()


def test_too_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEAPFROG_START_TIMEOUT", "0.5")
    with pytest.raises(LeapfrogError, match=r"A rank was not ready after 0.5 s\. \(rank 0\)") as caught:
        prompt()
    assert caught.value.report.code == "rank_start"


def test_what_a_rank_says_when_it_fails(tmp_path: Path):
    with pytest.raises(LeapfrogError) as caught:
        supervisor.acquire(TWO, ComfyHost(str(tmp_path)), lambda: None, User())
    report = caught.value.report
    assert "No module named 'comfy'" in report.message or "No module named 'comfy'" in "".join(report.log)
    assert report.rank in (0, 1)


def test_a_rank_that_ends(monkeypatch: pytest.MonkeyPatch):
    once_they_start(lambda: psutil.Process(the_pool().pids[1]).kill())
    with pytest.raises(LeapfrogError, match=r"A rank was ended by SIGKILL.* at its start\. \(rank 1\)"):
        prompt()


@pytest.mark.parametrize("mode", ["exact", "lookahead"])
def test_one_that_ends_at_its_start_is_done_without(mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEAPFROG_CARRY_ON", "1")
    once_they_start(lambda: psutil.Process(the_pool().pids[1]).kill())
    assert distance(generate(split(load("flux"), mode=mode), Request()), reference(Request())) < EXACT
    assert not [pool for pool in supervisor._pools.values() if pool.alive], "the next run has all devices again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_gone():
    with pytest.raises(LeapfrogError) as caught:
        supervisor.acquire(("cuda:0",), comfy_host(), lambda: None, User())
    assert (caught.value.report.code, caught.value.report.rank) == ("device_fault", 0)
