"""From a MODEL to what ranks need to rebuild its denoiser: the recipe, the weight patches, where ComfyUI lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.cli_args
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy.weight_adapter

from ..parallel_backend import ComfyHost, LeapfrogError, Recipe

# Arguments of ComfyUI that change how a denoiser computes; a rank must parse them as the host did.
COMPUTE_ARGS = (
    "force_fp32 force_fp16 fp32_unet fp64_unet bf16_unet fp16_unet fp8_e4m3fn_unet fp8_e5m2_unet fp8_e8m0fnu_unet "
    "force_channels_last supports_fp8_compute use_split_cross_attention use_quad_cross_attention "
    "use_pytorch_cross_attention use_sage_attention use_flash_attention disable_xformers force_upcast_attention "
    "dont_upcast_attention deterministic cpu"
).split()


def comfy_host() -> ComfyHost:
    """Where this ComfyUI lives and how it was told to compute."""
    root = Path(comfy.samplers.__file__).resolve().parents[1]
    given = comfy.cli_args.args
    return ComfyHost(
        str(root), tuple(f"--{name.replace('_', '-')}" for name in COMPUTE_ARGS if getattr(given, name, False))
    )


def recipe_of(model: comfy.model_patcher.ModelPatcher) -> Recipe:
    """How to rebuild the denoiser of a MODEL from its file.

    Raises LeapfrogError: no_recipe for a MODEL that no stock loader made, missing_file if its file is gone.
    """
    made_by = getattr(model, "cached_patcher_init", None)
    if not made_by:
        raise LeapfrogError.of("no_recipe", "This MODEL does not say which file it was loaded from.")
    loader, args = made_by[0], made_by[1]
    if loader is comfy.sd.load_diffusion_model:
        name, options = "diffusion_model", args[1] if len(args) > 1 else {}
    elif loader is comfy.sd.load_checkpoint_guess_config:
        name, options = "checkpoint", args[6] if len(args) > 6 else {}
    else:
        raise LeapfrogError.of("no_recipe", f"This MODEL was made by {loader.__module__}.{loader.__qualname__}.")
    return Recipe.of(name, args[0], options or {})


def patches_of(model: comfy.model_patcher.ModelPatcher) -> tuple[str, dict[str, Any]]:
    """A MODEL's weight patches (LoRA and the like): an id that changes with them, and a tree that can travel.

    Raises LeapfrogError unsupported_patch naming what cannot travel; nothing is dropped.
    """
    for kind in ("weight_wrapper_patches", "injections"):
        if getattr(model, kind, None):
            raise LeapfrogError.of("unsupported_patch", f"This MODEL carries {kind}, which cannot travel to a rank.")
    for name in model.object_patches:
        if name.startswith("diffusion_model.") or name == "manual_cast_dtype":
            raise LeapfrogError.of("unsupported_patch", f"This MODEL replaces '{name}', which cannot travel to a rank.")
    if not model.patches:
        return "", {}
    known = _trees.get(model)
    if known is None or known[0] != str(model.patches_uuid):
        tree = {key: [_plain_patch(key, patch) for patch in patches] for key, patches in model.patches.items()}
        known = _trees[model] = (str(model.patches_uuid), tree)
    return known


# A call of the denoiser asks for the patches each time; ComfyUI gives them a new id whenever they change.
_trees: WeakKeyDictionary[comfy.model_patcher.ModelPatcher, tuple[str, dict[str, Any]]] = WeakKeyDictionary()


def _plain_patch(key: str, patch: tuple) -> tuple:
    strength, value, strength_model, offset, function = patch
    if function is not None and function is not comfy.utils.swap_scale_shift:
        raise LeapfrogError.of(
            "unsupported_patch", f"The patch of {key} runs a function, which cannot travel to a rank."
        )
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        value = {
            "adapter": type(value).__name__,
            "loaded_keys": sorted(value.loaded_keys),
            "weights": value.weights,
        }
    return (strength, value, strength_model, offset, function is not None)
