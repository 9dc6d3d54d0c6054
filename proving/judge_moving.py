"""Says what a clip shows, and scores the video model with it.

Nothing in this judge is learned. What differs from the background is the shape: its middle over time is the direction,
its mean colour the colour, and the outline that overlaps it best in all frames the shape. A clip in which one of them
is not plain (no shape, two, a ragged one, a jump) is "unclear" in it, which is never right.

Usage: python proving/judge_moving.py                          tests the judge on drawn and on spoiled clips
       python proving/judge_moving.py --clip CLIP.safetensors  samples held-out captions through ComfyUI, scores them
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comfy_setup import WEIGHTS, parser, prepare
from moving import ALL, DIRECTIONS, FRAMES, HELD_OUT, RADIUS, SIDE, STEP, TRAINED, Attributes, clips
from shapes import COLOURS, SHAPES, distance

UNCLEAR = "unclear"
SEEN = 0.25  # of the difference between black and white: what differs by less is background
PIXELS = 60  # a smaller thing is no shape
FIT = 0.74  # overlap / union with the ideal outline, in the worst frame
OFF_COLOUR = 0.22  # distance in RGB
OFF_PATH = 2.5  # pixels from the steady motion, in the worst frame


def outlines() -> Tensor:
    """Ideal shapes [4, candidates, 33, 33] around the middle of their box: several sizes, moved by up to 3 pixels."""
    axis = torch.arange(-16.0, 17.0)
    moves = torch.arange(-3.0, 4.0)
    x = axis - moves[:, None, None, None]
    y = axis[:, None] - moves[:, None, None]
    sizes = RADIUS * torch.linspace(0.8, 1.2, 7)
    each = [torch.stack([(0.5 - distance(shape, x, y, size)).clamp(0, 1) for size in sizes]) for shape in SHAPES]
    return torch.stack(each).flatten(1, 3)


def fits(inside: Tensor, ideal: Tensor) -> Tensor:
    """Overlap / union of a mask [64, 64] with the best placed outline of each of the four shapes: [4]."""
    down, across = inside.nonzero().T
    top, left = ((v.min() + v.max() + 1) // 2 for v in (down, across))
    room = F.pad(inside, (16, 16, 16, 16))
    near = room[top : top + 33, left : left + 33]
    outside = inside.sum() - near.sum()
    both = torch.minimum(ideal, near).sum((-2, -1)) / (torch.maximum(ideal, near).sum((-2, -1)) + outside)
    return both.amax(1)


def judge(clips: Tensor) -> list[Attributes]:
    """What each of the clips [N, frames, 64, 64, 3] in 0..1 shows."""
    ideal = outlines()
    return [_one(clip.float(), ideal) for clip in clips]


def _one(clip: Tensor, ideal: Tensor) -> Attributes:
    back = clip.flatten(0, 2).median(0).values
    change = (clip - back).square().sum(-1).sqrt()  # [frames, 64, 64]
    top = change.flatten(1).topk(PIXELS).values.mean(1)
    if top.min() < SEEN:
        return Attributes(UNCLEAR, UNCLEAR, UNCLEAR)
    inside = (change > top[:, None, None] / 2).float()

    overlap = torch.stack([fits(one, ideal) for one in inside])
    best = int(overlap.mean(0).argmax())
    shape = SHAPES[best] if overlap[:, best].min() >= FIT else UNCLEAR

    core = change > 0.8 * top[:, None, None]
    means = torch.stack([frame[mask].mean(0) for frame, mask in zip(clip, core, strict=True)])
    away = (means[:, None] - torch.tensor(list(COLOURS.values()))).norm(dim=-1)
    nearest = int(away.mean(0).argmin())
    colour = tuple(COLOURS)[nearest] if away[:, nearest].max() <= OFF_COLOUR else UNCLEAR

    axis = torch.arange(SIDE, dtype=torch.float32)
    mass = inside.sum((1, 2))
    middle = torch.stack([(inside.sum(1) * axis).sum(1), (inside.sum(2) * axis).sum(1)], 1) / mass[:, None]
    when = torch.arange(len(clip)) - (len(clip) - 1) / 2
    speed = (when[:, None] * middle).sum(0) / when.square().sum()
    off = (middle - middle.mean(0) - when[:, None] * speed).norm(dim=1).max()
    along = torch.tensor(list(DIRECTIONS.values())) * STEP
    miss = (along - speed).norm(dim=1)
    steady = off <= OFF_PATH and miss.min() <= STEP / 2
    return Attributes(shape, colour, tuple(DIRECTIONS)[int(miss.argmin())] if steady else UNCLEAR)


def spoiled(seed: int) -> tuple[list[str], Tensor]:
    """Clips [36, 6, 64, 64, 3] that no caption describes, and what is wrong with each."""
    drawn, other = clips(ALL[::8], seed), clips([*ALL[52::8], *ALL[4:52:8]], seed + 1)
    still = drawn[:, :1].expand_as(drawn)
    jump = drawn[:, [0, 4, 1, 3, 2, 5]]
    morph = torch.cat([drawn[:, :3], other[:, 3:]], 1)
    kinds = {"still": still, "jumping": jump, "changing": morph}
    return [kind for kind in kinds for _ in drawn], torch.cat(list(kinds.values()))


def check(args: Namespace) -> None:
    """Prints how often the judge is right on drawn clips, bare and through the autoencoder, and on spoiled ones."""
    wanted = [a for a in ALL for _ in range(2)]
    drawn = clips(wanted, 500)
    for name, shown in (("drawn", drawn), ("through the autoencoder", through(args, drawn))):
        seen = judge(shown)
        right = sum(a == b for a, b in zip(wanted, seen, strict=True))
        print(f"{name}: {right} of {len(wanted)} = {right / len(wanted):.3f}")
    kinds, shown = spoiled(600)
    unclear = [UNCLEAR in seen for seen in judge(shown)]
    for kind in dict.fromkeys(kinds):
        said = [one for one, its in zip(unclear, kinds, strict=True) if its == kind]
        print(f"{kind}: {sum(said)} of {len(said)} unclear")


@torch.inference_mode()
def through(args: Namespace, shown: Tensor) -> Tensor:
    """The clips, each frame encoded and decoded."""
    vae = load_vae(args.vae)
    return vae.decode(vae.encode(shown.flatten(0, 1))).clamp(0, 1).unflatten(0, shown.shape[:2])


def load_vae(path: Path) -> Any:
    """The image autoencoder from ComfyUI's own loader."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def load_clip(path: Path) -> Any:
    """The text encoder from ComfyUI's own loader."""
    import comfy.sd

    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


@torch.inference_mode()
def latents(
    model: Any, clip: Any, captions: Sequence[str], seeds: Sequence[int],
    steps: int = 20, cfg: float = 3.5, sampler: str = "euler", scheduler: str = "simple",
) -> Tensor:  # fmt: skip
    """Latents [captions x seeds, 16, 6, 8, 8] through ComfyUI's own sampling code; all seeds of a caption at once."""
    import comfy.sample

    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    empty = torch.zeros(1, 16, FRAMES, SIDE // 8, SIDE // 8)
    noise = torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])
    out = []
    for caption in captions:
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
        out.append(
            comfy.sample.sample(
                model, noise, steps, cfg, sampler, scheduler, positive, negative, torch.zeros_like(noise),
                disable_pbar=True, seed=seeds[0],
            )
        )  # fmt: skip
    return torch.cat(out)


@torch.inference_mode()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Clips [N, T, height, width, 3] in 0..1 of latents [N, 16, T, h, w]: the image autoencoder decodes each frame."""
    return vae.decode(latents.movedim(2, 1).flatten(0, 1)).clamp(0, 1).unflatten(0, (len(latents), -1))


def sheet(shown: Tensor, path: Path) -> None:
    """Writes the clips [N, T, 64, 64, 3] to a PNG, two clips to a row."""
    from PIL import Image

    grid = F.pad(shown, (0, 0, 1, 1, 1, 1)).movedim(1, 2).flatten(2, 3)  # [N, height, T x width, 3]
    grid = F.pad(grid, (0, 0, 0, 0, 0, 0, 0, len(grid) % 2))
    grid = grid.unflatten(0, (-1, 2)).movedim(1, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((grid * 255).round().byte().numpy()).save(path)


def score(args: Namespace) -> None:
    """Samples, judges, prints the score and writes a contact sheet."""
    import comfy.sd

    wanted = TRAINED[::7] if args.trained else HELD_OUT
    seeds = list(range(args.seed, args.seed + args.each))
    model, clip = comfy.sd.load_diffusion_model(str(args.model)), load_clip(args.clip)
    start = time.monotonic()
    made = latents(
        model, clip, [a.caption for a in wanted], seeds, args.steps, args.cfg, args.sampler, args.scheduler
    )  # fmt: skip
    seconds = time.monotonic() - start
    shown = decode(load_vae(args.vae), made)
    seen, asked = judge(shown), [a for a in wanted for _ in seeds]
    for i, name in enumerate(Attributes._fields):
        print(f"{name}: {sum(a[i] == b[i] for a, b in zip(asked, seen, strict=True)) / len(asked):.3f}")
    for a, b in zip(asked, seen, strict=True):
        if a != b:
            print(f"  asked {a.caption!r}, saw {b.caption!r}")
    right = sum(a == b for a, b in zip(asked, seen, strict=True))
    print(f"all three right: {right} of {len(asked)} = {right / len(asked):.3f}, {seconds:.0f} s")
    sheet(shown, args.sheet)


def main() -> None:
    """Tests the judge or scores the model."""
    command = parser(__doc__)
    command.add_argument("--vae", type=Path, default=WEIGHTS / "shapes_vae.safetensors")
    command.add_argument("--model", type=Path, default=WEIGHTS / "moving_wan.safetensors")
    command.add_argument("--clip", type=Path, help="file that text_encoder.py wrote")
    command.add_argument("--each", type=int, default=4, help="seeds for each of the 12 captions")
    command.add_argument("--seed", type=int, default=100, help="first seed")
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--cfg", type=float, default=3.5)
    command.add_argument("--sampler", default="euler")
    command.add_argument("--scheduler", default="simple")
    command.add_argument("--trained", action="store_true", help="captions of the training set instead of held-out ones")
    command.add_argument("--sheet", type=Path, default=Path("sheet.png"), help="contact sheet to write")
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    if args.clip is None:
        check(args)
    else:
        score(args)


if __name__ == "__main__":
    main()
