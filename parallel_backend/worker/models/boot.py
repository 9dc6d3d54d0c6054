"""Making a rank's process a ComfyUI process: arguments first, then devices. Import before any other comfy module."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch


def boot_comfy(args: Sequence[str]) -> torch.device:
    """Parse ``args`` as ComfyUI's main does and return the device that this rank computes on."""
    sys.argv = ["rank", *args]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management

    comfy.model_management.set_cudnn_benchmark()  # as main.py does, for --fast autotune
    # A rank places its own part of the weights; ComfyUI's choice for a whole model would fill the GPU first.
    comfy.model_management.unet_inital_load_device = lambda *_: torch.device("cpu")
    logging.getLogger().setLevel(logging.WARNING)
    return comfy.model_management.get_torch_device()
