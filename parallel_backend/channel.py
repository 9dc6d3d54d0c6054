"""The control channel of one rank: typed messages over a socket that both ends proved a secret on.

A frame is four bytes of length, the highest first, and a msgpack body that is decoded into one union of message types,
so nothing but those types can come out. Memory is taken for bytes that have come, never for bytes that are announced.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from .protocol import MAX_MESSAGE

Received = TypeVar("Received")
SEND_TIMEOUT_S = 30.0
_LENGTH = struct.Struct("!I")
_PART = 1 << 16


class Channel(Generic[Received]):
    """One end of the wire; ``receives`` is the union of message types that the other end may send.

    ``send_timeout_s`` is how long the other end may leave a message untaken. A rank has none: its death pipe watches
    its host, which may be held for any time by whoever sits in front of it.
    """

    def __init__(self, sock: socket.socket, receives: Any, send_timeout_s: float | None = None):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = sock
        self._send_timeout_s = send_timeout_s
        self._frame = bytearray()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[memoryview], Received] = msgspec.msgpack.Decoder(receives).decode

    def send(self, message: msgspec.Struct, timeout_s: float | None = None) -> None:
        """``timeout_s`` counts where it is less than the channel's own.

        Raises OSError if the other end is gone or does not take it, ValueError if the message is over the bound.
        """
        body = self._encode(message)
        if len(body) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(body)} bytes is over the bound of {MAX_MESSAGE}")
        self.push(_LENGTH.pack(len(body)) + body, timeout_s)

    def push(self, data: bytes | memoryview, timeout_s: float | None = None) -> None:
        """Send bytes as they are; as :meth:`send` otherwise."""
        limits = [seconds for seconds in (self._send_timeout_s, timeout_s) if seconds is not None]
        self.connection.settimeout(max(0.0, min(limits)) if limits else None)
        try:
            self.connection.sendall(data)
        except (TimeoutError, BlockingIOError):
            self.close()  # part of it went, so nothing else can
            raise TimeoutError("the other end does not take what it is sent") from None

    def receive(self, timeout_s: float | None) -> Received:
        """The next message. None waits for ever, which only a rank does, whose death pipe watches its host.

        Raises TimeoutError (what came of a message is kept for the next call), EOFError or OSError (the other end is
        gone or announced too much, which closes the channel), msgspec.MsgspecError (no message of these types).
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._fill(_LENGTH.size, deadline)
        (length,) = _LENGTH.unpack_from(self._frame)
        if length > MAX_MESSAGE:
            self.close()
            raise OSError(f"a message of {length} bytes was announced, the bound is {MAX_MESSAGE}")
        self._fill(_LENGTH.size + length, deadline)
        frame, self._frame = self._frame, bytearray()
        try:
            return self._decode(memoryview(frame)[_LENGTH.size :])
        except (RecursionError, UnicodeDecodeError) as error:
            raise msgspec.DecodeError(f"no message: {type(error).__name__}") from None

    def _fill(self, size: int, deadline: float | None) -> None:
        while len(self._frame) < size:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self.connection.settimeout(left)
            part = self.connection.recv(min(size - len(self._frame), _PART))
            if not part:
                raise EOFError
            self._frame += part

    def close(self) -> None:
        self.connection.close()
