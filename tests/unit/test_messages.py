"""Errors, messages, the handshake and the run report."""

from __future__ import annotations

import ast
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from fuzz_messages import FROM_HOST, FROM_JOINER, FROM_RANK, ORDERS, SECRET
from leapfrog.parallel_backend import LeapfrogError, handshake, protocol
from leapfrog.parallel_backend.channel import Channel
from leapfrog.parallel_backend.errors import HINTS, ErrorReport
from leapfrog.parallel_backend.handshake import Door, listen
from leapfrog.parallel_backend.protocol import Done, FromHost, FromJoiner, FromRank, Loaded, Orders, ToJoiner
from leapfrog.parallel_backend.report import RunReport
from pack import ROOT


def codes_in_use() -> set[object]:
    """Every string that the source hands to LeapfrogError.of or ErrorReport as a code."""
    found: set[object] = set()
    for path in [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "parallel_backend").rglob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not (named := ast.unparse(call.func)).endswith(
                ("LeapfrogError.of", "ErrorReport")
            ):
                continue
            given = [word.value for word in call.keywords if word.arg == "code"] or call.args[:1]
            assert given, f"{path}: {named} without a code"
            found |= set(_constants(given[0]))
    return found


def _constants(node: ast.expr) -> list[object]:
    if isinstance(node, ast.IfExp):
        return [*_constants(node.body), *_constants(node.orelse)]
    return [node.value] if isinstance(node, ast.Constant) else []


def test_the_registry_holds_exactly_the_codes_in_use():
    assert codes_in_use() == set(HINTS)


@pytest.mark.parametrize("code", sorted(HINTS))
def test_an_error_says_what_happened_where_and_what_to_do(code: str):
    error = LeapfrogError(ErrorReport(code, "It went wrong.", rank=1, step=3))
    assert str(error) == f"It went wrong. (rank 1, denoiser call 3)\n{HINTS[code]}"
    assert HINTS[code].endswith(".")


def test_a_code_outside_the_registry_is_a_mistake():
    with pytest.raises(ValueError, match="no_such_code"):
        LeapfrogError.of("no_such_code", "What?")


REPORT = ErrorReport("rank_oom", "no", 1, 2, "here")
SENT = [(FROM_HOST, FromHost), (FROM_RANK, FromRank), (FROM_JOINER, FromJoiner), ([Orders(ORDERS)], ToJoiner)]


@pytest.mark.parametrize(("messages", "union"), SENT[:3])
def test_there_is_a_message_of_every_type(messages: list[msgspec.Struct], union):
    assert {type(message) for message in messages} == set(get_args(union))


@pytest.mark.parametrize(
    ("message", "union"),
    [(message, union) for messages, union in SENT for message in messages],
    ids=lambda value: type(value).__name__,
)
def test_a_message_arrives_as_it_was_sent(message: msgspec.Struct, union):
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=union) == message


def test_a_message_for_the_other_direction_is_refused():
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(protocol.Stop()), type=FromRank)


def test_a_channel_carries_messages_and_respects_deadlines():
    left, right = tcp_pair()
    host, rank = Channel(left, FromRank), Channel(right, FromHost)
    with pytest.raises(TimeoutError):
        host.receive(0.01)
    rank.send(REPORTED := protocol.Failed(1, REPORT))
    assert host.receive(5) == REPORTED
    rank.close()
    with pytest.raises((EOFError, OSError)):
        host.receive(5)
    host.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with listen() as listener:
        left = socket.create_connection(listener.getsockname())
        return left, listener.accept()[0]


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, Channel[Any]]]:
    """(the other end as a plain socket, the host's channel)"""
    left, right = tcp_pair()
    host: Channel[Any] = Channel(right, FromRank, 0.2)
    yield left, host
    left.close()
    host.close()


def test_half_a_message_keeps_nobody_past_the_deadline(wire: tuple[socket.socket, Channel[Any]]):
    other, host = wire
    frame = framed(protocol.Failed(1, REPORT))
    for part in (frame[:2], frame[2:9]):
        other.sendall(part)
        with pytest.raises(TimeoutError):
            host.receive(0.02)
    other.sendall(frame[9:] + framed(protocol.Ok(2)))
    assert host.receive(5) == protocol.Failed(1, REPORT)
    assert host.receive(5) == protocol.Ok(2)


@pytest.mark.parametrize("length", [protocol.MAX_MESSAGE + 1, 2**31, 2**32 - 1])
def test_a_message_over_the_bound_ends_the_channel(wire: tuple[socket.socket, Channel[Any]], length: int):
    other, host = wire
    other.sendall(length.to_bytes(4, "big") + bytes(64))
    with pytest.raises(OSError, match="announced"):
        host.receive(5)
    with pytest.raises(OSError, match="announced"):
        host.receive(5)
    with pytest.raises(ValueError, match="over the bound"):
        host.send(protocol.Failed(1, ErrorReport("rank_error", "x" * protocol.MAX_MESSAGE)))


def test_an_announced_message_takes_no_memory(wire: tuple[socket.socket, Channel[Any]]):
    other, host = wire
    other.sendall(protocol.MAX_MESSAGE.to_bytes(4, "big"))
    tracemalloc.start()
    with pytest.raises(TimeoutError):
        host.receive(0.02)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18


def test_a_message_that_nobody_takes_ends_the_channel(wire: tuple[socket.socket, Channel[Any]]):
    _other, host = wire
    large = protocol.Failed(1, ErrorReport("rank_error", "x" * (protocol.MAX_MESSAGE - 200)))
    with pytest.raises(TimeoutError):
        host.send(large)
    with pytest.raises(OSError, match="descriptor"):
        host.send(protocol.Ok())


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xc1", b"\x81\xa2\xff\xff\x01", b"\x91" * 100_000 + b"\x01",
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        msgspec.msgpack.encode({"type": "done", "begin": float("nan")}),
        msgspec.msgpack.encode({"type": "done", "sent": -1}),
        msgspec.msgpack.encode({"type": "hello", "store_port": 65536}),
        msgspec.msgpack.encode({"type": "failed", "error": {"code": "no_such_code", "message": ""}}),
        msgspec.msgpack.encode({"type": "traced", "flow": {"reads": [[1]], "head": [], "outputs": [None]}}),
        msgspec.msgpack.encode({"type": "done", "output": {"arena": "../a", "spec": 0, "heads": []}}),
        msgspec.msgpack.encode({"type": "done", "output": {"arena": "a", "spec": 0, "heads": [["float32", [-1], 0]]}}),
        msgspec.msgpack.encode({"type": "done", "output": {"arena": "a", "spec": 0, "heads": [["object", [1], 0]]}}),
    ],
    ids=[
        "nothing", "no msgpack", "no text", "deep",
        "a long list", "a long map", "long bytes", "no number", "less than nothing",
        "no port", "no code", "a unit outside the flow", "no arena", "a negative size", "no dtype",
    ],
)  # fmt: skip
def test_a_malformed_message_is_refused_and_the_next_one_read(wire: tuple[socket.socket, Channel[Any]], body: bytes):
    other, host = wire
    other.sendall(len(body).to_bytes(4, "big") + body + framed(protocol.Ok(2)))
    with pytest.raises(msgspec.MsgspecError):
        host.receive(5)
    assert host.receive(5) == protocol.Ok(2)


def framed(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "big") + body


@pytest.fixture
def door() -> Iterator[Door]:
    with Door(SECRET, 3) as made:
        yield made


@contextmanager
def knocking(port: int, rank: int, secret: str = SECRET, timeout_s: float = 10) -> Iterator[Future[socket.socket]]:
    """A rank that knocks meanwhile, in a thread."""
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(handshake.knock, port, rank, secret, timeout_s)
        yield call
        if call.exception() is None:
            call.result().close()


def admitted(door: Door, timeout: float = 10) -> int | None:
    """The rank that is let in next; None after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if caller := door.admit(0.02):
            caller[1].close()
            return caller[0]
    return None


@pytest.mark.parametrize(
    "said",
    [b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n" * 5, bytes.fromhex(SECRET) + b"\x00\x01", bytes(66)],
    ids=["nothing", "a byte", "garbage", "the secret itself", "a wrong proof"],
)
@pytest.mark.parametrize("hangs_up", [True, False], ids=["then hangs up", "then waits"])
def test_a_stranger_is_turned_away_and_the_rank_after_it_let_in(door: Door, said: bytes, hangs_up: bool):
    with socket.create_connection(("127.0.0.1", door.port)) as stranger:
        stranger.sendall(said)
        if hangs_up:
            stranger.close()
        with knocking(door.port, 2):
            assert admitted(door) == 2


def test_slow_callers_do_not_keep_a_rank_waiting(door: Door, monkeypatch: pytest.MonkeyPatch):
    """Not even where each of them may be slow for ever, and there are more than the door hears at a time."""
    monkeypatch.setattr(handshake, "PROOF_TIMEOUT_S", 3600)
    crowd = [socket.create_connection(("127.0.0.1", door.port)) for _ in range(100)]
    for stranger in crowd:
        stranger.sendall(b"x")
    with knocking(door.port, 1):
        assert admitted(door) == 1
    assert len(door._callers) <= handshake.MAX_WAITING
    for stranger in crowd:
        stranger.close()


def test_a_slow_caller_is_turned_away(door: Door, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(handshake, "PROOF_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", door.port)) as stranger:
        assert admitted(door, 0.5) is None
        stranger.settimeout(5)
        assert len(stranger.recv(100)) == 32
        assert stranger.recv(100) == b""


def test_a_rank_that_is_slow_to_speak_is_let_in(door: Door):
    caller = socket.create_connection(("127.0.0.1", door.port))
    late = threading.Timer(0.3, handshake.prove, (caller, 1, SECRET))
    late.start()
    assert admitted(door) == 1
    late.join()
    caller.close()


@pytest.mark.parametrize("rank", [3, 1], ids=["of another pool", "that is there already"])
def test_a_rank_that_is_not_expected_is_turned_away(door: Door, rank: int):
    with knocking(door.port, 1):
        assert admitted(door) == 1
    with knocking(door.port, rank, timeout_s=0.2) as call:
        assert admitted(door, 1) is None
        assert isinstance(call.exception(), ConnectionError)


def test_a_proof_is_good_for_one_connection(door: Door):
    with (
        socket.create_connection(("127.0.0.1", door.port)) as stranger,
        listen() as trap,
        knocking(trap.getsockname()[1], 0, timeout_s=0.5) as rank,
    ):
        victim = trap.accept()[0]
        victim.sendall(bytes(32))
        stranger.sendall(victim.recv(66, socket.MSG_WAITALL))
        assert admitted(door, 0.2) is None
        victim.sendall(bytes(32))  # does not know the secret
        trap.close()
        assert isinstance(rank.exception(), ConnectionError)


def test_nobody_comes(door: Door):
    assert door.admit(0.01) is None


@pytest.fixture
def report() -> RunReport:
    report = RunReport(
        "A run", ["cpu", "cpu"], [Loaded(nbytes=2_000_000, units=["a.0", "a.1"]), Loaded(nbytes=3_000_000)]
    )
    for call, kind in enumerate(("exact", "async")):
        report.sent(call, kind)
    began = report.began
    report.replied(0, 0, Done(begin=began, end=began + 0.25, sent=4000))
    report.replied(0, 1, Done(begin=began, end=began + 0.5, waited=0.25))
    for rank in range(2):
        report.replied(1, rank, Done(begin=began + 0.5, end=began + 1.0))
    for call in range(2):
        report.ended(call, 0.5)
    report.ended_at = began + 1.0
    report.notes.append("something was seen")
    return report


def test_the_report_says_what_ran_where(report: RunReport):
    assert report.lines() == [
        "A run: 2 denoiser calls (1 exact, 1 async) in 1.00 s on 2 ranks",
        "  rank 0 on cpu, a.0 to a.1: 2.0 MB of weights, busy 75%, 2 kB sent per call",
        "  rank 1 on cpu: 3.0 MB of weights, busy 75%, 0 kB sent per call",
        "  something was seen",
    ]


def test_a_rank_that_is_lost_keeps_its_number(report: RunReport):
    report.ranks.remove(0)
    report.holds([Loaded(nbytes=7_000_000)])
    report.replied(1, 0, Done(begin=report.began, end=report.began + 0.25))
    assert report.spans[-1].rank == 1
    assert [held.nbytes for held in report.loaded] == [0, 7_000_000]


def test_the_trace_has_a_row_per_rank(report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert report.save_trace() is None
    monkeypatch.setenv("LEAPFROG_TRACE_DIR", str(tmp_path / "new"))
    path = report.save_trace()
    assert path is not None
    trace = json.loads(path.read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {(span["tid"], span["args"]["call"]) for span in spans} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert spans[1] | {"args": {}} == {
        "ph": "X", "pid": 0, "tid": 1, "name": "exact", "ts": pytest.approx(0), "dur": pytest.approx(5e5), "args": {}
    }  # fmt: skip
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert names == ["rank 0 cpu", "rank 1 cpu"]
    assert [rank["bytes"] for rank in trace["otherData"]["ranks"]] == [2_000_000, 3_000_000]
    assert trace["otherData"]["call_s"] == [0.5, 0.5]
