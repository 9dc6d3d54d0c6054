"""The denoisers that a rank can hold: the whole one, or one component."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import comfy.model_patcher
import torch

from ...protocol import Recipe
from ...units import find_units
from ..component import Component
from ..links import Links
from .loader import build, decode_patches, place_weights, weight_bytes
from .taps import on_start, take_out, tap

SMALL = 1 << 16
PROFILE_ROUNDS = 3


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


class HeldDenoiser:
    """A denoiser rebuilt from a recipe, all of it or the units of one component, with its patches baked in."""

    def __init__(self, recipe: Recipe, bounds: Sequence[tuple[int, int]], links: Links, device: torch.device):
        self.recipe = recipe
        self.bounds = list(bounds)
        self.unit_names: list[str] = []
        self.component: Component | None = None
        self.patches_id: str | None = None
        self._device = device
        self._links = links
        self._patcher = build(recipe, self._cut)
        self.denoiser: torch.nn.Module = self._patcher.model.diffusion_model

    def _cut(self, denoiser: torch.nn.Module) -> list[str]:
        if not self.bounds:
            return []
        units = find_units(denoiser)
        first, last = self.bounds[self._links.rank]
        absent = [i for i in range(len(units)) if not first <= i <= last]
        self.unit_names = [unit.path for unit in units[first : last + 1]]
        self.component = Component(denoiser.forward, units, self.bounds, self._links)
        take_out(denoiser, units, absent, self.component.answer)
        tap(denoiser, units, range(first, last + 1), self.component.produced)
        return [units[i].path for i in absent]

    def patch(self, patches_id: str, tree: dict[str, Any]) -> None:
        """Bake the weight patches in; weights go to the device."""
        if patches_id != self.patches_id:
            place_weights(self._patcher, decode_patches(to_device(tree, torch.device("cpu"), None)), self._device)
            self.patches_id = patches_id

    @property
    def nbytes(self) -> int:
        return weight_bytes(self.denoiser)

    @property
    def shared_bytes(self) -> int:
        """Bytes of the small parts that every rank of a split holds."""
        return self.nbytes - sum(weight_bytes(self.denoiser.get_submodule(name)) for name in self.unit_names)

    def inputs(self, tree: tuple[Any, Any]) -> tuple[Any, Any]:
        """The forward's (args, kwargs) on this device, cast where the host computes in another precision than we do."""
        args, kwargs = tree
        own = self._patcher.model.get_dtype_inference()
        dtype = own if args[0].dtype != own else None
        args = (to_device(args[0], self._device, dtype), *to_device(args[1:], self._device, None))
        return args, to_device(kwargs, self._device, dtype)


def profile_units(recipe: Recipe, tree: tuple[Any, Any], device: torch.device) -> tuple[list[float], list[str]]:
    """``(seconds, names)``: the time of each unit for these inputs, the best of three, on this device.

    Weights are neither read nor resident: on a CPU, untouched memory; on a GPU one unit at a time.
    """
    spans: list[list[float]] = []
    names: list[str] = []
    begin = [0.0]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def prepare(denoiser: torch.nn.Module) -> list[str]:
        _clear_small(denoiser)
        units = find_units(denoiser)
        names.extend(unit.path for unit in units)
        everything = range(len(units))

        def started(index: int) -> None:
            denoiser.get_submodule(units[index].path).to(device)
            begin[0] = now()

        def done(index: int, _output: Any) -> None:
            spans[-1][index] = now() - begin[0]
            if device.type != "cpu":
                denoiser.get_submodule(units[index].path).to("cpu")

        on_start(denoiser, units, everything, started)
        tap(denoiser, units, everything, done)
        if device.type != "cpu":
            inside = {id(p) for u in units for p in denoiser.get_submodule(u.path).parameters()}
            for parameter in denoiser.parameters():
                if id(parameter) not in inside:
                    parameter.data = parameter.data.to(device)
        return []

    patcher: comfy.model_patcher.ModelPatcher = build(recipe, prepare, read_weights=False)
    model = patcher.model
    dtype = model.get_dtype_inference()
    for _ in range(PROFILE_ROUNDS):
        args, kwargs = to_device(tree, device, None)
        spans.append([0.0] * len(names))
        model.diffusion_model(args[0].to(dtype), *args[1:], **to_device(kwargs, device, dtype))
    return [min(times) for times in zip(*spans, strict=True)], names


def _clear_small(module: torch.nn.Module) -> None:
    """Zero what is small: recycled memory may hold numbers that are slow to compute with. Large memory is fresh."""
    for parameter in module.parameters():
        if parameter.numel() <= SMALL:
            parameter.data.zero_()
