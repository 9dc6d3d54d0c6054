"""Unknown tensors: what units of other ranks returned and this rank does not need. Shape, dtype and device, no content.

ComfyUI's code between the units goes on computing with them, and mixes them with real tensors (a ControlNet's, say):
whatever is computed from an unknown tensor is unknown too. A meta tensor would not do, because code asks a tensor for
its device and makes real tensors there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map


class Unknown(torch.Tensor):
    """``Unknown(meta, device)``: pretends to be on ``device``, has the shape, strides and dtype of ``meta``."""

    meta: torch.Tensor

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device) -> Unknown:
        made = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype,
            device=device,
        )  # fmt: skip
        made.meta = meta
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Unknown({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device") or _device(args, kwargs)
        given: dict[int, torch.Tensor] = {}

        def hollow(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                meta = value.meta if isinstance(value, Unknown) else torch.empty_like(value, device="meta")
                given[id(meta)] = value
                return meta
            return torch.device("meta") if isinstance(value, torch.device) else value

        def filled(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in given:
                return cls(value, device)
            # an operation in place: it returns what it was given, which if real is worthless now
            target = given[id(value)]
            if not isinstance(target, Unknown) and target.is_floating_point():
                target.fill_(torch.nan)
            return target

        return tree_map(filled, func(*tree_map(hollow, args), **tree_map(hollow, kwargs)))


def _device(args: Any, kwargs: Any) -> torch.device:
    found: list[torch.device] = []
    tree_map(lambda v: found.append(v.device) if isinstance(v, Unknown) else None, (args, kwargs))
    return found[0]


def is_unknown(value: Any) -> bool:
    """Whether a tree has an unknown tensor in it."""
    if isinstance(value, dict):
        return any(is_unknown(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(is_unknown(item) for item in value)
    return isinstance(value, Unknown)
