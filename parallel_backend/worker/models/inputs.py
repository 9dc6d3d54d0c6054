"""The inputs of a forward, as they arrive, made into what ComfyUI's forward takes on a rank's device."""

from __future__ import annotations

from typing import Any

import torch

from .inside_patches import rebuild


def forward_inputs(tree: tuple[Any, Any], device: torch.device, own: torch.dtype) -> tuple[tuple, dict[str, Any]]:
    """The forward's (args, kwargs), cast to ``own`` where the host computes in another precision than the rank."""
    args, kwargs = tree
    x = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    dtype = own if x.dtype != own else None
    options = dict(kwargs.get("transformer_options", {}))
    inside = options.pop("inside_patches", {})
    args = (to_device(args[0], device, dtype), *to_device(args[1:], device, None))
    kwargs = to_device({**kwargs, "transformer_options": options}, device, dtype)
    kwargs["transformer_options"].update(rebuild(inside))
    return args, kwargs


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
