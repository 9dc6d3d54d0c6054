"""The fuzz campaign in short, and that it sees what it is there to see."""

from __future__ import annotations

import pytest
import torch

import fuzz
from leapfrog.parallel_backend import handshake
from leapfrog.parallel_backend.channel import Channel
from leapfrog.parallel_backend.courier import HostCourier
from leapfrog.parallel_backend.handshake import Door
from leapfrog.parallel_backend.tensors import Arena


def test_no_malformed_frame_does_harm():
    said: list[str] = []
    counts = fuzz.campaign(3000, seed=7, say=said.append)
    assert not said
    assert (counts["crashes"], counts["accepted"], counts["over"]) == (0, 0, 0)
    assert counts["frames"] >= 2900
    assert 0 < counts["formed"] < counts["frames"] / 4, "most frames are malformed, mutants are close to good ones"


def only(monkeypatch: pytest.MonkeyPatch, name: str, frames: int = 300) -> dict[str, int]:
    monkeypatch.setattr(fuzz, "TARGETS", {name: (100, fuzz.TARGETS[name][1])})
    return fuzz.campaign(frames, seed=7, say=lambda _: None)


def test_a_parser_that_raises_what_it_should_not_is_a_crash(monkeypatch: pytest.MonkeyPatch):
    def careless(self: Channel, timeout_s: float | None) -> object:
        self._fill(4, None)
        self._fill(4 + int.from_bytes(self._frame[:4], "big"), None)
        frame, self._frame = self._frame, bytearray()
        return self._decode(memoryview(frame)[4:])

    monkeypatch.setattr(Channel, "receive", careless)
    assert only(monkeypatch, "host", 1000)["crashes"] > 0


def test_a_door_that_asks_for_no_proof_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(handshake.hmac, "compare_digest", lambda *_: True)
    assert only(monkeypatch, "door")["accepted"] > 0


def test_a_view_outside_the_arena_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Arena, "tree", lambda *_: torch.ones(1))
    assert only(monkeypatch, "tree", 50)["accepted"] > 0


def test_memory_over_the_bound_is_seen(monkeypatch: pytest.MonkeyPatch):
    enter = Door.admit

    def wasteful(self: Door, timeout_s: float) -> object:
        bytearray(1 << 20)
        return enter(self, timeout_s)

    monkeypatch.setattr(Door, "admit", wasteful)
    counts = only(monkeypatch, "door", 20)
    assert counts["over"] == 20
    assert counts["peak"] >= 1 << 20


def test_a_courier_that_writes_where_nothing_was_asked_for_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HostCourier, "_arena", lambda self, message, payload: self.arenas[payload.arena])
    assert only(monkeypatch, "host courier", 2000)["accepted"] > 0
