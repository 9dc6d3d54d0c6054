"""Both nodes on tiny denoisers, in this process, with ranks that are real processes: on the CPU, or on GPUs.

All tests share one pool: the backend keeps the ranks of the last set of devices alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import torch

import tiny_models
from generation import Request, generate
from leapfrog.nodes import AsyncUNetSplit, ParaStepSampler
from leapfrog.parallel_backend import supervisor
from leapfrog.parallel_backend.pool import Pool
from leapfrog.parallel_backend.pool_memory import Held
from where import ON_GPUS, devices

torch.set_num_threads(1)  # the ranks have a core each

EXACT = 1e-4 if ON_GPUS else 1e-5
"""Relative distance up to which two results count as the same."""


@pytest.fixture(scope="package", autouse=True)
def no_ranks_afterwards() -> Iterator[None]:
    """The ranks that tests share end with the last test of their folder."""
    yield
    supervisor.close_all()


@cache
def load(family: str) -> Any:
    """The MODEL of a tiny denoiser from ComfyUI's own loader: "flux", "unet", or "checkpoint" for Load Checkpoint."""
    if family == "checkpoint":
        return comfy.sd.load_checkpoint_guess_config(str(tiny_models.tiny_checkpoint()), output_clip=False)[0]
    path = tiny_models.tiny_flux() if family == "flux" else tiny_models.tiny_unet()
    return comfy.sd.load_diffusion_model(str(path))


@cache
def reference(request: Request, sampler: str = "euler") -> torch.Tensor:
    """What ComfyUI alone makes of a request."""
    return generate(load(request.family), request, sampler)


def split(model: Any, ranks: int = 2, mode: str = "asyncdiff", warmup: int = 2, **options: Any) -> Any:
    """The MODEL that Async UNet Split gives; one component per rank if ``options`` do not say otherwise."""
    options = {"components": ranks, "stride": 1, **options}
    named = devices(options.pop("devices", ranks))
    return AsyncUNetSplit.execute(model, named, warmup_steps=warmup, mode=mode, **options).args[0]


def parastep(
    lanes: int, ranks: int = 2, warmup: int = 2, base: Any = "euler", predictor: str = "linear",
    fidelity: str = "unguarded", drift_bound: float = 0.0, calibrate: bool = False,
) -> Any:  # fmt: skip
    """The SAMPLER that ParaStep Sampler gives, around a sampler's name or a SAMPLER."""
    named = {"base_sampler": base} if isinstance(base, str) else {"base_sampler": "euler", "sampler": base}
    return ParaStepSampler.execute(
        **named, fidelity=fidelity, lanes=lanes, devices=devices(ranks), warmup_steps=warmup,
        predictor=predictor, drift_bound=drift_bound, calibrate=calibrate,
    ).args[0]  # fmt: skip


def with_lora(model: Any, strength: float = 1.0) -> Any:
    """A MODEL behind Load LoRA."""
    weights = comfy.utils.load_torch_file(str(tiny_models.tiny_lora()), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, weights, strength, 0)[0]


def the_pool() -> Pool:
    """The one pool that is alive."""
    (pool,) = (pool for pool in supervisor._pools.values() if pool.alive)
    return pool


def in_ranks() -> Held:
    """What the ranks of that pool hold."""
    held = the_pool().memory.held
    assert held
    return held
