"""Another machine for the tests: a network namespace behind a veth pair, with joiners in it.

It shares the processor, the file system and the process table with this one, and nothing of the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from leapfrog.parallel_backend import supervisor
from pack import BASE, ROOT, comfyui_dir

PREFIX = "leapfrog-"
PORT = 29611
BACKEND = ROOT / "parallel_backend"


def cannot() -> str:
    """Why there can be no such machine here; "" where there can."""
    if not sys.platform.startswith("linux") or not shutil.which("ip"):
        return "network namespaces need Linux and `ip`"
    if os.geteuid():
        return "network namespaces need root"
    name = f"{PREFIX}try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"network namespaces cannot be made here: {made.stderr.strip()}" if made.returncode else ""


def ip(*arguments: object) -> str:
    return subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


class OtherMachine:
    """Machine "b"; ``file`` is what LEAPFROG_MACHINES has to name. What was started in it ends with :meth:`close`."""

    def __init__(self, folder: Path):
        _remove_leftovers()
        self.name = f"{PREFIX}{os.getpid()}"
        self.here, self.there = f"lf{os.getpid()}h", f"lf{os.getpid()}t"
        net = f"10.77.{os.getpid() % 250}"
        self.address, self.listen = f"{net}.2", f"{net}.1"
        self.log = folder / "joiner.log"
        self.file = folder / "leapfrog.json"
        self.write(self.file)
        self._started: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", self.name)
        ip("link", "add", self.here, "type", "veth", "peer", "name", self.there, "netns", self.name)
        ip("addr", "add", f"{self.listen}/24", "dev", self.here)
        ip("link", "set", self.here, "up")
        self.ip("addr", "add", f"{self.address}/24", "dev", self.there)
        self.ip("link", "set", "lo", "up")
        self.ip("link", "set", self.there, "up")

    def write(self, path: Path, **changed: Any) -> Path:
        """A file of machines, the right one where nothing is changed."""
        self.secret = getattr(self, "secret", secrets.token_hex(32))
        content = {"listen": self.listen, "port": PORT, "secret": self.secret, "machines": ["b"], **changed}
        path.touch(0o600)
        path.write_text(json.dumps(content))
        return path

    def ip(self, *arguments: object) -> str:
        return ip("-n", self.name, *arguments)

    def start(self, command: Sequence[object]) -> psutil.Process:
        """Run a command there; what it prints is in ``log``."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, command)], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, env={**os.environ, "COMFYUI_DIR": str(comfyui_dir())},
            )  # fmt: skip
        self._started.append(process)
        return psutil.Process(process.pid)

    def join(self, file: Path | None = None, device: str = "cpu") -> psutil.Process:
        return self.start([sys.executable, BACKEND, *self.arguments(file), "--device", device, "--", *FLAGS])

    def arguments(self, file: Path | None = None) -> list[object]:
        return ["--join", file or self.file, "--machine", "b"]

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(int(pid)) for pid in ip("netns", "pids", self.name).split()]

    def ranks(self) -> list[psutil.Process]:
        """What joiners have started."""
        found = []
        for one in self.processes():
            with contextlib.suppress(psutil.Error):  # has ended meanwhile
                found += [one] * (one.cmdline()[1:] == [str(BACKEND)])
        return found

    def listeners(self) -> set[str]:
        """The addresses at which anything listens there."""
        told = subprocess.run(
            ["ip", "netns", "exec", self.name, "ss", "-Htln"], check=True, capture_output=True, text=True
        ).stdout
        return {line.split()[3].rpartition(":")[0] for line in told.splitlines()}

    def empty(self) -> None:
        """End what was started there."""
        for process in self.processes():
            process.send_signal(signal.SIGKILL)
        for process in self._started:
            process.wait()
        self._started.clear()

    def close(self) -> None:
        self.empty()
        ip("netns", "del", self.name)
        subprocess.run(["ip", "link", "del", self.here], capture_output=True)  # goes with its other end


@contextlib.contextmanager
def another_machine(folder: Path) -> Iterator[OtherMachine]:
    """The other machine, known to this process; no pool before and after it."""
    supervisor.close_all()
    made = OtherMachine(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAPFROG_MACHINES", str(made.file))
        try:
            yield made
        finally:
            supervisor.close_all()
            made.close()


FLAGS = ["--base-directory", BASE]


def _remove_leftovers() -> None:
    """Of test runs that were killed."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        pid = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            for inside in ip("netns", "pids", name).split():
                os.kill(int(inside), signal.SIGKILL)
            ip("netns", "del", name)
