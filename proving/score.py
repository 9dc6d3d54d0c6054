"""How often a proving model makes what it is asked: samples held-out captions through ComfyUI and judges them.

python proving/score.py flux --clip CLIP.safetensors [--each 5] [--steps 20] [--sheet sheet.png]
"""

from __future__ import annotations

import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comfy_setup import parser, prepare
from grounds import GROUNDS, Prompts, sample
from judge_shapes import CLEAN, outline
from sounds import write_wav


def sheet(pictures: Tensor, columns: int, path: Path) -> None:
    """Writes pictures [N, height, width, channels] in 0..1 in rows to a PNG."""
    from PIL import Image

    tiles = F.pad(pictures.movedim(-1, 1), (1, 1, 1, 1), value=0.5)
    tiles = torch.cat([tiles, tiles.new_zeros(-len(tiles) % columns, *tiles.shape[1:])])
    grid = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((grid.expand(-1, -1, 3) * 255).round().byte().cpu().numpy()).save(path)


def tell(asked: Sequence[Any], seen: Sequence[Any]) -> None:
    """Prints how often each attribute is right, every sample that is not as asked, and how many are."""
    for i, name in enumerate(type(asked[0])._fields):
        print(f"{name}: {sum(a[i] == b[i] for a, b in zip(asked, seen, strict=True)) / len(asked):.3f}")
    for a, b in zip(asked, seen, strict=True):
        if a != b:
            print(f"  asked {a.caption!r}, made {b.caption!r}")
    right = sum(a == b for a, b in zip(asked, seen, strict=True))
    print(f"as asked: {right} of {len(asked)} = {right / len(asked):.3f}")


def tell_outlines(pictures: Tensor, asked: Sequence[Any]) -> None:
    """Prints how well the shapes fit their ideal outlines, a second opinion on drawn shapes that is not learned."""
    fits = torch.tensor([outline(image.movedim(-1, 0), a) for image, a in zip(pictures, asked, strict=True)])
    clean = (fits >= CLEAN).float().mean()
    print(f"outline: mean {fits.mean():.3f}, lowest {fits.min():.3f}, at least {CLEAN}: {clean:.3f}")


def main() -> None:
    """Samples, judges, prints the score and writes a contact sheet."""
    command = parser(__doc__)
    command.formatter_class = RawDescriptionHelpFormatter
    command.add_argument("name", choices=sorted(GROUNDS))
    command.add_argument("--model", type=Path, help="its file, unless the one in weights/")
    command.add_argument("--clip", type=Path, required=True, help="file that text_encoder.py wrote")
    command.add_argument("--each", type=int, default=5, help="seeds for each caption")
    command.add_argument("--seed", type=int, default=100, help="first seed")
    command.add_argument("--steps", type=int, help="unless the model's own number")
    command.add_argument("--trained", type=int, help="so many captions of the training set instead of held-out ones")
    command.add_argument("--sheet", type=Path, default=Path("sheet.png"), help="contact sheet to write")
    command.add_argument("--wavs", type=Path, help="folder for the sounds of the audio model")
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    ground = GROUNDS[args.name](args.model) if args.model else GROUNDS[args.name]()
    wanted = ground.trained[:: len(ground.trained) // args.trained][: args.trained] if args.trained else ground.asked
    seeds = range(args.seed, args.seed + args.each)
    settings = replace(ground.settings, steps=args.steps) if args.steps else ground.settings
    start = time.monotonic()
    made = sample(ground.model, ground.latent, settings, Prompts(args.clip), [a.caption for a in wanted], seeds)
    print(f"{len(made)} samples, {time.monotonic() - start:.0f} s")
    decoded = ground.decode(made)
    pictures = ground.pictures(decoded)
    asked = [a for a in wanted for _ in seeds]
    tell(asked, ground.judge(decoded))
    if args.name in ("flux", "unet"):
        tell_outlines(pictures, asked)
    sheet(pictures, 2 * args.each, args.sheet)
    if args.wavs:
        args.wavs.mkdir(parents=True, exist_ok=True)
        for i, (a, sound) in enumerate(zip(asked, decoded, strict=True)):
            write_wav(sound, args.wavs / f"{a.caption.replace(' ', '_')}_{seeds[i % len(seeds)]}.wav")


if __name__ == "__main__":
    main()
