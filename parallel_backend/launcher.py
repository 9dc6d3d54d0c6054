"""The one file that starts ranks: a rank's command line, environment, death pipe and log.

A rank lives exactly as long as the pipe on its standard input stays open. The system closes that pipe whatever ends
the host, kill -9 and exec included, and the rank's guard thread then ends the rank.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec

from .channel import SEND_TIMEOUT_S, Channel
from .devices import kind_of
from .protocol import LOOPBACK, FromRank, LaunchSpec
from .tensors import Arena

log = logging.getLogger("leapfrog")
PACKAGE = Path(__file__).resolve().parent
# What a rank inherits: enough to find Python, libraries and devices. PyTorch's allocator settings stay out.
KEPT = (
    "PATH HOME USER LANG LC_ALL TMPDIR TEMP TMP SYSTEMROOT SYSTEMDRIVE WINDIR USERPROFILE APPDATA LOCALAPPDATA COMSPEC "
    "LD_LIBRARY_PATH LD_PRELOAD VIRTUAL_ENV PYTHONPATH PYTHONHASHSEED PYTHONDONTWRITEBYTECODE CUDA_HOME CUDA_PATH "
    "CUDA_DEVICE_ORDER CUBLAS_WORKSPACE_CONFIG NVIDIA_TF32_OVERRIDE XDG_CACHE_HOME HF_HUB_OFFLINE TRITON_CACHE_DIR CC"
).split()
KEPT_PREFIXES = (
    "LEAPFROG_", "NCCL_", "TORCH_NCCL_", "CUDA_MPS_", "MALLOC_", "RCCL_", "HSA_", "ROCR_", "TORCH_ROCM_", "TORCH_BLAS_",
    "MIOPEN_", "PYTORCH_TUNABLEOP_", "FLASH_ATTENTION_",
)  # fmt: skip
# What worker/rank.py puts in front of the lines that have a level; the rest is what libraries print.
LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL):(.*)")
MAX_LINE = 4096
_GET_ADDRESS = 0x8915  # SIOCGIFADDR; the socket module does not have it


def rank_environment(device: str, backend: str, threads: int, address: str = LOOPBACK) -> dict[str, str]:
    """The environment of a rank on ``device``; it sees no other GPU and talks to other ranks at ``address`` only.

    Raises OSError where no interface of this machine has the address.
    """
    env = {k: v for k, v in os.environ.items() if k in KEPT or k.startswith(KEPT_PREFIXES)}
    env["PYTHONUNBUFFERED"] = "1"
    env["CUDA_VISIBLE_DEVICES"] = visible(kind_of(device))
    if threads:
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
        env["OMP_WAIT_POLICY"] = "PASSIVE"  # a thread that spins while it waits takes the core from another rank
    if interface := interface_of(address):
        env["GLOO_SOCKET_IFNAME"] = interface
        env.setdefault("NCCL_SOCKET_IFNAME", interface)
    if backend == "nccl":
        env.setdefault("NCCL_RAS_ENABLE", "0")  # a listener that tells anybody about the ranks
        env["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
        env["TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"] = "false"
    return env


def interface_of(address: str) -> str:
    """The network interface that has an address; "" where this system does not say, and PyTorch chooses.

    Raises OSError if none has it.
    """
    if address == LOOPBACK:
        return {"linux": "lo", "darwin": "lo0"}.get(sys.platform, "")
    if sys.platform != "linux":
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(sock, _GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has none
            if answer[20:24] == socket.inet_aton(address):
                return name
    raise OSError(f"no network interface has {address} as its first address")


def visible(device: str) -> str:
    """CUDA_VISIBLE_DEVICES for a process on this device: the host may itself see a renumbered subset."""
    if not device.startswith("cuda:"):
        return ""
    index = int(device.removeprefix("cuda:"))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("HIP_VISIBLE_DEVICES", "")
    host = [d for d in seen.split(",") if d.strip()]
    return host[index].strip() if index < len(host) else str(index)


class RankLog:
    """What a rank prints: it goes to ComfyUI's log, and the tail of it is kept.

    Lines keep the level that the rank gave them, and have none below ERROR while it starts: ComfyUI's start-up is
    noise that the user has read already. What has no level is for debugging.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self.starting = True
        self._tail: deque[str] = deque(maxlen=40)

    def _said(self, level: int, text: str) -> None:
        self._tail.append(text)
        if self.starting and level < logging.ERROR:
            level = logging.DEBUG
        try:
            log.log(level, "[Leapfrog rank %d] %s", self.rank, text)
        except Exception:  # another pack's log handler
            pass

    def last_lines(self, count: int) -> tuple[str, ...]:
        """The end of what it printed."""
        return tuple(self._tail)[-count:]


class RankProcess(RankLog):
    """One rank as an operating system process. ``news_s`` is how soon one knows of its end."""

    news_s = 0.2

    def __init__(self, spec: LaunchSpec):
        super().__init__(spec.rank)
        self._process = subprocess.Popen(
            [sys.executable, str(PACKAGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=rank_environment(spec.device, spec.backend, spec.threads, spec.address),
            cwd=spec.comfy_root,
            # out of reach of the terminal's Ctrl+C, which is for the host
            start_new_session=os.name == "posix",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
            self._process.stdin.flush()
        except OSError:
            log.warning("rank %d ended before it read its orders", spec.rank)
        self._pump = threading.Thread(target=self._pump_log, name=f"leapfrog-log-{spec.rank}", daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    @property
    def how_it_ended(self) -> str:
        """ "ended with exit code 1", "was ended by SIGKILL ...", or "" while it lives."""
        code = self.exit_code
        if code is None:
            return ""
        if code >= 0 or os.name != "posix":
            return f"ended with exit code {code}"
        why = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"was ended by {_signal_name(-code)}{why}"

    @property
    def stopped(self) -> bool:
        """Whether it is halted (SIGSTOP, a debugger); only known on Linux."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] in ("T", "t")

    def last_lines(self, count: int) -> tuple[str, ...]:
        """The end of what it printed; of a process that has ended, its last words."""
        if self.exit_code is not None:
            self._pump.join(0.5)
        return super().last_lines(count)

    def channel(self, sock: socket.socket, _arenas: Mapping[str, Arena]) -> Channel[FromRank]:
        """The control channel over the socket that it came in with; it attaches to the arenas by their names."""
        return Channel(sock, FromRank, SEND_TIMEOUT_S)

    def _pump_log(self) -> None:
        # Whatever happens to the log, the pipe must not fill: the rank would stop at its next line.
        assert self._process.stdout
        while raw := self._process.stdout.readline(MAX_LINE):
            line = raw.decode(errors="replace").rstrip()
            tagged = LEVEL.fullmatch(line)
            level, text = (logging.getLevelName(tagged[1]), tagged[2]) if tagged else (logging.DEBUG, line)
            self._said(level, text)

    def let_go(self) -> None:
        """Close the death pipe: the process ends by itself."""
        assert self._process.stdin
        try:
            self._process.stdin.close()
        except OSError:
            pass

    def end(self, grace_s: float) -> None:
        """Let go, wait ``grace_s``, then kill. The process is gone when this returns."""
        self.let_go()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._pump.join(2)
        if self._process.stdout and not self._pump.is_alive():
            self._process.stdout.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
