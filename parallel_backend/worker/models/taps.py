"""Absences and taps: how a component's units are cut out of ComfyUI's model, applied once after it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential


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
    denoiser: torch.nn.Module, units: Sequence[str], held: Sequence[int], produced: Callable[[int, Any], None]
) -> None:
    """Call ``produced(index, output)`` whenever a held unit has computed; it may raise to leave the forward."""
    for index in held:
        _, last = children_called(denoiser.get_submodule(units[index]))
        last.register_forward_hook(lambda _m, _a, output, index=index: produced(index, output))


def children_called(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The first and the last module that are called when a unit computes."""
    if isinstance(module, TimestepEmbedSequential):
        children = list(module.children())
        return children[0], children[-1]
    return module, module
