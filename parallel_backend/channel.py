"""The control channel of one rank: typed messages over a loopback socket that both ends proved a secret on.

Frames are multiprocessing's (length, bytes); the body is msgpack decoded into one union of message types, so nothing
but those types can come out. Every receive takes a deadline.
"""

from __future__ import annotations

import hmac
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import msgspec

from .protocol import MAX_MESSAGE

Received = TypeVar("Received")
LOOPBACK = "127.0.0.1"
PROOF_TIMEOUT_S = 2.0


class Channel(Generic[Received]):
    """One end of the wire; ``receives`` is the union of message types that the other end may send."""

    def __init__(self, sock: socket.socket, receives: Any):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(True)
        self.connection = Connection(sock.detach())
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], Received] = msgspec.msgpack.Decoder(receives).decode

    def send(self, message: msgspec.Struct) -> None:
        """Raises OSError if the other end is gone, ValueError if the message is over the bound."""
        body = self._encode(message)
        if len(body) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(body)} bytes is over the bound of {MAX_MESSAGE}")
        self.connection.send_bytes(body)

    def receive(self, timeout_s: float | None) -> Received:
        """The next message. None waits for ever, which only a rank does, whose death pipe watches its host.

        Raises TimeoutError, EOFError or OSError (the other end is gone), msgspec.ValidationError.
        """
        if timeout_s is not None and not self.connection.poll(timeout_s):
            raise TimeoutError
        return self._decode(self.connection.recv_bytes(MAX_MESSAGE))

    def close(self) -> None:
        self.connection.close()


def listen() -> socket.socket:
    """A listening socket on a free port of 127.0.0.1."""
    return socket.create_server((LOOPBACK, 0), backlog=16)


def knock(port: int, rank: int, secret: str, timeout_s: float) -> socket.socket:
    """A rank's side of the handshake: connect, then prove the secret and say which rank this is."""
    sock = socket.create_connection((LOOPBACK, port), timeout=timeout_s)
    sock.sendall(bytes.fromhex(secret) + rank.to_bytes(2, "big"))
    return sock


def admit(listener: socket.socket, secret: str, timeout_s: float) -> tuple[int, socket.socket] | None:
    """The host's side: ``(rank, socket)`` of the next caller, None if none came in time or it did not know the secret.

    A caller has two seconds of its own to say it, however short ``timeout_s`` is: a busy machine may let it wait.
    """
    listener.settimeout(timeout_s)
    try:
        sock, _ = listener.accept()
    except TimeoutError:
        return None
    deadline = time.monotonic() + PROOF_TIMEOUT_S
    expected = bytes.fromhex(secret)
    proof = b""
    try:
        while len(proof) < len(expected) + 2:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            part = sock.recv(len(expected) + 2 - len(proof))
            if not part:
                break
            proof += part
    except OSError:
        proof = b""
    if len(proof) != len(expected) + 2 or not hmac.compare_digest(proof[:-2], expected):
        sock.close()
        return None
    return int.from_bytes(proof[-2:], "big"), sock
