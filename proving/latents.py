"""The drawings as a denoiser sees them: latents of shapes_vae."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shapes import BACKGROUNDS, PLACES, TRAINED, Attributes, draw

CROP, SIDE = 12, 16  # latent cells a side: of the drawings that are encoded, and of a picture
CELL = 8  # pixels


def paste(base: Tensor, change: Tensor, across: int, down: int) -> Tensor:
    """Adds change [C, 12, 12], moved by whole cells from the centre, to base [C, 16, 16]."""
    room = F.pad(change, (SIDE, SIDE, SIDE, SIDE))
    start = (SIDE - CROP) // 2
    top, left = SIDE - start - down, SIDE - start - across
    return base + room[:, top : top + SIDE, left : left + SIDE]


@torch.no_grad()
def read_latents(vae_file: Path, each: int, cache: Path) -> Tensor:
    """Latents [216, each, 16, 16, 16] of drawings of the trained captions, as the model sees them.

    The encoder is the costly part, so it sees each shape in the middle only: the other places are whole cells away, and
    their latents are the background's plus the moved difference that the shape makes.
    """
    if not cache.exists():
        from comfy.taesd.taesd import TAESD
        from safetensors.torch import load_file

        vae = TAESD(latent_channels=16)
        vae.load_state_dict(load_file(vae_file))
        encoder = vae.float().taesd_encoder.to(memory_format=torch.channels_last)
        rng = torch.Generator().manual_seed(11)
        flat = torch.tensor(BACKGROUNDS)[:, None, None, None].expand(-1, 3, -1, -1)
        small, full = (encoder(flat.repeat(1, 1, side * CELL, side * CELL)) for side in (CROP, SIDE))
        middle: dict[tuple[str, ...], list[tuple[int, Tensor]]] = {}
        for kind in sorted({a[:3] for a in TRAINED}):
            levels = torch.randint(len(BACKGROUNDS), (each,), generator=rng).tolist()
            side = CROP * CELL
            centre = (side / 2, side / 2)
            drawn = [draw(Attributes(*kind, ""), rng, side, centre, BACKGROUNDS[level]) for level in levels]
            middle[kind] = list(zip(levels, encoder(torch.stack(drawn)) - small[levels], strict=True))
        out = torch.empty(len(TRAINED), each, 16, SIDE, SIDE)
        for i, attributes in enumerate(TRAINED):
            across, down = (offset // CELL for offset in PLACES[attributes.place])
            for j, (level, change) in enumerate(middle[attributes[:3]]):
                out[i, j] = paste(full[level], change, across, down)
        torch.save(out, cache)
    return torch.load(cache)
