"""The proving models as ComfyUI's own loaders give them, each with what is asked of it and who judges what comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_setup import HERE, WEIGHTS


@dataclass(frozen=True)
class Ground:
    """One model. ``latent`` is the shape of one sample's latent, ``asked`` are captions that training never saw.

    ``show(latents)`` gives pictures ``[N, height, width, channels]`` in 0..1 (a clip's frames one below the other) to
    compare; ``judge(latents)`` says for each what it is, equal to what was asked or not.
    """

    title: str
    model: Any
    latent: tuple[int, ...]
    cfg: float
    scheduler: str
    asked: Sequence[Any]
    show: Callable[[Tensor], Tensor]
    judge: Callable[[Tensor], list[Any]]


def flux() -> Ground:
    """The image transformer."""
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(WEIGHTS / "shapes_flux.safetensors"))
    return _drawn("Flux, drawn shapes", model, "simple")


def unet() -> Ground:
    """The U-Net; ranks learn of its class from proving/rank_site."""
    import comfy.sd

    from unet_config import register

    register()
    paths = [str(HERE / "rank_site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    model = comfy.sd.load_diffusion_model(str(WEIGHTS / "shapes_unet.safetensors"))
    return _drawn("U-Net, drawn shapes", model, "normal")


def wan() -> Ground:
    """The video transformer."""
    import comfy.sd

    from judge_moving import decode, judge
    from moving import FRAMES, HELD_OUT, SIDE

    model = comfy.sd.load_diffusion_model(str(WEIGHTS / "moving_wan.safetensors"))
    vae = _vae()
    return Ground(
        "Wan, moving shapes", model, (16, FRAMES, SIDE // 8, SIDE // 8), 3.5, "simple", HELD_OUT,
        lambda latents: decode(vae, latents).flatten(1, 2), lambda latents: judge(decode(vae, latents)),
    )  # fmt: skip


def _drawn(title: str, model: Any, scheduler: str) -> Ground:
    from judge import judge, load
    from shapes import HELD_OUT

    vae, network = _vae(), load()

    def show(latents: Tensor) -> Tensor:
        return vae.decode(latents).clamp(0, 1)

    return Ground(title, model, (16, 16, 16), 3.0, scheduler, HELD_OUT, show, lambda made: judge(show(made), network))


def _vae() -> Any:
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(WEIGHTS / "shapes_vae.safetensors")))


GROUNDS: dict[str, Callable[[], Ground]] = {"flux": flux, "unet": unet, "wan": wan}


def prompts(ground: Ground, clip_file: Path, samples: int) -> tuple[list[Any], list[Any], Any]:
    """(what is asked of each sample, its CONDITIONING, the negative CONDITIONING)."""
    import comfy.sd

    clip = comfy.sd.load_clip([str(clip_file)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)

    def encoded(text: str) -> Any:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    count = len(ground.asked)
    spread = [ground.asked[i * count // min(samples, count) % count] for i in range(samples)]
    with torch.inference_mode():
        return spread, [encoded(one.caption) for one in spread], encoded("")
