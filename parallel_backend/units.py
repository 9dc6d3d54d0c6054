"""Units: the smallest blocks of a denoiser that one rank can own, found on the model itself. Knows no ComfyUI import.

Candidates are the entries of the outermost ModuleLists and ModuleDicts that hold a good part of the weights; in a
Stable Diffusion U-Net, where those are few and uneven, the layers in them, and in SDXL the blocks of its deep
transformers. In which order they run, which earlier units each of them reads and what it returns is observed, not
listed: see ``worker/models/trace.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from .errors import LeapfrogError
from .tensors import DtypeName, Shape

# Of a denoiser's weights, what a list must hold to be worth cutting.
WORTH_CUTTING = 0.01
LISTS = ("ModuleList", "ModuleDict")
# A block of a Stable Diffusion U-Net: layers that its forward calls one by one.
LAYERED = "TimestepEmbedSequential"


class Output(msgspec.Struct, frozen=True):
    """What a unit returns: a tree spec (``tensors.py``), and the dtype and shape of each of its tensors.

    ``orders`` are the dimensions of each tensor as they lie in memory, the outermost first. Sums depend on it: only
    with the same order do later units compute the same to the last bit.
    """

    spec: Any
    tensors: list[tuple[DtypeName, Shape]]
    orders: list[tuple[int, ...]] = []

    def __post_init__(self) -> None:
        if any(sorted(order) != [*range(len(order))] for order in self.orders):
            raise ValueError("an order of dimensions names each of them once")


class Flow(msgspec.Struct, frozen=True):
    """How values go from unit to unit for one layout of the inputs.

    ``reads[u]`` are the earlier units whose outputs unit ``u`` reads, ``head`` those that the part after the last unit
    reads. ``outputs[u]`` is None for a unit that does not run in this layout.
    """

    reads: list[list[int]]
    head: list[int]
    outputs: list[Output | None]

    def __post_init__(self) -> None:
        named = {unit for read in (*self.reads, self.head) for unit in read}
        if len(self.outputs) != len(self.reads) or not named <= set(range(len(self.reads))):
            raise ValueError("a flow is between its own units")


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
        if kind == LAYERED:
            yield from _layers(child, path)
        elif kind in LISTS:
            if _size(child) >= worth:
                yield from _entries(child, path)
        else:
            yield from _walk(child, f"{path}.", worth)


def _entries(blocks: Any, prefix: str):
    for name, block in blocks.named_children():
        path, kind = f"{prefix}.{name}", type(block).__name__
        if kind in LISTS:  # of the levels of a U-Net (Stable Cascade)
            yield from _entries(block, path)
        else:
            yield from _layers(block, path) if kind == LAYERED else [path]


def _layers(block: Any, prefix: str):
    for name, layer in block.named_children():
        deep = getattr(layer, "transformer_blocks", ())
        inner = [f".transformer_blocks.{i}" for i in range(len(deep))] if len(deep) > 1 else [""]
        yield from (f"{prefix}.{name}{path}" for path in inner)


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
