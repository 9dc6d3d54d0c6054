"""The inputs of a forward, brought to a rank's device."""

from __future__ import annotations

from typing import Any

import torch


def to_device(tree: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Copies of a tree's tensors on ``device``; float tensors of half precision and above in ``dtype`` where given."""
    if isinstance(tree, torch.Tensor):
        wanted = dtype if dtype and tree.is_floating_point() and tree.dtype != dtype else tree.dtype
        return tree.to(device=device, dtype=wanted, copy=True)
    if isinstance(tree, dict):
        return {key: to_device(value, device, dtype) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(to_device(value, device, dtype) for value in tree)
    return tree
