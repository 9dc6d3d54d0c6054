"""Rebuilding a denoiser from its recipe with ComfyUI's loaders: whole, one component of it, or an empty shell.

ComfyUI builds the model object first, without touching the memory of its weights, and copies them in afterwards. In
between, units that another rank holds are replaced by absences, so their weights are never read and never resident.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.utils
import comfy.weight_adapter
import torch
from safetensors import SafetensorError

from ...errors import UnreadableFile
from ...protocol import Recipe
from ...tensors import unflatten

Prepare = Callable[[torch.nn.Module], Sequence[str]]
ADAPTERS: dict[str, Any] = {adapter.__name__: adapter for adapter in comfy.weight_adapter.adapters}


def build(recipe: Recipe, prepare: Prepare, read_weights: bool = True) -> comfy.model_patcher.ModelPatcher:
    """The recipe's model.

    ``prepare`` gets the denoiser before its weights are read, may take units out of it, and returns their paths.
    """
    options = unflatten(json.loads(recipe.options), [])
    with _between_build_and_read(prepare, read_weights):
        state, metadata = _read(recipe.path)
        if recipe.loader == "diffusion_model":
            patcher = comfy.sd.load_diffusion_model_state_dict(
                state, model_options=options, metadata=metadata, disable_dynamic=True
            )
        else:
            loaded: Any = comfy.sd.load_state_dict_guess_config(
                state, output_vae=False, output_clip=False, model_options=options, metadata=metadata,
                disable_dynamic=True,
            )  # fmt: skip
            patcher = loaded[0] if loaded else None
    if patcher is None:
        raise RuntimeError(f"ComfyUI does not know the model in {recipe.path}")
    return patcher


def _read(path: str) -> Any:
    """A file's (weights, metadata). Raises UnreadableFile with the file's name where it cannot be read."""
    try:
        return comfy.utils.load_torch_file(path, return_metadata=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UnreadableFile(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def _between_build_and_read(prepare: Prepare, read_weights: bool) -> Iterator[None]:
    original = comfy.model_base.BaseModel.load_model_weights

    def load_model_weights(self: Any, sd: dict, unet_prefix: str = "", assign: bool = False) -> Any:
        absent = tuple(f"{path}." for path in prepare(self.diffusion_model))
        if not read_weights:
            return self
        convert = self.model_config.process_unet_state_dict
        self.model_config.process_unet_state_dict = lambda sd: {
            k: v for k, v in convert(sd).items() if not k.startswith(absent)
        }
        return original(self, sd, unet_prefix, assign=assign)

    comfy.model_base.BaseModel.load_model_weights = load_model_weights
    try:
        yield
    finally:
        comfy.model_base.BaseModel.load_model_weights = original


def decode_patches(tree: dict[str, Any]) -> dict[str, list[tuple]]:
    """ComfyUI's patches from the plain form in which they travel (nodes/recipe.py writes it)."""
    return {key: [_decode_patch(p) for p in patches] for key, patches in tree.items()}


def _decode_patch(patch: Any) -> tuple:
    strength, value, strength_model, offset, swap = patch
    if isinstance(value, dict):
        adapter = ADAPTERS[value["adapter"]]
        value = adapter(set(), value["weights"])
    function = comfy.utils.swap_scale_shift if swap else None
    return (strength, value, strength_model, offset, function)


def place_weights(
    patcher: comfy.model_patcher.ModelPatcher, patches: dict[str, list[tuple]], device: torch.device
) -> None:
    """Bake the patches that belong to held weights and move everything to ``device``."""
    patcher.unpatch_model()
    held = {k for k, _ in patcher.model.named_parameters()}
    patcher.patches = {key: value for key, value in patches.items() if key in held}
    patcher.patch_model(device_to=device)
    patcher.patches = {}  # they lie in memory that is the host's


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes for t in tensors.values())
