"""Says what a clip of a moving shape shows.

Nothing in this judge is learned. What differs from the background is the shape: its middle over time is the direction,
its mean colour the colour, and the outline that overlaps it best in all frames the shape. A clip in which one of them
is not plain (no shape, two, a ragged one, a jump) is "unclear" in it, which is never right.

Usage: python proving/judge_moving.py    tests the judge on drawn and on spoiled clips
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comfy_setup import parser, prepare
from moving import ALL, DIRECTIONS, RADIUS, SIDE, STEP, Attributes, clips
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


def check(vae: Any) -> None:
    """Prints how often the judge is right on drawn clips, bare and through the autoencoder, and on spoiled ones."""
    wanted = [a for a in ALL for _ in range(2)]
    drawn = clips(wanted, 500)
    for name, shown in (("drawn", drawn), ("through the autoencoder", through(vae, drawn))):
        seen = judge(shown)
        right = sum(a == b for a, b in zip(wanted, seen, strict=True))
        print(f"{name}: {right} of {len(wanted)} = {right / len(wanted):.3f}")
    kinds, shown = spoiled(600)
    unclear = [UNCLEAR in seen for seen in judge(shown)]
    for kind in dict.fromkeys(kinds):
        said = [one for one, its in zip(unclear, kinds, strict=True) if its == kind]
        print(f"{kind}: {sum(said)} of {len(said)} unclear")


@torch.inference_mode()
def through(vae: Any, shown: Tensor) -> Tensor:
    """The clips, each frame encoded and decoded."""
    return vae.decode(vae.encode(shown.flatten(0, 1))).clamp(0, 1).unflatten(0, shown.shape[:2])


def main() -> None:
    """Tests the judge."""
    command = parser(__doc__)
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    from grounds import load_vae

    check(load_vae())


if __name__ == "__main__":
    main()
