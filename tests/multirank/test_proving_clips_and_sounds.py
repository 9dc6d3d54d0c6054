"""The trained video and audio models: divided between two ranks they are the same, and make what is new to them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from generation import distance
from grounds import GROUNDS, Ground, Prompts, sample
from pack import BASE
from ranks import EXACT, split

CLASSES = {"wan": "WAN21_T2V", "audio": "StableAudio"}
ATTRIBUTE = {"wan": "direction", "audio": "kind"}


@cache
def ground(name: str) -> Ground:
    return GROUNDS[name]()


@cache
def prompts() -> Prompts:
    return Prompts(BASE / "models" / "text_encoders" / "shapes_clip.safetensors")


def made(name: str, model: Any, asked: list[Any], seeds: list[int], steps: int) -> Any:
    settings = replace(ground(name).settings, steps=steps)
    return sample(model, ground(name).latent, settings, prompts(), [one.caption for one in asked], seeds)


def asked(name: str) -> list[Any]:
    """One of each direction or kind."""
    return list({getattr(one, ATTRIBUTE[name]): one for one in reversed(ground(name).asked)}.values())


@pytest.mark.parametrize("name", CLASSES)
def test_exact_mode_is_comfyui(name: str):
    model = ground(name).model
    assert type(model.model.model_config).__name__ == CLASSES[name]
    theirs = made(name, model, asked(name)[:1], [7, 8], 4)
    assert distance(made(name, split(model, mode="exact"), asked(name)[:1], [7, 8], 4), theirs) < EXACT


@pytest.mark.parametrize("name", CLASSES)
def test_held_out_captions_are_followed(name: str):
    wanted = asked(name)
    results = ground(name).decode(made(name, ground(name).model, wanted, [100], ground(name).settings.steps))
    assert ground(name).judge(results) == wanted
