"""The node Leapfrog Adviser."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy_api.v0_0_2 import io

from ..parallel_backend import LanesPlan, LeapfrogError, Recipe, SplitPlan, Survey, Surveyed
from .node_text import DEVICES, teller
from .ranks_memory import LanesMemory
from .recipe import comfy_host, own_device, weight_bytes
from .remote_forward import of_coupled_rows
from .rounds_sampler import RoundsSampler
from .standin import StandInPatcher

SMALL_PRINT = (
    "Speeds are calculated from times measured here and cover the denoiser only. Fidelity (PSNR to ComfyUI alone) is "
    "the lowest that Leapfrog's small test models of this kind reached (docs/quality); yours may differ."
)


class LeapfrogAdviser(io.ComfyNode):
    """
    Measures the model on your devices and says which of Leapfrog's nodes to take, with which settings.

    The model passes through unchanged. Take the node out again, or bypass it, once you know.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeapfrogAdviser",
            display_name="Leapfrog Adviser",
            category="advanced/multigpu",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["leapfrog", "multi gpu", "parallel", "benchmark", "which node"],
            inputs=[
                io.Model.Input("model", tooltip="The model to measure, from a stock loader or behind LoRA nodes."),
                io.Conditioning.Input("positive", tooltip="The prompt: its length counts, and what goes with it."),
                io.Latent.Input("latent_image", tooltip="The latent that you will denoise: its size counts."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of steps that you will take."),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="The CFG that you will use. With anything but 1 every step evaluates two prompts.",
                ),
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip=DEVICES,
                ),
                io.Combo.Input(
                    "wish",
                    options=list(Survey.WISHES),
                    default="balanced",
                    tooltip=(
                        "balanced: the fastest that is expected to reach at least 50 dB (PSNR to ComfyUI alone), a "
                        "difference that is hard to see. faithful: the same with 65 dB. fastest: whatever the "
                        "difference. least memory: the fewest weights on each device; among equals what reaches 50 dB."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(tooltip="The model, unchanged."),
                io.String.Output("advice", tooltip="What to take, and what it would bring."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent_image: dict[str, Any], steps: int, cfg: float, devices: str, wish: str
    ) -> io.NodeOutput:
        survey = measured(model, positive, latent_image, devices)
        text = advice(survey, steps, 1 if cfg == 1 else 2, wish)
        teller(cls)(text)
        return io.NodeOutput(model, text)


class SurveySampler(RoundsSampler):
    """Leaves at the first call of the denoiser, with Surveyed."""

    def memory_for(self, patcher: Any, recipe: Recipe) -> LanesMemory:
        size = weight_bytes(patcher.model.diffusion_model)
        sound = "Audio" in type(patcher.model.latent_format).__name__
        coupled = of_coupled_rows(patcher.model.diffusion_model)
        survey = Survey(self.plan.devices, recipe, comfy_host(), size, sound=sound, coupled=coupled)
        return LanesMemory(patcher, survey)


def measured(model: Any, positive: Any, latent_image: dict[str, Any], devices: str) -> Survey:
    """A survey of the MODEL's denoiser for such a prompt and latent.

    Raises LeapfrogError: bad_devices; unsupported_model for a denoiser that has no units; unsupported_patch for a MODEL
    that is split already; what a run of ParaStep would raise.
    """
    if isinstance(model, StandInPatcher):
        raise LeapfrogError.of(
            "unsupported_patch", "This MODEL has been split already; Leapfrog Adviser measures the whole one."
        )
    plan = LanesPlan.choose(devices, 0, own=own_device())
    SplitPlan(plan.devices[:1]).check(model.model.diffusion_model)
    sampler = SurveySampler(plan, comfy.samplers.sampler_object("euler"), lambda text: None)
    image = comfy.sample.fix_empty_latent_channels(
        model, latent_image["samples"], latent_image.get("downscale_ratio_spacial"),
        latent_image.get("downscale_ratio_temporal"),
    )  # fmt: skip
    noise = comfy.sample.prepare_noise(image, 0, latent_image.get("batch_index"))
    sigmas = torch.tensor([float(model.get_model_object("model_sampling").sigma_max), 0.0])
    try:
        comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, positive, positive, image, noise_mask=latent_image.get("noise_mask"),
            disable_pbar=True, seed=0,
        )  # fmt: skip
    except Surveyed as done:
        return done.survey
    raise LeapfrogError.of("unsupported_patch", "A node on this MODEL answers in the denoiser's place.")


def advice(survey: Survey, steps: int, conditionings: int, wish: str) -> str:
    """The advice for the wish, then what other wishes would get, and what was measured."""
    wishes: dict[str, list[str]] = {}
    for one in (wish, *Survey.WISHES):
        wishes.setdefault(survey.advise(steps, conditionings, one)[0].line(steps), []).append(one)
    lines = [f"{', '.join(dict.fromkeys(named))}: {line}" for line, named in wishes.items()]
    return "\n".join([*lines, survey.said, SMALL_PRINT])
