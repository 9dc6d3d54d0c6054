"""Units: the smallest blocks of a denoiser that one rank can own, found on the model itself. Knows no ComfyUI import.

A unit list is data: which attributes hold the blocks, in the order in which the forward runs them. U-Nets add skip
tensors, each made by one unit and consumed by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import LeapfrogError


@dataclass(frozen=True)
class Unit:
    """``path`` is the attribute path in the denoiser, ``parameters`` the prefix of its weights' names.

    ``consumer`` is the index of the unit that consumes this unit's output besides the next one, None without a skip.
    """

    path: str
    consumer: int | None = None


@dataclass(frozen=True)
class Family:
    lists: tuple[str, ...]
    skips: bool = False


FAMILIES = {
    "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel": Family(
        ("input_blocks", "middle_block", "output_blocks"), skips=True
    ),
    "comfy.ldm.flux.model.Flux": Family(("double_blocks", "single_blocks")),
}


def family_of(denoiser: Any) -> Family:
    """Raises LeapfrogError unsupported_model for a class that has no entry."""
    for cls in type(denoiser).__mro__:
        family = FAMILIES.get(f"{cls.__module__}.{cls.__qualname__}")
        if family:
            return family
    raise LeapfrogError.of(
        "unsupported_model",
        f"Async UNet Split cannot cut a {type(denoiser).__name__} yet; it knows Stable Diffusion U-Nets and Flux.",
    )


def find_units(denoiser: Any) -> list[Unit]:
    """The units of a denoiser in the order of evaluation."""
    family = family_of(denoiser)
    paths: list[str] = []
    for name in family.lists:
        blocks = getattr(denoiser, name)
        if name == "middle_block":
            paths += [name] if blocks is not None else []
        else:
            paths += [f"{name}.{i}" for i in range(len(blocks))]
    skip_to: dict[int, int] = {}
    if family.skips:
        # the forward pops the newest skip first, so the last input block feeds the first output block
        made = len(denoiser.input_blocks)
        skip_to = {i: len(paths) - 1 - i for i in range(made)}
    return [Unit(path, skip_to.get(i)) for i, path in enumerate(paths)]


def needed_by(units: Sequence[Unit], bounds: Sequence[tuple[int, int]], rank: int) -> list[int]:
    """Units of earlier ranks whose outputs ``rank`` needs: the running state and the skips that it consumes."""
    first, last = bounds[rank]
    consumed = {
        i for i, unit in enumerate(units[:first]) if unit.consumer is not None and first <= unit.consumer <= last
    }
    return sorted(consumed | {first - 1} if first else consumed)


def owner_of(bounds: Sequence[tuple[int, int]], unit: int) -> int:
    """The rank whose component holds ``unit``."""
    return next(rank for rank, (first, last) in enumerate(bounds) if first <= unit <= last)
