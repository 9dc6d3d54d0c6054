"""The pool: starts all ranks, asks them things under a deadline, notices when one dies, ends them.

One pool per set of devices is alive at a time; :func:`acquire` hands out the living one or starts it.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for_any
from typing import Any

import msgspec

from .channel import SEND_TIMEOUT_S, Channel, Door
from .errors import ErrorReport, LeapfrogError
from .launcher import RankProcess
from .plan import CPU, this_machine
from .protocol import ANSWERS, Failed, FromRank, Hello, HostMessage, Join, LaunchSpec, Payload, RankMessage, Ready, Stop
from .tensors import Arena, flatten, place

log = logging.getLogger("leapfrog")
START_TIMEOUT_S = 180.0
POLL_S = 0.02
END_GRACE_S = 2.0
SPARE = 1.25
UNUSED_S = 60.0
MAX_ARENAS = 12

Tick = Callable[[], None]


@dataclass(frozen=True)
class ComfyHost:
    """Where ComfyUI lives and the arguments that a rank's ComfyUI code must parse as the host's did."""

    root: str
    args: tuple[str, ...] = ()


def step_timeout_s() -> float:
    return float(os.environ.get("LEAPFROG_STEP_TIMEOUT", "600"))


def _threads_per_rank(devices: Sequence[str]) -> int:
    shared = sum(d == CPU for d in devices)
    return max(1, this_machine().cores // shared) if shared else 0


def _backend(devices: Sequence[str]) -> str:
    import torch.distributed as dist

    alone = len(set(devices)) == len(devices) or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    if all(d != CPU for d in devices) and alone and dist.is_available() and dist.is_nccl_available():
        return "nccl"
    if any(d != CPU for d in devices):
        log.info("Leapfrog: ranks talk gloo, through host memory, because NCCL cannot serve %s", ",".join(devices))
    return "gloo"


@dataclass(eq=False)
class Call:
    """Messages that went to some ranks. ``replies`` fill up, each handed to ``on_reply`` as it comes in."""

    number: int
    ranks: frozenset[int]
    arena: str = ""
    on_reply: Callable[[int, int, Any], None] | None = None
    answers: dict[int, type[RankMessage]] = field(default_factory=dict)
    replies: dict[int, Any] = field(default_factory=dict)
    wanted: bool = True

    @property
    def complete(self) -> bool:
        return len(self.replies) == len(self.ranks)


class Pool:
    """All ranks, ready. Not for several threads at once: callers hold :attr:`lock` for a whole request.

    Each rank works through its messages in the order in which they were sent, so several calls can be under way.
    ``memory`` is a place for callers to keep what they know about this pool's ranks (what is loaded, say). ``users``
    are the objects that may come back for it; see :func:`acquire`. ``free`` are the bytes that each device had free
    at the start, None where nobody counts.
    """

    def __init__(
        self, devices: Sequence[str], processes: list[RankProcess], channels: list[Channel[FromRank]],
        free: Sequence[int | None] = (),
    ):  # fmt: skip
        self.devices = tuple(devices)
        self.free = list(free)
        self.lock = threading.RLock()
        self.memory: dict[str, Any] = {}
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        self.alive = True
        self._processes = processes
        self._channels = channels
        self._calls: dict[int, Call] = {}
        self._number = 0
        self._arenas: dict[str, Arena] = {}

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self._processes]

    def payload(self, tree: Any, tick: Tick, reserve: int = 0, where: str = "value") -> tuple[Payload, int]:
        """Write a tree into an arena that no call uses; returns it with the offset of ``reserve`` free bytes after it.

        Raises LeapfrogError unsupported_patch, with the place in the tree, for a value that cannot travel.
        """
        try:
            spec, tensors = flatten(tree, where)
            heads, end = place(tensors)
        except TypeError as error:
            raise LeapfrogError.of("unsupported_patch", f"{error}.") from None
        arena = self._free_arena(end + reserve, tick)
        arena.write(tensors, heads)
        return Payload(arena.name, spec, heads), end

    def _free_arena(self, size: int, tick: Tick) -> Arena:
        deadline = time.monotonic() + step_timeout_s()
        while True:
            used = {call.arena for call in self._calls.values()}
            free = [arena for name, arena in self._arenas.items() if name not in used]
            large = [arena for arena in free if arena.size >= size]
            if large:
                return large[0]
            if free:
                self._arenas.pop(free[0].name).close()
            if len(self._arenas) < MAX_ARENAS:
                arena = Arena.create(int(size * SPARE))
                self._arenas[arena.name] = arena
                return arena
            self._pump(self._calls.values(), deadline, tick)

    def read(self, payload: Payload) -> Any:
        """A copy of a payload's tree. Raises LeapfrogError rank_error for what is none; the pool is then closed."""
        try:
            return self._arenas[payload.arena].tree(payload.spec, payload.heads, copy=True)
        except (AttributeError, KeyError, ValueError):
            raise self._broken(ErrorReport("rank_error", "A rank sent a result that cannot be read.")) from None

    def submit(
        self,
        messages: Mapping[int, HostMessage],
        tick: Tick,
        using: Payload | None = None,
        on_reply: Callable[[int, int, Any], None] | None = None,
    ) -> Call:
        """Send one message per rank and return at once. The arena of ``using`` stays untouched until the call is
        complete and :meth:`done`. ``tick`` is called first and may raise to give up."""
        tick()
        self._number += 1
        call = Call(self._number, frozenset(messages), using.arena if using else "", on_reply)
        call.answers = {rank: ANSWERS[type(message)] for rank, message in messages.items()}
        self._calls[call.number] = call
        for rank, message in messages.items():
            message.call = call.number
            try:
                self._channels[rank].send(message)
            except OSError:
                self._receive(rank)  # raises with the reason
        return call

    def done(self, call: Call) -> None:
        """Nobody will look at this call again."""
        call.wanted = False
        if call.complete:
            self._calls.pop(call.number, None)

    def wait(self, calls: Sequence[Call], ranks: Sequence[int], timeout_s: float, tick: Tick) -> Call:
        """Wait until one of the calls has the replies of those of ``ranks`` that it asked; returns the first such.

        ``tick`` is called every 20 ms and may raise to give up. Raises LeapfrogError (rank_died, rank_timeout, what
        a rank reported); the pool is then closed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for call in calls:
                if all(rank in call.replies for rank in ranks if rank in call.ranks):
                    return call
            self._pump(calls, deadline, tick)

    def request(
        self, messages: Mapping[int, HostMessage], timeout_s: float, tick: Tick, using: Payload | None = None
    ) -> dict[int, Any]:
        """Send one message per rank and wait for all replies; errors as in :meth:`wait`."""
        call = self.submit(messages, tick, using)
        try:
            self.wait([call], list(messages), timeout_s, tick)
        finally:
            self.done(call)
        return call.replies

    def _pump(self, calls: Iterable[Call], deadline: float, tick: Tick) -> None:
        """Take in what has arrived; the wait is short. Past the deadline the ranks that owe to ``calls`` are blamed."""
        owing = {rank for call in self._calls.values() for rank in call.ranks - call.replies.keys()}
        connections = {id(self._channels[rank].connection): rank for rank in owing}
        waiting = [self._channels[rank].connection for rank in owing]
        arrived = wait_for_any(waiting, timeout=min(POLL_S, max(0.0, deadline - time.monotonic())))
        for connection in arrived:
            rank = connections[id(connection)]
            reply = self._receive(rank)
            call = self._calls.get(reply.call)
            if call is None:
                continue
            if rank in call.replies or not isinstance(reply, call.answers.get(rank, ())):
                raise self._broken(ErrorReport("rank_error", "A rank answered what it was not asked.", rank))
            call.replies[rank] = reply
            if call.on_reply:
                call.on_reply(call.number, rank, reply)
            if call.complete and not call.wanted:
                del self._calls[call.number]
        if not arrived:
            if time.monotonic() > deadline:
                late = {rank for call in calls for rank in call.ranks - call.replies.keys()}
                raise self._broken(ErrorReport("rank_timeout", "A rank did not answer in time.", min(late or owing)))
            tick()

    def _receive(self, rank: int) -> RankMessage:
        try:
            reply = self._channels[rank].receive(1.0)
        except (EOFError, OSError, TimeoutError, msgspec.MsgspecError):
            self._wait_for_end([self._processes[rank]], 1.0)
            raise self._broken(self._death(rank)) from None
        if isinstance(reply, Failed):
            # a rank whose neighbour died fails too, and may be heard first
            others = [process for process in self._processes if process.rank != rank]
            dead = self._wait_for_end(others, 0.2)
            report = reply.error or ErrorReport("rank_error", "A rank failed without a reason.", rank)
            raise self._broken(report if dead is None else self._death(dead))
        return reply

    @staticmethod
    def _wait_for_end(processes: Sequence[RankProcess], seconds: float) -> int | None:
        """The rank of the first of these processes that has ended, None if none has within ``seconds``."""
        limit = time.monotonic() + seconds
        while True:
            for process in processes:
                if process.exit_code is not None:
                    return process.rank
            if time.monotonic() > limit:
                return None
            time.sleep(0.005)

    def _death(self, rank: int) -> ErrorReport:
        process = self._processes[rank]
        last = " | ".join(list(process.tail)[-5:])
        code = process.exit_code
        how = f"ended with exit code {code}" if code is not None else "broke the connection"
        said = f" Its last words: {last}" if last else ""
        return ErrorReport("rank_died", f"The process of a rank {how}.{said}", rank)

    def _broken(self, report: ErrorReport) -> LeapfrogError:
        if report.traceback:
            log.error("Leapfrog rank %d:\n%s", report.rank, report.traceback)
        self.close()
        return LeapfrogError(report)

    def close(self) -> None:
        """End all ranks and give back the shared memory. Nothing is left when this returns."""
        if not self.alive:
            return
        self.alive = False
        for channel in self._channels:
            try:
                channel.send(Stop())
            except OSError:
                pass
            channel.close()
        _end_all(self._processes)
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()
        self._calls.clear()


def _end_all(processes: Sequence[RankProcess]) -> None:
    threads = [threading.Thread(target=p.end, args=(END_GRACE_S,)) for p in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def start_pool(devices: Sequence[str], host: ComfyHost, tick: Tick) -> Pool:
    """Start one rank per device and wait until all of them are ready, within three minutes.

    Raises LeapfrogError rank_start, or whatever ``tick`` raises; no process is left then.
    """
    began = time.monotonic()
    deadline = began + START_TIMEOUT_S
    log.info("Leapfrog: starting %d ranks on %s", len(devices), ",".join(devices))
    secret = secrets.token_hex(32)
    backend = _backend(devices)
    threads = _threads_per_rank(devices)
    processes: list[RankProcess] = []
    channels: dict[int, Channel[FromRank]] = {}
    with Door(secret, len(devices)) as door:
        try:
            for rank, device in enumerate(devices):
                args = list(host.args) + (["--cpu"] if device == CPU and "--cpu" not in host.args else [])
                spec = LaunchSpec(
                    rank=rank, world=len(devices), device=device, backend=backend, comfy_args=args, secret=secret,
                    threads=threads if device == CPU else 0, port=door.port, comfy_root=host.root,
                    timeout_s=step_timeout_s(),
                )  # fmt: skip
                processes.append(RankProcess(spec))
            while len(channels) < len(devices):
                _check_start(processes, deadline, tick)
                if caller := door.admit(POLL_S):
                    channels[caller[0]] = Channel(caller[1], FromRank, SEND_TIMEOUT_S)
            hello = {r: _await(Hello, channels[r], processes, deadline, tick) for r in channels}
            for channel in channels.values():
                channel.send(Join(store_port=hello[0].store_port))
            ready = {r: _await(Ready, channels[r], processes, deadline, tick) for r in channels}
        except BaseException:
            for channel in channels.values():
                channel.close()
            _end_all(processes)
            raise
    log.info("Leapfrog: %d ranks ready (%s) after %.1f s", len(devices), backend, time.monotonic() - began)
    ranks = range(len(devices))
    return Pool(devices, processes, [channels[r] for r in ranks], [ready[r].free for r in ranks])


def _check_start(processes: Sequence[RankProcess], deadline: float, tick: Tick) -> None:
    tick()
    for process in processes:
        if process.exit_code is not None:
            last = " | ".join(list(process.tail)[-5:])
            message = f"A rank ended with exit code {process.exit_code} while starting. Its last words: {last}"
            raise LeapfrogError(ErrorReport("rank_start", message, process.rank))
    if time.monotonic() > deadline:
        raise LeapfrogError(ErrorReport("rank_start", f"The ranks were not ready after {START_TIMEOUT_S:.0f} s."))


def _await(
    kind: type[RankMessage], channel: Channel[FromRank], processes: Sequence[RankProcess], deadline: float, tick: Tick
) -> Any:
    while True:
        _check_start(processes, deadline, tick)
        try:
            message = channel.receive(POLL_S)
        except TimeoutError:
            continue
        except (EOFError, OSError):
            time.sleep(POLL_S)
            continue
        except msgspec.MsgspecError as error:
            raise LeapfrogError(ErrorReport("rank_start", f"A rank sent no message: {error}.")) from None
        if isinstance(message, Failed) and message.error:
            raise LeapfrogError(message.error)
        if not isinstance(message, kind):
            raise LeapfrogError(ErrorReport("rank_start", f"A rank sent {type(message).__name__} out of turn."))
        return message


_pools: dict[tuple[str, ...], Pool] = {}
_pools_lock = threading.Lock()


def acquire(devices: Sequence[str], host: ComfyHost, tick: Tick, user: object) -> Pool:
    """The living pool on exactly these devices, or a new one; pools that share a device with it are closed first.

    A pool is closed a minute after the last of its users is gone: ComfyUI drops a MODEL without telling anyone.
    """
    with _pools_lock:
        for key, pool in list(_pools.items()):
            if not pool.alive or (key != tuple(devices) and set(key) & set(devices)):
                pool.close()
                del _pools[key]
        pool = _pools.get(tuple(devices))
        if pool is None:
            pool = _pools[tuple(devices)] = start_pool(devices, host, tick)
        if user not in pool.users:
            pool.users.add(user)
            weakref.finalize(user, _close_later, pool).atexit = False
        return pool


def _close_later(pool: Pool) -> None:
    if pool.alive:
        timer = threading.Timer(UNUSED_S, _close_unused, (pool,))
        timer.daemon = True
        timer.start()


def _close_unused(pool: Pool) -> None:
    with _pools_lock:
        if not pool.users:
            pool.close()


def close_all() -> None:
    """Close every pool of this process."""
    with _pools_lock:
        for pool in _pools.values():
            pool.close()
        _pools.clear()


atexit.register(close_all)
