"""A host that ends without saying goodbye takes its ranks and its shared memory along."""

from __future__ import annotations

import json
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
def host() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, HOST, comfyui_dir(), tiny_models.tiny_flux()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_there(segment: str) -> bool:
    return Path("/dev/shm", segment).exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no names in the file system here")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_nothing_outlives_the_host(host: subprocess.Popen[str], how: signal.Signals):
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
