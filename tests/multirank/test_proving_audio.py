"""The trained audio model: divided between two ranks it is the same, and it sounds as it was never trained to."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from generation import distance
from grounds import Ground, Prompts, audio, sample
from pack import BASE
from ranks import EXACT, split


@cache
def ground() -> Ground:
    return audio()


@cache
def prompts() -> Prompts:
    return Prompts(BASE / "models" / "text_encoders" / "shapes_clip.safetensors")


def made(model: Any, asked: list[Any], seeds: list[int], steps: int) -> Any:
    settings = replace(ground().settings, steps=steps)
    return sample(model, ground().latent, settings, prompts(), [one.caption for one in asked], seeds)


def asked() -> list[Any]:
    """One of each kind."""
    return list({one.kind: one for one in reversed(ground().asked)}.values())


def test_exact_mode_is_comfyui():
    model = ground().model
    assert type(model.model.model_config).__name__ == "StableAudio"
    theirs = made(model, asked()[:1], [7, 8], 4)
    assert distance(made(split(model, mode="exact"), asked()[:1], [7, 8], 4), theirs) < EXACT


def test_held_out_captions_are_heard():
    sounds = ground().decode(made(ground().model, asked(), [100], ground().settings.steps))
    assert ground().judge(sounds) == asked()
