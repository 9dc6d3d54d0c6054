"""Says what a picture of a drawn shape shows.

The judge is a small convolutional network trained on drawings: clean, noisy, blurred and through the autoencoder.
Pictures of no shape, of two, and of half-melted ones are taught as "unclear", which is never right.

Usage: python proving/judge_shapes.py    trains it (minutes), writes weights/judge.safetensors
"""

from __future__ import annotations

import itertools
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comfy_setup import WEIGHTS, parser, prepare
from shapes import ALL, PICTURE, SHAPES, SIZES, VOCABULARY, Attributes, distance, draw

UNCLEAR = "unclear"
CLEAN = 0.86  # outline() of a drawing is 0.91 or more, and 0.84 or less for the outline of another shape
CLASSES = (*(len(names) for names in VOCABULARY), 2)  # shape, colour, size, place, whether unclear


class Judge(nn.Module):
    """Pictures [N, 3, 128, 128] in 0..1 to logits [N, 19]: shape, colour, size, place, clear or not."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 32, 48, 64, 64)
        self.layers = nn.Sequential()
        for i, (old, new) in enumerate(itertools.pairwise(widths)):
            self.layers.append(nn.Conv2d(old, new, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1))
            self.layers.append(nn.GroupNorm(8, new))
            self.layers.append(nn.SiLU())
        self.last = nn.Linear(widths[-1] * 16, sum(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layers(images * 2 - 1).flatten(1))


def load(path: Path = WEIGHTS / "judge.safetensors") -> Judge:
    """The trained judge."""
    from safetensors.torch import load_file

    model = Judge()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()


@torch.no_grad()
def judge(images: Tensor, model: Judge | None = None) -> list[Attributes]:
    """What each of the pictures [N, 3, 128, 128] (or ComfyUI's [N, 128, 128, 3]) in 0..1 shows."""
    model = load() if model is None else model
    if images.shape[1] != 3:
        images = images.movedim(-1, 1)
    picks = [part.argmax(1).tolist() for part in model(images.float()).split(CLASSES, 1)]
    out = []
    for *labels, unclear in zip(*picks, strict=True):
        names = [names[label] for names, label in zip(VOCABULARY, labels, strict=True)]
        out.append(Attributes(UNCLEAR if unclear else names[0], *names[1:]))
    return out


def outline(image: Tensor, attributes: Attributes) -> float:
    """How well a picture [3, 128, 128] fits the named shape: overlap / union with the best placed ideal outline.

    A second opinion that is not learned: the judge forgives ragged edges, this does not.
    """
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    change = (image - border.median(1).values[:, None, None]).square().sum(0).sqrt()
    inside = (change > change.flatten().topk(100).values.mean() / 2).float()
    down, across = inside.nonzero().float().T + 0.5
    middle = [(v.min() + v.max()) / 2 for v in (across, down)]
    axis = torch.arange(PICTURE, dtype=torch.float32) + 0.5
    moves = torch.arange(-4.0, 5.0)
    x = axis - middle[0] - moves[:, None, None, None]
    y = axis[:, None] - middle[1] - moves[:, None, None]
    best = 0.0
    for factor in torch.linspace(0.8, 1.2, 9):
        ideal = (0.5 - distance(attributes.shape, x, y, SIZES[attributes.size] * factor)).clamp(0, 1)
        both = torch.minimum(ideal, inside).sum((-2, -1)) / torch.maximum(ideal, inside).sum((-2, -1))
        best = max(best, float(both.max()))
    return best


def spoiled(rng: torch.Generator) -> Tensor:
    """A picture [3, 128, 128] that shows no shape of the vocabulary properly."""
    kind = int(torch.randint(4, (), generator=rng))
    first, second = (ALL[int(i)] for i in torch.randint(len(ALL), (2,), generator=rng))
    axis = torch.arange(PICTURE, dtype=torch.float32) + 0.5
    where = 32 + 64 * torch.rand(2, generator=rng)
    x, y = axis[None] - where[0], axis[:, None] - where[1]
    picture, other = draw(first, rng), draw(second, rng)
    if kind == 0:  # a blob: smooth noise, cut at a level, near some point
        noise = F.interpolate(torch.randn(1, 1, 16, 16, generator=rng), PICTURE, mode="bicubic")[0, 0]
        reach = 12 + 20 * float(torch.rand((), generator=rng))
        inside = (4 * (noise + 1.2 - (x * x + y * y).sqrt() / reach)).clamp(0, 1)
    elif kind == 1:  # two different shapes in one picture, else nothing
        if first[:2] != second[:2] and first.place != second.place:
            return torch.where((picture - picture[:, :1, :1]).abs().amax(0) > 0.1, picture, other)
        inside = torch.zeros(PICTURE, PICTURE)
    elif kind == 2:  # between two shapes
        shapes = [SHAPES[int(i)] for i in torch.randperm(len(SHAPES), generator=rng)[:2]]
        radius = torch.tensor(12 + 16 * float(torch.rand((), generator=rng)))
        inside = (0.5 - sum(distance(shape, x, y, radius) for shape in shapes) / 2).clamp(0, 1)
    else:  # nothing at all
        inside = torch.zeros(PICTURE, PICTURE)
    colour = draw(second, rng).flatten(1)
    paint = colour[:, (colour - colour[:, :1]).abs().sum(0).argmax()]
    back = picture[:, :1, :1]
    return back + (paint[:, None, None] - back) * inside


def examples(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, 128, 128] and their labels [count, 5]; a sixth is unclear."""
    images, labels = [], []
    for i in range(count):
        if i % 6 == 0:
            images.append(spoiled(rng))
            labels.append((-1, -1, -1, -1, 1))
        else:
            attributes = ALL[int(torch.randint(len(ALL), (), generator=rng))]
            images.append(draw(attributes, rng))
            labels.append((*attributes.labels, 0))
    return torch.stack(images), torch.tensor(labels)


def roughen(images: Tensor, rng: torch.Generator) -> Tensor:
    """The pictures with some noise, some blur and some change of brightness, each of them by chance."""
    size = len(images)
    chance = torch.rand(4, size, 1, 1, 1, generator=rng)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, (2 * chance[0] - 1).clamp(0, 1))
    images = images + 0.06 * (2 * chance[1] - 1).clamp(0, 1) * torch.randn(images.shape, generator=rng)
    return (images + 0.06 * (chance[2] - 0.5)).clamp(0, 1)


def train(args: Namespace) -> None:
    """Trains on drawings, of which a part went through the autoencoder, and writes the weights."""
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(5)
    vae = TAESD(latent_channels=16)
    vae.load_state_dict(load_file(args.vae))
    vae = vae.float().to(memory_format=torch.channels_last)
    images, labels = examples(args.pictures, rng)
    with torch.no_grad():
        for part in torch.arange(args.pictures // 6).split(8):  # examples() has no order but the unclear ones
            latents = vae.taesd_encoder(images[part])
            strength = 0.15 * torch.rand(len(part), 1, 1, 1, generator=rng)
            noise = strength * torch.randn(latents.shape, generator=rng)
            images[part] = vae.taesd_decoder(latents + noise).clamp(0, 1)
    check, check_labels = examples(480, rng)
    model = Judge()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    start, step = time.monotonic(), 0
    while (spent := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * max(0.01, 1 - spent)
        pick = torch.randint(len(images), (48,), generator=rng)
        logits = model(roughen(images[pick], rng)).split(CLASSES, 1)
        pairs = zip(logits, labels[pick].T, strict=True)
        loss = torch.stack([F.cross_entropy(part, want, ignore_index=-1) for part, want in pairs]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} {spent:.2f} loss {loss.item():.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        picks = torch.stack([part.argmax(1) for part in model(check).split(CLASSES, 1)], 1)
    right = (picks == check_labels) | (check_labels < 0)
    clear = check_labels[:, 4] == 0
    for kind, rows in (("clear", clear), ("unclear", ~clear)):
        print(f"{kind} pictures: {right[rows].all(1).float().mean():.4f} right")
    print("each:", [round(v, 4) for v in right.float().mean(0).tolist()])
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, args.weights)


def main() -> None:
    """Trains."""
    command = parser(__doc__)
    command.add_argument("--weights", type=Path, default=WEIGHTS / "judge.safetensors")
    command.add_argument("--vae", type=Path, default=WEIGHTS / "shapes_vae.safetensors")
    command.add_argument("--minutes", type=float, default=3, help="training time")
    command.add_argument("--pictures", type=int, default=3000, help="training pictures")
    args = command.parse_args()
    prepare(args.comfyui, args.threads)
    train(args)


if __name__ == "__main__":
    main()
