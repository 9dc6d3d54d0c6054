"""What ranks read and hold: each precision that ComfyUI loads, and no more than a component."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sd
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from generation import Request, distance, generate
from leapfrog.parallel_backend import supervisor
from ranks import EXACT, in_ranks, load, parastep, reference, split, the_pool
from where import ON_GPUS

FP8_MAX = 448


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


def stored(kind: str, folder: Path) -> Path:
    """The tiny Flux in a file of another precision; "fp8" as scaled fp8 with one scale for each large weight."""
    made: dict[str, torch.Tensor] = {}
    for key, value in load_file(tiny_models.tiny_flux()).items():
        if kind == "fp8" and value.ndim == 2 and "blocks" in key:
            scale = value.abs().max() / FP8_MAX
            made[key] = (value / scale).to(torch.float8_e4m3fn)
            made[key.replace(".weight", ".scale_weight")] = scale.float()
        else:
            made[key] = value.to(torch.float16 if kind == "fp16" else torch.bfloat16)
    if kind == "fp8":
        made["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    path = folder / f"{kind}.safetensors"
    save_file(made, path)
    return path


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp8"])
def test_a_file_of_another_precision(kind: str, tmp_path: Path):
    model: Any = comfy.sd.load_diffusion_model(str(stored(kind, tmp_path)))
    theirs = generate(model, Request())
    assert EXACT < distance(theirs, reference(Request())) < 0.5, "the precision shows"
    assert distance(generate(split(model, mode="exact"), Request()), theirs) < EXACT
    assert distance(generate(model, Request(), parastep(1)), theirs) < EXACT


def test_a_file_that_is_replaced_is_read_anew_by_all_ranks(tmp_path: Path):
    """Or those that have given their weights back would read the new file, and the others keep the old one."""
    path, weights = tmp_path / "trained.safetensors", load_file(tiny_models.tiny_flux())
    save_file(weights, path)
    behind = split(comfy.sd.load_diffusion_model(str(path)), mode="exact")
    assert distance(generate(behind, Request()), reference(Request())) < EXACT
    behind.denoiser.unload([0])
    save_file({name: 0.9 * weight for name, weight in weights.items()}, path)
    trained = generate(comfy.sd.load_diffusion_model(str(path)), Request())
    assert distance(trained, reference(Request())) > 100 * EXACT
    assert distance(generate(behind, Request()), trained) < EXACT


@pytest.mark.parametrize("ranks", [2, 3])
def test_weights_divided_evenly_where_that_is_asked_for(ranks: int):
    generate(split(load("unet"), ranks=ranks, mode="exact", balance="memory"), Request("unet"))
    held = [loaded.nbytes for loaded in in_ranks().parts]
    assert max(held) <= (1 / ranks + 0.1) * tiny_models.tiny_unet().stat().st_size


@pytest.mark.skipif(ON_GPUS, reason="the weights are in the GPU's memory, which no process's own memory shows")
def test_ranks_grow_by_their_component_and_not_by_the_file():
    request = Request("unet", steps=1)
    supervisor.close_all()
    model = split(load("unet"), mode="exact")
    generate(split(load("flux"), mode="exact"), Request(steps=1))
    before = [_private(pid) for pid in the_pool().pids]
    generate(model, request)
    held = [loaded.nbytes for loaded in in_ranks().parts]
    whole = tiny_models.tiny_unet().stat().st_size
    assert max(held) < 0.75 * whole
    for pid, earlier, own in zip(the_pool().pids, before, held, strict=True):
        assert _private(pid) - earlier < own + 0.25 * whole


def _private(pid: int) -> int:
    """Bytes of a process's memory that are its own, not the page cache's."""
    return psutil.Process(pid).memory_full_info().uss
