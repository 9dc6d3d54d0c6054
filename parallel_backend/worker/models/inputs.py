"""The inputs of a forward, as they arrive, made into what ComfyUI's forward takes on a rank's device."""

from __future__ import annotations

from typing import Any

import torch

from .inside_patches import rebuild


def forward_inputs(
    tree: tuple[Any, Any], device: torch.device, own: torch.dtype, time: float = 1.0
) -> tuple[tuple, dict[str, Any]]:
    """The forward's (args, kwargs), args being ``(x, timesteps, context, ...)``, with timesteps multiplied by ``time``.

    Where the host computes in another precision than the rank, what ComfyUI would have cast is cast to ``own``: all but
    timesteps and transformer options, whose sigmas stay as they are.
    """
    args, kwargs = tree
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    dtype = own if first.dtype != own else None
    options = dict(kwargs.get("transformer_options", {}))
    inside = options.pop("inside_patches", {})
    x, timesteps, *others = args
    timesteps = _multiplied(to_device(timesteps, device, None), time)
    args = (to_device(x, device, dtype), timesteps, *to_device(others, device, dtype))
    kwargs = to_device({key: value for key, value in kwargs.items() if key != "transformer_options"}, device, dtype)
    kwargs["transformer_options"] = to_device(options, device, None) | rebuild(inside)
    return args, kwargs


def _multiplied(timesteps: Any, factor: float) -> Any:
    """Timesteps, a tensor or several of them (audio and video), times a factor."""
    if factor == 1.0:
        return timesteps
    if isinstance(timesteps, torch.Tensor):
        return timesteps * factor
    return type(timesteps)(_multiplied(part, factor) for part in timesteps)


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
