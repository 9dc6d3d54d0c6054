"""Absences and taps: how a component's units are cut out of ComfyUI's model, applied once after it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from torch.overrides import TorchFunctionMode


class Absence(torch.nn.Module):
    """A unit that another rank holds: no weights, returns what ``answer`` gives.

    Code around the units may look at a unit's attributes; those of the original are still there, weights on meta.
    """

    def __init__(self, original: torch.nn.Module, answer: Callable[[], Any]):
        super().__init__()
        self.__dict__["original"] = original.to("meta")
        self.__dict__["answer"] = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class BeforeOwnUnits(TorchFunctionMode):
    """While it is on, what is computed from an absent unit's unknown output (a meta tensor) is unknown too.

    ComfyUI's code between the units mixes those with real tensors: a ControlNet's, or what other units returned.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _any_unknown(args) or _any_unknown(kwargs.values()):
            args, kwargs = _unknown(args), _unknown(kwargs)
        return func(*args, **kwargs)


def _any_unknown(values: Any) -> bool:
    return any(
        (isinstance(v, torch.Tensor) and v.is_meta) or (isinstance(v, list | tuple) and _any_unknown(v)) for v in values
    )


def _unknown(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else torch.empty_like(value, device="meta")
    if isinstance(value, dict):
        return {k: _unknown(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_unknown, value))
    if isinstance(value, list | tuple):
        return type(value)(map(_unknown, value))
    return value


def transformers_in(unit: torch.nn.Module) -> int:
    """By how much a unit of a U-Net raises the transformer index, which patches are keyed by."""
    return sum(isinstance(child, SpatialTransformer) for child in unit.children())


def take_out(
    denoiser: torch.nn.Module, units: Sequence[str], absent: Sequence[int], answer: Callable[[int], Any]
) -> None:
    """Replace the units with indices ``absent`` by absences. Names of the other units' weights do not change."""
    for index in absent:
        path = units[index]
        parent, _, name = path.rpartition(".")
        original = denoiser.get_submodule(path)
        module: torch.nn.Module = Absence(original, lambda index=index: answer(index))
        if isinstance(original, TimestepEmbedSequential):
            # a U-Net walks the children of a block itself and never calls the block
            module = TimestepEmbedSequential(module)
        denoiser.get_submodule(parent).register_module(name, module)


def tap(
    denoiser: torch.nn.Module,
    units: Sequence[str],
    held: Sequence[int],
    starting: Callable[[], None],
    produced: Callable[[int, Any], None],
) -> None:
    """Call ``starting()`` before any held unit computes and ``produced(index, output)`` after it has; the latter may
    raise to leave the forward."""
    for index in held:
        first, last = children_called(denoiser.get_submodule(units[index]))
        first.register_forward_pre_hook(lambda _m, _a: starting())
        last.register_forward_hook(lambda _m, _a, output, index=index: produced(index, output))


def children_called(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The first and the last module that are called when a unit computes."""
    if isinstance(module, TimestepEmbedSequential):
        children = list(module.children())
        return children[0], children[-1]
    return module, module
