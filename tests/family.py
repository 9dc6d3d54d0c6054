"""A small denoiser of every transformer family that ComfyUI loads, and one generation with each.

Every file is in the layout that ComfyUI's own loader recognises, with seeded weights, written at first use. Families
come in three kinds:

* plain: ComfyUI reads the widths off the weights (or the file's metadata), so the file is tiny and nothing is changed;
* ``narrowed``: ComfyUI has widths in its code; the file states smaller ones and narrowed.py lets detection read them;
* ``large``: a file of up to 300 MB, left out of the quick test run.

``published`` builds the denoiser at full size on the meta device, for questions that need no weights.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.ldm.audio.embedders
import comfy.model_detection
import comfy.nested_tensor
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import torch

import narrowed
from generation import Conditioning, noise
from seeded import Weights, cached, seeded

Entries = Callable[[int], dict[str, Any]]

narrowed.narrow(comfy.model_detection)


def _nothing(_prompt: int) -> dict[str, Any]:
    return {}


def attention_mask(_prompt: int) -> dict[str, Any]:
    """An entry of a prompt: all of its 16 tokens count."""
    return {"attention_mask": torch.ones(1, 16, dtype=torch.int64)}


@dataclass(frozen=True, eq=False)
class Family:
    """One denoiser.

    ``loaded_as`` is the class in comfy.supported_models that the loader must pick. ``config`` is the denoiser's whole
    configuration; ``published`` are its entries that differ at full size. ``latent`` is the shape of one row, or the
    shapes of a nested latent's parts. ``context`` and ``pooled`` are widths of a prompt, ``entries`` gives what else a
    prompt with a given seed carries. ``denoise`` is the part of the schedule that is sampled. ``lists`` are the
    attributes that hold the transformer blocks, in the order in which the forward reaches them; other lists in a
    denoiser prepare its inputs.

    The file's weights have ``dtype`` and are random. ``stated`` entries become its
    "config" metadata; ``narrowed`` are the entries that detection cannot see, ``detected`` what it would have found at
    full size. A ``checkpoint`` is for Load Checkpoint instead of Load Diffusion Model.
    """

    name: str
    loaded_as: str
    config: Mapping[str, Any]
    latent: tuple[Any, ...]
    context: int
    lists: tuple[str, ...]
    pooled: int | None = None
    entries: Entries = _nothing
    tokens: int = 16
    cfg: float = 3.0
    denoise: float = 1.0
    stated: tuple[str, ...] = ()
    narrowed: tuple[str, ...] = ()
    detected: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    large: bool = False
    checkpoint: bool = False

    def __str__(self) -> str:
        return self.name


def config(base: Mapping[str, Any] | None = None, /, **entries: Any) -> dict[str, Any]:
    """A configuration: ``base`` with ``entries``."""
    return {**(base or {}), **entries}


def build(family: Family, device: str = "cpu", full_size: bool = False) -> torch.nn.Module:
    """ComfyUI's denoiser with the family's configuration and uninitialised weights."""
    widths = config(family.config, **(family.published or {}) if full_size else {})
    made = getattr(comfy.supported_models, family.loaded_as)(widths)
    made.unet_config |= widths  # some classes set widths of their own
    made.set_inference_dtype(torch.float32, None)
    return made.get_model(_conditioner(family), "", device=device).diffusion_model


def published(family: Family) -> torch.nn.Module:
    """The denoiser as published, on the meta device: full width and depth, no memory."""
    assert family.published is not None
    return build(family, "meta", full_size=True)


def path(family: Family) -> Path:
    """The family's file, written if it is not there yet. Families that differ in their prompts only share one."""

    def make() -> Weights:
        model = build(family)
        weights = seeded(model, zlib.crc32(family.loaded_as.encode()))
        weights = {k: v.to(family.dtype) for k, v in weights.items()}
        if family.checkpoint:
            weights = {f"model.model.{k}": v for k, v in weights.items()} | _conditioner(family)
        return weights

    metadata = {}
    if family.stated:
        metadata["config"] = json.dumps({"transformer": {k: family.config[k] for k in family.stated}})
    if family.narrowed or family.detected:
        widths = {k: family.config[k] for k in (*family.narrowed, *family.detected)}
        metadata[narrowed.KEY] = json.dumps({"as": dict(family.detected), "widths": widths})
    digest = zlib.crc32(repr((sorted(family.config.items()), family.dtype, metadata)).encode())
    return cached(f"family-{family.loaded_as}-{digest:08x}", make, metadata)


def load(family: Family) -> Any:
    """The family's MODEL from ComfyUI's own loader."""
    if family.checkpoint:
        return comfy.sd.load_checkpoint_guess_config(str(path(family)), output_vae=False, output_clip=False)[0]
    return comfy.sd.load_diffusion_model(str(path(family)))


def for_ranks(patch: Any) -> None:
    """Let processes started while this MonkeyPatch holds load the narrowed families."""
    site = str(Path(narrowed.__file__).parent / "rank_site")
    patch.setenv("PYTHONPATH", site, prepend=os.pathsep)


def prompt(family: Family, seed: int) -> Conditioning:
    """A conditioning for the family with random content."""
    properties = family.entries(seed)
    if family.pooled is not None:
        properties["pooled_output"] = noise((1, family.pooled), seed)
    return [[noise((1, family.tokens, family.context), seed), properties]]


def latent(family: Family, batch: int, seed: int | None) -> Any:
    """Noise of the family's latent shape, zeros without a seed; nested where the family's latents are."""

    def part(index: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(batch, *shape) if seed is None else noise((batch, *shape), seed + index)

    if isinstance(family.latent[0], tuple):
        return comfy.nested_tensor.NestedTensor([part(i, shape) for i, shape in enumerate(family.latent)])
    return part(0, family.latent)


def sample(
    model: Any, family: Family, steps: int = 3, sampler: Any = "euler", batch: int = 1, cfg: float | None = None,
    seed: int = 5, prompt_seed: int = 1,
) -> torch.Tensor:  # fmt: skip
    """The final latent of one generation; a nested latent comes back as one flat row per picture."""
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", int(steps / family.denoise))[-steps - 1 :]
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            model, latent(family, batch, seed), family.cfg if cfg is None else cfg, sampler, sigmas,
            prompt(family, prompt_seed), prompt(family, 100), latent(family, batch, None), disable_pbar=True, seed=seed,
        )  # fmt: skip
    return torch.cat([part.flatten(1) for part in out.unbind()], 1) if out.is_nested else out


def _conditioner(family: Family) -> dict[str, torch.Tensor]:
    """The weights outside the denoiser that a Stable Audio checkpoint must have."""
    if not family.checkpoint:
        return {}
    out = {}
    for seed, name in enumerate(("seconds_start", "seconds_total")):
        number = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=512)
        out |= {f"conditioner.conditioners.{name}.{k}": v for k, v in seeded(number, seed).items()}
    return out
