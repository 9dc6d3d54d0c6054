"""One picture's latent through ComfyUI's own sampling code, in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from tiny_models import CONTEXT

TOKENS = 16
Conditioning = list[list[Any]]


@dataclass(frozen=True)
class Request:
    """What is asked for. ``size`` is the latent's side, ``prompt`` seeds a conditioning."""

    family: str = "flux"
    size: int = 8
    batch: int = 1
    steps: int = 6
    cfg: float = 3.0
    prompt: int = 1
    denoise: float = 1.0
    masked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, 16 if self.family == "flux" else 4, self.size, self.size)


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, **properties: Any) -> Conditioning:
    """A conditioning as CLIPTextEncode gives it, with random content."""
    return [[noise((1, TOKENS, CONTEXT), seed), {"pooled_output": noise((1, CONTEXT), seed), **properties}]]


def generate(
    model: Any,
    request: Request,
    sampler: Any = "euler",
    positive: Conditioning | None = None,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The final latent. ``sampler`` is a name or a SAMPLER; ``on_step(step, denoised, x)`` is told of each step."""
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    wanted = int(request.steps / request.denoise)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", wanted)[-request.steps - 1 :]
    image = noise(request.shape, 11) if request.masked or request.denoise < 1 else torch.zeros(request.shape)
    conditioning = (positive or prompt(request.prompt), prompt(100))
    mask = None
    if request.masked:
        mask = torch.zeros(1, 1, request.size, request.size)
        mask[..., request.size // 2 :] = 1
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise(request.shape, 5), request.cfg, sampler, sigmas, *conditioning, image, noise_mask=mask,
            callback=on_step and (lambda step, denoised, x, _total: on_step(step, denoised, x)),
            disable_pbar=True, seed=5,
        )  # fmt: skip


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of ``a`` from ``b``."""
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())
