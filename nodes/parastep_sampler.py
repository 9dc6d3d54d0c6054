"""The node ParaStep Sampler and the sampler that it makes."""

from __future__ import annotations

import copy
import logging
import weakref
from inspect import cleandoc
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy_api.v0_0_2 import io
from tqdm.auto import tqdm

from ..parallel_backend import LanesDenoiser, LanesPlan, LeapfrogError, sample_in_rounds
from .boundaries import runs_of_one_conditioning
from .recipe import comfy_host, patches_of, recipe_of
from .standin import StandInPatcher, weightless

log = logging.getLogger("leapfrog")
SERVED = ("euler", "ddim")


class ParaStepSampler(io.ComfyNode):
    """
    Takes several denoising steps at the same time, one per device (ParaStep).

    Use it in place of KSamplerSelect, with SamplerCustom or SamplerCustomAdvanced. Every device holds the whole model;
    no fast link between them is needed. With one device it is just the base sampler.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeapfrogParaStepSampler",
            display_name="ParaStep Sampler",
            category="model/sampling/samplers",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["leapfrog", "parastep", "multi gpu", "parallel sampler", "parallel steps"],
            inputs=[
                io.Combo.Input(
                    "base_sampler",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="The sampler to run in parallel. euler and ddim for now; the others are refused by name.",
                ),
                io.Int.Input(
                    "lanes",
                    default=0,
                    min=0,
                    max=8,
                    tooltip="Steps evaluated at once. 0: one per device.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=3,
                    min=1,
                    max=1000,
                    tooltip="Steps taken one by one at the start. More: closer to ComfyUI alone, but slower.",
                ),
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip="'auto': all GPUs, or two processes on the CPU without one. Or a list: '0,1', 'cpu,cpu'.",
                ),
                io.Combo.Input(
                    "predictor",
                    options=["linear", "newest", "paper"],
                    default="linear",
                    advanced=True,
                    tooltip=(
                        "How a result that is not there yet is guessed. linear: continue the last two. newest: repeat "
                        "the last. paper: each lane repeats its own last, as published."
                    ),
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For the sampler input of SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def validate_inputs(cls, base_sampler: str) -> bool | str:
        if base_sampler in comfy.samplers.SAMPLER_NAMES and base_sampler not in SERVED:
            return f"ParaStep Sampler cannot run '{base_sampler}' in parallel yet; choose {' or '.join(SERVED)}."
        return True

    @classmethod
    def execute(cls, base_sampler: str, lanes: int, warmup_steps: int, devices: str, predictor: str) -> io.NodeOutput:
        if base_sampler not in SERVED:
            raise LeapfrogError.of("unsupported_sampler", f"ParaStep Sampler cannot run '{base_sampler}' in parallel.")
        base = comfy.samplers.sampler_object(base_sampler)
        plan = LanesPlan.choose(devices, lanes, warmup_steps, predictor)
        if len(plan.devices) == 1 and plan.lanes == 1:
            log.info("Leapfrog: one device (%s), so ParaStep Sampler is plain %s.", plan.devices[0], base_sampler)
            return io.NodeOutput(base)
        return io.NodeOutput(RoundsSampler(plan, base.inpaint_options))


class RoundsSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER that takes its steps in rounds, evaluated by a pool. ComfyUI's KSAMPLER does the rest."""

    def __init__(self, plan: LanesPlan, inpaint_options: dict[str, Any]):
        super().__init__(self._sample_parastep, inpaint_options=inpaint_options)
        self.plan = plan
        self._denoiser: LanesDenoiser | None = None

    @torch.no_grad()
    def _sample_parastep(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        """k-diffusion's sampler signature: ``model`` is KSamplerX0Inpaint around the guider, ``x`` ``[batch, ...]``."""
        guider = model.inner_model
        denoiser = self._denoiser_for(guider.model_patcher)
        args = {**(extra_args or {})}
        args["model_options"] = _through(
            args.get("model_options", {}), weightless(guider.inner_model, denoiser), guider
        )

        def evaluate(points: list[torch.Tensor], first: int) -> list[torch.Tensor]:
            batch = x.shape[0]
            levels = sigmas[first : first + len(points)]
            denoised: list[torch.Tensor] = []
            for length in runs_of_one_conditioning(guider.conds, levels.tolist()):
                lanes = slice(len(denoised), len(denoised) + length)
                rows = torch.cat(points[lanes])
                at = levels[lanes].repeat_interleave(batch).to(rows)
                denoised += _widened(model, length, args)(rows, at).split(batch)
            return denoised

        bar = tqdm(total=len(sigmas) - 1, disable=disable)

        def on_step(step: int, latent: torch.Tensor, denoised: torch.Tensor) -> None:
            bar.update()
            if callback is not None:
                callback(
                    {"x": latent, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised}
                )

        denoiser.begin_run()
        try:
            return sample_in_rounds(
                evaluate, x, sigmas, self.plan.lanes, self.plan.warmup, self.plan.predictor, on_step
            )
        finally:
            bar.close()
            denoiser.end_run()

    def _denoiser_for(self, patcher: comfy.model_patcher.ModelPatcher) -> LanesDenoiser:
        if isinstance(patcher, StandInPatcher):
            raise LeapfrogError.of(
                "unsupported_patch",
                "ParaStep Sampler does not take a MODEL from Async UNet Split yet; use one of them.",
            )
        if patcher.get_additional_models_with_key("multigpu"):
            raise LeapfrogError.of(
                "unsupported_patch", "This MODEL went through MultiGPU CFG Split; use one of the two."
            )
        recipe = recipe_of(patcher)
        if self._denoiser is None or self._denoiser.recipe != recipe:
            self._denoiser = LanesDenoiser(self.plan, recipe, comfy_host())
        self._denoiser.check_patches(patches_of(patcher))
        _close_with(patcher, self._denoiser)
        if patcher.load_device.type == "cuda":
            # ComfyUI has just put the weights on a GPU that the ranks need for their own
            patcher.partially_unload(patcher.offload_device, patcher.loaded_size())
        return self._denoiser


def _close_with(patcher: comfy.model_patcher.ModelPatcher, denoiser: LanesDenoiser) -> None:
    """End the ranks when ComfyUI unloads the MODEL whose weights they hold (/free, "unload models")."""
    kind = comfy.patcher_extension.CallbacksMP.ON_DETACH
    known = weakref.ref(denoiser)

    def on_detach(_patcher: Any, unpatch_all: bool) -> None:
        still_there = known()
        if unpatch_all and still_there:
            still_there.close()

    patcher.remove_callbacks_with_key(kind, "leapfrog")
    patcher.add_callback_with_key(kind, "leapfrog", on_detach)


def _through(options: dict[str, Any], twin: Any, guider: Any) -> dict[str, Any]:
    """Model options with which the guider's denoiser calls go through ``twin`` instead of the loaded model."""

    def apply_remotely(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if executor.class_obj is not guider.inner_model:
            return executor(*args, **kwargs)  # a guider's second model stays where it is
        twin.current_patcher = guider.model_patcher
        return twin._apply_model(*args, **kwargs)

    options = comfy.model_patcher.create_model_options_clone(options)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.add_wrapper_with_key(kind, "leapfrog", apply_remotely, options, is_model_options=True)
    return options


def _widened(model: Any, lanes: int, extra_args: dict[str, Any]):
    """ComfyUI's inpainting wrapper for ``lanes`` times as many rows, with the mask, noise and image repeated."""
    wide = copy.copy(model)
    args = dict(extra_args)
    for owner, name in ((wide.__dict__, "noise"), (wide.__dict__, "latent_image"), (args, "denoise_mask")):
        value = owner.get(name)
        if lanes > 1 and isinstance(value, torch.Tensor):
            owner[name] = value.repeat(lanes, *[1] * (value.ndim - 1))
    return lambda x, sigma: wide(x, sigma, **args)
