"""The node Async UNet Split."""

from __future__ import annotations

from inspect import cleandoc

from comfy_api.v0_0_2 import io

from ..parallel_backend import LeapfrogError, SplitDenoiser, SplitPlan
from .inside_patches import refuse_replaced_methods
from .node_text import DEVICES, shower, teller
from .recipe import comfy_host, own_device, patches_of, recipe_of, weight_bytes
from .standin import StandInPatcher


class AsyncUNetSplit(io.ComfyNode):
    """
    Cuts the denoiser into parts, one per device, that work on several steps at the same time.

    Each device holds only its own part of the weights. With two devices and CFG above 1, if the whole model fits on
    each, the prompt and the negative prompt get a device each instead; the picture does not change. For U-Nets and
    transformers. Put it on the MODEL wire, in front of LoRA nodes or behind them; everything else stays. With one
    device the model passes through.
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
                    tooltip=DEVICES,
                ),
                io.Int.Input(
                    "components",
                    default=0,
                    min=0,
                    max=SplitPlan.MOST,
                    tooltip=(
                        "How many parts to cut the denoiser into. 0 is automatic: a part for each device, except that "
                        "with CFG above 1 prompt and negative prompt take half of an even number of devices each, "
                        "so that two devices hold the whole model each. 2 or more on as many devices: always cut."
                    ),
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip=(
                        "Steps computed exactly at the start. 0: as many as it takes until the next ones can be "
                        "predicted well. More: closer to ComfyUI alone, but slower."
                    ),
                ),
                io.Int.Input(
                    "stride",
                    default=1,
                    min=1,
                    max=2,
                    advanced=True,
                    tooltip=(
                        "asyncdiff only. 2: the parts compute for every second step and their data serves two; "
                        "faster and less close, and it needs one more device."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=list(SplitPlan.MODES),
                    default="lookahead",
                    tooltip=(
                        "lookahead: the parts work on several steps at once, the later ones at predicted points; very "
                        "close to ComfyUI alone. asyncdiff: as published, each part on the previous step's data; the "
                        "picture differs more. extrapolated: asyncdiff with that data continued by one step. exact: "
                        "one part after the other; the picture of ComfyUI alone, no faster, for models too large for "
                        "one device."
                    ),
                ),
                io.Combo.Input(
                    "cfg_lanes",
                    options=list(SplitPlan.CFG_LANES),
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "Prompt and negative prompt on different devices, which is exact. auto: with CFG above 1 and "
                        "an even number of devices, before cutting deeper; with two devices each then holds the "
                        "whole denoiser, if it fits. on: the same, even if free memory looks too small (an error with "
                        "an odd number). off, or 2 components on 2 devices: always cut."
                    ),
                ),
                io.Float.Input(
                    "drift_bound",
                    default=SplitPlan.DRIFT_BOUND,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    advanced=True,
                    tooltip=(
                        "How far a predicted step may be from the true one (relative) before it is computed again, "
                        "exactly; also ends the automatic warm-up. Smaller: closer, but slower."
                    ),
                ),
                io.Boolean.Input(
                    "time_shift",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "asyncdiff only: use the previous step's time, as the paper offers. With our small models it "
                        "was less close with two parts; with four or eight it helped two of four."
                    ),
                ),
                io.String.Input(
                    "cut",
                    default="",
                    advanced=True,
                    tooltip=(
                        "Where to cut, by hand: the number, counted from 0, of the unit with which part 2, 3 ... "
                        "begins, such as '13', or '7,13' for three parts. The log names the units of each part. Empty: "
                        "measured, so that the slowest part is as fast as possible."
                    ),
                ),
                io.Combo.Input(
                    "balance",
                    options=list(SplitPlan.BALANCES),
                    default="speed",
                    advanced=True,
                    tooltip=(
                        "speed: parts that take equal time. memory: no device holds more than an equal share of the "
                        "weights plus a tenth of them; in a U-Net, whose middle is heavy but quick, that is slower."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="The same model, computed on all devices. Connect it as usual.")],
        )

    @classmethod
    def execute(
        cls, model, devices: str, components: int, warmup_steps: int, stride: int, mode: str, cfg_lanes: str = "auto",
        drift_bound: float = SplitPlan.DRIFT_BOUND, time_shift: bool = False, cut: str = "", balance: str = "speed",
    ) -> io.NodeOutput:  # fmt: skip
        if isinstance(model, StandInPatcher):
            message = "This MODEL has been split already; take one of the two nodes out."
            raise LeapfrogError.of("unsupported_patch", message)
        plan = SplitPlan.choose(
            devices, components, warmup=warmup_steps, mode=mode, cfg_lanes=cfg_lanes, bound=drift_bound,
            time_shift=time_shift, cut=cut, stride=stride, balance=balance, own=own_device(),
        )  # fmt: skip
        if len(plan.devices) == 1:
            teller(cls)(f"one device ({plan.devices[0]}), so Async UNet Split passes the MODEL through.")
            return io.NodeOutput(model)
        plan.check(model.model.diffusion_model)
        of_another_branch = {key.removeprefix("diffusion_model.") for key in model.object_patches_backup}
        refuse_replaced_methods(model.model.diffusion_model, but=of_another_branch)
        size = weight_bytes(model.model.diffusion_model)
        denoiser = SplitDenoiser(plan, recipe_of(model), comfy_host(), size, shower(cls))
        denoiser.check_patches(patches_of(model))
        return io.NodeOutput(StandInPatcher.of(model, denoiser))
