"""The rendezvous store of a pool's ranks, with either of PyTorch's backends for it."""

from __future__ import annotations

import socket

import psutil
import pytest

from leapfrog.parallel_backend.worker import links


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
