"""What computes with the denoiser's weights in the host, where a split model has none: refused by name."""

from __future__ import annotations

import math
import re
from typing import Any

import comfy.controlnet

from ..parallel_backend import LeapfrogError

READ_WEIGHTS = {
    comfy.controlnet.ControlLora: "a Control-LoRA",
    comfy.controlnet.ControlNetSD35: "a ControlNet for Stable Diffusion 3.5",
    comfy.controlnet.QwenFunControlNet: "a Qwen-Image Fun ControlNet",
}
"""ControlNets that borrow layers of the model they control."""


def refuse_host_weights(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """An OUTER_SAMPLE wrapper.

    Raises LeapfrogError unsupported_patch before sampling begins for a ControlNet that needs the denoiser's weights and
    for a guider whose two models would have ranks read files at every step; later for any other code that stumbles over
    the empty weights.
    """
    _refuse_second_split(executor.class_obj)
    for conds in executor.class_obj.conds.values():
        for cond in conds or ():
            _refuse_control(cond.get("control"))
    try:
        return executor(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, LeapfrogError) or not re.search(r"\bmeta\b", str(error)):
            raise
        raise LeapfrogError.of(
            "unsupported_patch", f"Something computes with the denoiser's weights outside the ranks: {error}"
        ) from error


def _refuse_second_split(guider: Any) -> None:
    """Ranks hold one model at a time, and a guider of two asks both in each step."""
    one, other = (
        getattr(getattr(guider, name, None), "model", None) for name in ("model_patcher", "uncond_model_patcher")
    )
    first, second = (getattr(model, "__dict__", {}).get("leapfrog") for model in (one, other))
    if not first or not second or not set(first.devices) & set(second.devices) or math.isclose(guider.cfg, 1.0):
        return
    alike = (first.plan, first.recipe) == (second.plan, second.recipe) and first.plan.mode in ("lookahead", "exact")
    if first is not second and not alike:
        raise LeapfrogError.of(
            "unsupported_patch",
            "This guider's two models are both split and share devices: at every step the ranks would hold one after "
            "the other. Split one of them, or give each devices of its own.",
        )


def _refuse_control(control: comfy.controlnet.ControlBase | None) -> None:
    while control is not None:
        for kind, name in READ_WEIGHTS.items():
            if isinstance(control, kind):
                raise LeapfrogError.of(
                    "unsupported_patch",
                    f"The conditioning carries {name}, which needs the denoiser's weights; ParaStep can use it.",
                )
        control = control.previous_controlnet
