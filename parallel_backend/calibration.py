"""How much a model's picture changes for the drift that is accepted: measured once by short runs, and remembered.

A guard bounds what goes into an evaluation: how far its latent may be from the true one. What comes out in the end, the
relative difference of the finished latent, is taken to grow in proportion, by a factor that depends on the model and
the sampler. That factor is the sensitivity. With it a fidelity means about the same difference for every model.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .protocol import Recipe
from .schedules.drift import distance
from .schedules.parastep import Guard, Predictor

log = logging.getLogger("leapfrog")
LANES = 4
BOUNDS = (0.012, 0.048)
TELLING = 0.25
"""A run whose largest accepted drift is a smaller share of the bound tells nothing."""
USUAL = 0.085
"""Euler's sensitivity on the small Flux of this project, for which the bounds of the fidelities were chosen."""

# Makes the finished latent of a short run, by a schedule; None: one evaluation at a time.
ShortRun = Callable[[tuple[Guard, Predictor] | None], torch.Tensor]


def measure(short: ShortRun) -> float:
    """The sensitivity: relative difference of the finished latent, divided by the bound; the mean of several bounds."""
    true = short(None)
    found = []
    for bound in BOUNDS:
        guard = Guard(LANES, 0, bound)
        off = distance(short((guard, Predictor("linear", spacing=2))), true)
        if 0 < off < math.inf and guard.accepted > TELLING * bound:
            found.append(math.log(off / bound))
    return math.exp(sum(found) / len(found)) if found else USUAL


class Calibration:
    """The sensitivities in the file ``path`` (JSON), one for each model file and sampler."""

    def __init__(self, path: Path):
        self._path = path

    def sensitivity(self, recipe: Recipe, sampler: str, short: ShortRun, tell: Callable[[str], None]) -> float:
        """What is remembered, or measured now, which ``tell`` says. An unreadable file counts as empty."""
        key = f"{Path(recipe.path).name} {recipe.stamp[0]} {recipe.stamp[1]} {sampler}"
        known = self._read().get(key)
        if isinstance(known, float) and 0 < known < math.inf:
            return known
        tell("ParaStep: calibrating, three short runs; only this time")
        found = measure(short)
        self._write({**self._read(), key: found})
        log.info("Leapfrog: an accepted drift of 1 %% changes the picture by %.3f %% (%s)", found, sampler)
        return found

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self, known: dict[str, Any]) -> None:
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
            new.replace(self._path)
        except OSError as error:
            log.warning("Leapfrog: the calibration could not be kept in %s: %s", self._path.name, error.strerror)
