"""Tensors from rank to rank through torch.distributed: NCCL between GPUs, gloo (through host memory) otherwise."""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..handshake import listen
from ..tensors import place

log = logging.getLogger("leapfrog.rank")
# From linux/bpf_common.h and asm-generic/socket.h; the socket module does not have them.
_RETURN = 0x06
_ATTACH_FILTER = 26
STORE_TIMEOUT = timedelta(seconds=60)
# Before 2.8 the libuv backend of PyTorch's store takes no listener; on Windows PyTorch is built without it.
LIBUV = sys.platform != "win32" and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
PATIENCE_S = 30.0
"""How much longer a rank waits for another than the host for both: the host knows better who is to blame."""


def open_store(world: int, address: str) -> tuple[dist.TCPStore, int]:
    """The rendezvous store, listening on a free port of one address only; rank 0 owns it. Returns it with the port."""
    listener = listen(address)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address, port, world, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT,
        master_listen_fd=listener.detach(), use_libuv=LIBUV,
    )  # fmt: skip
    return store, port


def join_store(world: int, address: str, port: int) -> dist.TCPStore:
    """The store that rank 0 has opened."""
    return dist.TCPStore(address, port, world, wait_for_workers=False, use_libuv=LIBUV)


def shut_doors(port: int = 0) -> None:
    """From now on no listener of this process lets anybody in, or only none at this ``port``; what is connected stays.

    The store and gloo ask callers for no secret, and gloo keeps every connection. Linux only: elsewhere they stay open.
    """
    if sys.platform != "linux":
        return
    program = ctypes.create_string_buffer(struct.pack("=HBBI", _RETURN, 0, 0, 0))  # a filter that drops every packet
    for number in Path("/proc/self/fd").iterdir():
        try:
            sock = socket.socket(fileno=int(number.name))
        except OSError:
            continue  # no socket, or gone by now
        try:
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and (not port or sock.getsockname()[1] == port):
                given = struct.pack("@HP", 1, ctypes.addressof(program))
                sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, given)
        except OSError:
            log.info("a listener stays open: this system has no socket filters")
        finally:
            sock.detach()


class Incoming:
    """Tensors on their way from one rank, in one message."""

    def __init__(self, work: dist.Work, buffer: torch.Tensor, open_it: Callable[[torch.Tensor], list[torch.Tensor]]):
        self._work = work
        self._buffer = buffer
        self._open = open_it

    def wait(self) -> list[torch.Tensor]:
        self._work.wait()
        return self._open(self._buffer)


class Links:
    """This rank's links to the others. Between two ranks, messages arrive in the order in which they were sent."""

    def __init__(
        self, store: dist.TCPStore, rank: int, world: int, backend: str, device: torch.device, timeout_s: float
    ):
        self.rank = rank
        self.world = world
        self.device = device
        self.sent = 0
        self._waits: list[tuple[Any, Any]] = []
        self._tells = backend != "gloo"
        self._staging = torch.device("cpu") if backend == "gloo" else device
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        timeout = timedelta(seconds=timeout_s + PATIENCE_S)
        bound = device if backend == "nccl" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound)
        # All are connected to the store, and with gloo to each other. NCCL may connect later; it lets in who knows the
        # number of its communicator.
        if backend == "gloo":
            shut_doors()
        elif rank == 0:
            shut_doors(store.port)

    def begin(self) -> None:
        """Forget what was sent and waited for."""
        self.sent = 0
        self._waits.clear()

    @property
    def waited(self) -> float:
        """Seconds that this rank stood still for others since :meth:`begin`; the device must have done its work."""
        return sum(_between(*wait) for wait in self._waits)

    def send(self, to: int, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the tensors into one message and send it; returns before it has arrived."""
        while self._tells and self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        # gloo does not say when a message has left, one can only wait for it. Of the calls in a full pipeline, two for
        # each rank, none has more messages than there are other ranks; what is older has left.
        while len(self._sending) >= 2 * self.world * (self.world - 1):
            self._sending.popleft()[0].wait()
        heads, size = place(tensors)
        buffer = torch.empty(size, dtype=torch.uint8, device=self._staging)
        for tensor, head in zip(tensors, heads, strict=True):
            part = buffer[head.offset : head.offset + head.nbytes]
            part.view(tensor.dtype).view(head.shape).copy_(tensor)
        work = dist.isend(buffer, dst=to)
        assert work
        self._sending.append((work, buffer))
        self.sent += size

    def receive(self, source: int, like: Sequence[torch.Tensor]) -> Incoming:
        """Expect tensors of the shapes and dtypes of ``like`` (meta tensors will do) from ``source``; does not wait."""
        heads, size = place(like)
        dtypes = [t.dtype for t in like]

        def open_it(buffer: torch.Tensor) -> list[torch.Tensor]:
            buffer = buffer.to(self.device)
            return [
                buffer[h.offset : h.offset + h.nbytes].view(dtype).view(h.shape)
                for h, dtype in zip(heads, dtypes, strict=True)
            ]

        buffer = torch.empty(size, dtype=torch.uint8, device=self._staging)
        work = dist.irecv(buffer, src=source)
        assert work
        return Incoming(work, buffer, open_it)

    def wait(self, incoming: Incoming) -> list[torch.Tensor]:
        if self._staging != self.device and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # until then it stands still for nobody
        began = self._mark()
        tensors = incoming.wait()
        self._waits.append((began, self._mark()))
        return tensors

    def _mark(self) -> Any:
        """Now. With NCCL the device's stream waits, this thread does not."""
        if self._staging.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Any, end: Any) -> float:
    """Seconds from one mark to another."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
