"""Absences and taps: how a component's units are cut out of ComfyUI's model, applied once after it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


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


def forget_calls(denoiser: torch.nn.Module) -> None:
    """Have a denoiser compute anew what it keeps from call to call (HiDream-O1: keys and values of the text and of
    references): a rank that has some of its layers has no true values of the others, and it knows references by the
    identity of tensors, of which ranks make new ones at every call."""
    if hasattr(denoiser, "clear_kv_cache"):
        denoiser.clear_kv_cache()  # pyright: ignore[reportCallIssue]


def take_out(
    denoiser: torch.nn.Module, units: Sequence[str], absent: Sequence[int], answer: Callable[[int], Any]
) -> None:
    """Replace the units with indices ``absent`` by absences. Names of the other units' weights do not change."""
    for index in absent:
        parent, _, name = units[index].rpartition(".")
        original = denoiser.get_submodule(units[index])
        denoiser.get_submodule(parent).register_module(name, Absence(original, lambda index=index: answer(index)))


def tap(
    denoiser: torch.nn.Module, units: Sequence[str], held: Sequence[int], produced: Callable[[int, Any], None]
) -> None:
    """Call ``produced(index, output)`` whenever a held unit has computed; it may raise to leave the forward."""
    for index in held:
        module = denoiser.get_submodule(units[index])
        module.register_forward_hook(lambda _m, _a, output, index=index: produced(index, output))
