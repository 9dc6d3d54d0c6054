"""A ComfyUI node that only the fault campaign installs: something in the denoiser goes wrong at a chosen evaluation."""

from __future__ import annotations

from typing import Any


class CampaignSpoil:
    """Passes a MODEL on that gives the denoiser an option which it cannot compute with, from evaluation ``at`` on."""

    CATEGORY = "leapfrog/tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "spoil"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "at": ("INT", {"min": 0})}}

    def spoil(self, model: Any, at: int) -> tuple[Any]:
        count = 0

        def wrapper(apply_model: Any, call: dict[str, Any]) -> Any:
            nonlocal count
            count += 1
            inputs = dict(call["c"])
            if count > at:
                inputs["transformer_options"] = {
                    **inputs["transformer_options"], "rope_options": {"scale_x": "no number"},
                }  # fmt: skip
            return apply_model(call["input"], call["timestep"], **inputs)

        spoiled = model.clone()
        spoiled.set_model_unet_function_wrapper(wrapper)
        return (spoiled,)


NODE_CLASS_MAPPINGS = {"CampaignSpoil": CampaignSpoil}
