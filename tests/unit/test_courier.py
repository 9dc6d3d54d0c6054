"""The channel that carries tensors to ranks on other machines: both ends, their arenas, their deadlines."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from campaign import wait_until
from leapfrog.parallel_backend import handshake
from leapfrog.parallel_backend.courier import READ_S, HostCourier, RankCourier
from leapfrog.parallel_backend.protocol import (
    Done,
    Evaluate,
    Load,
    Payload,
)
from leapfrog.parallel_backend.tensors import Arena, TensorHead, flatten, place

Ends = tuple[HostCourier, RankCourier, Arena, list[str]]


@pytest.fixture
def couriers() -> Iterator[Ends]:
    """(the host's end, the rank's end, the host's arena, who has noticed that the connection is gone)"""
    with handshake.listen() as listener:
        left = socket.create_connection(listener.getsockname())
        right = listener.accept()[0]
    arena, noticed = Arena.create(1 << 20), []
    host, rank = HostCourier(left, {arena.name: arena}), RankCourier(right, lambda: noticed.append("rank"))
    yield host, rank, arena, noticed
    host.close()
    rank.close()
    arena.close()


def written(arena: Arena, tree: Any, start: int = 0) -> tuple[Payload, int]:
    spec, tensors = flatten(tree)
    heads, end = place(tensors, start)
    arena.write(tensors, heads)
    return Payload(arena.name, spec, heads), end


def test_tensors_there_and_back(couriers: Ends):
    host, rank, arena, _ = couriers
    tree = (torch.arange(100_000, dtype=torch.float32), {"half": torch.ones(3, 5, dtype=torch.bfloat16)})
    payload, out = written(arena, tree)
    host.send(Evaluate(4, payload, out, 4096))
    asked = rank.receive(5)
    assert asked == Evaluate(4, payload, out, 4096)
    own = rank.arenas[arena.name]
    got = own.tree(payload.spec, payload.heads)
    assert torch.equal(got[0], tree[0])
    assert torch.equal(got[1]["half"], tree[1]["half"])
    own.view(payload.heads[0]).zero_()
    assert torch.equal(arena.view(payload.heads[0]), tree[0]), "no memory is shared"
    result, _ = written(own, torch.full((7,), 3.0), out)
    rank.send(Done(4, result, begin=1.0, end=2.0))
    now = time.perf_counter()
    done = host.receive(5)
    assert isinstance(done, Done)
    assert torch.equal(arena.view(result.heads[0]), torch.full((7,), 3.0))
    assert done.end - done.begin == pytest.approx(1.0)
    assert done.end == pytest.approx(now, abs=5.0)


def test_the_rank_has_room_for_whatever_the_host_has(couriers: Ends):
    host, rank, arena, _ = couriers
    for size in (10, 10_000, 100):
        payload, out = written(arena, torch.ones(size))
        host.send(Evaluate(1, payload, out, 4 * size))
        asked = rank.receive(5)
        assert isinstance(asked, Evaluate)
        result, _ = written(rank.arenas[arena.name], torch.full((size,), 2.0), asked.out)
        rank.send(Done(1, result))
        host.receive(5)
        assert torch.equal(arena.view(result.heads[0]), torch.full((size,), 2.0))


@pytest.mark.parametrize(
    ("heads", "call"),
    [
        ([TensorHead("float32", (16,), 0)], 4), ([TensorHead("float32", (17,), 1024)], 4),
        ([TensorHead("float32", (1,), 1 << 20)], 4), ([TensorHead("uint8", (2**40,), 1024)], 4),
        ([TensorHead("float32", (16,), 1024)] * 2, 4), ([TensorHead("float32", (16,), 1024)], 5),
    ],
    ids=["before the room", "past the room", "past the arena", "huge", "twice", "not asked for"],
)  # fmt: skip
def test_a_rank_writes_only_where_it_was_asked_to(couriers: Ends, heads: list[TensorHead], call: int):
    host, rank, arena, noticed = couriers
    payload, _ = written(arena, torch.ones(4))
    host.send(Evaluate(4, payload, 1024, 64))
    rank.receive(5)
    before = bytes(arena.raw(TensorHead("uint8", (2048,), 0)))
    rank._out.send(Done(call, Payload(arena.name, ["t", 0], heads)))
    with pytest.raises(OSError, match="not asked"):
        host.receive(5)
    with pytest.raises(OSError, match="not asked"):
        host.receive(5)
    assert bytes(arena.raw(TensorHead("uint8", (2048,), 0))) == before
    with pytest.raises((EOFError, OSError)):
        rank.receive(5)
    assert wait_until(lambda: noticed == ["rank"], 5)


def test_a_rank_takes_no_memory_beyond_reason(couriers: Ends):
    host, rank, _, noticed = couriers
    host._out.send(Load(1, patches=Payload("a", ["t", 0], [TensorHead("uint8", (2**39,), 0)])))
    with pytest.raises(OSError, match="no arena"):
        rank.receive(5)
    assert wait_until(lambda: noticed == ["rank"], 5)


def test_half_of_the_tensors_keep_nobody_waiting(couriers: Ends):
    host, rank, arena, _ = couriers
    payload, _ = written(arena, torch.arange(1000.0))
    raw = bytes(arena.raw(payload.heads[0]))
    host._out.send(Load(1, patches=payload))
    host._out.push(raw[:1999])
    with pytest.raises(TimeoutError):
        rank.receive(0.05)
    host._out.push(raw[1999:])
    assert rank.receive(5) == Load(1, patches=payload)
    assert torch.equal(rank.arenas[arena.name].view(payload.heads[0]), torch.arange(1000.0))


def test_a_rank_keeps_the_arenas_that_the_host_may_still_speak_of(couriers: Ends):
    host, rank, _, _ = couriers
    for number in range(40):
        host._out.send(Load(1, patches=Payload(f"arena_{number}", ["t", 0], [TensorHead("uint8", (0,), 0)])))
        rank.receive(5)
    assert list(rank.arenas) == [f"arena_{number}" for number in range(24, 40)]


def test_a_machine_that_takes_nothing_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEAPFROG_STEP_TIMEOUT", "0.3")
    with handshake.listen() as listener:
        left = socket.create_connection(listener.getsockname())
        right = listener.accept()[0]
    arena = Arena.create(1 << 20)
    host = HostCourier(left, {arena.name: arena})
    payload, _ = written(arena, torch.ones(arena.size - 4096, dtype=torch.uint8))
    more_than_sockets_hold = Payload(payload.arena, payload.spec, payload.heads * 64)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        host.send(Load(1, patches=more_than_sockets_hold))
    assert time.monotonic() - began < 10
    with pytest.raises((EOFError, OSError)):
        host.receive(5)
    host.close()
    right.close()
    arena.close()


@pytest.mark.parametrize("how", ["forgotten", "closed"])
def test_arenas_that_another_thread_has_closed(couriers: Ends, how: str):
    host, _, arena, noticed = couriers
    payload, _ = written(arena, torch.ones(4))
    lost = Arena.create(64)
    lost.close()
    host.arenas = {} if how == "forgotten" else {arena.name: lost}
    with pytest.raises(OSError, match="closed meanwhile"):
        host.send(Load(1, patches=payload))
    assert wait_until(lambda: noticed == ["rank"], 5)


def test_tensors_are_waited_for_with_a_timeout_of_their_own(couriers: Ends):
    host, rank, arena, _ = couriers
    payload, _ = written(arena, torch.ones(1000))
    with arena.raw(payload.heads[0]) as raw:
        host._out.send(Load(1, patches=payload))
        assert wait_until(lambda: rank._in.connection.gettimeout() == READ_S, 5)
        host._out.push(raw)
    assert rank.receive(5) == Load(1, patches=payload)
