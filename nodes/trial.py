"""The doctor's part that needs ComfyUI: do the nodes load, does a model cut in parts give what ComfyUI gives, and what
is advised for it."""

from __future__ import annotations

import asyncio
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import folder_paths
import torch

from ..parallel_backend import LeapfrogError, SplitPlan
from . import AsyncUNetSplit, comfy_entrypoint
from .adviser import measured

Row = Callable[..., None]
SIDE = 32
STEPS = 20
TOKENS = 16
FOLDERS = ("diffusion_models", "checkpoints")
BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 3e-2}
BOUND = 1e-5
"""Relative distance up to which a result counts as the same: rounding, where devices differ."""
WIDTHS = (
    "context_dim context_in_dim text_dim cap_feat_dim caption_channels cross_attention_dim text_states_dim "
    "joint_attention_dim text_feature_dim text_embed_dim crossattn_emb_channels"
).split()
"""What ComfyUI's configurations of denoisers call the width of a prompt."""
COMMON = (768, 1024, 2048, 2304, 2560, 3584, 4096)
"""Widths to try where the configuration does not say: those of CLIP, T5, Gemma, Qwen."""
POOLED = 1280
"""Width of a pooled prompt where the configuration does not say: CLIP-G's, which SDXL takes."""


def run(row: Row, devices: Sequence[str], model: str) -> None:
    """Send a row for each thing that was tried; ``todo`` in a row makes it a problem."""
    began = time.perf_counter()
    classes = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    named = ", ".join(one.define_schema().display_name or one.__name__ for one in classes)
    row(name="nodes", text=f"ok, {named}")
    row(name="computes on", text=f"{comfy.model_management.get_torch_device()} by itself")
    if not model:
        return
    found = _find(model)
    if found is None:
        have = " or ".join(f"models/{name}" for name in FOLDERS)
        row(
            name="a model", text=f"There is no {model} in ComfyUI's folders for models.", last_words=_some_files(),
            todo=f"Name a file as a loader shows it, in {have} (or in a folder that extra_model_paths.yaml names).",
        )  # fmt: skip
        return
    try:
        for content in _tried(found, devices, began):
            row(**content)
    except LeapfrogError as error:
        row(
            name="a model", text=error.report.message, todo=error.report.hint,
            last_words=error.report.traceback.splitlines(),
        )  # fmt: skip
    except Exception as error:
        row(
            name="a model", text=f"{type(error).__name__}: {error}", last_words=traceback.format_exc().splitlines(),
            todo="Please report this with the whole text above.",
        )  # fmt: skip


def _find(name: str) -> tuple[str, str] | None:
    """A model file's folder (of FOLDERS) and path, by the name that a loader shows or by its last part."""
    for folder in FOLDERS:
        names = folder_paths.get_filename_list(folder)
        wanted = name.replace("\\", "/")
        for one in names:
            plain = one.replace("\\", "/")
            if wanted == plain or wanted.rpartition("/")[2] == plain.rpartition("/")[2]:
                path = folder_paths.get_full_path(folder, one)
                return (folder, path) if path else None
    return None


def _some_files(most: int = 8) -> list[str]:
    names = [name for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ["There are:", *names[:most], *more] if names else ["There are none."]


def _load(folder: str, path: str) -> Any:
    if folder == "checkpoints":
        return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
    return comfy.sd.load_diffusion_model(path)


def _tried(found: tuple[str, str], devices: Sequence[str], began: float) -> Iterator[dict[str, Any]]:
    """Rows: one evaluation by ComfyUI alone and one in exact mode, at the same latent and prompt; if all is well, what
    is advised."""
    model = _load(*found)
    kind = type(model.model).__name__
    alone = failure = None
    for prompt in _prompts(model):
        try:
            alone = _evaluate(model, prompt)
            break
        except torch.OutOfMemoryError as error:
            failure = error
            break
        except Exception as error:  # whatever a denoiser says to a prompt that is not its own
            failure = failure or error
    if alone is None or not alone.isfinite().all():
        why = "it makes no finite numbers of it" if failure is None else str(failure)
        yield {
            "name": "a model",
            "text": f"not compared: ComfyUI alone cannot use a {kind} with a made-up prompt ({why})",
            "remark": "but the model could not be compared",
        }
        return
    dtype = model.model.get_dtype_inference()
    comfy.model_management.unload_all_models()
    parts = min(len(devices), SplitPlan.MOST)
    split = AsyncUNetSplit.execute(
        model, ",".join(devices), components=parts, warmup_steps=0, stride=1, mode="exact"
    ).args[0]
    try:
        ours = _evaluate(split, prompt)
    finally:
        split.denoiser.close()
    distance = float((ours - alone).norm() / alone.norm())
    seconds = time.perf_counter() - began
    text = f"{kind} in {parts} parts, relative difference {distance:.1e} to ComfyUI alone ({seconds:.0f} s)"
    if distance <= BOUNDS.get(dtype, BOUND):
        yield {"name": "a model", "text": f"ok, {text}"}
        yield {"name": "advice", "text": _advice(model, prompt, devices)}
        return
    yield {
        "name": "a model", "text": f"Not the result of ComfyUI alone: {text}.", "last_words": [],
        "todo": "Please report this with the whole text above and the name of the model.",
    }  # fmt: skip


def _advice(model: Any, prompt: list[list[Any]], devices: Sequence[str]) -> str:
    """What Leapfrog Adviser says by default, with CFG and without."""
    shape = _shape(model)
    survey = measured(model, prompt, {"samples": torch.zeros(shape)}, ",".join(devices))
    try:
        lines = [
            f"{what}: {survey.advise(STEPS, conditionings, survey.WISHES[0])[0].line(STEPS)}"
            for what, conditionings in (("CFG above 1", 2), ("CFG 1", 1))
        ]
    finally:
        survey.close()
    size = "x".join(map(str, shape[1:]))
    return "\n".join([*lines, f"at a latent of {size}; Leapfrog Adviser takes your own. {survey.said}"])


def _prompts(model: Any) -> Iterator[list[list[Any]]]:
    """Conditionings that the model may take: of the width that its configuration says, plain or with a token mask."""
    config = model.model.model_config.unet_config
    embedder = (config.get("context_embedder_config") or {}).get("params", {})
    widths = [config[name] for name in WIDTHS if isinstance(config.get(name), int)]
    widths += [embedder["in_features"]] if "in_features" in embedder else []
    pooled = config.get("vec_in_dim") or (config.get("adm_in_channels") if embedder else None) or POOLED
    for width, masked in itertools.product(widths[:1] or COMMON, (False, True)):
        mask = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.int64)} if masked else {}
        yield [[_noise((1, TOKENS, width)), {"pooled_output": _noise((1, pooled)), **mask}]]


def _noise(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _shape(model: Any) -> tuple[int, ...]:
    """Of a small latent."""
    form = model.get_model_object("latent_format")
    return 1, form.latent_channels, *{1: (SIDE * 2,), 3: (1, SIDE, SIDE)}.get(form.latent_dimensions, (SIDE, SIDE))


def _evaluate(model: Any, prompt: list[list[Any]]) -> torch.Tensor:
    """What the model makes of a noise in one step of Euler, which is one evaluation."""
    shape = _shape(model)
    first = float(model.get_model_object("model_sampling").sigma_max)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, _noise(shape), 1.0, comfy.samplers.sampler_object("euler"), torch.tensor([first, 0.0]), prompt,
            prompt, torch.zeros(shape), disable_pbar=True, seed=1,
        )  # fmt: skip
