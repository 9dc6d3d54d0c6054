"""Units: the smallest blocks of a denoiser that one rank can own, found on the model itself. Knows no ComfyUI import.

Candidates are the entries of the outermost ModuleLists and ModuleDicts that hold a good part of the weights. In which
order they run, which earlier units each of them reads and what it returns is observed, not listed: see
``worker/models/trace.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from .errors import LeapfrogError

# Of a denoiser's weights, what a list must hold to be worth cutting.
WORTH_CUTTING = 0.01
LISTS = ("ModuleList", "ModuleDict")
# A Stable Diffusion U-Net keeps its middle block outside the lists.
BLOCKS = ("TimestepEmbedSequential",)


class Output(msgspec.Struct, frozen=True):
    """What a unit returns: a tree spec (``tensors.py``), and the dtype and shape of each of its tensors."""

    spec: Any
    tensors: list[tuple[str, tuple[int, ...]]]


class Flow(msgspec.Struct, frozen=True):
    """How values go from unit to unit for one layout of the inputs.

    ``reads[u]`` are the earlier units whose outputs unit ``u`` reads, ``head`` those that the part after the last unit
    reads. ``outputs[u]`` is None for a unit that does not run in this layout.
    """

    reads: list[list[int]]
    head: list[int]
    outputs: list[Output | None]


def find_units(denoiser: Any) -> list[str]:
    """Attribute paths of the units, in the order of definition.

    Raises LeapfrogError unsupported_model for a denoiser without a list of blocks.
    """
    worth = WORTH_CUTTING * _size(denoiser)
    paths = list(_walk(denoiser, "", worth))
    if len(paths) < 2:
        raise LeapfrogError.of(
            "unsupported_model", f"Async UNet Split cannot cut a {type(denoiser).__name__}: it has no list of blocks."
        )
    return paths


def _walk(module: Any, prefix: str, worth: float):
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        kind = type(child).__name__
        if kind in BLOCKS:
            yield path
        elif kind in LISTS:
            if _size(child) >= worth:
                yield from (f"{path}.{entry}" for entry, _ in child.named_children())
        else:
            yield from _walk(child, f"{path}.", worth)


def _size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def needed_by(flow: Flow, bounds: Sequence[tuple[int, int]], position: int) -> list[int]:
    """Units of earlier components whose outputs the component at ``position`` reads."""
    first, last = bounds[position]
    read = {u for unit in range(first, last + 1) for u in flow.reads[unit]}
    if last == len(flow.reads) - 1:
        read.update(flow.head)
    return sorted(u for u in read if u < first)


def owner_of(bounds: Sequence[tuple[int, int]], unit: int) -> int:
    """The position of the component that holds ``unit``."""
    return next(position for position, (first, last) in enumerate(bounds) if first <= unit <= last)


def crossing_bytes(flow: Flow, bounds: Sequence[tuple[int, int]], nbytes: Sequence[int]) -> list[int]:
    """Bytes that each component sends per evaluation; ``nbytes[u]`` is the size of unit ``u``'s output."""
    sent = [0] * len(bounds)
    for position in range(len(bounds)):
        for unit in needed_by(flow, bounds, position):
            sent[owner_of(bounds, unit)] += nbytes[unit]
    return sent
