"""Who may connect: a handshake in which both ends prove a secret.

The host sends a nonce; the rank answers with its own, its number and a proof; the host answers with a
proof. The secret itself is never sent, and neither end believes a caller or a listener that took over a port.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import time
from dataclasses import dataclass

from .protocol import LOOPBACK

PROOF_TIMEOUT_S = 2.0
MAX_WAITING = 64
_NONCE = 32
_RANK = 2
_CLAIM = _NONCE + _RANK
_PROOF = 32


def listen(address: str = LOOPBACK, port: int = 0) -> socket.socket:
    """A listening socket at this address, on a free port if none is given."""
    return socket.create_server((address, port), backlog=128)


def knock(port: int, rank: int, secret: str, timeout_s: float, host: str = LOOPBACK) -> socket.socket:
    """A rank's side: connect, prove the secret and say which rank this is, have the host prove it too.

    Turned away, it knocks again until ``timeout_s`` is over: strangers may crowd the door. Raises OSError.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
        try:
            prove(sock, rank, secret)
            return sock
        except OSError as error:
            sock.close()
            if not isinstance(error, ConnectionError) or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def prove(sock: socket.socket, rank: int, secret: str) -> None:
    """The rank's side on a connected socket that has a timeout. Raises OSError."""
    nonce = _take(sock, _NONCE)
    claim = secrets.token_bytes(_NONCE) + rank.to_bytes(_RANK, "big")
    sock.sendall(claim + _proof(secret, b"rank", nonce, claim))
    if not hmac.compare_digest(_take(sock, _PROOF), _proof(secret, b"host", nonce, claim)):
        raise ConnectionRefusedError("who listens does not know the secret")


def _take(sock: socket.socket, size: int) -> bytes:
    """As many bytes, in as many parts: who sends them one by one gains little, a part has the socket's timeout."""
    taken = b""
    while len(taken) < size:
        part = sock.recv(size - len(taken))
        if not part:
            raise ConnectionAbortedError("turned away")
        taken += part
    return taken


def _proof(secret: str, side: bytes, nonce: bytes, claim: bytes) -> bytes:
    return hmac.digest(bytes.fromhex(secret), side + nonce + claim, "sha256")


@dataclass
class _Caller:
    sock: socket.socket
    address: str
    nonce: bytes
    deadline: float
    said: bytes = b""


class Door:
    """The host's side: a listener that lets every rank of a pool in once, and nobody else.

    With ``again`` callers of any number below ``world`` come in as often as they like, which joiners of other machines
    do. ``refused`` are addresses of some that proved wrong.

    Callers are heard at the same time, each for two seconds. Of more than 64 at a time the one that has waited longest
    is turned away, so neither slow callers nor many of them keep a rank out.
    """

    def __init__(self, secret: str, world: int, address: str = LOOPBACK, port: int = 0, again: bool = False):
        self._secret = secret
        self._again = again
        self.refused: set[str] = set()
        self._absent = set(range(world))
        self._callers: dict[socket.socket, _Caller] = {}
        self._listener = listen(address, port)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._listener, selectors.EVENT_READ)

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_error: object) -> None:
        for caller in list(self._callers.values()):
            self._turn_away(caller)
        self._ready.close()
        self._listener.close()

    def admit(self, timeout_s: float) -> tuple[int, socket.socket] | None:
        """``(rank, socket)`` of the next rank, None if none came in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            for caller in [caller for caller in self._callers.values() if caller.deadline < now]:
                self._turn_away(caller)
            for key, _ in self._ready.select(max(0.0, deadline - now)):
                caller: _Caller | None = key.data
                if caller is None:
                    self._open()
                elif caller.sock in self._callers and (rank := self._hear(caller)) is not None:
                    return rank, caller.sock
            if time.monotonic() >= deadline:
                return None

    def _open(self) -> None:
        nonce = secrets.token_bytes(_NONCE)
        try:
            sock, (address, _) = self._listener.accept()
            sock.setblocking(False)
            sock.send(nonce)
        except OSError:
            return
        if len(self._callers) >= MAX_WAITING:
            self._turn_away(next(iter(self._callers.values())))
        caller = self._callers[sock] = _Caller(sock, address, nonce, time.monotonic() + PROOF_TIMEOUT_S)
        self._ready.register(sock, selectors.EVENT_READ, caller)

    def _hear(self, caller: _Caller) -> int | None:
        """The rank of a caller that has said and proved it; what says too little stays, what proves wrong goes."""
        try:
            part = caller.sock.recv(_CLAIM + _PROOF - len(caller.said))
        except OSError:
            part = b""
        caller.said += part
        if part and len(caller.said) < _CLAIM + _PROOF:
            return None
        claim, proof = caller.said[:_CLAIM], caller.said[_CLAIM:]
        rank = int.from_bytes(claim[_NONCE:], "big")
        known = hmac.compare_digest(proof, _proof(self._secret, b"rank", caller.nonce, claim))
        if not known or rank not in self._absent:
            if part and not known and len(self.refused) < MAX_WAITING:
                self.refused.add(caller.address)
            self._turn_away(caller)
            return None
        try:
            caller.sock.send(_proof(self._secret, b"host", caller.nonce, claim))
        except OSError:
            self._turn_away(caller)
            return None
        self._forget(caller)
        if not self._again:
            self._absent.remove(rank)
        return rank

    def _turn_away(self, caller: _Caller) -> None:
        self._forget(caller)
        caller.sock.close()

    def _forget(self, caller: _Caller) -> None:
        del self._callers[caller.sock]
        self._ready.unregister(caller.sock)
