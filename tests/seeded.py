"""Seeded random weights for ComfyUI's own classes, and files that are written at first use under build/test-models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from pack import BUILD

FOLDER = BUILD / "test-models"
VERSION = 2

Weights = Mapping[str, torch.Tensor]


def seeded(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A state dict for ``model``, scaled to keep activations near one so that a result depends on every block."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for key, like in model.state_dict().items():
        noise = torch.randn(like.shape, generator=rng)
        if like.ndim > 1:
            out[key] = noise * like[0].numel() ** -0.5
        elif key.endswith(("weight", "scale")):
            out[key] = 1 + 0.1 * noise
        else:
            out[key] = 0.1 * noise
    return out


def cached(name: str, make: Callable[[], Weights], metadata: Mapping[str, str] | None = None) -> Path:
    """The file ``name``; ``make`` gives its weights if it is not there yet."""
    path = FOLDER / f"{name}-{VERSION}.safetensors"
    if not path.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file(dict(make()), part, metadata={"format": "pt", **(metadata or {})})
        os.replace(part, path)
    return path
