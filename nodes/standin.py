"""The weightless stand-in: a MODEL whose denoiser has ComfyUI's class, names and shapes, and a remote forward."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import weakref
from contextlib import ExitStack
from typing import Any, NamedTuple

import comfy.hooks
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS

from ..parallel_backend import LeapfrogError, SplitDenoiser
from .host_weights import refuse_host_weights
from .inside_patches import refuse_replaced_methods
from .lookahead_sampler import look_ahead
from .ranks_memory import RanksPatcher, calls_that_fit
from .recipe import reshaped_by
from .remote_forward import RUN, Remote, Run, evaluate, run_wrapped

log = logging.getLogger("leapfrog")
CALLS = "leapfrog_calls"


NOTHING_LOADED: dict[str, Any] = {
    "current_patcher": None,
    "current_weight_patches_uuid": None,
    "lowvram_patch_counter": 0,
    "model_loaded_weight_memory": 0,
    "model_lowvram": False,
    "model_offload_buffer_memory": 0,
}


REPLACED = ("forward", "_apply")
"""What a shell has of ours."""


MEMORY_HANDLES = ("_v", "_v_weight", "_v_bias", "_v_signature", "_pins", "_pin_state", "_prefetch")


# Of a model that ComfyUI has loaded in part: functions that hold its LoRA.
PATCHES_IN_PLACE = ("weight_function", "bias_function")


def _of_memory_manager(name: str) -> bool:
    """Whether it is ComfyUI's memory manager that hangs an attribute of this name on a module."""
    return name in MEMORY_HANDLES or name.endswith("_lowvram_function")


def weightless(base: comfy.model_base.BaseModel, denoiser: SplitDenoiser) -> comfy.model_base.BaseModel:
    """A remote twin of ``base`` that keeps no weights of its denoiser alive."""

    def empty(p: torch.nn.Parameter) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)

    dm = base.diffusion_model
    memo: dict[int, Any] = {id(p): empty(p) for p in dm.parameters()}
    for module in dm.modules():
        handles = [value for name, value in vars(module).items() if _of_memory_manager(name)]
        memo |= {id(value): [] for name, value in vars(module).items() if name in PATCHES_IN_PLACE}
        # copies would free the memory of the originals; a plain value may be anybody's
        memo |= {id(value): None for value in handles if not isinstance(value, int | float | str | None)}
    shell = copy.deepcopy(dm, memo)
    for module in shell.modules():
        for name in filter(_of_memory_manager, list(vars(module))):
            delattr(module, name)
    return remote_twin(base, shell, denoiser)


def remote_twin(
    base: comfy.model_base.BaseModel, shell: torch.nn.Module, denoiser: Remote
) -> comfy.model_base.BaseModel:
    """A copy of ``base`` that shares everything with it but the denoiser: that is ``shell``, a copy of the original
    one, whose forward now calls ``denoiser``."""
    twin = copy.copy(base)
    twin._modules = dict(base._modules)
    twin._modules["diffusion_model"] = shell
    _call_remotely(shell, twin, denoiser)
    for name in ("dynamic_vbars", "dynamic_pins", "dynamic_patchers"):
        twin.__dict__.pop(name, None)
    twin.__dict__.update(NOTHING_LOADED)
    return twin


def _call_remotely(shell: torch.nn.Module, twin: comfy.model_base.BaseModel, denoiser: Remote) -> None:
    takes_context_third = list(inspect.signature(type(shell).forward).parameters)[3:4] == ["context"]

    # Weak references: ComfyUI counts on a model being gone as soon as its last MODEL is.
    twin_ref, shell_ref = weakref.ref(twin), weakref.ref(shell)

    def remote(*args: Any, **kwargs: Any) -> torch.Tensor:
        owner: Any = twin_ref()
        return evaluate(denoiser, owner.current_patcher, args, kwargs)

    # Not to be traced by torch.compile: what happens here happens in other processes.
    @torch.compiler.disable
    def forward(x: torch.Tensor, timesteps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        this: Any = shell_ref()
        if takes_context_third and "context" in kwargs:
            args = (kwargs.pop("context"), *args)  # where wrappers of the denoiser's own forward find it
        return run_wrapped(this, remote, (x, timesteps, *args), kwargs)

    # ComfyUI moves models about with .to(); there is nothing to move
    shell.__dict__.update(zip(REPLACED, (forward, lambda fn, recurse=True: shell_ref()), strict=True))


class Original(NamedTuple):
    """A parameter to put back when a MODEL is unpatched, as ComfyUI keeps it."""

    weight: torch.nn.Parameter
    inplace_update: bool = False


class StandInPatcher(RanksPatcher):
    """A MODEL whose weights are in ranks."""

    @classmethod
    def of(cls, model: comfy.model_patcher.ModelPatcher, denoiser: SplitDenoiser) -> StandInPatcher:
        """The stand-in for a MODEL, with everything attached to it (patches, options, wrappers, hooks)."""
        seed = cls.__new__(cls)
        twin = weightless(model.model, denoiser)
        for key, kept in model.backup.items():  # patches may have widened what the shell was made after
            if kept.weight.shape != comfy.utils.get_attr(twin, key).shape and key.startswith("diffusion_model."):
                comfy.utils.set_attr_param(twin, key, torch.empty_like(kept.weight, device="meta"))
        for key, kept in model.object_patches_backup.items():  # of another MODEL, left on what both share
            comfy.utils.set_attr(twin, key, kept)
        twin.__dict__["leapfrog"] = denoiser
        seed.__dict__ = {**model.__dict__, "model": twin, "pinned": set()}
        made: Any = seed.clone(model_override=(twin, ({}, {}, {}, set())))
        made.parent = None
        made.cached_patcher_init = None
        if made.additional_models.pop("multigpu", None):
            log.warning("Leapfrog: MultiGPU CFG Split in front of Async UNet Split is ignored; the split has the GPUs.")
        # it would put the host's own denoiser back in place of the stand-in
        made.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
        made.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "leapfrog", refuse_host_weights)
        made.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "leapfrog", make_room_elsewhere)
        made.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "leapfrog", look_ahead)
        return made

    @property
    def denoiser(self) -> SplitDenoiser:
        return self.model.__dict__["leapfrog"]

    @property
    def largest_share(self) -> int:
        plan = self.denoiser.plan
        return self.denoiser.nbytes // plan.components(plan.pipelines(guided=True, whole_fits=True)[0])

    def _room_for_calls(self) -> float:
        """Bytes that a call may need: as ComfyUI reckons for itself, but of what the rank on the host's GPU has, where
        there is one, and of the rows of both pipelines. The same for a whole run."""
        if self.load_device.type == "cpu" or not self.ranks_here:
            return math.inf
        free, held, plan = self.get_free_memory(self.load_device), self.loaded_size(), self.denoiser.plan
        whole = held >= self.denoiser.nbytes if held else self.denoiser.fits(free)
        pipelines = plan.pipelines(guided=True, whole_fits=whole)
        if not held:
            free -= self.denoiser.nbytes // plan.components(pipelines[0])
        return max(0.0, free / 1.5 * len(pipelines))

    def load(self, device_to: Any = None, lowvram_model_memory: int = 0, force_patch_weights: bool = False,
             full_load: bool = False) -> None:  # fmt: skip
        """Nothing to move here: the ranks load when the first call tells them the shapes.

        Only the shapes that patches change are changed: ComfyUI asks the first layer how many channels it takes.
        """
        for key, shape in reshaped_by(self).items():
            if key not in self.backup:
                weight = comfy.utils.get_attr(self.model, key)
                self.backup[key] = Original(weight)
                comfy.utils.set_attr_param(self.model, key, torch.empty(shape, dtype=weight.dtype, device="meta"))
        if self.ranks_here:
            comfy.model_management.soft_empty_cache()  # other processes cannot use what this one keeps
        self.model.device = device_to
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(comfy.patcher_extension.CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def get_key_patches(self, filter_prefix: str | None = None) -> Any:
        """What ModelMerge takes of a second model."""
        raise _no_weights()

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> Any:
        raise _no_weights()

    def patch_hooks(self, hooks: comfy.hooks.HookGroup | None) -> None:
        """Remember the hooks of the conditioning that comes next; the ranks bake them into their weights."""
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        self.current_hooks = None

    def pre_run(self) -> None:
        super().pre_run()
        refuse_replaced_methods(self.model.diffusion_model, but=REPLACED)
        if TORCH_COMPILE_KWARGS in self.model_options:
            log.warning("Leapfrog: TorchCompileModel has no effect on a split model; the ranks compute uncompiled.")
        self.attachments[RUN] = Run()
        self.attachments[CALLS] = calls = ExitStack()
        calls.enter_context(calls_that_fit(self.model, self._room_for_calls()))
        self.denoiser.begin_run()

    def cleanup(self) -> None:
        super().cleanup()
        self.attachments.pop(RUN, None)
        self.attachments.pop(CALLS, ExitStack()).close()
        self.denoiser.end_run()


def make_room_elsewhere(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """An OUTER_SAMPLE wrapper: on the GPUs that are not the MODEL's own, where ComfyUI makes room by itself, and before
    it loads what the run uses."""
    ranks: StandInPatcher = executor.class_obj.model_patcher
    ranks.make_room({name: gpu for name, gpu in ranks.gpus_in_use.items() if gpu != ranks.load_device})
    return executor(*args, **kwargs)


def _no_weights() -> LeapfrogError:
    return LeapfrogError.of(
        "unsupported_patch",
        "A MODEL from Async UNet Split has no weights in ComfyUI: connect what is in front of that node here.",
    )
