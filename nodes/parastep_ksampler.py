"""The node ParaStep KSampler: KSampler, in parallel steps."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.v0_0_2 import io

from .node_text import teller
from .parastep_sampler import OPTIONS, plan_of
from .rounds_sampler import in_rounds, let_step_aside


class ParaStepKSampler(io.ComfyNode):
    """
    KSampler, with several denoising steps taken at the same time, one per device (ParaStep).

    Use it in place of KSampler. Every device holds the whole model; no fast link between them is needed.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LeapfrogParaStepKSampler",
            display_name="ParaStep KSampler",
            category="model/sampling",
            description=cleandoc(cls.__doc__ or ""),
            search_aliases=["leapfrog", "parastep", "multi gpu", "parallel ksampler", "parallel steps"],
            inputs=[
                io.Model.Input("model", tooltip="The model used for denoising, from a stock loader."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="The random seed used for creating the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of steps."),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="How closely the image follows the prompt (Classifier-Free Guidance).",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.SAMPLER_NAMES, tooltip="The sampler to run in parallel."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.SCHEDULER_NAMES, tooltip="How noise is gradually removed."
                ),
                io.Conditioning.Input("positive", tooltip="What to include in the image."),
                io.Conditioning.Input("negative", tooltip="What to exclude from the image."),
                io.Latent.Input("latent_image", tooltip="The latent image to denoise."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Lower values keep the structure of the initial image.",
                ),
                *OPTIONS,
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any,
        negative: Any, latent_image: dict[str, Any], denoise: float = 1.0, **options: Any,
    ) -> io.NodeOutput:  # fmt: skip
        sampler = in_rounds(plan_of(**options), comfy.samplers.sampler_object(sampler_name), teller(cls))
        image = comfy.sample.fix_empty_latent_channels(
            model, latent_image["samples"], latent_image.get("downscale_ratio_spacial"),
            latent_image.get("downscale_ratio_temporal"),
        )  # fmt: skip
        noise = comfy.sample.prepare_noise(image, seed, latent_image.get("batch_index"))
        schedule = comfy.samplers.KSampler(
            model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options
        )
        let_step_aside(model)
        samples = comfy.sample.sample_custom(
            model, noise, cfg, sampler, schedule.sigmas, positive, negative, image,
            noise_mask=latent_image.get("noise_mask"), callback=latent_preview.prepare_callback(model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
        )  # fmt: skip
        kept = {k: v for k, v in latent_image.items() if not k.startswith("downscale_ratio_")}
        return io.NodeOutput({**kept, "samples": samples})
