"""Full-size U-Net checkpoints with seeded random weights, in the key layout that ComfyUI's own loaders recognise.

    from full_size import checkpoint, load, sample
    model = load("sdxl")                       # writes build/full-size/sdxl-1.safetensors at first use
    latent = sample(model, "sdxl", steps=2)

    python scripts/full_size.py svd sd_x4      # write, load and sample each; print class, dtypes, seconds, memory

The pictures mean nothing, but architecture, names, shapes and bytes are those of the real models, and weights are
scaled so that activations stay near one: a result depends on every block, on the prompt and on the step.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pack import BUILD, add_comfyui

FOLDER = BUILD / "full-size"
VERSION = 1
TOKENS = 77
FRAMES = 3
"""Frames of a video's latent in :func:`sample`."""

UNET = {
    "image_size": 32, "use_spatial_transformer": True, "legacy": False, "out_channels": 4, "in_channels": 4,
    "adm_in_channels": None, "use_temporal_resblock": False, "use_temporal_attention": False,
}  # fmt: skip
FOUR_LEVELS = {
    **UNET, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}  # fmt: skip
SD15 = {**FOUR_LEVELS, "context_dim": 768, "use_linear_in_transformer": False}
SD21 = {**FOUR_LEVELS, "context_dim": 1024, "use_linear_in_transformer": True}
SDXL = {
    **UNET, "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "use_linear_in_transformer": True,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip
SVD = {
    **SD21, "in_channels": 8, "num_classes": "sequential", "adm_in_channels": 768, "use_temporal_resblock": True,
    "use_temporal_attention": True, "extra_ff_mix_layer": True, "use_spatial_context": True,
    "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
    "disable_temporal_crossattention": False,
}  # fmt: skip
X4 = {
    **UNET, "model_channels": 256, "in_channels": 7, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 2, 4],
    "transformer_depth": [0] * 2 + [1] * 6, "transformer_depth_middle": 1,
    "transformer_depth_output": [0] * 3 + [1] * 9,
    "context_dim": 1024, "use_linear_in_transformer": True,
}  # fmt: skip
V_PREDICTION = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""ComfyUI takes a Stable Diffusion 2 for a v-prediction model where these values spread wider than 0.09."""


@dataclass(frozen=True)
class FullSize:
    """``config`` as the loader detects it from the file, ``half``: stored in float16, else in float32."""

    config: Mapping[str, Any]
    side: int
    """of the latent at the resolution that the model is made for"""
    half: bool = True


MODELS = {
    "sd15": FullSize(SD15, 64, half=False),
    "sd15_inpaint": FullSize({**SD15, "in_channels": 9}, 64),
    "sd21": FullSize(SD21, 96),
    "sdxl": FullSize(SDXL, 128),
    "sdxl_inpaint": FullSize({**SDXL, "in_channels": 9}, 128),
    "svd": FullSize(SVD, 72),
    "sd_x4": FullSize(X4, 128),
}


def checkpoint(name: str) -> Path:
    """The file of one of MODELS, for Load Diffusion Model (``comfy.sd.load_diffusion_model``); written at first use."""
    path = FOLDER / f"{name}-{VERSION}.safetensors"
    if not path.exists():
        print(f"making {path.name} ...", file=sys.stderr, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        try:
            _write(partial, MODELS[name])
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def empty(name: str) -> Any:
    """ComfyUI's model object (a BaseModel) of one of MODELS on the meta device: shapes without memory, no file."""
    import comfy.model_detection
    import torch

    config: Any = comfy.model_detection.model_config_from_unet_config(dict(MODELS[name].config))
    config.set_inference_dtype(torch.float16 if MODELS[name].half else torch.float32, None)
    return config.get_model({}, "", device="meta")


def load(name: str) -> Any:
    """The MODEL (a ModelPatcher) that ComfyUI's own loader makes of the file, in a folder that ComfyUI then knows."""
    import comfy.sd
    import folder_paths

    folder_paths.add_model_folder_path("diffusion_models", str(FOLDER))
    return comfy.sd.load_diffusion_model(str(checkpoint(name)))


def _write(path: Path, model: FullSize) -> None:
    """Write a safetensors file tensor by tensor: memory is needed for the largest one only."""
    import comfy.model_detection
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config: Any = comfy.model_detection.model_config_from_unet_config(dict(model.config))
    build: Any = UNetModel
    shapes = build(**config.unet_config, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
    dtype, written = (torch.float16, "F16") if model.half else (torch.float32, "F32")
    header, end = {}, 0
    for key, like in shapes.items():
        begin, end = end, end + like.numel() * dtype.itemsize
        header[key] = {"dtype": written, "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, like in shapes.items():
            file.write(_weight(key, like.shape, draw).to(dtype).numpy())


def _weight(key: str, shape: Any, draw: Any) -> Any:
    import torch

    noise = torch.randn(shape, generator=draw)
    if key == "label_emb.weight":  # a table of classes: one row is used at a time
        return noise * 0.7
    if len(shape) > 1:
        return noise * (0.7 / noise[0].numel() ** 0.5)
    if key == V_PREDICTION:
        return noise * 0.2
    return 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise


def _noise(shape: tuple[int, ...], seed: int) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(name: str, seed: int, size: int, negative: bool = False) -> list:
    """A CONDITIONING as ComfyUI's nodes for this model give it, of random content."""
    model = MODELS[name].config
    values: dict[str, Any] = {}
    text = _noise((1, TOKENS, model["context_dim"]), seed)
    if model["adm_in_channels"] == 2816:  # SDXL: pooled prompt and sizes
        pixels = {"width": size * 8, "height": size * 8, "crop_w": 0, "crop_h": 0}
        values = {"pooled_output": _noise((1, 1280), seed + 1), **pixels}
    if model["in_channels"] == 9:  # InpaintModelConditioning: the picture without its masked half
        mask = _mask(size)
        values |= {"concat_latent_image": _noise((1, 4, size, size), 11) * (1 - mask), "concat_mask": mask}
    if name == "svd":  # SVD_img2vid_Conditioning: CLIP-vision embedding and latent of the first frame
        text, first = _noise((1, 1, 1024), 11), _noise((1, 4, size, size), 12)
        values = {"motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0, "concat_latent_image": first}
        if negative:
            text, values["concat_latent_image"] = text * 0, first * 0
    if name == "sd_x4":  # SD_4XUpscale_Conditioning: the small picture
        values = {"concat_image": _noise((1, 3, size, size), 11).clamp(-1, 1), "noise_augmentation": 0.1}
    return [[text, values]]


def _mask(size: int) -> Any:
    import torch

    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1
    return mask


def sample(
    model: Any, name: str, steps: int = 2, size: int = 16, *, cfg: float = 5.0, sampler: Any = "euler", seed: int = 3,
    pictures: int = 1,
) -> Any:  # fmt: skip
    """The final latent of ``[pictures, 4, size, size]``, of FRAMES rows for a video; ``sampler`` is a name or a
    SAMPLER."""
    import comfy.sample
    import comfy.samplers
    import torch

    rows = FRAMES if name == "svd" else pictures
    inpaint = MODELS[name].config["in_channels"] == 9
    image = _noise((rows, 4, size, size), 11) if inpaint else torch.zeros(rows, 4, size, size)
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    prompts = conditioning(name, 1, size), conditioning(name, 5, size, negative=True)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, _noise(tuple(image.shape), seed), cfg, sampler, sigmas, *prompts, image,
            noise_mask=_mask(size) if inpaint else None, disable_pbar=True, seed=seed,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(MODELS)}; default: all")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--keep", action="store_true", help="do not delete the files that this run wrote")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MODELS):
        parser.error(f"no such model: {', '.join(unknown)}")
    add_comfyui()
    import resource

    import torch

    torch.set_num_threads(1)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # noqa: E731
    for name in options.names or MODELS:
        there = (FOLDER / f"{name}-{VERSION}.safetensors").exists()
        began = time.perf_counter()
        path = checkpoint(name)
        wrote, made = time.perf_counter(), peak()
        model = load(name)
        loaded = time.perf_counter()
        latent = sample(model, name, options.steps, options.size)
        done = time.perf_counter()
        base = model.model
        print(
            f"{name}: {type(base.model_config).__name__}, {type(base).__name__}, {base.model_type.name}, "
            f"{base.diffusion_model.in_channels} channels in, stored {'float16' if MODELS[name].half else 'float32'}, "
            f"kept {str(base.get_dtype())[6:]}, computed {str(base.get_dtype_inference())[6:]}; "
            f"{path.stat().st_size / 1e9:.2f} GB written in {wrote - began:.0f} s (peak {made:.1f} GB), "
            f"loaded in {loaded - wrote:.0f} s, {options.steps} steps {done - loaded:.1f} s, peak {peak():.1f} GB; "
            f"latent {list(latent.shape)} std {latent.std():.3f}, finite {bool(latent.isfinite().all())}",
            flush=True,
        )
        del model, base
        if not there and not options.keep:
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
