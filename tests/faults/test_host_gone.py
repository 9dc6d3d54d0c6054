"""A host that ends without saying goodbye takes its ranks and its shared memory along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tiny_models
from pack import comfyui_dir

HOST = Path(__file__).with_name("host.py")
DEADLINE_S = 10.0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The host, whose temporary files, and its ranks', would be in ``tmp_path``."""
    command = [sys.executable, HOST, comfyui_dir(), tiny_models.tiny_flux()]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    yield process
    process.kill()
    process.wait()
    assert process.stdin and process.stdout
    process.stdin.close()
    process.stdout.close()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_there(segment: str) -> bool:
    return Path("/dev/shm", segment).exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no names in the file system here")
@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, id="exec")],
    ids=lambda how: how.name,
)
def test_nothing_outlives_the_host(host: subprocess.Popen[str], how: signal.Signals, tmp_path: Path):
    assert host.stdout
    held = json.loads(host.stdout.readline())
    assert len(held["ranks"]) == 2
    assert all(map(is_alive, held["ranks"]))
    assert is_there(held["memory"])
    host.send_signal(how)
    deadline = time.monotonic() + DEADLINE_S
    while (any(map(is_alive, held["ranks"])) or is_there(held["memory"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, held["ranks"]))
    assert not is_there(held["memory"])
    if how is signal.SIGUSR1:
        assert host.poll() is None
    else:
        host.wait(DEADLINE_S)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_ranks_that_start_do_not_outlive_the_host(host: subprocess.Popen[str]):
    def ranks() -> list[psutil.Process]:
        return [one for one in psutil.Process(host.pid).children() if "parallel_backend" in " ".join(one.cmdline())]

    while len(found := ranks()) < 2:
        assert host.poll() is None
        time.sleep(0.01)
    host.kill()
    _, left = psutil.wait_procs(found, DEADLINE_S)
    assert not left
