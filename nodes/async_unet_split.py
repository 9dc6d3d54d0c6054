"""The node Async UNet Split."""

from __future__ import annotations

import logging
from inspect import cleandoc

from comfy_api.v0_0_2 import io

from ..parallel_backend import LeapfrogError, SplitDenoiser, SplitPlan
from .recipe import comfy_host, patches_of, recipe_of
from .standin import StandInPatcher

log = logging.getLogger("leapfrog")


class AsyncUNetSplit(io.ComfyNode):
    """
    Cuts the denoiser into parts, one per device, that compute at the same time (AsyncDiff).

    A device holds only its own part of the weights. For Stable Diffusion U-Nets and Flux. Put it on the MODEL wire, in
    front of LoRA nodes or behind them; everything else stays. With one device the model passes through.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeapfrogAsyncUNetSplit",
            display_name="Async UNet Split",
            category="advanced/multigpu",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["leapfrog", "asyncdiff", "multi gpu", "parallel", "pipeline", "split model"],
            inputs=[
                io.Model.Input("model", tooltip="The model to spread over several devices, from a stock loader."),
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip="'auto': all GPUs, or two processes on the CPU without one. Or a list: '0,1', 'cpu,cpu'.",
                ),
                io.Int.Input(
                    "components",
                    default=0,
                    min=0,
                    max=8,
                    tooltip="How many parts to cut the denoiser into, one per device. 0: one for every device.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=3,
                    min=1,
                    max=1000,
                    tooltip="Steps computed exactly at the start. More: closer to ComfyUI alone, but slower.",
                ),
                io.Int.Input(
                    "stride",
                    default=1,
                    min=1,
                    max=1,
                    advanced=True,
                    tooltip="Steps served by one parallel batch. Only 1 for now.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["async", "exact"],
                    default="async",
                    tooltip=(
                        "async: all parts compute at the same time, each on the previous step's data; the picture "
                        "differs a little. exact: one part after the other; the picture of ComfyUI alone, no faster. "
                        "For models too large for one device."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, computed on all devices. Connect it as usual.")],
        )

    @classmethod
    def execute(cls, model, devices: str, components: int, warmup_steps: int, stride: int, mode: str) -> io.NodeOutput:
        if isinstance(model, StandInPatcher):
            raise LeapfrogError.of("unsupported_patch", "This MODEL has been split already.")
        plan = SplitPlan.choose(devices, components, warmup_steps, mode)
        if plan.components == 1:
            log.info("Leapfrog: one device (%s), so Async UNet Split passes the MODEL through.", plan.devices[0])
            return io.NodeOutput(model)
        plan.check(model.model.diffusion_model)
        denoiser = SplitDenoiser(plan, recipe_of(model), comfy_host())
        denoiser.check_patches(patches_of(model))
        return io.NodeOutput(StandInPatcher.of(model, denoiser))
