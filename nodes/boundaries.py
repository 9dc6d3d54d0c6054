"""Where the conditioning of a run changes. ComfyUI decides once per call what is active: no call may cross a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any


def runs_of_one_conditioning(conds: Mapping[str, Sequence[Mapping[str, Any]]], sigmas: Sequence[float]) -> list[int]:
    """Lengths of the runs of ``sigmas`` for which the same prompts and ControlNets of ``conds`` are active."""
    return [len(list(run)) for _, run in groupby(sigmas, key=lambda sigma: _active(conds, sigma))]


def _active(conds: Mapping[str, Sequence[Mapping[str, Any]]], sigma: float) -> tuple[bool, ...]:
    found = []
    for cond in (one for several in conds.values() for one in several or ()):
        found.append(cond.get("timestep_end", sigma) <= sigma <= cond.get("timestep_start", sigma))
        control = cond.get("control")
        while control is not None:
            if control.timestep_range is not None:
                start, end = control.timestep_range
                found.append(end <= sigma <= start)
            control = control.previous_controlnet
    return tuple(found)
