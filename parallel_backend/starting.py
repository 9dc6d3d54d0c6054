"""How ranks come up: one process per device, connected, each with ComfyUI loaded, joined in one process group."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from typing import Any

import msgspec

from .devices import CPU, kind_of, machine_of, this_machine
from .errors import ErrorReport
from .guests import RemoteProcess, invite
from .handshake import Door
from .launcher import RankProcess
from .machines import Machines
from .pool import POLL_S, Pool, State, Tick
from .protocol import LOOPBACK, Failed, Hello, Join, LaunchSpec, RankMessage, Ready
from .settings import start_timeout_s, step_timeout_s, uses_nccl

log = logging.getLogger("leapfrog")
STILL_S = 10.0
HALTED_S = 10.0
"""How long a rank that starts may be halted."""


@dataclass(frozen=True)
class ComfyHost:
    """Where ComfyUI lives and the arguments that a rank's ComfyUI code must parse as the host's did."""

    root: str
    args: tuple[str, ...] = ()


def start_ranks(pool: Pool, host: ComfyHost, tick: Tick) -> None:
    """Bring up the ranks of a pool that is starting; it is ready when this returns.

    Raises LeapfrogError rank_start or what a rank reported, or whatever ``tick`` raises; no process is left then.
    """
    devices, world = pool.devices, len(pool.devices)
    start = _Start(pool, tick)
    backend, why = backend_of(devices)
    log.info("Leapfrog: starting %d ranks on %s, talking %s, %s", world, ",".join(devices), backend, why)
    once = secrets.token_hex(32)
    threads = _threads_per_rank(devices)
    guests: dict[int, RemoteProcess] = {}
    try:
        machines = Machines.configured() if any(map(machine_of, devices)) else None
        home, secret = (machines.listen, machines.pool_secret(once)) if machines else (LOOPBACK, once)
        if machines:
            guests = invite(devices, machines, host.root, start.check)
        with Door(secret, world, home) as door:
            for rank, device in enumerate(devices):
                guest = guests.get(rank)
                spec = LaunchSpec(
                    rank=rank, world=world, device=device, backend=backend, comfy_args=_args(host, device),
                    secret=once if guest else secret, threads=threads if device == CPU else 0, port=door.port,
                    comfy_root=host.root, timeout_s=step_timeout_s(), host=home,
                    address=guest.address if guest else home,
                )  # fmt: skip
                pool.processes.append(guest.launch(spec) if guest else RankProcess(spec))
            while missing := set(range(world)) - pool.channels.keys():
                start.check(missing)
                if caller := door.admit(POLL_S):
                    pool.channels[caller[0]] = pool.processes[caller[0]].channel(caller[1], pool.arenas)
        hello = start.gather(Hello)
        for channel in pool.channels.values():
            channel.send(Join(store_port=hello[0].store_port, store_host=guests[0].address if 0 in guests else home))
        start.gather(Ready)
        pool.opened()
    except OSError as error:
        raise pool.broken(ErrorReport("rank_start", f"The ranks could not be started: {error}.")) from error
    finally:
        if pool.state is not State.READY:
            pool.close()
            for guest in guests.values():
                guest.end(0)
    log.info("Leapfrog: %d ranks ready (%s) after %.1f s", world, backend, start.seconds)


def _args(host: ComfyHost, device: str) -> list[str]:
    """ComfyUI's arguments for a rank on this device, which may be a GPU although the host leaves GPUs alone."""
    return [*(["--cpu"] if kind_of(device) == CPU else []), *(arg for arg in host.args if arg != "--cpu")]


class _Start:
    """The wait until ranks have started, with a deadline and a word about it now and then."""

    def __init__(self, pool: Pool, tick: Tick):
        self._pool = pool
        self._tick = tick
        self._began = time.monotonic()
        self._timeout_s = start_timeout_s()
        self._told = 0
        self._ran_at = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def check(self, missing: Iterable[int], nobody: str = "") -> None:
        """Raises what ``tick`` raises, or LeapfrogError if waiting for the missing ranks is in vain.

        ``nobody`` says who is missing where there are no processes yet.
        """
        self._tick()
        pool = self._pool
        for process in pool.dead:
            raise pool.broken(ErrorReport("rank_start", f"A rank {process.how_it_ended} at its start.", process.rank))
        if not pool.alive:
            raise pool.broken(ErrorReport("rank_start", "The ranks were ended while they started."))
        halted = next((process for process in pool.processes if process.stopped), None)
        if halted is None:
            self._ran_at = self.seconds
        elif self.seconds - self._ran_at > HALTED_S:
            message = f"The process of a rank is halted (SIGSTOP, a debugger), for {HALTED_S:g} s by now."
            raise pool.broken(ErrorReport("rank_start", message, halted.rank))
        if self.seconds > self._timeout_s:
            if nobody:
                raise pool.broken(ErrorReport("no_machine", f"After {self._timeout_s:g} s {nobody}"))
            message = f"A rank was not ready after {self._timeout_s:g} s."
            raise pool.broken(ErrorReport("rank_start", message, pool.culprit(missing)))
        if self.seconds > STILL_S * (self._told + 1):
            self._told += 1
            ranks = ",".join(map(str, sorted(missing)))
            log.info("Leapfrog: waiting for rank %s (%.0f of %g s)", ranks, self.seconds, self._timeout_s)

    def gather(self, kind: type[RankMessage]) -> dict[int, Any]:
        """A message of this kind from every rank."""
        channels = self._pool.channels
        got: dict[int, Any] = {}
        while missing := channels.keys() - got.keys():
            self.check(missing)
            waiting = {id(channels[rank].connection): rank for rank in missing}
            for connection in wait_for_any([channels[rank].connection for rank in missing], POLL_S):
                rank = waiting[id(connection)]
                try:
                    message = channels[rank].receive(1.0)
                except (EOFError, OSError, TimeoutError, msgspec.MsgspecError):
                    time.sleep(POLL_S)  # the next check says how it ended
                    continue
                if isinstance(message, Failed) and message.error:
                    raise self._pool.broken(message.error)
                if not isinstance(message, kind):
                    error = ErrorReport("rank_start", f"A rank sent {type(message).__name__} out of turn.", rank)
                    raise self._pool.broken(error)
                got[rank] = message
                if kind is Hello:
                    log.info("Leapfrog: rank %d has loaded ComfyUI after %.1f s", rank, self.seconds)
        return got


def _threads_per_rank(devices: Sequence[str]) -> int:
    shared = sum(d == CPU for d in devices)
    return max(1, this_machine().cores // shared) if shared else 0


def backend_of(devices: Sequence[str]) -> tuple[str, str]:
    """torch.distributed's backend for ranks on these devices, and why it is that one."""
    import torch.distributed as dist

    if any(kind_of(device) == CPU for device in devices):
        return "gloo", "through host memory, because ranks are on the CPU"
    if not uses_nccl():
        return "gloo", "through host memory, because LEAPFROG_NCCL is 0"
    if not dist.is_available() or not dist.is_nccl_available():
        return "gloo", "through host memory, because this torch has no NCCL"
    if len(set(devices)) == len(devices):
        return "nccl", "because each rank has a GPU and this torch has NCCL"
    if _nccl_shares_gpus():
        return "nccl", "with ranks that share a GPU, as NCCL_MULTI_RANK_GPU_ENABLE allows: for tests, it gains nothing"
    return "gloo", "through host memory, because NCCL serves one rank for each GPU only"


def _nccl_shares_gpus() -> bool:
    """Whether NCCL was asked to serve several ranks on a GPU, and is new enough for it."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and nccl_version() >= (2, 30)


LOADED_ALREADY = getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_LAZY", 0)


def nccl_version() -> tuple[int, ...]:
    """That of the NCCL which is loaded, such as ``(2, 30, 7)``; torch would name the one that it was built with."""
    import torch.cuda.nccl

    found = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2", LOADED_ALREADY).ncclGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):  # inside torch, or another system's
        return torch.cuda.nccl.version()[:3]
    return found.value // 10000, found.value // 100 % 100, found.value % 100
