"""What ranks hold on the host's own device, as ComfyUI's memory manager sees it and can have it back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_execution.utils import get_executing_context

from ..parallel_backend import LanesDenoiser, SplitDenoiser


class RanksPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher whose weights are in ranks; the memory manager can have the weights freed, or the ranks ended."""

    @property
    def denoiser(self) -> SplitDenoiser | LanesDenoiser:
        raise NotImplementedError

    @property
    def largest_share(self) -> int:
        """Bytes of weights that a rank may come to hold."""
        raise NotImplementedError

    @property
    def ranks_here(self) -> list[int]:
        """The ranks on the host's device."""
        here = str(self.load_device) if self.load_device.index is not None else f"{self.load_device}:0"
        return [rank for rank, device in enumerate(self.denoiser.devices) if device == here]

    @property
    def elsewhere(self) -> bool:
        """Whether the host has a GPU, and no rank on it: then ranks have no room to give there."""
        return self.load_device.type != "cpu" and not self.ranks_here

    def is_dynamic(self) -> bool:
        return False

    @property
    def gpus_in_use(self) -> dict[str, torch.device]:
        """The GPUs where ComfyUI has put a model; on no other has this process a context, and none is to get one."""
        loaded = comfy.model_management.current_loaded_models
        return {str(one.device): one.device for one in loaded if one.model and one.device.type == "cuda"}

    def make_room(self, gpus: Mapping[str, torch.device], activations: float = 0.0, used: Sequence[Any] = ()) -> None:
        """Free these GPUs of what is in the way of a rank's weights, if it has not loaded them yet, and of the bytes of
        its ``activations``; but not of models that are ``used``."""
        manager = comfy.model_management
        loaded = manager.current_loaded_models
        in_use = [one for one in loaded if one.model and any(map(one.model.is_clone, (self, *used)))]
        for rank, name in enumerate(self.denoiser.devices):
            if name in gpus:
                manager.free_memory(self._room(rank, activations), gpus[name], keep_loaded=in_use)
        if gpus:
            manager.soft_empty_cache()  # other processes cannot use what this one keeps

    def _room(self, rank: int, activations: float) -> float:
        weights = 0.0 if self.denoiser.loaded_bytes(rank) else 1.1 * self.largest_share
        return weights + max(activations, comfy.model_management.minimum_inference_memory())

    def model_size(self) -> int:
        """Bytes on the host's device that room has to be found for: before the ranks load, what they may need."""
        return self.loaded_size() or sum(self.largest_share for _ in self.ranks_here)

    def loaded_size(self) -> int:
        """Bytes of the ranks' weights on the host's device."""
        return sum(map(self.denoiser.loaded_bytes, self.ranks_here))

    def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        # less than nothing is what the host would have to free for the whole denoiser's evaluation, which is not here
        return super().partially_load(device_to, max(0, extra_memory), force_patch_weights)

    def partially_unload(self, device_to: Any, memory_to_free: int = 0, force_patch_weights: bool = False) -> int:
        freed = self.loaded_size()
        if not self.elsewhere:
            self.denoiser.unload(self.ranks_here)
        return freed

    def detach(self, unpatch_all: bool = True) -> Any:
        """For good, which ends the ranks, or to make room for something else of the prompt that is executed.

        With --disable-smart-memory ComfyUI unloads everything after each prompt, and means no more by it.
        """
        result = super().detach(unpatch_all)
        if unpatch_all and (get_executing_context() or comfy.model_management.DISABLE_SMART_MEMORY):
            if not self.elsewhere:
                self.denoiser.release(self.ranks_here)
        elif unpatch_all:
            self.denoiser.close()
        return result


class LanesMemory(RanksPatcher):
    """Stands for the ranks of ParaStep, which hold the weights of a MODEL that the host has, too."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher, denoiser: LanesDenoiser):
        super().__init__(torch.nn.Module(), model.load_device, torch.device("cpu"))
        self._denoiser = denoiser

    @property
    def denoiser(self) -> LanesDenoiser:
        return self._denoiser

    @property
    def largest_share(self) -> int:
        return self._denoiser.nbytes

    def announce(
        self, model: comfy.model_patcher.ModelPatcher, used: Sequence[Any] = (), activations: float = 0.0
    ) -> None:
        """Free GPUs of what the ranks need them for, and have the memory manager know of the ranks.

        That is, on every GPU where ComfyUI has put a model, and on the host's, whatever is in the way; but of the MODEL
        only as much as is short, and not what else is ``used`` in the run (ControlNets).
        """
        if self.load_device.type == "cuda":
            room = sum(self._room(rank, activations) for rank in self.ranks_here)
            free: Any = comfy.model_management.get_free_memory(self.load_device)
            if (short := room - free) > 0:  # its own copy of the weights, which ComfyUI has just put there
                model.partially_unload(torch.device("cpu"), int(short))
            here = {self.denoiser.devices[rank]: self.load_device for rank in self.ranks_here}
            self.make_room({**self.gpus_in_use, **here}, activations, (model, *used))
        self.be_known()

    @property
    def holds(self) -> bool:
        """Whether ranks hold any weights."""
        return any(map(self.denoiser.loaded_bytes, range(len(self.denoiser.devices))))

    def be_known(self) -> None:
        """Be among the models that the memory manager may unload."""
        manager = comfy.model_management
        known = _KnownRanks(self)
        if known not in manager.current_loaded_models:
            known.model_load()
            manager.current_loaded_models.insert(0, known)

    def step_aside(self) -> bool:
        """Be unknown to the memory manager until :meth:`be_known`; whether it was known."""
        loaded = comfy.model_management.current_loaded_models
        others = [one for one in loaded if one.model is not self]
        known, loaded[:] = len(others) < len(loaded), others
        return known


class _KnownRanks(comfy.model_management.LoadedModel):
    """Of all that is wholly on a GPU the last to be moved: ranks have to read their file again, while what belongs to
    the host, such as its own copy of the same weights, goes to main memory."""

    def model_offloaded_memory(self) -> int:
        return min(super().model_offloaded_memory(), -1)


@contextmanager
def calls_that_fit(base: Any, room: float = math.inf) -> Iterator[None]:
    """ComfyUI makes several calls of what does not fit the host's device, which is not where it is computed.

    For the time of the context one of a model's calls fits if it needs no more bytes than ``room``.
    """
    own, required = base.__dict__.get("memory_required"), base.memory_required
    base.memory_required = lambda *args, **kwargs: 0.0 if required(*args, **kwargs) <= room else math.inf
    try:
        yield
    finally:
        del base.memory_required
        if own:
            base.memory_required = own
