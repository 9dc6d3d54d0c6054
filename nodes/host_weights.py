"""What computes with the denoiser's weights in the host, where a split model has none: refused by name."""

from __future__ import annotations

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

    Raises LeapfrogError unsupported_patch for a ControlNet that needs the denoiser's weights, before sampling begins,
    and for any other code that stumbles over the empty ones.
    """
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


def _refuse_control(control: comfy.controlnet.ControlBase | None) -> None:
    while control is not None:
        for kind, name in READ_WEIGHTS.items():
            if isinstance(control, kind):
                raise LeapfrogError.of(
                    "unsupported_patch",
                    f"The conditioning carries {name}, which needs the denoiser's weights; ParaStep can use it.",
                )
        control = control.previous_controlnet
