"""The proving models as ComfyUI's own loaders give them, each with what is asked of it and who judges what comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_setup import WEIGHTS


@dataclass(frozen=True)
class Ground:
    """One model. ``latent`` is the shape of one sample's latent, ``asked`` are captions that training never saw.

    ``show(latents)`` gives pictures ``[N, height, width, channels]`` in 0..1 (a clip's frames one below the other, of a
    sound its levels in time) to compare; ``judge(latents)`` says for each what it is, equal to what was asked or not.
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


GROUNDS: dict[str, Callable[[], Ground]] = {"flux": flux}


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
