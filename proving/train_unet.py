"""Trains the small U-Net on drawn shapes: velocity prediction with Stable Diffusion's noise schedule.

Everything that the model sees is what ComfyUI's nodes give it: the timestep's number, the scaled noisy latent, the 77
hidden states of the text encoder, the empty prompt for classifier-free guidance.

The text encoder is not trained, and most of its variance says which token stands where. So the training sees the
hidden states through a linear map that evens their main directions out, and the file has this map multiplied into the
layers that read them.
Usage: python proving/train_unet.py --clip CLIP.safetensors [--comfyui DIR] [--minutes 45]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfy_setup import WEIGHTS, prepare
from latents import read_latents
from shapes import ALL, TRAINED
from training import MAIN, command_line, drawings_options, drawn, evening, read_prompts, save, train
from unet_config import HEADS, MEAN, UNET

READERS = ("attn2.to_k.weight", "attn2.to_v.weight")


def build(**changed: Any) -> nn.Module:
    """ComfyUI's U-Net with initial weights: Kaiming, and zero for what ends a block, a transformer or the network."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

    model = UNetModel(
        image_size=32, use_spatial_transformer=True, legacy=False, dtype=torch.float32, device="cpu",
        operations=comfy.ops.disable_weight_init, **{**UNET, **HEADS, **changed},
    )  # fmt: skip
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
    last = [layer.out_layers[-1] for layer in model.modules() if isinstance(layer, ResBlock)]
    last += [layer for name, layer in model.named_modules() if name.endswith("proj_out")]
    for layer in (*last, model.out[-1]):
        nn.init.zeros_(layer.weight)
    return model


def main() -> None:
    """Trains for so many minutes, going on from the checkpoint in --work where there is one."""
    command = command_line(__doc__, WEIGHTS / "shapes_unet.safetensors", minutes=45, batch=24, rate=0.015)
    drawings_options(command, 40, "encoded drawings per shape, colour and size")
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    import comfy.model_sampling

    hidden, _ = read_prompts(args.clip, [a.caption for a in ALL], args.work / "prompts.pt")
    latents = read_latents(args.vae, args.each, args.work / "latents.pt") - torch.tensor(MEAN)[:, None, None]
    print(f"latents: mean {latents.mean():.3f} std {latents.std():.3f}", flush=True)
    rows = torch.tensor([ALL.index(a) for a in TRAINED])
    to_even = evening(hidden[rows])
    context = hidden @ to_even.T
    sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas

    torch.manual_seed(0)
    model = build(context_dim=MAIN)

    def loss_of(rng: torch.Generator, _part: float) -> Tensor:
        clean, prompt = drawn(latents, rows, len(ALL), args.batch, rng)
        step = (torch.rand(args.batch, generator=rng) ** 0.75 * len(sigmas)).long()
        sigma = sigmas[step][:, None, None, None]
        kept = (sigma.square() + 1).rsqrt()
        noise = torch.randn(clean.shape, generator=rng)
        noisy = kept * (clean + sigma * noise)
        got = model(noisy, step.float(), context=context[prompt])
        return F.mse_loss(got, kept * (noise - sigma * clean))

    def keep(average: dict[str, Tensor]) -> None:
        save({k: v @ to_even if k.endswith(READERS) else v for k, v in average.items()}, args.out)

    edges = ("input_blocks.0.", "out.", "time_embed.")
    train(
        model, loss_of, keep,
        inner=[n for n, w in model.named_parameters() if w.ndim > 1 and not n.startswith(edges)],
        checkpoint=args.work / "unet.pt", minutes=args.minutes, rate=args.rate,
    )  # fmt: skip


if __name__ == "__main__":
    main()
