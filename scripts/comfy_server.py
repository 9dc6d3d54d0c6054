"""A real headless ComfyUI: started, driven through ComfyClient, and stopped without remains.

with ComfyServer() as server:
    entry = server.run(graph)                  # API format; raises PromptError with the node's own words
    pictures = server.outputs(entry)           # paths
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from comfy_client import ComfyClient, PromptError, PromptInterrupted, ServerError
from pack import BASE, comfyui_dir, has_gpu

__all__ = ["ComfyServer", "PromptError", "PromptInterrupted", "ServerError"]

MARK = "LEAPFROG_SERVER"
"""Environment variable that all processes of one server inherit: none is lost from view by changing its parent."""


class ComfyServer(ComfyClient):
    """One ComfyUI process on 127.0.0.1 with its client.

    base: ComfyUI's --base-directory, with models/ and custom_nodes/; by default what the set-up has made.
    output: folder for pictures, by default base/output.
    flags: more of ComfyUI's own flags. `--cpu` is added where PyTorch sees no GPU.
    env: variables that are set for the server, on top of this process's own.

    Temporary and user files go to a folder that goes away with the server; ComfyUI's own folder is not written into.
    """

    def __init__(
        self,
        *flags: str,
        base: Path = BASE,
        output: Path | None = None,
        env: Mapping[str, str] | None = None,
        comfyui: Path | None = None,
    ):
        self._work = Path(tempfile.mkdtemp(prefix="leapfrog-comfyui-"))
        atexit.register(self._end)
        self.port = _free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", output or base / "output", self._work / "temp")
        self._base = base
        self._flags = flags
        self._env = dict(env or {})
        self._comfyui = comfyui or comfyui_dir()
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file = self._work / "comfyui.log"
        self._log = ""

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        self.stop()

    def start(self, timeout: float = 120) -> ComfyServer:
        """Start the process and wait until it answers. Raises ServerError with the end of the log otherwise."""
        if not (self._comfyui / "main.py").is_file() or not self._base.is_dir():
            raise ServerError(f"no ComfyUI in {self._comfyui}, or no {self._base}: run `make setup`")
        for folder in (self._work / "user", self._base / "custom_nodes", self.output):
            folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, self._comfyui / "main.py"),
            *("--listen", "127.0.0.1", "--port", self.port, "--base-directory", self._base),
            *("--output-directory", self.output, "--temp-directory", self._work),
            *("--user-directory", self._work / "user", "--database-url", "sqlite:///:memory:"),
            *("--disable-auto-launch", "--disable-api-nodes"),
            *([] if "--cpu" in self._flags or has_gpu() else ["--cpu"]),
            *self._flags,
        ]
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._work,
                env={**os.environ, **self._env, MARK: self.client_id},
                start_new_session=True,
            )
        try:
            self.connect(timeout)
        except BaseException:
            self._end()
            raise
        return self

    def stop(self, timeout: float = 15) -> None:
        """End the server: TERM, then KILL after `timeout`. Raises ServerError if something that it started lives on."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
        left = [_describe(one) for one in self.survivors(timeout)]
        self._end()
        if left:
            raise ServerError("ComfyUI has ended but left running: " + "; ".join(left))

    def kill9(self) -> None:
        """End ComfyUI's own process at once, as a crash would; see `survivors`. `stop` still has to be called."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def processes(self) -> list[psutil.Process]:
        """Everything alive that ComfyUI has started, directly or not."""
        return [one for one in _marked(self.client_id) if self._process is None or one.pid != self._process.pid]

    def survivors(self, timeout: float) -> list[psutil.Process]:
        """What is left of `processes` after at most `timeout`; returns as soon as nothing is."""
        deadline = time.monotonic() + timeout
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    @property
    def log(self) -> str:
        """All that ComfyUI and its children have printed, also after `stop`."""
        return self._log_file.read_text(errors="replace") if self._log_file.is_file() else self._log

    def _check(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise ServerError(f"ComfyUI ended with code {self._process.returncode}{self._context()}")

    def _context(self) -> str:
        return "\nthe end of ComfyUI's log:\n" + "\n".join(self.log.splitlines()[-30:])

    def _end(self) -> None:
        """Leave nothing: no process, no connection, no file."""
        atexit.unregister(self._end)
        for one in _marked(self.client_id):
            try:
                one.kill()
            except psutil.Error:  # it went by itself
                continue
        if self._process is not None:
            self._process.wait(10)
        self.close()
        self._log = self.log
        shutil.rmtree(self._work, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _marked(mark: str) -> list[psutil.Process]:
    """Every living process whose environment carries the mark."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get(MARK) == mark and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.Error:  # gone meanwhile, or another user's
            continue
    return found


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline()):.160}"
    except psutil.Error:
        return str(process.pid)
