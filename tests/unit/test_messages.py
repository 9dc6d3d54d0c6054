"""Errors, messages, the handshake and the run report."""

from __future__ import annotations

import ast
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from leapfrog.parallel_backend import LeapfrogError, channel, protocol
from leapfrog.parallel_backend.channel import Channel, admit, knock, listen
from leapfrog.parallel_backend.errors import HINTS, ErrorReport
from leapfrog.parallel_backend.protocol import Done, FromHost, FromRank, Loaded
from leapfrog.parallel_backend.report import TRACE_DIR, RunReport
from leapfrog.parallel_backend.tensors import TensorHead
from leapfrog.parallel_backend.units import Flow, Output
from pack import ROOT

SECRET = "ab" * 32


def codes_in_use() -> set[str]:
    """Every string that the source hands to LeapfrogError.of or ErrorReport as a code."""
    found = set()
    for path in [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "parallel_backend").rglob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not (named := ast.unparse(call.func)).endswith(
                ("LeapfrogError.of", "ErrorReport")
            ):
                continue
            given = [word.value for word in call.keywords if word.arg == "code"] or call.args[:1]
            assert given, f"{path}: {named} without a code"
            values = (given[0].body, given[0].orelse) if isinstance(given[0], ast.IfExp) else (given[0],)
            found |= {one.value for one in values if isinstance(one, ast.Constant)}
    return found


def test_the_registry_holds_exactly_the_codes_in_use():
    assert codes_in_use() == set(HINTS)


@pytest.mark.parametrize("code", sorted(HINTS))
def test_an_error_says_what_happened_where_and_what_to_do(code: str):
    error = LeapfrogError(ErrorReport(code, "It went wrong.", rank=1, step=3))
    assert str(error) == f"It went wrong. (rank 1, denoiser call 3)\n{HINTS[code]}"
    assert HINTS[code].endswith(".")


def test_a_code_outside_the_registry_is_a_mistake():
    with pytest.raises(KeyError, match="no_such_code"):
        LeapfrogError.of("no_such_code", "What?")


PAYLOAD = protocol.Payload("psm_x", ["u", [["t", 0], ["v", None]]], [TensorHead("float32", (2, 3), 64)])
RECIPE = protocol.Recipe("diffusion_model", "/m.safetensors", '["d", []]', (5, 7))
FLOW = Flow([[], [0]], [1], [Output(["t", 0], [("float32", (2, 3))]), None])
REPORT = ErrorReport("rank_oom", "no", 1, 2, "here")
HOST_MESSAGES = [
    protocol.Join(1, store_port=4), protocol.Trace(2, RECIPE, PAYLOAD, ["a", "b"], 3),
    protocol.Load(3, RECIPE, protocol.Cut(["a", "b"], [(0, 0), (1, 1)]), [0, 1], PAYLOAD, "id"),
    protocol.Evaluate(4, PAYLOAD, 128, 64, 9, 1, 2, FLOW, False, True, True),
    protocol.Echo(5, PAYLOAD, 1, 2), protocol.Unload(6), protocol.Stop(7),
]  # fmt: skip
RANK_MESSAGES = [
    protocol.Hello(0, 3), protocol.Ready(1, 5), Loaded(3, 9, 1, ["a"], 0.25),
    protocol.Traced(2, [protocol.UnitTrace("a", 0.5, 8)], FLOW, 0.1, 0.2, 3, None, "cpu"),
    Done(4, PAYLOAD, 1.0, 2.0, 0.5, 7, 0.25), protocol.Failed(5, REPORT), protocol.Ok(6),
]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "union"),
    [(m, FromHost) for m in HOST_MESSAGES] + [(m, FromRank) for m in RANK_MESSAGES],
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
    rank.connection.send_bytes(b"\xc1 not msgpack")
    with pytest.raises(msgspec.MsgspecError):
        host.receive(5)
    rank.close()
    with pytest.raises((EOFError, OSError)):
        host.receive(5)
    host.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with listen() as listener:
        left = socket.create_connection(listener.getsockname())
        return left, listener.accept()[0]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listen() as made:
        yield made


def admitted(listener: socket.socket, timeout: float = 10) -> int | None:
    """The rank that is let in next, past callers that are not; None after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if caller := admit(listener, SECRET, 0.02):
            caller[1].close()
            return caller[0]
    return None


@pytest.mark.parametrize(
    "said",
    [b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n" * 5, bytes.fromhex("cd" * 32) + b"\x00\x01", bytes.fromhex(SECRET)],
    ids=["nothing", "a byte", "garbage", "a wrong secret", "no rank"],
)
@pytest.mark.parametrize("hangs_up", [True, False], ids=["then hangs up", "then waits"])
def test_a_stranger_is_turned_away_and_the_rank_after_it_let_in(
    listener: socket.socket, said: bytes, hangs_up: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(channel, "PROOF_TIMEOUT_S", 0.2)
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(said)
        if hangs_up:
            stranger.close()
        with knock(port, 258, SECRET, 5):
            assert admitted(listener) == 258


def test_a_rank_that_is_slow_to_speak_is_let_in(listener: socket.socket):
    caller = socket.create_connection(listener.getsockname())
    late = threading.Timer(0.3, lambda: caller.sendall(bytes.fromhex(SECRET) + b"\x00\x01"))
    late.start()
    assert admitted(listener) == 1
    late.join()
    caller.close()


def test_nobody_comes(listener: socket.socket):
    assert admit(listener, SECRET, 0.01) is None


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


def test_the_trace_has_a_row_per_rank(report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert report.save_trace() is None
    monkeypatch.setenv(TRACE_DIR, str(tmp_path / "new"))
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
