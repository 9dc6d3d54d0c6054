"""A function in a thread of its own that has the turn or waits for it."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import comfy.samplers
import pytest
import torch

from leapfrog.nodes.coroutine import Coroutine, pause
from leapfrog.nodes.lookahead_sampler import LookaheadSampler
from leapfrog.nodes.scout import NoiseState, Question, Scout


class Cancel(BaseException):
    """As ComfyUI's own, which is no Exception."""


def after_a_pause(error: BaseException | None) -> int:
    pause("what it waits for")
    if error:
        raise error
    return 7


def test_it_pauses_and_goes_on():
    made = Coroutine(lambda: after_a_pause(None), "test")
    assert (made.pending, made.ended) == ("what it waits for", False)
    made.resume()
    assert (made.pending, made.ended, made.result()) == (None, True, 7)


def test_an_error_waits_for_whoever_asks_for_the_result():
    made = Coroutine(lambda: after_a_pause(ValueError("wrong")), "test")
    made.resume()
    assert made.ended
    with pytest.raises(ValueError, match="wrong"):
        made.result()


def test_a_cancel_does_not_wait():
    made = Coroutine(lambda: after_a_pause(Cancel()), "test")
    with pytest.raises(Cancel):
        made.resume()
    made.drop()
    with pytest.raises(Cancel):
        Coroutine(cancelled, "test")


def cancelled() -> None:
    raise Cancel


def test_what_is_dropped_ends_in_silence():
    ended = []

    def work() -> None:
        try:
            pause(None)
        finally:
            ended.append(True)

    Coroutine(work, "test").drop()
    assert ended == [True]


def test_what_is_dropped_keeps_nothing_alive():
    tensors = []

    def sampler(ask: Any) -> Any:
        latent = torch.zeros(3)
        tensors.append(weakref.ref(latent))
        while True:
            (output,) = ask(Question(latent, torch.ones(1), {}))
            latent = latent + output
            tensors.append(weakref.ref(output))

    gc.disable()
    try:
        scout = Scout(sampler, NoiseState(), [])
        scout.answer((torch.ones(3),))
        scout.drop()
        del scout
        assert [one() for one in tensors] == [None, None]
    finally:
        gc.enable()


def test_waves_that_have_started_do_not_outlive_one_that_cannot():
    ended = []

    def evaluate(question: str) -> Any:
        if question == "cancelled":
            raise Cancel
        try:
            pause("its rows")
        finally:
            ended.append(question)

    sampler = LookaheadSampler(SimpleNamespace(), comfy.samplers.sampler_object("euler"))  # type: ignore[arg-type]
    with pytest.raises(Cancel):
        sampler.start(SimpleNamespace(), evaluate, ["first", "second", "cancelled"], 0)  # type: ignore[list-item]
    assert ended == ["first", "second"]
    assert not sampler._waves


def test_one_after_another_shares_a_thread():
    def thread() -> int:
        pause(None)
        return threading.get_ident()

    def run() -> int:
        made = Coroutine(thread, "test")
        made.resume()
        return made.result()

    assert len({run() for _ in range(5)}) == 1
    both = [Coroutine(thread, "test") for _ in range(2)]
    assert [one.name for one in threading.enumerate()].count("test") == 2
    for one in both:
        one.resume()
    assert both[0].result() != both[1].result()
