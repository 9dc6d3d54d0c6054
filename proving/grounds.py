"""The proving models as ComfyUI's own loaders give them, each with what is asked of it and who judges what comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comfy_setup import HERE, WEIGHTS


@dataclass(frozen=True)
class Settings:
    """What a KSampler is set to for a model."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str


@dataclass(frozen=True)
class Ground:
    """One model. ``latent`` is the shape of one sample's latent, ``asked`` are captions that training never saw.

    ``decode(latents)`` gives what ``judge`` says of each what it is, equal to what was asked or not; ``pictures`` makes
    pictures ``[N, height, width, channels]`` in 0..1 of what was decoded, to look at and to compare.
    """

    title: str
    model: Any
    latent: tuple[int, ...]
    settings: Settings
    asked: Sequence[Any]
    trained: Sequence[Any]
    decode: Callable[[Tensor], Tensor]
    judge: Callable[[Tensor], list[Any]]
    pictures: Callable[[Tensor], Tensor] = lambda decoded: decoded


def flux(file: Path = WEIGHTS / "shapes_flux.safetensors") -> Ground:
    """The image transformer."""
    return _drawn("Flux, drawn shapes", file, "simple")


def unet(file: Path = WEIGHTS / "shapes_unet.safetensors") -> Ground:
    """The U-Net; ranks learn of its class from proving/rank_site."""
    from unet_config import register

    register()
    paths = [str(HERE / "rank_site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return _drawn("U-Net, drawn shapes", file, "normal")


def wan(file: Path = WEIGHTS / "moving_wan.safetensors") -> Ground:
    """The video transformer; the image autoencoder decodes each frame by itself. Pictures show time downwards."""
    import comfy.sd

    from judge_moving import judge
    from moving import FRAMES, HELD_OUT, SIDE, TRAINED

    vae = load_vae()

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents.movedim(2, 1).flatten(0, 1)).clamp(0, 1).unflatten(0, (len(latents), -1))

    return Ground(
        "Wan, moving shapes", comfy.sd.load_diffusion_model(str(file)), (16, FRAMES, SIDE // 8, SIDE // 8),
        Settings(20, 3.5, "euler", "simple"), HELD_OUT, TRAINED, decode, judge, lambda clips: clips.flatten(1, 2),
    )  # fmt: skip


def audio(file: Path = WEIGHTS / "sounds_stable_audio.safetensors") -> Ground:
    """The audio transformer. Pictures are spectra."""
    import comfy.sd

    from judge_sounds import judge, picture
    from sounds import BANDS, FRAMES, HELD_OUT, TRAINED, waveforms

    model = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=False, output_clip=False)[0]
    return Ground(
        "Stable Audio, sounds", model, (BANDS, FRAMES), Settings(20, 4.0, "dpmpp_2m", "karras"), HELD_OUT, TRAINED,
        waveforms, judge, lambda sounds: torch.stack([picture(sound) for sound in sounds]),
    )  # fmt: skip


def _drawn(title: str, file: Path, scheduler: str) -> Ground:
    import comfy.sd

    from judge_shapes import judge, load
    from shapes import HELD_OUT, TRAINED

    vae, network = load_vae(), load()

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents).clamp(0, 1)

    return Ground(
        title, comfy.sd.load_diffusion_model(str(file)), (16, 16, 16), Settings(20, 3.0, "euler", scheduler), HELD_OUT,
        TRAINED, decode, lambda decoded: judge(decoded, network),
    )  # fmt: skip


GROUNDS: dict[str, Callable[..., Ground]] = {"flux": flux, "unet": unet, "wan": wan, "audio": audio}


@cache
def load_vae() -> Any:
    """The image autoencoder."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(WEIGHTS / "shapes_vae.safetensors")))


def load_clip(file: Path) -> Any:
    """The text encoder."""
    import comfy.sd

    return comfy.sd.load_clip([str(file)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


class Prompts:
    """The text encoder. A call gives the CONDITIONING of a caption."""

    def __init__(self, file: Path):
        self._clip = load_clip(file)

    @torch.inference_mode()
    def __call__(self, caption: str) -> Any:
        return self._clip.encode_from_tokens_scheduled(self._clip.tokenize(caption))


@torch.inference_mode()
def sample(
    model: Any, latent: tuple[int, ...], settings: Settings, prompts: Prompts, captions: Sequence[str],
    seeds: Sequence[int],
) -> Tensor:  # fmt: skip
    """Latents ``[captions x seeds, *latent]`` through ComfyUI's own sampling code; a caption's seeds are one batch."""
    import comfy.sample

    negative = prompts("")
    noise = torch.cat([comfy.sample.prepare_noise(torch.zeros(1, *latent), seed) for seed in seeds])
    chosen = settings.steps, settings.cfg, settings.sampler, settings.scheduler
    made = []
    for caption in captions:
        conds, start = (prompts(caption), negative), torch.zeros_like(noise)
        made.append(comfy.sample.sample(model, noise, *chosen, *conds, start, disable_pbar=True, seed=seeds[0]))
    return torch.cat(made)
