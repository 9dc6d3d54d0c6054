"""The class of the proving U-Net, which ComfyUI does not have.

ComfyUI recognises U-Nets by the widths of published models. This module imports nothing of ComfyUI by itself, so that
a process can load it before ComfyUI is there (`rank_site`).
"""

from __future__ import annotations

from typing import Any

MEAN = (
    -0.177, 0.994, -0.054, 0.869, -0.373, -0.622, -0.071, 0.363, -0.938, -0.177, 0.023, -0.570, 0.994, 0.094, 0.152,
    0.036,
)  # fmt: skip
"""Of each channel of the drawings' latents: a denoiser that starts from pure noise wants them around zero."""
UNET: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "model_channels": 64, "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 2], "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "context_dim": 768, "adm_in_channels": None, "use_linear_in_transformer": False,
    "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
"""What ComfyUI reads off the weights."""
HEADS = {"num_heads": -1, "num_head_channels": 32}


def register() -> None:
    """Adds the class to the ones that ComfyUI's loaders know; again, it does nothing.

    Splitting has to be measured on a U-Net that denoises, with skips and cross attention, and those that ComfyUI
    recognises are 320 channels wide: too much to train on a CPU. Its loaders, samplers and U-Net stay as they are.
    """
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models
    import comfy.supported_models_base
    import torch

    class ShapesLatent(comfy.latent_formats.Flux):
        def process_in(self, latent: torch.Tensor) -> torch.Tensor:
            return super().process_in(latent) - self._mean(latent)

        def process_out(self, latent: torch.Tensor) -> torch.Tensor:
            return super().process_out(latent + self._mean(latent))

        def _mean(self, latent: torch.Tensor) -> torch.Tensor:
            return torch.tensor(MEAN, dtype=latent.dtype, device=latent.device)[:, None, None]

    class ShapesUNet(comfy.supported_models_base.BASE):
        unet_config = UNET
        unet_extra_config = HEADS
        latent_format = ShapesLatent

        def model_type(self, state_dict: Any, prefix: str = "") -> comfy.model_base.ModelType:
            return comfy.model_base.ModelType.V_PREDICTION

        def inpaint_model(self) -> bool:
            return False  # which is concluded from more than 4 channels

    models = comfy.supported_models.models
    if not any(model.__name__ == ShapesUNet.__name__ for model in models):
        models.append(ShapesUNet)
