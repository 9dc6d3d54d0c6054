"""The node ParaStep Sampler."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

import comfy.samplers
from comfy_api.v0_0_2 import io

from ..parallel_backend import LanesPlan
from .node_text import DEVICES, teller
from .recipe import own_device
from .rounds_sampler import in_rounds

# The options that both ParaStep nodes have.
OPTIONS = [
    io.Combo.Input(
        "fidelity",
        options=list(LanesPlan.FIDELITIES),
        default="balanced",
        tooltip=(
            "How far a predicted step may be from the true one before it is computed again. faithful: closest, least "
            "speed. balanced: very close. fast: small details may differ. exact: the picture of one device, seldom "
            "faster. unguarded: nothing is computed again, however wrong it is; set warmup_steps to 3 or more."
        ),
    ),
    io.Int.Input(
        "lanes",
        default=0,
        min=0,
        max=LanesPlan.MOST,
        tooltip=(
            "Steps evaluated at once. 0 is automatic. With CFG 1: one step for each device. With CFG above 1: half as "
            "many, prompt and negative prompt on a device each; two devices then give the very same picture, at most "
            "twice as fast. More lanes than devices run as one batch on each."
        ),
    ),
    io.String.Input(
        "devices",
        default="auto",
        tooltip=DEVICES,
    ),
    io.Int.Input(
        "warmup_steps",
        default=0,
        min=0,
        max=1000,
        tooltip="Steps taken one by one at the start. 0: for as long as the next ones cannot be predicted well.",
    ),
    io.Combo.Input(
        "predictor",
        options=list(LanesPlan.PREDICTORS),
        default="linear",
        advanced=True,
        tooltip=(
            "How a result that is not there yet is guessed. linear: continue the last two. newest: repeat the last. "
            "paper: each lane repeats its own last, as published (with fidelity unguarded)."
        ),
    ),
    io.Float.Input(
        "drift_bound",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.001,
        round=0.0001,
        advanced=True,
        tooltip=(
            "How far a predicted latent may be from the true one (relative), in place of fidelity: 0.006 is what "
            "faithful allows, 0.03 what fast allows. 0: what fidelity says."
        ),
    ),
    io.Boolean.Input(
        "calibrate",
        default=False,
        optional=True,
        advanced=True,
        tooltip=(
            "Fit the fidelity to this model: three short runs, the first time that a model and a sampler come "
            "together, measure how much the picture changes. The result is kept."
        ),
    ),
]


def plan_of(
    fidelity: str, lanes: int, devices: str, warmup_steps: int, predictor: str, drift_bound: float,
    calibrate: bool = False,
) -> LanesPlan:  # fmt: skip
    """The plan for these options. Raises LeapfrogError: bad_plan, bad_devices, bad_machines."""
    return LanesPlan.choose(
        devices, lanes, warmup=warmup_steps, predictor=predictor, fidelity=fidelity, bound=drift_bound,
        calibrate=calibrate, own=own_device(),
    )  # fmt: skip


class ParaStepSampler(io.ComfyNode):
    """
    Takes several denoising steps at the same time, one per device (ParaStep).

    Use it in place of KSamplerSelect, with SamplerCustom or SamplerCustomAdvanced. Every device holds the whole model;
    no fast link between them is needed. With one device and one lane it is just the base sampler.
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
                    tooltip="The sampler to run in parallel.",
                ),
                *OPTIONS,
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="A sampler with settings of its own, to run in parallel in place of base_sampler.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Sampler.Output(tooltip="For the sampler input of SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, base_sampler: str, sampler: Any = None, **options: Any) -> io.NodeOutput:
        plan = plan_of(**options)
        base = comfy.samplers.sampler_object(base_sampler) if sampler is None else sampler
        return io.NodeOutput(in_rounds(plan, base, teller(cls)))
