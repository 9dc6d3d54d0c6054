"""A MODEL goes with its last user. One that waited for Python's garbage collector, as what keeps itself alive does,
would hold its weights until then, and would go while ComfyUI's memory manager counts the models it has."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch

import tiny_models
from campaign import wait_until
from generation import Request, generate, prompt
from leapfrog.nodes import LeapfrogAdviser
from ranks import parastep, split
from where import devices

Use = Callable[[Any], list[Any]]
"""Uses a MODEL, and returns what is to go with it."""


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def advised(model: Any) -> list[Any]:
    latent = {"samples": torch.zeros(Request().shape)}
    with torch.inference_mode():
        LeapfrogAdviser.execute(model, prompt(1), latent, 20, 3.0, devices(2), "balanced")
    return []


def cancelled(model: Any, sampler: Any) -> None:
    def interrupt(step: int, *_: Any) -> None:
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        generate(model, Request(steps=8), sampler, on_step=interrupt)


def finished(model: Any, sampler: Any) -> None:
    generate(model, Request(), sampler)


def split_and_run(mode: str, run: Callable[[Any, Any], None] = finished) -> Use:
    def use(model: Any) -> list[Any]:
        behind = split(model, mode=mode)
        run(behind, "euler")
        return [behind, behind.model, behind.denoiser]

    return use


def in_rounds(lanes: int, ranks: int, run: Callable[[Any, Any], None] = finished) -> Use:
    def use(model: Any) -> list[Any]:
        sampler = parastep(lanes, ranks)
        run(model, sampler)
        return [sampler, sampler._memory, sampler.denoiser]

    return use


USERS: dict[str, Use] = {
    "adviser": advised,
    "exact": split_and_run("exact"),
    "asyncdiff": split_and_run("asyncdiff"),
    "lookahead": split_and_run("lookahead"),
    "lookahead, cancelled": split_and_run("lookahead", cancelled),
    "lanes": in_rounds(2, 2),
    "lanes on one device": in_rounds(2, 1),
    "lanes, cancelled": in_rounds(2, 2, cancelled),
}


@pytest.mark.parametrize("use", USERS.values(), ids=USERS)
def test_nothing_of_a_run_keeps_the_model(use: Use):
    model = comfy.sd.load_diffusion_model(str(tiny_models.tiny_flux()))
    left = [weakref.ref(one) for one in (model, model.model, *use(model))]
    del model

    def alive() -> list[str]:
        return [type(one()).__name__ for one in left if one() is not None]

    wait_until(lambda: not alive(), 5)  # for the thread of an evaluation, which ends after it
    assert alive() == []
