"""Absences and taps: how a component's units are cut out of ComfyUI's model, applied once after it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential

from ...units import Unit


class Absence(torch.nn.Module):
    """A unit that another rank holds: no weights, returns what ``answer`` gives."""

    def __init__(self, answer: Callable[[], Any]):
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer()


def take_out(
    denoiser: torch.nn.Module, units: Sequence[Unit], absent: Sequence[int], answer: Callable[[int], Any]
) -> None:
    """Replace the units with indices ``absent`` by absences. Names of the other units' weights do not change."""
    for index in absent:
        path = units[index].path
        parent, _, name = path.rpartition(".")
        module: torch.nn.Module = Absence(lambda index=index: answer(index))
        if isinstance(denoiser.get_submodule(path), TimestepEmbedSequential):
            # a U-Net walks the children of a block itself and never calls the block
            module = TimestepEmbedSequential(module)
        denoiser.get_submodule(parent).register_module(name, module)


def tap(
    denoiser: torch.nn.Module, units: Sequence[Unit], held: Sequence[int], produced: Callable[[int, Any], None]
) -> None:
    """Call ``produced(index, output)`` whenever a held unit has computed; it may raise to leave the forward."""
    for index in held:
        module = _last_called(denoiser.get_submodule(units[index].path))
        module.register_forward_hook(lambda _m, _a, output, index=index: produced(index, output))


def on_start(
    denoiser: torch.nn.Module, units: Sequence[Unit], held: Sequence[int], started: Callable[[int], None]
) -> None:
    """Call ``started(index)`` whenever a held unit is about to compute."""
    for index in held:
        module = denoiser.get_submodule(units[index].path)
        if isinstance(module, TimestepEmbedSequential):
            module = next(module.children())
        module.register_forward_pre_hook(_before(started, index))


def _before(started: Callable[[int], None], index: int) -> Callable[[torch.nn.Module, Any], None]:
    return lambda _module, _args: started(index)


def _last_called(module: torch.nn.Module) -> torch.nn.Module:
    return list(module.children())[-1] if isinstance(module, TimestepEmbedSequential) else module
