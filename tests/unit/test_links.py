"""The rendezvous store of a pool's ranks, with either of PyTorch's backends for it."""

from __future__ import annotations

import socket
import subprocess
import sys

import psutil
import pytest

from leapfrog.parallel_backend.worker import links
from pack import ROOT


@pytest.mark.parametrize("libuv", [False, True])
def test_a_store_listens_on_its_address_only_and_others_join_it(libuv: bool, monkeypatch: pytest.MonkeyPatch):
    if libuv and not links.LIBUV:
        pytest.skip("this PyTorch's libuv backend takes no listener")
    monkeypatch.setattr(links, "LIBUV", libuv)
    store, port = links.open_store(2, "127.0.0.1")
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]
    joined = links.join_store(2, "127.0.0.1", port)
    joined.set("key", "value")
    assert store.get("key") == b"value"
    with socket.create_connection(("127.0.0.1", port), 5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 50)
    joined.set("key", "another")
    assert store.get("key") == b"another"


SHUTS = """
import socket, sys
sys.path.insert(0, sys.argv[1])
from parallel_backend.handshake import listen
from parallel_backend.worker.links import shut_doors

shut, open_ = (listen("127.0.0.1") for _ in range(2))
inside = socket.create_connection(shut.getsockname(), 5)
shut_doors(shut.getsockname()[1])
outside = socket.socket()
outside.settimeout(0.3)
assert outside.connect_ex(shut.getsockname()), "it let somebody in"
socket.create_connection(open_.getsockname(), 5)
server, _ = shut.accept()
server.sendall(b"still here")
assert inside.recv(20) == b"still here"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="doors can be shut on Linux only")
def test_one_door_can_be_shut_and_who_is_inside_stays():
    """With NCCL only that of the store; in a process of its own, because nothing opens a door again."""
    done = subprocess.run([sys.executable, "-c", SHUTS, ROOT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
