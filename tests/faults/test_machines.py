"""Other machines that are missing, strange, slow or lost. Tests follow each other on one network and one joiner."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

import tiny_models
from campaign import wait_until
from generation import Request, distance, generate
from leapfrog.nodes import AsyncUNetSplit
from leapfrog.parallel_backend import LeapfrogError, guests, supervisor
from other_machine import BACKEND, PORT, OtherMachine, another_machine, cannot
from pack import comfyui_dir
from ranks import EXACT, load, reference, the_pool

pytestmark = pytest.mark.skipif(bool(cannot()), reason=cannot())
HOST = Path(__file__).with_name("host.py")
NOTICED_S = 15.0
STARTED_S = 60.0


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherMachine]:
    with another_machine(tmp_path_factory.mktemp("machines")) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAPFROG_START_TIMEOUT", "3")


def sample(on_step: Callable[..., None] | None = None) -> torch.Tensor:
    model = AsyncUNetSplit.execute(
        load("flux"), "cpu,b/cpu", components=2, warmup_steps=2, mode="exact", stride=1
    ).args[0]
    return generate(model, Request(), on_step=on_step)


def right() -> bool:
    return distance(sample(), reference(Request())) < EXACT


def failing(on_step: Callable[..., None] | None = None) -> LeapfrogError:
    """What a prompt fails with. Nothing of its pool is left on this side."""
    with pytest.raises(LeapfrogError) as caught:
        sample(on_step)
    assert not [pool for pool in supervisor._pools.values() if pool.alive]
    alive = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
    assert not [one for one in alive if one.cmdline()[1:] == [str(BACKEND)]]
    ours = {"leapfrog-guest", "leapfrog-courier"}
    assert wait_until(lambda: not ours & {thread.name for thread in threading.enumerate()}, 5)
    assert not listening()
    return caught.value


def listening() -> list[tuple]:
    found = psutil.Process().net_connections("tcp")
    return [one.laddr for one in found if one.status == psutil.CONN_LISTEN]


def while_halted(rank: psutil.Process, strike: Callable[[], None]) -> Callable[..., None]:
    """For ``on_step``: after step 2 the rank is halted, so that an evaluation is under way when it is struck."""

    def on_step(step: int, *_: object) -> None:
        if step == 2:
            rank.suspend()
            threading.Timer(0.3, strike).start()

    return on_step


def test_a_machine_that_does_not_come(machine: OtherMachine, impatient: None):
    error = failing()
    assert error.report.code == "no_machine"
    assert "After 3 s machine b had not offered cpu. Start there: python" in str(error)
    assert "--machine b --device cpu" in str(error)


def test_a_machine_with_another_secret(machine: OtherMachine, impatient: None):
    joiner = machine.join(machine.write(machine.file.with_name("other.json"), secret="0" * 64))
    assert wait_until(lambda: b"waits for a prompt" in machine.log.read_bytes(), STARTED_S)
    assert f"{machine.address} called with another secret" in str(failing())
    assert joiner.is_running()
    assert wait_until(lambda: b"was turned away" in machine.log.read_bytes(), 5)
    machine.empty()


def test_other_versions(machine: OtherMachine, monkeypatch: pytest.MonkeyPatch):
    machine.join()
    monkeypatch.setattr(guests, "versions", lambda _root: {"PyTorch": "0.4.1"})
    error = failing()
    assert error.report.code == "no_machine"
    assert f"Machine b has PyTorch {torch.__version__.partition('+')[0]}, this one has 0.4.1" in str(error)


def test_an_address_that_is_not_here(machine: OtherMachine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEAPFROG_MACHINES", str(machine.write(machine.file.with_name("far.json"), listen="192.0.2.77")))
    error = failing()
    assert error.report.code == "bad_machines"
    assert f"192.0.2.77:{PORT}" in str(error)


def test_a_rank_there_is_killed(machine: OtherMachine):
    assert right()
    (rank,) = machine.ranks()
    report = failing(while_halted(rank, rank.kill)).report
    assert (report.code, report.rank, report.step) == ("rank_died", 1, 4)
    assert "on machine b was ended by SIGKILL" in report.message


def test_a_joiner_is_killed(machine: OtherMachine):
    assert right()
    (rank,) = machine.ranks()
    joiner = rank.parent()
    assert joiner

    def strike() -> None:
        joiner.kill()
        joiner.wait(10)
        rank.resume()

    report = failing(while_halted(rank, strike)).report
    assert (report.code, report.rank) == ("rank_died", 1)
    assert "was lost: machine b broke the connection" in report.message
    assert wait_until(lambda: not machine.processes(), 5), "the rank there ends with its joiner"


def test_a_rank_there_that_hangs(machine: OtherMachine, monkeypatch: pytest.MonkeyPatch):
    machine.join()
    assert right()
    (rank,) = machine.ranks()
    monkeypatch.setenv("LEAPFROG_STEP_TIMEOUT", "6")
    report = failing(lambda step, *_: rank.suspend() if step == 2 else None).report
    assert (report.code, report.rank) == ("rank_timeout", 1)
    assert "Its process is halted" in report.message
    assert wait_until(lambda: not machine.ranks(), 5)


def test_a_machine_is_lost_and_comes_back(machine: OtherMachine):
    assert right()
    joiner = machine.ranks()[0].parent()
    began = 0.0

    def on_step(step: int, *_: object) -> None:
        nonlocal began
        if step == 2:
            began = time.monotonic()
            machine.ip("link", "set", machine.there, "down")

    report = failing(on_step).report
    assert time.monotonic() - began < NOTICED_S
    assert (report.code, report.rank, report.step) == ("rank_died", 1, 4)
    assert "was lost: machine b does not answer any more" in report.message
    assert wait_until(lambda: not machine.ranks(), NOTICED_S), "the rank there ends itself"
    machine.ip("link", "set", machine.there, "up")
    assert right()
    assert machine.ranks()[0].parent() == joiner


def test_a_picture_is_finished_without_the_machine_that_is_lost(machine: OtherMachine, monkeypatch: pytest.MonkeyPatch):
    assert right()
    monkeypatch.setenv("LEAPFROG_CARRY_ON", "1")

    def on_step(step: int, *_: object) -> None:
        if step == 2:
            machine.ip("link", "set", machine.there, "down")

    assert distance(sample(on_step), reference(Request())) < EXACT
    assert not [pool for pool in supervisor._pools.values() if pool.alive]
    machine.ip("link", "set", machine.there, "up")
    assert right()


@pytest.mark.parametrize("how", ["netem delay 40ms", "tbf rate 4mbit burst 16kb latency 400ms"])
def test_a_slow_link(machine: OtherMachine, how: str):
    assert right()
    pool = the_pool()
    for command in (["tc"], ["tc", "-n", machine.name]):
        device = machine.here if len(command) == 1 else machine.there
        made = subprocess.run(
            [*command, "qdisc", "replace", "dev", device, "root", *how.split()], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"this kernel has no {how.split()[0]}: {made.stderr.strip()}")
    assert right()
    assert the_pool() is pool


def test_nothing_listens_afterwards(machine: OtherMachine):
    assert right()
    pids = the_pool().pids
    supervisor.close_all()
    assert not listening()
    assert not machine.listeners()
    assert not any(map(psutil.pid_exists, pids))
    assert not machine.ranks()


def test_a_host_is_killed(machine: OtherMachine):
    supervisor.close_all()
    command = [sys.executable, HOST, comfyui_dir(), tiny_models.tiny_flux(), "cpu", "b/cpu"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host:
        assert host.stdout
        assert host.stdout.readline()
        assert len(machine.ranks()) == 1
        host.kill()
    assert wait_until(lambda: not machine.ranks(), 5)
