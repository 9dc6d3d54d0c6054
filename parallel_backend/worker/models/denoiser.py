"""The denoisers that a rank can hold: the whole one, or one component."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer

from ...protocol import Cut, Recipe
from ..component import Component
from ..links import Links
from .inputs import forward_inputs, to_device
from .loader import build, decode_patches, place_weights, weight_bytes
from .taps import forget_calls, take_out, tap


class HeldDenoiser:
    """A denoiser rebuilt from a recipe, all of it or the units of one component, with its patches baked in."""

    def __init__(self, recipe: Recipe, cut: Cut | None, peers: Sequence[int], links: Links, device: torch.device):
        self.recipe = recipe
        self.cut = cut
        self.peers = list(peers)
        self.unit_names: list[str] = []
        self.component: Component | None = None
        self.patches_id: str | None = None
        self._options: dict[str, Any] = {}
        self._device = device
        self._links = links
        self.patcher = build(recipe, self._take_component)
        self.denoiser: torch.nn.Module = self.patcher.model.diffusion_model

    def _take_component(self, denoiser: torch.nn.Module) -> list[str]:
        if not self.cut:
            return []
        units, bounds = self.cut.units, self.cut.bounds
        first, last = bounds[self.peers.index(self._links.rank)]
        absent = [i for i in range(len(units)) if not first <= i <= last]
        self.unit_names = units[first : last + 1]
        self.component = component = Component(denoiser.forward, bounds, self.peers, self._links)
        transformers = {i for i in absent if isinstance(denoiser.get_submodule(units[i]), SpatialTransformer)}

        def answer(index: int) -> Any:
            # a U-Net counts its transformers as it calls them, and patches are keyed by the number
            if index in transformers and "transformer_index" in self._options:
                self._options["transformer_index"] += 1
            return component.answer(index)

        take_out(denoiser, units, absent, answer)
        tap(denoiser, units, range(first, last + 1), component.produced)
        return [units[i] for i in absent]

    def patch(self, patches_id: str, tree: dict[str, Any]) -> None:
        """Bake the weight patches in; weights go to the device."""
        if patches_id != self.patches_id:
            place_weights(self.patcher, decode_patches(to_device(tree, torch.device("cpu"), None)), self._device)
            self.patches_id = patches_id

    @property
    def nbytes(self) -> int:
        return weight_bytes(self.denoiser)

    @property
    def shared_bytes(self) -> int:
        """Bytes of the small parts that every rank of a split holds."""
        return self.nbytes - sum(weight_bytes(self.denoiser.get_submodule(name)) for name in self.unit_names)

    def inputs(self, tree: tuple[Any, Any], time: float = 1.0) -> tuple[Any, Any]:
        """The forward's (args, kwargs) on this device, its timesteps multiplied with ``time``."""
        args, kwargs = forward_inputs(tree, self._device, self.patcher.model.get_dtype_inference(), time)
        forget_calls(self.denoiser)
        self._options = kwargs["transformer_options"]
        return args, kwargs
