"""The pool: all ranks. Asks them things under a deadline, notices when one dies or hangs, says who is to blame.

Its life is a :class:`State`, which the pool alone changes: ``starting.py`` brings the ranks up and ``supervisor.py``
decides who gets a pool and when it has to go.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for_any
from typing import Any

import msgspec
import torch

from .channel import Channel
from .courier import HostCourier
from .devices import CPU, kind_of
from .errors import ErrorReport, LeapfrogError, error_of
from .guests import RemoteProcess
from .launcher import RankProcess
from .pool_memory import PoolMemory
from .protocol import ANSWERS, Failed, FromRank, HostMessage, Payload, RankMessage, Release, Room, Stop
from .settings import step_timeout_s
from .tensors import Arena, laid_out, trim_heap

log = logging.getLogger("leapfrog")
POLL_S = 0.02
END_GRACE_S = 2.0
GONE_S = 15.0
MAX_ARENAS = 12
LAST_LINES = 10
ENDED_MEANWHILE = "The ranks were ended while they computed."

Tick = Callable[[], None]
Process = RankProcess | RemoteProcess


class State(enum.Enum):
    """Where a pool is in its life. Busy: somebody waits for an answer. Failed and stopped: no process is left."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    STOPPED = "stopped"


ENDED = {State.FAILED, State.STOPPED}
NEXT = {
    State.STARTING: {State.READY, *ENDED},
    State.READY: {State.BUSY, *ENDED},
    State.BUSY: {State.READY, *ENDED},
    State.FAILED: set(),
    State.STOPPED: set(),
}


@dataclass(eq=False)
class Call:
    """Messages that went to some ranks. ``replies`` fill up, each handed to ``on_reply`` as it comes in, with ``step``
    and rank.

    ``step`` is which denoiser call of the run it is, from 1; 0 for anything else. ``answers`` are the types of reply
    that the ranks may give. ``answered``: the replies that somebody waited for are there; others may still come.
    """

    number: int
    ranks: frozenset[int]
    arena: str = ""
    on_reply: Callable[[int, int, Any], None] | None = None
    step: int = 0
    answers: dict[int, type[RankMessage]] = field(default_factory=dict)
    replies: dict[int, Any] = field(default_factory=dict)
    wanted: bool = True
    answered: bool = False

    @property
    def complete(self) -> bool:
        return len(self.replies) == len(self.ranks)


class Pool:
    """The ranks on some devices, from their start to their end.

    Not for several threads at once: callers hold :attr:`lock` for a whole request. :meth:`close` may come from any.
    Each rank works through its messages in the order in which they were sent, so several calls can be under way.
    ``memory`` is what callers know of this pool's ranks, ``users`` are the objects that may come back for it.
    ``used_at`` is when it was last asked for something, ``had_users_at`` when it was last seen to have users.
    """

    def __init__(self, devices: Sequence[str]):
        self.devices = tuple(devices)
        self.lock = threading.RLock()
        self.memory = PoolMemory()
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        self.used_at = self.had_users_at = time.monotonic()
        self.processes: list[Process] = []
        self.channels: dict[int, Channel[FromRank] | HostCourier] = {}
        self._state = State.STARTING
        self._changing = threading.Lock()
        self._gone = threading.Event()
        self._calls: dict[int, Call] = {}
        self._number = 0
        self._failure: ErrorReport | None = None
        self.arenas: dict[str, Arena] = {}

    @property
    def state(self) -> State:
        return self._state

    @property
    def alive(self) -> bool:
        return self._state not in ENDED

    @property
    def pids(self) -> list[int]:
        """Of the ranks on this machine."""
        return [p.pid for p in self.processes if p.pid is not None]

    @property
    def dead(self) -> list[Process]:
        """The ranks whose processes have ended although nobody asked them to."""
        return [process for process in self.processes if self.alive and process.exit_code is not None]

    @property
    def catching_up(self) -> bool:
        """Whether ranks may still be at work on what nobody wants any more, for as long as that takes.

        Who still owes its word on a call that has been answered is as good as done with it.
        """
        return any(not call.wanted and not call.answered for call in self._calls.values())

    def _become(self, state: State) -> bool:
        """Whether the state changed. A pool that has ended stays as it is, whoever was first to end it."""
        with self._changing:
            if self._state is state or not self.alive:
                return False
            if state not in NEXT[self._state]:
                raise RuntimeError(f"a pool that is {self._state.value} cannot become {state.value}")
            self._state = state
            return True

    def opened(self) -> None:
        """All ranks have started."""
        for process in self.processes:
            process.starting = False
        self._become(State.READY)

    def _settle(self) -> None:
        """Somebody waits, or nobody does any more."""
        self.used_at = time.monotonic()
        self._become(State.BUSY if any(call.wanted for call in self._calls.values()) else State.READY)

    def payload(self, tree: Any, tick: Tick, reserve: int = 0, where: str = "value") -> tuple[Payload, int]:
        """Write a tree into an arena that no call uses; returns it with the offset of ``reserve`` free bytes after it.

        Raises LeapfrogError unsupported_patch, with the place in the tree, for a value that cannot travel.
        """
        spec, tensors, heads, end = laid_out(tree, where)
        arena = self._free_arena(end + reserve, tick)
        arena.write(tensors, heads)
        return Payload(arena.name, spec, heads), end

    def _free_arena(self, size: int, tick: Tick) -> Arena:
        deadline = time.monotonic() + step_timeout_s()
        while True:
            used = {call.arena for call in self._calls.values()}
            free = [arena for name, arena in self.arenas.items() if name not in used]
            large = [arena for arena in free if arena.size >= size]
            if large:
                return large[0]
            self._forget([arena.name for arena in free])
            if len(self.arenas) < MAX_ARENAS:
                arena = Arena.create(size)
                self.arenas[arena.name] = arena
                return arena
            self._pump(deadline, tick)

    def rest(self) -> None:
        """Give back the shared memory that no call under way uses, and what else was freed; the next call gets new."""
        used = {call.arena for call in list(self._calls.values())}
        unused = [name for name in self.arenas if name not in used]
        self._forget(unused)
        if unused:
            trim_heap()

    def _forget(self, names: Sequence[str]) -> None:
        if not names:
            return
        for name in names:
            self.arenas.pop(name).close()
        self.tell(Release(arenas=list(names)))

    def tell(self, message: Release) -> None:
        """Tell all ranks."""
        for channel in self.channels.values():
            with contextlib.suppress(OSError):  # the next call of this rank tells why
                channel.send(message)

    def read(self, payload: Payload) -> Any:
        """A copy of a payload's tree. Raises LeapfrogError rank_error for what is none; the pool is then closed."""
        try:
            return self.arenas[payload.arena].tree(payload.spec, payload.heads, copy=True)
        except (AttributeError, KeyError, ValueError):
            raise self.broken(ErrorReport("rank_error", "A rank sent a result that cannot be read.")) from None

    def finite(self, payload: Payload) -> tuple[bool, bool]:
        """Whether all numbers in a payload's tensors, and whether any, are neither NaN nor infinity."""
        arena = self.arenas[payload.arena]
        tensors = [torch.isfinite(arena.view(head)) for head in payload.heads]
        whole = all(bool(one.all()) for one in tensors)
        return whole, whole or any(bool(one.any()) for one in tensors)

    def submit(
        self,
        messages: Mapping[int, HostMessage],
        tick: Tick,
        using: Payload | None = None,
        on_reply: Callable[[int, int, Any], None] | None = None,
        step: int = 0,
    ) -> Call:
        """Send one message per rank and return at once. The arena of ``using`` stays untouched until the call is
        complete and :meth:`done`. ``tick`` is called first and may raise to give up.

        Raises LeapfrogError: unsupported_patch for more than a message can carry, what became of a rank that is gone.
        """
        tick()
        self._number += 1
        call = Call(self._number, frozenset(messages), using.arena if using else "", on_reply, step)
        call.answers = {rank: ANSWERS[type(message)] for rank, message in messages.items()}
        self._calls[call.number] = call
        self._settle()
        sent: list[int] = []
        for rank, message in messages.items():
            message.call = call.number
            try:
                self.channels[rank].send(message)
            except OSError:
                self._receive(rank)  # raises with the reason
            except (OverflowError, ValueError) as error:
                report = ErrorReport("unsupported_patch", f"The inputs of this run cannot be sent to a rank: {error}.")
                if sent:  # they will wait for this one
                    raise self.broken(report) from None
                call.ranks = frozenset()
                self.done(call)
                raise error_of(report) from None
            sent.append(rank)
        return call

    def done(self, call: Call) -> None:
        """Nobody will look at this call again."""
        call.wanted = False
        if call.complete and self._calls.get(call.number) is call:
            self._calls.pop(call.number, None)  # or another thread has ended the pool
        self._settle()

    def wait(self, calls: Sequence[Call], ranks: Sequence[int], timeout_s: float, tick: Tick) -> Call:
        """Wait until one of the calls has the replies of those of ``ranks`` that it asked; returns the first such.

        ``tick`` is called every 20 ms and may raise to give up. Raises LeapfrogError (rank_died, rank_timeout, what
        a rank reported); the pool is then closed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for call in calls:
                if self._calls.get(call.number) is not call:
                    raise self._ended_meanwhile()
                if all(rank in call.replies for rank in ranks if rank in call.ranks):
                    call.answered = True
                    return call
            self._pump(deadline, tick)

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

    def free(self, tick: Tick) -> list[int | None]:
        """Bytes that each rank's device could give if the rank held nothing; None where nobody counts. Errors as in
        :meth:`wait`."""
        if all(kind_of(device) == CPU for device in self.devices):
            return [None] * len(self.devices)
        ranks = range(len(self.devices))
        replies = self.request({rank: Room() for rank in ranks}, step_timeout_s(), tick)
        return [replies[rank].free for rank in ranks]

    def catch_up(self, seconds: float) -> bool:
        """Wait until all ranks have done what they were told, but not for longer; whether they have.

        Raises LeapfrogError for a rank that is gone.
        """
        until = time.monotonic() + seconds
        call = self.submit({rank: Room() for rank in self.channels}, lambda: None)
        try:
            while not call.complete and time.monotonic() < until:
                self._pump(math.inf, lambda: None)
        finally:
            self.done(call)
        return call.complete

    def _pump(self, deadline: float, tick: Tick) -> None:
        """Take in what has arrived; the wait is short. Past the deadline a rank that owes an answer is blamed."""
        owing = {rank for call in self._calls.values() for rank in self._owing(call)}
        connections = {id(self.channels[rank].connection): rank for rank in owing}
        waiting = [self.channels[rank].connection for rank in owing]
        try:
            arrived = wait_for_any(waiting, timeout=min(POLL_S, max(0.0, deadline - time.monotonic())))
        except (OSError, ValueError):  # a channel that was closed, by whoever ended the pool or could not send
            raise self._closed(owing) from None
        for connection in arrived:
            rank = connections[id(connection)]
            reply = self._receive(rank)
            call = self._calls.get(reply.call)
            if call is None:
                continue
            if rank in call.replies or not isinstance(reply, call.answers.get(rank, ())):
                raise self.broken(ErrorReport("rank_error", "A rank sent a reply that was not asked for.", rank))
            call.replies[rank] = reply
            if call.on_reply:
                call.on_reply(call.step, rank, reply)
            if call.complete and not call.wanted:
                del self._calls[call.number]
        if not arrived:
            for process in self.dead:  # it may owe no answer, and others wait for it
                raise self._died(process.rank)
            if time.monotonic() > deadline:
                raise self._late()
            tick()

    @staticmethod
    def _owing(call: Call) -> frozenset[int]:
        return call.ranks - call.replies.keys()

    def _receive(self, rank: int) -> RankMessage:
        try:
            reply = self.channels[rank].receive(1.0)
        except (EOFError, OSError, TimeoutError, msgspec.MsgspecError):
            self._wait_for_end([self.processes[rank]], 1.0)
            raise self._died(rank) from None
        if isinstance(reply, Failed):
            # a rank whose neighbour died fails too, and may be heard first
            others = [process for process in self.processes if process.rank != rank]
            dead = self._wait_for_end(others, max((process.news_s for process in others), default=0.0))
            if dead is not None:
                raise self._died(dead)
            raise self.broken(reply.error or ErrorReport("rank_error", "A rank failed without a reason.", rank))
        return reply

    @staticmethod
    def _wait_for_end(processes: Sequence[Process], seconds: float) -> int | None:
        """The rank of the first of these processes that has ended, None if none has within ``seconds``."""
        limit = time.monotonic() + seconds
        while True:
            for process in processes:
                if process.exit_code is not None:
                    return process.rank
            if time.monotonic() > limit:
                return None
            time.sleep(0.005)

    def _ended_meanwhile(self) -> LeapfrogError:
        """For those who still wait: what the pool failed of, whoever heard of it first."""
        return error_of(self._failure) if self._failure else LeapfrogError.of("rank_died", ENDED_MEANWHILE)

    def _closed(self, owing: Iterable[int]) -> LeapfrogError:
        """Why a channel of these ranks is closed."""
        if not self.alive:
            return self._ended_meanwhile()
        return self._died(next((rank for rank in owing if self.channels[rank].connection.fileno() < 0), min(owing)))

    def _died(self, rank: int) -> LeapfrogError:
        how = self.processes[rank].how_it_ended or "broke the connection"
        return self.broken(ErrorReport("rank_died", f"The process of a rank {how}.", rank))

    def _late(self) -> LeapfrogError:
        owing = [late for call in self._calls.values() if (late := self._owing(call))]
        if not owing:
            return self.broken(ErrorReport("rank_timeout", "No shared memory became free in time."))
        # a rank waits only for ranks before it, which have answered all the earlier calls
        rank = self.culprit(frozenset().union(*owing), owing[0])
        halted = " Its process is halted (SIGSTOP, a debugger)." if self.processes[rank].stopped else ""
        return self.broken(ErrorReport("rank_timeout", f"A rank did not answer in time.{halted}", rank))

    def culprit(self, silent: Iterable[int], suspects: Container[int] = ()) -> int:
        """Of ranks that do not answer, the one that the others may be waiting for: halted, or the first suspect."""
        return min(silent, key=lambda rank: (not self.processes[rank].stopped, rank not in suspects, rank))

    def broken(self, report: ErrorReport) -> LeapfrogError:
        """End the pool; the error to raise, with all that is known. What follows from another one is told as that."""
        if self._failure:
            return error_of(self._failure)
        if 0 <= report.rank < len(self.processes):
            step = next((call.step for call in self._calls.values() if report.rank in self._owing(call)), 0)
            lines = self.processes[report.rank].last_lines(LAST_LINES)
            report = msgspec.structs.replace(report, step=step, log=lines)
        if report.traceback:
            log.error("Leapfrog rank %d:\n%s", report.rank, report.traceback)
        self._failure = report
        self._end(State.FAILED)
        return error_of(report)

    def close(self) -> None:
        """End all ranks and give back the shared memory. Nothing is left when this returns."""
        self._end(State.STOPPED)

    def _end(self, state: State) -> None:
        if not self._become(state):
            self._gone.wait(GONE_S)  # another thread is at it
            return
        for channel in self.channels.values():
            try:
                channel.send(Stop())
            except OSError:
                pass
            channel.close()
        for process in self.processes:
            process.let_go()
        deadline = time.monotonic() + END_GRACE_S
        for process in self.processes:  # without threads of our own: a Python that ends may start none
            try:
                process.end(max(0.2, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("Leapfrog: rank %d does not end, not even when killed", process.rank)
        # whoever writes to an arena or reads it has the lock, and will soon be told that the pool has ended
        locked = self.lock.acquire(timeout=END_GRACE_S)
        for arena in self.arenas.values():
            with contextlib.suppress(BufferError):  # a courier that is stuck in it; the segment goes with its last view
                arena.close()
        self.arenas.clear()
        if locked:
            self.lock.release()
        self._calls.clear()
        self._gone.set()
