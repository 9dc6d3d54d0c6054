"""One source of noise for a sampler and its scouts, where drawing it again would take longer than a denoising step."""

from __future__ import annotations

from typing import Any

import torch
from comfy.k_diffusion.sampling import BrownianTreeNoiseSampler

# ComfyUI's samplers that by default draw from a Brownian tree, and whether they draw it on the CPU.
BROWNIAN = {
    "sample_dpmpp_sde": True,
    "sample_dpmpp_2m_sde": True,
    "sample_dpmpp_2m_sde_heun": True,
    "sample_dpmpp_3m_sde": True,
    "sample_dpmpp_sde_gpu": False,
    "sample_dpmpp_2m_sde_gpu": False,
    "sample_dpmpp_2m_sde_heun_gpu": False,
    "sample_dpmpp_3m_sde_gpu": False,
}


class SharedNoise:
    """The noise sampler that ``BROWNIAN`` samplers make for themselves; noise between two sigmas is drawn once."""

    def __init__(self, x: torch.Tensor, sigmas: torch.Tensor, seed: int | None, on_cpu: bool):
        self._tree = BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=seed, cpu=on_cpu)
        self._drawn: dict[tuple[float, float], torch.Tensor] = {}

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        between = float(sigma), float(sigma_next)
        if between not in self._drawn:
            self._drawn[between] = self._tree(sigma, sigma_next)
        return self._drawn[between]


def with_shared_noise(
    function: Any, x: torch.Tensor, sigmas: torch.Tensor, seed: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The options for a sampler's function, with a noise sampler for all its copies where that is worth it."""
    name = getattr(function, "__name__", "")
    if name not in BROWNIAN or options.get("noise_sampler") is not None or len(sigmas) < 2:
        return options
    return {**options, "noise_sampler": SharedNoise(x, sigmas, seed, BROWNIAN[name])}
