"""The trained video model: divided between two ranks it is the same, and it shows what it was never trained on."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.sd

from generation import distance
from judge_moving import decode, judge, latents, load_clip, load_vae
from moving import HELD_OUT
from pack import BASE
from ranks import EXACT, split

MODELS = BASE / "models"
ASKED = HELD_OUT[4:6]
"""One moves up and one down: the model confuses left and right."""


@cache
def load() -> Any:
    """The MODEL from ComfyUI's own loader."""
    return comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models" / "moving_wan.safetensors"))


@cache
def text() -> Any:
    return load_clip(MODELS / "text_encoders" / "shapes_clip.safetensors")


def test_exact_mode_is_comfyui():
    assert type(load().model.model_config).__name__ == "WAN21_T2V"
    asked = {"captions": [ASKED[0].caption], "seeds": [7, 8], "steps": 4}
    assert distance(latents(split(load(), mode="exact"), text(), **asked), latents(load(), text(), **asked)) < EXACT


def test_held_out_captions_are_shown():
    made = latents(load(), text(), [a.caption for a in ASKED], [100])
    assert judge(decode(load_vae(MODELS / "vae" / "shapes_vae.safetensors"), made)) == list(ASKED)
