"""A device that is not at hand, emulated: the layers of a denoiser take as long as a profile says, whatever is in them.

A layer computes as ever and then waits until its time is over. So many processes can be
under way at once on few cores, each with a device of its own. All else is real: ComfyUI, ranks, messages, schedules.

What is emulated is said by the environment variable LEAPFROG_EMULATED, which ranks inherit: the path of a profile (see
`simulate.py`), a colon, and how many times as long each layer is to take. Ranks get this module from `emulated_site`, a
folder with a sitecustomize.py, on their PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from profile_units import units_of

VARIABLE = "LEAPFROG_EMULATED"
TARGET = "comfy.model_base"


@dataclass(frozen=True)
class Pace:
    """How long a layer takes: ``seconds`` for as many ``rows`` as were profiled, ``one_row`` of that for a single one,
    and in between and beyond what lies on the line through both."""

    seconds: float
    rows: int
    one_row: float

    def of(self, rows: int) -> float:
        """Seconds for so many rows."""
        each = (1 - self.one_row) / (self.rows - 1) if self.rows > 1 else 1.0
        return self.seconds * (self.one_row + (rows - 1) * each)


@cache
def waiting(kind: type) -> type:
    """The class of a layer, with a forward that waits until the ``pace`` of the layer has passed."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = kind.forward(self, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        given = next(value for value in (*args, *kwargs.values()) if hasattr(value, "shape"))
        left = began + self.pace.of(given.shape[0]) - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return result

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def paces(denoiser: Any, profile: dict[str, Any], slower: float) -> Iterator[tuple[str, Pace]]:
    """Path and pace of every layer; what comes before the first one and behind the last has a module, too."""
    unet = hasattr(denoiser, "input_blocks")
    paths = [path for _, _, layers in units_of(denoiser) for path in layers]
    times = [layer["seconds"] for unit in profile["units"] for layer in unit["layers"]]
    paths += ["time_embed", "out"] if unet else ["img_in", "final_layer"]
    times += [profile["stem_seconds"], profile["head_seconds"]]
    one_row = profile["row_seconds"] / profile["whole_seconds"] if "row_seconds" in profile else 1.0
    for path, seconds in zip(paths, times, strict=True):
        yield path, Pace(slower * seconds, profile["rows"], one_row)


def emulate(denoiser: Any, profile: dict[str, Any], slower: float) -> None:
    """Give every layer of the denoiser its pace."""
    for path, pace in paces(denoiser, profile, slower):
        layer = denoiser.get_submodule(path)
        layer.__class__ = waiting(type(layer))
        layer.pace = pace


def emulate_all(model_base: ModuleType) -> None:
    """Emulate whatever denoiser this process makes from now on, if VARIABLE is set then."""
    base = model_base.BaseModel
    plain = base.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if said := os.environ.get(VARIABLE):
            path, _, slower = said.rpartition(":")
            emulate(self.diffusion_model, json.loads(Path(path).read_text()), float(slower))

    base.__init__ = __init__
