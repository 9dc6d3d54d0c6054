"""Where the conditioning of a run changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def conditioning_at(conds: Mapping[str, Sequence[Mapping[str, Any]]], sigma: float) -> tuple[bool, ...]:
    """Which of the prompts and ControlNets of ``conds`` are active at this sigma."""
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
