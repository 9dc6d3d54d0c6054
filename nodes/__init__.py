"""What a user drags. The only place of the host that imports ComfyUI."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from .adviser import LeapfrogAdviser
from .async_unet_split import AsyncUNetSplit
from .parastep_ksampler import ParaStepKSampler
from .parastep_sampler import ParaStepSampler


class LeapfrogExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [AsyncUNetSplit, ParaStepSampler, ParaStepKSampler, LeapfrogAdviser]


async def comfy_entrypoint() -> LeapfrogExtension:
    return LeapfrogExtension()
