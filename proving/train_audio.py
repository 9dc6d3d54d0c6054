"""Trains the tiny Stable Audio on drawn sounds: v prediction in latents that are levels of 64 sinusoids.

Everything that the model sees is what ComfyUI's nodes give it: the input scaled by 1 / sqrt(sigma^2 + 1), atan(sigma)
in quarter turns as the timestep, the 77 hidden states of the text encoder followed by a token each for the start (0 s)
and the length (2 s) that ComfyUI states for 64 frames, both of them as the global state too, the empty prompt for
classifier-free guidance. The two embedders of seconds are random and stay so. The training sees the hidden states
through a linear map that evens their main directions out, and the file has this map multiplied into the layer that
reads them. Nearly half of the captions tell less than they could ("four chirps", "high sounds"): what a word means is
then learned by itself, and not only with the words that it stands beside in few captions.
Usage: python proving/train_audio.py --clip CLIP.safetensors --work WORK [--comfyui DIR] [--minutes 45] [--device cuda]
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfy_setup import WEIGHTS, prepare
from sounds import FRAMES, TRAINED, draw, said
from training import MAIN, command_line, dropped, evening, read_prompts, save, train

CONFIG: dict[str, Any] = {
    "io_channels": 64, "embed_dim": 128, "num_heads": 2, "depth": 6, "cond_token_dim": 768,
    "project_cond_tokens": True, "global_cond_dim": 1536, "attn_kwargs": {"qk_norm": "rms"}, "norm_type": "rms_norm",
}  # fmt: skip
START, TOTAL = 0, int(FRAMES / 21.53)  # seconds; ComfyUI's defaults for a latent of this length
READER = "to_cond_embed.0.weight"  # of the hidden states
TOLD = tuple(itertools.product((True, False), repeat=3))
"""Which of a sound's attributes a caption names; first the whole caption."""
WHOLE = 0.5
"""Share of whole captions, beside those among all that are drawn from TOLD."""


def build(**changed: Any) -> nn.Module:
    """ComfyUI's denoiser with initial weights: Xavier, and zero for everything that ends a branch."""
    import comfy.ops
    from comfy.ldm.audio.dit import AudioDiffusionTransformer

    model = AudioDiffusionTransformer(
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **CONFIG | changed
    )
    for name, weight in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(weight)
        elif weight.ndim == 1 or "to_out" in name or "ff.2" in name or "project_out" in name or "process_conv" in name:
            nn.init.zeros_(weight)
        elif name == "timestep_features.weight":
            nn.init.normal_(weight)
        else:
            nn.init.xavier_uniform_(weight)
    rotary = model.transformer.rotary_pos_emb.inv_freq
    rotary.copy_(10000 ** -(torch.arange(len(rotary)) / len(rotary)))
    return model


def seconds_embedders() -> dict[str, nn.Module]:
    """The file's embedders of numbers of seconds, random and in fp16's precision."""
    from comfy.ldm.audio.embedders import NumberConditioner

    out = {}
    for name in ("seconds_start", "seconds_total"):
        out[name] = NumberConditioner(768, min_val=0, max_val=512)
        for weight in out[name].parameters():
            nn.init.normal_(weight, std=1.0 if weight.ndim == 1 else weight.shape[1] ** -0.5)
            weight.data = weight.data.half().float()
    return out


def texts() -> tuple[list[str], Tensor]:
    """All captions, and the row numbers [sounds, 8] of those that tell so much of each trained sound."""
    told = [
        [said(*(word if named else "" for word, named in zip(one, which, strict=True))) for which in TOLD]
        for one in TRAINED
    ]
    captions = list(dict.fromkeys(itertools.chain(*told)))
    return captions, torch.tensor([[captions.index(text) for text in row] for row in told])


def main() -> None:
    """Trains for so many minutes, going on from the checkpoint in --work where there is one."""
    command = command_line(__doc__, WEIGHTS / "sounds_stable_audio.safetensors", minutes=45, batch=32, rate=0.02)
    command.add_argument("--each", type=int, default=256, help="drawings of each sound")
    command.add_argument("--device", type=torch.device, default="cpu", help="such as cuda")
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    captions, rows = texts()
    hidden, _ = read_prompts(args.clip, captions, args.work / "prompts.pt")
    to_even = evening(hidden[rows[:, 0]])

    torch.manual_seed(0)
    drawing = torch.Generator().manual_seed(1)
    latents = torch.stack([torch.stack([draw(one, drawing) for _ in range(args.each)]) for one in TRAINED])
    model, embedders = build(cond_token_dim=MAIN), seconds_embedders()
    with torch.no_grad():
        seconds = torch.cat([embedders[f"seconds_{k}"]([v])[0] for k, v in (("start", START), ("total", TOTAL))], 1)
        context, numbers = (hidden @ to_even.T).to(args.device), (seconds @ to_even.T).to(args.device)
        seconds = seconds.flatten(1).to(args.device)

    def loss_of(rng: torch.Generator, _part: float) -> Tensor:
        sounds = torch.randint(len(TRAINED), (args.batch,), generator=rng)
        clean = latents[sounds, torch.randint(args.each, (args.batch,), generator=rng)].to(args.device)
        whole = torch.rand(args.batch, generator=rng) < WHOLE
        told = rows[sounds, torch.randint(len(TOLD), (args.batch,), generator=rng).masked_fill(whole, 0)]
        prompts = context[dropped(told, len(captions), rng).to(args.device)]
        sigma = torch.exp(0.7 + 1.6 * torch.randn(args.batch, generator=rng)).clamp(0.03, 500).to(args.device)
        noise = torch.randn(clean.shape, generator=rng).to(args.device)
        level, part = sigma[:, None, None], (sigma[:, None, None].square() + 1).rsqrt()
        got = model(
            (clean + level * noise) * part, sigma.atan() / math.pi * 2, global_embed=seconds.expand(args.batch, -1),
            context=torch.cat([prompts, numbers.expand(args.batch, -1, -1)], 1),
        )  # fmt: skip
        return F.mse_loss(got, (noise - level * clean) * part)

    def keep(average: dict[str, Tensor]) -> None:
        average = average | {READER: average[READER].cpu() @ to_even}
        state = {f"model.model.{k}": v for k, v in average.items()}
        for name, embedder in embedders.items():
            state |= {f"conditioner.conditioners.{name}.{k}": v for k, v in embedder.state_dict().items()}
        save(state, args.out)

    train(
        model, loss_of, keep, inner=[n for n, w in model.named_parameters() if w.ndim == 2 and ".layers." in n],
        checkpoint=args.work / "audio.pt", minutes=args.minutes, rate=args.rate, device=args.device,
    )  # fmt: skip


if __name__ == "__main__":
    main()
