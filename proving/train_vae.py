"""Trains the autoencoder (ComfyUI's TAESD architecture, 16 latent channels) on drawn shapes.

The encoder's own output is kept near zero mean and unit variance; vae_scale and vae_shift undo what ComfyUI's Flux
latent format does (process_in), so that the denoiser sees exactly that output. Encoder and decoder train together on
small and then on larger crops, at last the decoder alone with the encoder frozen.
Usage: python proving/train_vae.py [--comfyui DIR] [--minutes 15]
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfy_setup import WEIGHTS, parser, prepare
from muon import Muon
from shapes import ALL, SHAPES, draw, paint

FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # comfy.latent_formats.Flux
LATENT_NOISE = 0.1
BATCH = 8


def initialise(model: nn.Module) -> None:
    """Kaiming weights; the last convolution of each residual block starts small."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if name.endswith("conv.4"):
                layer.weight.data.mul_(0.1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for last in (model.taesd_encoder[-1], model.taesd_decoder[-1]):
        last.weight.data.mul_(0.3)
    nn.init.constant_(model.taesd_decoder[-1].bias, 0.6)


def crops(count: int, side: int, rng: torch.Generator) -> Tensor:
    """Pictures [count, 3, side, side] in 0..1 with a shape somewhere; a ninth of them in arbitrary colours."""
    out = []
    for _ in range(count):
        where = torch.rand(2, generator=rng) * side
        kind = int(torch.randint(len(ALL) * 9 // 8, (), generator=rng))
        if kind < len(ALL):
            out.append(draw(ALL[kind], rng, side, where.tolist()))
        else:
            colour, back = torch.rand(2, 3, generator=rng)
            radius = 8 + 24 * float(torch.rand((), generator=rng))
            out.append(paint(SHAPES[kind % len(SHAPES)], colour, radius, where.tolist(), back, side))
    return torch.stack(out)


def error(got: Tensor, want: Tensor) -> Tensor:
    """Absolute error plus squared error, of pixels in 0..1."""
    return (got - want).abs().mean() + 4 * F.mse_loss(got, want)


def save(model: nn.Module, path: Path) -> None:
    """Writes the fp16 file that the stock VAELoader reads."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    state["vae_scale"], state["vae_shift"] = torch.tensor(FLUX_SCALE).half(), torch.tensor(FLUX_SHIFT).half()
    save_file(state, path)


def stage(model: nn.Module, seconds: float, side: int, rate: float, last: float, joint: bool, seed: int) -> int:
    """Trains for so many seconds while the rate falls to its last part; returns the number of steps."""
    encoder, decoder = model.taesd_encoder, model.taesd_decoder
    rng = torch.Generator().manual_seed(seed)
    weights = list(decoder.parameters()) + (list(encoder.parameters()) if joint else [])
    for weight in encoder.parameters():
        weight.requires_grad_(joint)
    inner = [w for w in weights if w.ndim == 4 and min(w.shape[:2]) >= 16]
    outer = [w for w in weights if not any(w is other for other in inner)]
    optimisers = [(Muon(inner), rate), (torch.optim.Adam(outer, betas=(0.9, 0.98)), rate / 5)]
    start, step = time.monotonic(), 0
    while (spent := (time.monotonic() - start) / seconds) < 1:
        want = crops(BATCH, side, rng).to(memory_format=torch.channels_last)
        latent = encoder(want)
        noise = LATENT_NOISE * torch.randn(latent.shape, generator=rng)
        loss = fit = error(decoder(latent + noise), want)
        if joint:
            variance, mean = torch.var_mean(latent, dim=(0, 2, 3))
            loss = fit + 0.02 * (mean.square().mean() + (variance.add(1e-4).sqrt() - 1).square().mean())
            loss = loss + 0.02 * F.relu(latent.abs() - 3).square().mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser, full in optimisers:
            optimiser.param_groups[0]["lr"] = full * min(1, (step + 1) / 20) * (1 - (1 - last) * spent)
            optimiser.step()
        step += 1
        if step % 25 == 0:
            print(f"step {step} {spent:.2f} error {fit.item():.4f} std {latent.std().item():.3f}", flush=True)
    return step


@torch.no_grad()
def report(model: nn.Module) -> None:
    """Prints the quality on whole pictures and the statistics of their latents."""
    rng = torch.Generator().manual_seed(99)
    want = torch.stack([draw(ALL[i], rng) for i in range(0, len(ALL), 10)])
    latent = model.taesd_encoder(want)
    got = model.taesd_decoder(latent).clamp(0, 1)
    quality = -10 * (got - want).square().mean(dim=(1, 2, 3)).log10()
    print(f"PSNR {quality.mean():.2f}, worst {quality.min():.2f}")
    print(f"latents: mean {latent.mean():.3f} std {latent.std():.3f} largest {latent.abs().max():.2f}")


def main() -> None:
    """Trains and saves."""
    command = parser(__doc__)
    command.add_argument("--out", type=Path, default=WEIGHTS / "shapes_vae.safetensors")
    command.add_argument("--minutes", type=float, default=15)
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(0)
    model = TAESD(latent_channels=16).to(memory_format=torch.channels_last)
    initialise(model)
    seconds = args.minutes * 60
    steps = [
        stage(model, 0.60 * seconds, side=32, rate=5e-3, last=0.25, joint=True, seed=1),
        stage(model, 0.20 * seconds, side=48, rate=1.2e-3, last=0.1, joint=True, seed=2),
    ]
    save(model, args.out)
    report(model)
    steps.append(stage(model, 0.20 * seconds, side=64, rate=8e-4, last=0.02, joint=False, seed=3))
    save(model, args.out)
    report(model)
    print("steps", steps)


if __name__ == "__main__":
    main()
