"""How far a predicted latent is from the true one."""

from __future__ import annotations

import torch


def distance(point: torch.Tensor, x: torch.Tensor) -> float:
    """||point - x|| / ||x|| of ``[batch, ...]``, the largest over the samples of the batch; NaN where there is one."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    off, size = (torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=dtype) for v in (point - x, x))
    return float((off / size.clamp_min(torch.finfo(torch.float32).tiny)).max())
