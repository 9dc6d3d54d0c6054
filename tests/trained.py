"""The proving models in this process: a small trained Flux and a small trained U-Net that draw what a caption says."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import torch

from comfy_setup import WEIGHTS
from generation import Conditioning, noise
from grounds import Prompts, load_vae
from pack import BASE
from quality_report import psnr as psnr_of_each
from unet_config import register

CAPTIONS = ("a large red circle on the left", "a small blue square at the top")
MODELS = BASE / "models"


@cache
def load() -> Any:
    """The Flux, a MODEL from ComfyUI's own loader."""
    return comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models" / "shapes_flux.safetensors"))


@cache
def load_unet() -> Any:
    """The U-Net, a MODEL from ComfyUI's own loader, told of its class. Its schedule is "normal"."""
    register()
    return comfy.sd.load_diffusion_model(str(WEIGHTS / "shapes_unet.safetensors"))


@cache
def prompts(captions: tuple[str, ...] = CAPTIONS) -> tuple[Conditioning, Conditioning]:
    """(positive, negative): the captions as a batch, and the empty prompt."""
    encoded = Prompts(MODELS / "text_encoders" / "shapes_clip.safetensors")
    parts = [encoded(caption)[0] for caption in captions]
    pooled = torch.cat([part[1]["pooled_output"] for part in parts])
    return [[torch.cat([part[0] for part in parts]), {"pooled_output": pooled}]], encoded("")


def latents(
    model: Any, steps: int, sampler: Any = "euler", captions: tuple[str, ...] = CAPTIONS,
    scheduler: str = "simple",
) -> torch.Tensor:  # fmt: skip
    """The captions' final latents ``[N, 16, 16, 16]``. ``sampler`` is a name or a SAMPLER."""
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    start = noise((len(captions), 16, 16, 16), 7)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, start, 3.0, sampler, sigmas, *prompts(captions), torch.zeros_like(start),
            disable_pbar=True, seed=7,
        )  # fmt: skip


def decode(latent: torch.Tensor) -> torch.Tensor:
    """Pictures ``[N, height, width, 3]`` in 0 to 1."""
    with torch.inference_mode():
        return load_vae().decode(latent).clamp(0, 1)


def pictures(model: Any, steps: int, sampler: Any = "euler") -> torch.Tensor:
    """Both captions' pictures ``[2, height, width, 3]`` in 0 to 1. ``sampler`` is a name or a SAMPLER."""
    return decode(latents(model, steps, sampler))


def psnr(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean PSNR in dB of pictures in 0 to 1; 120 for equal ones."""
    return float(psnr_of_each(ours, theirs).mean())
