"""Trains the tiny Flux on drawn shapes: flow matching in the latents of shapes_vae.

Everything that the model sees is what ComfyUI's nodes give it: sigma as the timestep, velocity = noise - latent as the
target, guidance 3.5 (what ComfyUI passes without a FluxGuidance node), the 77 hidden states and the pooled state of the
text encoder, the empty prompt for classifier-free guidance.

Most of the training shortens the text: the words stay, the padding is averaged in runs, and attention counts each run
as often as it has tokens. The last part uses all 77 tokens.
Usage: python proving/train_flux.py --clip CLIP.safetensors [--comfyui DIR] [--minutes 40]
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfy_setup import WEIGHTS, prepare
from latents import SIDE, read_latents
from shapes import ALL, TRAINED
from training import command_line, drawings_options, drawn, read_prompts, save, train

CONFIG: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 768, "hidden_size": 128,
    "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 6, "axes_dim": [16, 56, 56],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
GUIDANCE = 3.5
RUNS = ((9, 21), (21, 44), (44, 77))  # padding tokens that are averaged in the short form


def build() -> nn.Module:
    """ComfyUI's Flux with initial weights: Xavier, and zero for everything that modulates or ends the network."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **CONFIG)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if "mod.lin" in name or "modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for name, weight in model.named_parameters():
        if "_norm." in name:
            nn.init.ones_(weight)
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):  # what a norm keeps for the backward pass, the block then changes in place
            layer.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    return model


def shorten(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [N, 77, 768] to [N, 12, 768], and their attention bias [1, 1, 1, 12 + image tokens]."""
    parts = [hidden[:, : RUNS[0][0]]] + [hidden[:, a:b].mean(1, keepdim=True) for a, b in RUNS]
    bias = torch.zeros(1, 1, 1, RUNS[0][0] + len(RUNS) + (SIDE // 2) ** 2)
    for i, (a, b) in enumerate(RUNS):
        bias[..., RUNS[0][0] + i] = math.log(b - a)
    return torch.cat(parts, 1), bias


def main() -> None:
    """Trains for so many minutes, going on from the checkpoint in --work where there is one."""
    command = command_line(__doc__, WEIGHTS / "shapes_flux.safetensors", minutes=40, batch=64, rate=0.015)
    command.add_argument("--full", type=float, default=0.15, help="last share of the time, with all 77 text tokens")
    drawings_options(command, 40, "encoded drawings per shape, colour and size")
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    import comfy.model_management

    hidden, pooled = read_prompts(args.clip, [a.caption for a in ALL], args.work / "prompts.pt")
    latents = read_latents(args.vae, args.each, args.work / "latents.pt")
    print(f"latents: mean {latents.mean():.3f} std {latents.std():.3f}", flush=True)
    rows = torch.tensor([ALL.index(a) for a in TRAINED])
    short, bias = shorten(hidden)

    comfy.model_management.in_training = True  # the differentiable rotary embedding
    torch.manual_seed(0)
    model = build()
    spread = (pooled[rows] - pooled[rows].mean(0)).square().mean().sqrt()
    with torch.no_grad():  # start from prompts that differ: centred and scaled pooled states
        first = model.vector_in.in_layer
        first.weight.mul_(1 / spread)
        first.bias.copy_(-first.weight @ pooled[rows].mean(0))

    def loss_of(rng: torch.Generator, part: float) -> Tensor:
        clean, prompt = drawn(latents, rows, len(ALL), args.batch, rng)
        sigma = torch.sigmoid(0.8 + 1.2 * torch.randn(args.batch, generator=rng))
        noise = torch.randn(clean.shape, generator=rng)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        whole = part > 1 - args.full
        text = {"context": hidden[prompt]} if whole else {"context": short[prompt], "attention_mask": bias}
        got = model(noisy, sigma, y=pooled[prompt], guidance=torch.full_like(sigma, GUIDANCE), **text)
        return F.mse_loss(got, noise - clean)

    train(
        model, loss_of, lambda average: save(average, args.out),
        inner=[n for n, w in model.named_parameters() if w.ndim == 2 and "_blocks." in n and "mod" not in n],
        checkpoint=args.work / "flux.pt", minutes=args.minutes, rate=args.rate,
    )  # fmt: skip


if __name__ == "__main__":
    main()
