"""Trains the tiny Wan 2.1 on drawn clips: flow matching in the latents of shapes_vae, each frame by itself.

Everything that the model sees is what ComfyUI's nodes give it: 1000 times sigma as the timestep, velocity = noise -
latent as the target, latents after the shift and the scale of Wan's latent format, the 77 hidden states of the text
encoder, the empty prompt for classifier-free guidance. The training sees the hidden states through a linear map that
evens their main directions out, and the file has this map multiplied into the layer that reads them.
Usage: python proving/train_wan.py --clip CLIP.safetensors --work WORK [--comfyui DIR] [--minutes 45]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfy_setup import WEIGHTS, prepare
from moving import ALL, DIRECTIONS, FRAMES, SIDE, TRAINED, look, path
from shapes import BACKGROUNDS
from training import MAIN, command_line, drawings_options, drawn, evening, read_prompts, save, train

CONFIG: dict[str, Any] = {
    "dim": 128, "ffn_dim": 384, "num_heads": 2, "num_layers": 8, "freq_dim": 256, "text_dim": 768,
    "in_dim": 16, "out_dim": 16, "model_type": "t2v", "patch_size": (1, 2, 2), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
STATED = ("text_dim", "freq_dim", "num_heads")  # what ComfyUI cannot read off the weights
GATE = 0.3  # how far each block is open at first
CELL = 8  # pixels
CELLS = SIDE // CELL
READER = "text_embedding.0.weight"  # of the hidden states


def build(**changed: Any) -> nn.Module:
    """ComfyUI's Wan with initial weights: Xavier, and zero for everything that modulates or ends the network."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    model = WanModel(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **CONFIG | changed)
    for name, weight in model.named_parameters():
        if name.endswith("modulation"):
            nn.init.zeros_(weight)
            if name.startswith("blocks"):
                nn.init.constant_(weight[:, 2::3], GATE)
        elif "norm" in name and name.endswith("weight"):
            nn.init.ones_(weight)
        elif weight.ndim == 1 or name.startswith(("head.", "time_projection.")):
            nn.init.zeros_(weight)
        else:
            nn.init.xavier_uniform_(weight.data.flatten(1))
    return model


def shifted(change: Tensor, right: int, down: int) -> Tensor:
    """The latent [16, 8, 8] moved by whole cells, with zero where it came from."""
    room = F.pad(change, (CELLS, CELLS, CELLS, CELLS))
    return room[:, CELLS - down : 2 * CELLS - down, CELLS - right : 2 * CELLS - right]


@torch.no_grad()
def read_latents(vae_file: Path, each: int, cache: Path) -> Tensor:
    """Latents [84, each, 16, 6, 8, 8] of clips of the trained captions, as the model sees them.

    The encoder is the costly part, so it sees each shape at a few places near the middle only: the others are whole
    cells away, and their latents are the background's plus the moved difference that the shape makes.
    """
    if not cache.exists():
        from comfy.latent_formats import Wan21
        from comfy.taesd.taesd import TAESD
        from safetensors.torch import load_file

        vae = TAESD(latent_channels=16)
        vae.load_state_dict(load_file(vae_file))
        vae = vae.float().to(memory_format=torch.channels_last)
        flat = vae.encode(torch.tensor(BACKGROUNDS)[:, None, None, None].expand(-1, 3, SIDE, SIDE) * 2 - 1)
        rng = torch.Generator().manual_seed(11)
        out = torch.empty(len(TRAINED), each, 16, FRAMES, CELLS, CELLS)
        for shape, colour in sorted({a[:2] for a in TRAINED}):
            looks = [look(shape, colour, rng) for _ in range(each)]
            levels = flat[[one.level for one in looks]]
            change = {
                near: vae.encode(torch.stack([one.frame(*near) for one in looks]) * 2 - 1) - levels
                for near in {place[1] for direction in DIRECTIONS for place in placed(direction)}
            }
            for i, attributes in enumerate(TRAINED):
                if attributes[:2] == (shape, colour):
                    for frame, (cells, near) in enumerate(placed(attributes.direction)):
                        for j in range(each):
                            out[i, j, :, frame] = levels[j] + shifted(change[near][j], *cells)
        torch.save(torch.stack([Wan21().process_in(one) for one in out]), cache)
    return torch.load(cache)


def placed(direction: str) -> list[tuple[tuple[int, int], tuple[float, float]]]:
    """The path, each place as whole cells and the pixels that are left over."""
    out = []
    for place in path(direction):
        cells = tuple(round(way / CELL) for way in place)
        out.append((cells, tuple(way - CELL * cell for way, cell in zip(place, cells, strict=True))))
    return out


def main() -> None:
    """Trains for so many minutes, going on from the checkpoint in --work where there is one."""
    command = command_line(__doc__, WEIGHTS / "moving_wan.safetensors", minutes=45, batch=16, rate=0.015)
    drawings_options(command, 30, "clips per trained caption")
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    import comfy.model_management

    hidden, _ = read_prompts(args.clip, [a.caption for a in ALL], args.work / "prompts.pt")
    latents = read_latents(args.vae, args.each, args.work / "latents.pt")
    print(f"latents: mean {latents.mean():.3f} std {latents.std():.3f}", flush=True)
    rows = torch.tensor([ALL.index(a) for a in TRAINED])
    to_even = evening(hidden[rows])
    context = hidden @ to_even.T

    comfy.model_management.in_training = True  # the differentiable rotary embedding
    torch.manual_seed(0)
    model = build(text_dim=MAIN)

    def loss_of(rng: torch.Generator, _part: float) -> Tensor:
        clean, prompt = drawn(latents, rows, len(ALL), args.batch, rng)
        sigma = torch.sigmoid(1.4 + 1.5 * torch.randn(args.batch, generator=rng))
        noise = torch.randn(clean.shape, generator=rng)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None, None])
        return F.mse_loss(model(noisy, 1000 * sigma, context[prompt]), noise - clean)

    metadata = {"config": json.dumps({"transformer": {key: CONFIG[key] for key in STATED}})}

    def keep(average: dict[str, Tensor]) -> None:
        save(average | {READER: average[READER] @ to_even}, args.out, metadata)

    train(
        model, loss_of, keep,
        inner=[n for n, w in model.named_parameters() if w.ndim == 2 and n.startswith("blocks.")],
        checkpoint=args.work / "wan.pt", minutes=args.minutes, rate=args.rate,
    )  # fmt: skip


if __name__ == "__main__":
    main()
