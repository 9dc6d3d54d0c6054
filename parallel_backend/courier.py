"""The control channel of a rank on another machine: it carries the bytes of the tensors too, behind their message.

A thread reads all the time, so neither end can block the other, and who waits for a message wakes up when all of it
has come.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic

import msgspec

from .channel import SEND_TIMEOUT_S, Channel, Received
from .machines import fingerprint
from .protocol import Done, FromHost, FromRank, Payload, Release, Stop
from .settings import step_timeout_s
from .tensors import Arena

log = logging.getLogger("leapfrog")
PART = 1 << 20
WAITING = 256
ARENAS = 16
LARGEST = 1 << 38
READ_S = 1.0
JOIN_S = 5.0
NOWHERE = ("", 0, 0)


def payload_of(message: Any) -> Payload | None:
    """What a message speaks of that lies in an arena."""
    found = (getattr(message, name, None) for name in ("inputs", "patches", "output"))
    return next((payload for payload in found if payload is not None), None)


class Courier(Generic[Received]):
    """One end; used as a :class:`Channel` is, by one thread at a time. ``arenas`` are those that messages speak of.

    ``connection`` can be waited for: there is something to read for every message that has come, and at the end.
    """

    def __init__(self, sock: socket.socket, receives: Any, arenas: Mapping[str, Arena]):
        self.arenas = arenas
        self._out: Channel[Received] = Channel(sock, receives, SEND_TIMEOUT_S)
        self._in: Channel[Received] = Channel(sock.dup(), receives)
        self.connection, self._bell = socket.socketpair()
        self._came: queue.SimpleQueue[Received | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, name="leapfrog-courier", daemon=True)
        self._thread.start()

    def send(self, message: msgspec.Struct, timeout_s: float = math.inf) -> None:
        """As :meth:`Channel.send`; each part of the tensors has the channel's deadline anew, all have ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        try:
            self._out.send(message, timeout_s)
            if payload := payload_of(message):
                self._send_tensors(payload, deadline)
        except OSError:
            self.hang_up()
            raise

    def _send_tensors(self, payload: Payload, deadline: float) -> None:
        try:
            for head in payload.heads:
                with self.arenas[payload.arena].raw(head) as raw:
                    for at in range(0, len(raw), PART):
                        with raw[at : at + PART] as part:
                            self._out.push(part, deadline - time.monotonic())
        except (KeyError, TypeError, ValueError) as error:
            raise ConnectionAbortedError("the arenas were closed meanwhile") from error

    def receive(self, timeout_s: float | None) -> Received:
        """As :meth:`Channel.receive`; the message's tensors lie in their arena."""
        try:
            came = self._came.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(came, Exception):
            self._came.put(came)
            raise came
        self.connection.recv(1)
        return came

    def hang_up(self) -> None:
        """End the connection; the other end, and whoever waits at this one, will notice."""
        for end in (self._in, self._out):  # either may be closed already
            with contextlib.suppress(OSError):
                end.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """When this returns nothing is written to the arenas any more."""
        self.hang_up()
        self._thread.join(JOIN_S)
        for sock in (self._out, self._in, self.connection, self._bell):
            sock.close()

    def _read(self) -> None:
        try:
            while True:
                message = self._message()
                self._arrived(message)
                if payload := payload_of(message):
                    arena = self._arena(message, payload)
                    for head in payload.heads:
                        with arena.raw(head) as raw:
                            self._fill(raw)
                if self._came.qsize() >= WAITING:
                    raise OSError("more messages came than were asked for")
                self._came.put(message)
                self._bell.send(b"!")
                if isinstance(message, Stop):
                    return
        except Exception as error:  # whatever came, the connection cannot be used any more
            self.hang_up()
            self._came.put(error if isinstance(error, EOFError | OSError) else OSError(str(error)))
            self._bell.close()
            self._ended(error)

    def _message(self) -> Received:
        while True:
            try:
                return self._in.receive(READ_S)
            except TimeoutError:
                continue

    def _fill(self, raw: memoryview) -> None:
        self._in.connection.settimeout(READ_S)  # a message has left what was left of its own
        at = 0
        while at < len(raw):
            with raw[at:] as rest:
                try:
                    count = self._in.connection.recv_into(rest)
                except TimeoutError:
                    continue
            if not count:
                raise EOFError
            at += count

    def _arrived(self, message: Any) -> None:
        pass

    def _arena(self, message: Any, payload: Payload) -> Arena:
        """Where the bytes of a message that has come may be written. Raises ValueError where they may not."""
        raise NotImplementedError

    def _ended(self, error: Exception) -> None:
        pass


class HostCourier(Courier[FromRank]):
    """The host's end. A rank writes to the arenas only what it was asked for, where there is room for it."""

    def __init__(self, sock: socket.socket, arenas: Mapping[str, Arena]):
        self._rooms: dict[int, tuple[str, int, int]] = {}
        self._room = NOWHERE
        self._clocks: float | None = None
        super().__init__(sock, FromRank, arenas)

    def send(self, message: msgspec.Struct, timeout_s: float = math.inf) -> None:
        """No longer than a rank may take for an answer."""
        payload, recipe = payload_of(message), getattr(message, "recipe", None)
        if payload and hasattr(message, "out"):
            out: Any = message
            self._rooms[out.call] = (payload.arena, out.out, out.out + out.out_size)
        if recipe:
            try:
                mark = fingerprint(recipe.path, recipe.stamp)
            except OSError:
                mark = "cannot be read"  # as the rank will say, of its own
            message = msgspec.structs.replace(message, recipe=msgspec.structs.replace(recipe, fingerprint=mark))
        super().send(message, min(timeout_s, step_timeout_s()))

    def _arrived(self, message: Any) -> None:
        self._room = self._rooms.pop(message.call, NOWHERE)
        # The rank's clock is another machine's: it is at most so much behind as the message that was fastest.
        if isinstance(message, Done):
            behind = time.perf_counter() - message.end
            self._clocks = behind if self._clocks is None else min(self._clocks, behind)
            message.begin += self._clocks
            message.end += self._clocks

    def _arena(self, message: Any, payload: Payload) -> Arena:
        name, begin, end = self._room
        outside = any(head.offset < begin or head.offset + head.nbytes > end for head in payload.heads)
        if payload.arena != name or outside or sum(head.nbytes for head in payload.heads) > end - begin:
            raise ValueError("a rank sent what it was not asked for")
        return self.arenas[name]


class RankCourier(Courier[FromHost]):
    """A rank's end: what comes is kept in arenas of its own. ``ended`` is called when the connection is gone."""

    def __init__(self, sock: socket.socket, ended: Callable[[], None]):
        self._own: dict[str, Arena] = {}
        self._when_ended = ended
        super().__init__(sock, FromHost, self._own)

    def _arrived(self, message: Any) -> None:
        if isinstance(message, Release):
            for name in message.arenas:
                self._own.pop(name, None)

    def _arena(self, message: Any, payload: Payload) -> Arena:
        ends = [head.offset + head.nbytes for head in payload.heads]
        size = max([*ends, getattr(message, "out", 0) + getattr(message, "out_size", 0)])
        if size > LARGEST or sum(head.nbytes for head in payload.heads) > size:
            raise ValueError(f"{size} bytes are no arena")
        # The host has a dozen arenas and writes to none that a message still to be answered speaks of.
        arena = self._own.pop(payload.arena, None)
        if arena is None or arena.size < size:
            arena = Arena.alone(payload.arena, size)
        self._own[payload.arena] = arena
        while len(self._own) > ARENAS:
            self._own.pop(next(iter(self._own)))
        return arena

    def _ended(self, error: Exception) -> None:
        if not isinstance(error, EOFError | ConnectionError):
            log.error("the connection to the host cannot be used: %s", error)
        self._when_ended()
