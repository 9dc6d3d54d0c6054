"""From a MODEL to what ranks need to rebuild its denoiser: the recipe, the weight patches, where ComfyUI lives."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from weakref import WeakKeyDictionary

import comfy.cli_args
import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch

from ..parallel_backend import ComfyHost, LeapfrogError, Patches, Recipe

# Arguments of ComfyUI that change how a denoiser computes or is read; a rank must parse them as the host did.
COMPUTE_ARGS = (
    "force_fp32 force_fp16 fp32_unet fp64_unet bf16_unet fp16_unet fp8_e4m3fn_unet fp8_e5m2_unet fp8_e8m0fnu_unet "
    "force_channels_last supports_fp8_compute use_split_cross_attention use_quad_cross_attention "
    "use_pytorch_cross_attention use_sage_attention use_flash_attention disable_xformers force_upcast_attention "
    "dont_upcast_attention deterministic enable_triton_backend disable_triton_backend cpu disable_mmap mmap_torch_files"
).split()


def comfy_host() -> ComfyHost:
    """Where this ComfyUI lives and how it was told to compute."""
    root = Path(comfy.samplers.__file__).resolve().parents[1]
    return ComfyHost(str(root), compute_args(comfy.cli_args.args))


def compute_args(given: argparse.Namespace) -> tuple[str, ...]:
    """The part of ComfyUI's command line that a rank needs."""
    options = {action.dest: action.option_strings[0] for action in comfy.cli_args.parser._actions}
    fast = sorted(feature.value for feature in getattr(given, "fast", None) or ())
    chosen = [options[name] for name in COMPUTE_ARGS if getattr(given, name, False)]
    return *chosen, *(["--fast", *fast] if fast else [])


def weight_bytes(denoiser: torch.nn.Module) -> int:
    """Bytes of a denoiser's weights in a rank, which has them in the model's dtype also where ComfyUI itself keeps
    those of the file and casts them when it needs them."""

    def nbytes(module: torch.nn.Module, name: str, weight: torch.Tensor) -> int:
        dtype = getattr(module, f"{name}_comfy_model_dtype", None)
        return weight.nelement() * dtype.itemsize if dtype else weight.nbytes

    return sum(
        nbytes(module, name, weight)
        for module in denoiser.modules()
        for name, weight in module.named_parameters(recurse=False)
    )


def own_device() -> str:
    """The kind of device that ComfyUI computes on."""
    return comfy.model_management.get_torch_device().type


def recipe_of(model: comfy.model_patcher.ModelPatcher) -> Recipe:
    """How to rebuild the denoiser of a MODEL from its file.

    Raises LeapfrogError: no_recipe for a MODEL that no stock loader made, missing_file if its file is gone,
    unknown_folder if its file lies where ComfyUI does not look for models.
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
    recipe = Recipe.of(name, args[0], options or {})
    if not _is_known(args[0]):
        raise LeapfrogError.of(
            "unknown_folder",
            f"The model file {Path(args[0]).name} is in none of the folders where ComfyUI looks for models, and "
            "Leapfrog's ranks read no other.",
        )
    return recipe


def _is_known(path: str) -> bool:
    """Whether a file lies in a folder that ComfyUI's folder_paths has, of whatever type.

    Either may be, or be behind, a symbolic link: as it is named or as it is resolved, one has to lie in the other.
    """
    listed = [entry[0] for entry in folder_paths.folder_names_and_paths.values() if entry]
    folders = {folder for paths in listed if not isinstance(paths, str) for folder in paths if folder}
    names = [place for folder in {folder_paths.models_dir, *folders} for place in _named_and_resolved(folder)]
    return any(_lies_in(file, folder) for file in _named_and_resolved(path) for folder in names)


def _named_and_resolved(path: str) -> tuple[Path, Path]:
    return Path(path).absolute(), Path(os.path.realpath(path))


def _lies_in(file: Path, folder: Path) -> bool:
    return file.is_relative_to(folder) and ".." not in file.relative_to(folder).parts


def patches_of(model: comfy.model_patcher.ModelPatcher) -> Patches:
    """A MODEL's weight patches (LoRA and the like).

    The weight hooks of the conditioning that is evaluated now are among them, at their strength of the moment.
    Raises LeapfrogError unsupported_patch naming what cannot travel; nothing is dropped.
    """
    for kind in ("weight_wrapper_patches", "injections"):
        if getattr(model, kind, None):
            raise LeapfrogError.of("unsupported_patch", f"This MODEL carries {kind}, which cannot travel to a rank.")
    for name in model.object_patches:
        if name.startswith("diffusion_model.") or name == "manual_cast_dtype":
            by = " (ModelComputeDtype)" if name == "manual_cast_dtype" else ""
            raise LeapfrogError.of(
                "unsupported_patch", f"This MODEL replaces '{name}'{by}, which cannot travel to a rank."
            )
    strengths = _hook_strengths(model)
    if not model.patches and not strengths:
        return Patches()
    version, trees = _trees.get(model, ("", {}))
    if version != str(model.patches_uuid):
        version, trees = _trees[model] = str(model.patches_uuid), {}
    if strengths not in trees:
        hooked = model.get_combined_hook_patches(model.current_hooks) if model.current_hooks else {}
        patches = {key: [*model.patches.get(key, []), *hooked.get(key, [])] for key in {**model.patches, **hooked}}
        tree = {key: [_plain_patch(key, patch) for patch in several] for key, several in patches.items()}
        name = "".join([version, *(f" hook {hook}: {strength}" for hook, strength in strengths)])
        trees[strengths] = Patches(name, tree, reshaped_by(model))
    return trees[strengths]


# A call of the denoiser asks for the patches each time. ComfyUI gives a MODEL a new patches_uuid whenever patches or
# hooks are added; hooks that it has may be on or off and change their strength from step to step.
HookStrengths = tuple[tuple[int, float], ...]
_trees: WeakKeyDictionary[comfy.model_patcher.ModelPatcher, tuple[str, dict[HookStrengths, Patches]]] = (
    WeakKeyDictionary()
)


def reshaped_by(model: comfy.model_patcher.ModelPatcher) -> dict[str, tuple[int, ...]]:
    """The weights whose shape a MODEL's patches change (Flux control LoRAs widen the first layer), and their shapes."""
    shapes = {}
    for key, patches in model.patches.items():
        if not key.startswith("diffusion_model."):
            continue
        weight = model.backup[key].weight if key in model.backup else comfy.utils.get_attr(model.model, key)
        shape = tuple(comfy.lora.calculate_shape(patches, weight, key))
        if shape != tuple(weight.shape):
            shapes[key] = shape
    return shapes


def _hook_strengths(model: comfy.model_patcher.ModelPatcher) -> HookStrengths:
    """The weight hooks that ComfyUI has switched on, as ``(number among the MODEL's hooks, strength)``."""
    if model.current_hooks is None:
        return ()
    known = list(model.hook_patches)
    active = model.current_hooks.get_type(comfy.hooks.EnumHookType.Weight)
    return tuple((known.index(hook.hook_ref), float(hook.strength)) for hook in active if hook.hook_ref in known)


def _plain_patch(key: str, patch: tuple) -> tuple:
    strength, value, strength_model, offset, function = patch
    if function is not None and function is not comfy.utils.swap_scale_shift:
        raise LeapfrogError.of(
            "unsupported_patch", f"The patch of {key} runs a function, which cannot travel to a rank."
        )
    if isinstance(value, list):
        raise LeapfrogError.of(
            "unsupported_patch",
            f"This MODEL is a merge of several (ModelMerge): {key} needs weights of another one. Save it with "
            "ModelSave and load that file.",
        )
    if isinstance(value, tuple) and isinstance(value[0], str) and value[0] == "model_as_lora":
        raise LeapfrogError.of(
            "unsupported_patch",
            f"A conditioning's hook is a whole model (Create Hook Model as LoRA): {key} is no small patch.",
        )
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        # not its loaded_keys: they only count what was found, and each adapter has those of the whole file
        value = {"adapter": type(value).__name__, "weights": value.weights}
    return (strength, value, strength_model, offset, function is not None)
