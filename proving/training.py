"""What the trainings of the denoisers share: prompts as the text encoder gives them, the loop, the files."""

from __future__ import annotations

import itertools
import math
import os
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from comfy_setup import WEIGHTS, parser
from grounds import load_clip
from muon import Muon

CPU = torch.device("cpu")
DROPPED = 0.1
"""Share of empty prompts."""
SAVED_S = 120.0
"""Between two checkpoints."""
MAIN = 64
"""Of the hidden states that a training sees through evening()."""


def command_line(description: str | None, out: Path, minutes: float, batch: int, rate: float) -> ArgumentParser:
    """The options that every training has."""
    command = parser(description)
    command.add_argument("--clip", type=Path, required=True, help="file that text_encoder.py wrote")
    command.add_argument("--out", type=Path, default=out)
    command.add_argument("--work", type=Path, required=True, help="folder for the cached data and the checkpoint")
    command.add_argument("--minutes", type=float, default=minutes)
    command.add_argument("--batch", type=int, default=batch)
    command.add_argument("--rate", type=float, default=rate, help="of Muon; Adam has an eighth")
    return command


def drawings_options(command: ArgumentParser, each: int, of: str) -> None:
    """The options of a training whose drawings go through the autoencoder."""
    command.add_argument("--vae", type=Path, default=WEIGHTS / "shapes_vae.safetensors")
    command.add_argument("--each", type=int, default=each, help=of)


@torch.no_grad()
def read_prompts(clip_file: Path, captions: Sequence[str], cache: Path) -> tuple[Tensor, Tensor]:
    """Hidden states [N + 1, 77, 768] and pooled states [N + 1, 768] of N captions and, last, of the empty prompt."""
    known = torch.load(cache) if cache.exists() else [None]
    if known[0] != list(captions):
        cache.parent.mkdir(parents=True, exist_ok=True)
        clip = load_clip(clip_file)
        prompts = [*captions, ""]
        states = [clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True) for prompt in prompts]
        known = [list(captions), *(torch.cat(part).clone() for part in zip(*states, strict=True))]
        torch.save(known, cache)
    return known[1], known[2]


def evening(hidden: Tensor) -> Tensor:
    """The map [directions, 768] that gives the main directions of hidden states [N, 77, 768] the variance one.

    The text encoder is not trained, and most of its variance says which token stands where.
    """
    states = hidden.flatten(0, 1)
    mean = states.mean(0)
    _, scale, directions = torch.linalg.svd(states - mean, full_matrices=False)
    scale = scale[:MAIN, None] / len(states) ** 0.5
    apart = torch.eye(len(mean)) - torch.outer(mean, mean) / mean.square().sum()
    return directions[:MAIN] / scale @ apart


def dropped(prompts: Tensor, empty: int, rng: torch.Generator) -> Tensor:
    """Row numbers of prompts [N], some of them replaced by that of the empty prompt."""
    return prompts.masked_fill(torch.rand(len(prompts), generator=rng) < DROPPED, empty)


def drawn(latents: Tensor, rows: Tensor, empty: int, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch at random: clean latents [count, ...] of latents [captions, each, ...], and row numbers of their prompts.

    ``rows`` [captions] has the row of each caption's prompt; some are replaced by ``empty``.
    """
    pick = torch.randint(len(rows), (count,), generator=rng)
    clean = latents[pick, torch.randint(latents.shape[1], (count,), generator=rng)]
    return clean, dropped(rows[pick], empty, rng)


def save(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes the fp16 file that a stock loader reads."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({k: v.detach().to(torch.float16).contiguous() for k, v in state.items()}, part, metadata)
    os.replace(part, path)


def train(
    model: nn.Module,
    loss_of: Callable[[torch.Generator, float], Tensor],
    keep: Callable[[dict[str, Tensor]], None],
    *,
    inner: Iterable[str],
    checkpoint: Path,
    minutes: float,
    rate: float,
    device: torch.device = CPU,
) -> None:
    """Trains for so many minutes in all, going on from the checkpoint where there is one.

    ``loss_of(rng, part)`` is the loss of one batch after that part of the time; ``keep`` is given the averaged weights
    whenever they are worth writing. ``inner`` names the weights that Muon takes, Adam has the rest.
    """
    names = set(inner)
    model.to(device)
    muon = [weight for name, weight in model.named_parameters() if name in names]
    adam = [weight for name, weight in model.named_parameters() if name not in names]
    optimisers = [(Muon(muon, decay=0.01), rate), (torch.optim.Adam(adam, betas=(0.9, 0.99)), rate / 8)]
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    done, before = 0, 0.0
    if checkpoint.exists():
        old = torch.load(checkpoint, map_location=CPU)  # where Adam counts its steps
        model.load_state_dict(old["model"])
        average, done, before = {k: v.to(device) for k, v in old["average"].items()}, old["step"], old["seconds"]
        for (optimiser, _), state in zip(optimisers, old["optimisers"], strict=True):
            optimiser.load_state_dict(state)
    rng = torch.Generator().manual_seed(done + 1)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def write(step: int, seconds: float) -> None:
        keep(average)
        states = [optimiser.state_dict() for optimiser, _ in optimisers]
        kept = {"model": model.state_dict(), "average": average, "step": step, "seconds": seconds, "optimisers": states}
        torch.save(kept, checkpoint)

    start = saved = time.monotonic()
    total, recent = minutes * 60, list[float]()
    for step in itertools.count(done + 1):
        spent = before + time.monotonic() - start
        if spent >= total:
            break
        loss = loss_of(rng, spent / total)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(adam, 1.0)
        falling = 0.01 + 0.99 * math.cos(spent / total * math.pi / 2) ** 2
        for optimiser, full in optimisers:
            optimiser.param_groups[0]["lr"] = full * min(1, step / 50) * falling
            optimiser.step()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - min(0.998, step / (step + 10)))
        recent.append(loss.item())
        if step % 50 == 0:
            print(f"step {step} {spent:.0f} s loss {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()
        if time.monotonic() - saved > SAVED_S:
            saved = time.monotonic()
            write(step, spent)
        done = step
    write(done, total)
    print(f"{done} steps", flush=True)
