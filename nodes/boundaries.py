"""Where the conditioning of a run changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

Conds = Mapping[str, Sequence[Mapping[str, Any]]]


def conditioning_at(conds: Conds, sigma: float) -> tuple[int, ...]:
    """Which of the prompts and ControlNets of ``conds`` are active at this sigma, and how many keyframes of their hooks
    have begun."""
    found: list[int] = []
    now = torch.tensor(sigma)  # ComfyUI compares in the precision of its sigmas
    for cond in _each(conds):
        found.append(bool(cond.get("timestep_end", now) <= now <= cond.get("timestep_start", now)))
        control = cond.get("control")
        while control is not None:
            if control.timestep_range is not None:
                start, end = control.timestep_range
                found.append(bool(end <= now <= start))
            control = control.previous_controlnet
        for keyframes in _keyframes(cond):
            found.append(sum(bool(frame.start_t >= now) for frame in keyframes.keyframes))
    return tuple(found)


def rewind(conds: Conds) -> None:
    """Let the keyframes of hooks, which ComfyUI only ever moves on, begin again."""
    for cond in _each(conds):
        for keyframes in _keyframes(cond):
            keyframes.reset()


def _each(conds: Conds) -> Iterator[Mapping[str, Any]]:
    return (cond for several in conds.values() for cond in several or ())


def _keyframes(cond: Mapping[str, Any]) -> list[Any]:
    hooks = cond.get("hooks")
    return [hook.hook_keyframe for hook in hooks.hooks] if hooks else []
