"""What attaches to the tiny denoisers: ControlNets, a GLIGEN model, LoRAs of every kind, an inpainting variant.

All with seeded random weights, read by ComfyUI's own loaders.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.ldm.flux.controlnet
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.taesd.taesd
import torch
from safetensors.torch import load_file

from seeded import cached, seeded
from tiny_models import CONTEXT, Weights, tiny_flux, tiny_unet

MAKE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
CPU = torch.device("cpu")


@cache
def controlnet(family: str) -> comfy.controlnet.ControlNet:
    """What Load ControlNet Model gives for a ControlNet of the tiny U-Net, or of the tiny Flux (in XLabs's layout)."""
    if family == "unet":
        weights = _unet_controlnet()
    else:
        whole = comfy.ldm.flux.controlnet.ControlNetFlux(**_config(tiny_flux()), **MAKE)
        weights = {key.replace("_norm.weight", "_norm.scale"): value for key, value in seeded(whole, 22).items()}
    return comfy.controlnet.load_controlnet_state_dict(dict(weights))


@cache
def control_lora() -> comfy.controlnet.ControlLora:
    """A Control-LoRA of the tiny U-Net: borrows the denoiser's weights and adds a small difference to each."""
    weights, rng = _unet_controlnet(), torch.Generator().manual_seed(23)
    own = ("input_hint_block", "zero_convs", "middle_block_out")
    lora = {key: value for key, value in weights.items() if key.startswith(own)}
    for key, weight in load_file(tiny_unet()).items():
        if key in weights and weight.ndim > 1:
            name = key.removesuffix("weight")
            lora[f"{name}up"] = 0.02 * torch.randn(weight.shape[0], 4, generator=rng)
            lora[f"{name}down"] = 0.02 * torch.randn(4, weight[0].numel(), generator=rng)
    return comfy.controlnet.load_controlnet_state_dict({**lora, "lora_controlnet": torch.zeros(0)})


@cache
def gligen() -> comfy.model_patcher.ModelPatcher:
    """What GLIGEN Loader gives, for the one attention layer of the tiny U-Net."""
    layer = comfy.gligen.GatedSelfAttentionDense(320, CONTEXT, 8, 40)
    weights = {f"input_blocks.1.1.transformer_blocks.0.fuser.{k}": v for k, v in seeded(layer, 24).items()}
    weights.update((f"position_net.{k}", v) for k, v in seeded(comfy.gligen.PositionNet(CONTEXT, CONTEXT), 25).items())
    for name in ("attn", "dense"):
        weights[f"input_blocks.1.1.transformer_blocks.0.fuser.alpha_{name}"] = torch.tensor(1.0)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(comfy.gligen.load_gligen(weights), load_device=device, offload_device=CPU)


def tiny_inpainting_unet() -> Path:
    """The tiny U-Net with the five more input channels of Stable Diffusion's inpainting models."""

    def make() -> Weights:
        weights = load_file(tiny_unet())
        first = weights["input_blocks.0.0.weight"]
        rng = torch.Generator().manual_seed(26)
        more = torch.randn(first.shape[0], 5, *first.shape[2:], generator=rng) * first[0].numel() ** -0.5
        return {**weights, "input_blocks.0.0.weight": torch.cat([first, more], 1)}

    return cached("inpainting-unet", make)


@cache
def vae_of_four_channels() -> comfy.sd.VAE:
    """A VAE in TAESD's layout for the tiny U-Net."""
    return comfy.sd.VAE(sd=dict(seeded(comfy.taesd.taesd.TAESD(latent_channels=4), 27)))


def loras() -> dict[str, Weights]:
    """One file for each way in which ComfyUI patches weights, all on layers of the tiny Flux: name -> its content."""
    rng = torch.Generator().manual_seed(28)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    first, second = "diffusion_model.double_blocks.1.img_mlp.0", "diffusion_model.single_blocks.2.linear2"
    weights = load_file(tiny_flux())
    out, columns = weights[f"{first.removeprefix('diffusion_model.')}.weight"].shape
    bias = weights[f"{second.removeprefix('diffusion_model.')}.bias"].numel()
    pair = {f"{first}.lora_up.weight": 0.5 * noise(out, 4), f"{first}.lora_down.weight": noise(4, columns) / 8}
    narrow = {
        f"diffusion_model.img_in.lora_{name}.weight": value
        for name, value in (("up", noise(128, 4)), ("down", noise(4, 128) / 8))
    }
    return {
        "lora": {**pair, f"{first}.alpha": torch.tensor(2.0)},
        "dora": {**pair, f"{first}.dora_scale": 1 + noise(out, 1).abs()},
        "loha": {
            f"{first}.hada_{name}": value
            for name, value in (
                ("w1_a", noise(out, 4)), ("w1_b", noise(4, columns) / 8), ("w2_a", noise(out, 4)),
                ("w2_b", noise(4, columns) / 8),
            )
        },
        "lokr": {f"{first}.lokr_w1": noise(8, 8) / 8, f"{first}.lokr_w2": noise(out // 8, columns // 8) / 4},
        "oft": {f"{first}.oft_blocks": 0.2 * noise(out // 32, 32, 32)},
        "difference": {f"{first}.diff": noise(out, columns) / 16, f"{second}.diff_b": 2 * noise(bias)},
        "replacement": {f"{second}.set_weight": noise(bias, 5 * columns) / 16},
        "wider first layer": {**narrow, "diffusion_model.img_in.reshape_weight": torch.tensor([128, 128])},
    }  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    found = comfy.model_detection.model_config_from_unet(load_file(path), "", True)
    assert found is not None
    return dict(found.unet_config)


def _unet_controlnet() -> dict[str, torch.Tensor]:
    config = _config(tiny_unet())
    del config["out_channels"]
    return dict(seeded(comfy.cldm.cldm.ControlNet(hint_channels=3, **config, **MAKE), 21))
