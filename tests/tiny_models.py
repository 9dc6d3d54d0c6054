"""Tiny checkpoints with seeded random weights, laid out as ComfyUI's own classes are and read by its own loaders.

Each function returns a file under build/test-models, written at first use. Weights are scaled to keep activations near
one, so that a result depends on every block, on the prompt and on the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ldm.flux.model
import comfy.ops
import comfy.taesd.taesd
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import load_file

from seeded import Weights, cached, seeded

CONTEXT = 768
"""Width of the prompts of both denoisers, CLIP-L's, which is also the width of the Flux's pooled prompt."""


def tiny_flux() -> Path:
    """A Flux of 2 double and 4 single blocks; latents of 16 channels."""
    return cached("flux", lambda: seeded(_flux(), 0))


def tiny_unet() -> Path:
    """A U-Net in Stable Diffusion 1.5's layout: two resolutions, a middle block; latents of 4 channels."""
    return cached("unet", lambda: seeded(_unet(), 1))


def tiny_checkpoint() -> Path:
    """The tiny Flux together with a VAE, for Load Checkpoint."""

    def make() -> Weights:
        denoiser = {f"model.diffusion_model.{key}": value for key, value in load_file(tiny_flux()).items()}
        return {**denoiser, **{f"vae.{key}": value for key, value in load_file(tiny_vae()).items()}}

    return cached("checkpoint", make)


def tiny_vae() -> Path:
    """A VAE in TAESD's layout for the tiny Flux."""
    return cached("vae", lambda: seeded(comfy.taesd.taesd.TAESD(latent_channels=16), 2))


def tiny_lora() -> Path:
    """A LoRA for a layer of each kind in the tiny Flux, strong enough to change a picture."""

    def make() -> Weights:
        rng = torch.Generator().manual_seed(3)
        out: dict[str, torch.Tensor] = {}
        for key, weight in load_file(tiny_flux()).items():
            if key.endswith(("img_attn.qkv.weight", "txt_mlp.0.weight", "linear1.weight")):
                name, (rows, columns) = f"diffusion_model.{key.removesuffix('.weight')}", weight.shape
                out[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=rng) * 0.5
                out[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=rng) * columns**-0.5
        return out

    return cached("lora", make)


def _flux() -> torch.nn.Module:
    return comfy.ldm.flux.model.Flux(
        in_channels=16, out_channels=16, patch_size=2, vec_in_dim=CONTEXT, context_in_dim=CONTEXT, hidden_size=128,
        mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=4, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
        guidance_embed=True, txt_ids_dims=[], image_model="flux",
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def _unet() -> torch.nn.Module:
    depth: Any = [1, 0]  # declared as an int, used as a list
    return UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1, 1], channel_mult=[1, 1],
        transformer_depth=depth, transformer_depth_output=[0, 0, 0, 0], transformer_depth_middle=-1, num_heads=8,
        context_dim=CONTEXT, use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
