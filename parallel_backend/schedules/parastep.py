"""ParaStep (arXiv 2505.14741, section 3): rounds of steps evaluated at once, from latents on reused predictions.

Shapes: ``x`` and every prediction are latents ``[batch, ...]``; ``d`` is the derivative dx/dsigma, which is the model's
own output for noise-predicting and flow-matching models. All functions are the mathematics only: evaluating the model
is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


def rounds(steps: int, lanes: int, warmup: int) -> list[tuple[int, int]]:
    """``(first step, length)`` of all rounds: ``warmup`` single steps, rounds of up to ``lanes``, the last step alone.

    The last step starts from a latent that was never predicted: ending on a predicted one costs up to 15 dB.
    """
    plan = [(i, 1) for i in range(min(warmup, steps))]
    at = len(plan)
    while at < steps - 1:
        length = min(lanes, steps - 1 - at)
        plan.append((at, length))
        at += length
    if at < steps:
        plan.append((at, 1))
    return plan


def ideal_speedup(steps: int, lanes: int, warmup: int) -> float:
    """Speed against one device when a round costs one evaluation: the paper's w + ceil((n - w) / p) of them."""
    exact = min(warmup, steps)
    return steps / (exact + math.ceil((steps - exact) / lanes))


def euler_step(x: torch.Tensor, d: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """One step of Euler's method, which is also DDIM with eta 0 (arXiv 2010.02502) in these variables."""
    return x + d * (sigma_next - sigma)


@dataclass
class Predictor:
    """Remembers fresh predictions and guesses the one a lane has not computed yet.

    kind "paper": lane r repeats what lane r computed last. "newest": every lane repeats the newest. "linear": two fresh
    predictions, ``spacing`` steps apart, extrapolated in step index.
    """

    kind: str
    lanes: int
    by_step: dict[int, torch.Tensor] = field(default_factory=dict)
    by_lane: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def spacing(self) -> int:
        return 2 if self.lanes >= 4 else 1

    def add(self, step: int, lane: int, d: torch.Tensor) -> None:
        self.by_step[step] = d
        self.by_lane[lane] = d
        self.by_step.pop(step - self.spacing - 1, None)

    def guess(self, lane: int, step: int) -> torch.Tensor:
        """The prediction that ``lane`` uses to advance over ``step``. At least one prediction must have been added."""
        newest = max(self.by_step)
        if self.kind == "paper":
            return self.by_lane.get(lane, self.by_step[newest])
        older = self.by_step.get(newest - self.spacing)
        if self.kind == "newest" or older is None:
            return self.by_step[newest]
        slope = (self.by_step[newest] - older) / self.spacing
        return self.by_step[newest] + slope * (step - newest)


def lane_points(
    x: torch.Tensor, sigmas: torch.Tensor, start: int, length: int, predictor: Predictor
) -> list[torch.Tensor]:
    """The latents at which the lanes of a round evaluate: lane r is r steps past ``x`` on guessed predictions."""
    points = [x]
    for lane in range(1, length):
        point = x
        for step in range(start, start + lane):
            point = euler_step(point, predictor.guess(lane, step), sigmas[step], sigmas[step + 1])
        points.append(point)
    return points


def sample_in_rounds(
    evaluate: Callable[[list[torch.Tensor], int], list[torch.Tensor]],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    lanes: int,
    warmup: int,
    predictor: str = "linear",
    on_step: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda step, x, denoised: None,
) -> torch.Tensor:
    """Euler's method (and DDIM) in rounds of ``lanes`` steps. Returns the last latent.

    ``x`` is ``[batch, ...]`` at ``sigmas[0]``; ``sigmas`` has one entry more than there are steps.
    ``evaluate(points, first)`` gives the denoised latents of ``points``, which belong to steps ``first``, ``first + 1``
    and so on; all of a round's evaluations are in one call. ``on_step(step, x, denoised)`` is called after every step's
    evaluation, in order, with the latent before the step.
    """
    known = Predictor(predictor, lanes)
    for start, length in rounds(len(sigmas) - 1, lanes, warmup):
        points = lane_points(x, sigmas, start, length, known)
        for lane, (point, denoised) in enumerate(zip(points, evaluate(points, start), strict=True)):
            step = start + lane
            d = (point - denoised) / sigmas[step]
            known.add(step, lane, d)
            on_step(step, x, denoised)
            x = euler_step(x, d, sigmas[step], sigmas[step + 1])
    return x


def row_shares(rows: int, group: int, ranks: int) -> Sequence[tuple[int, int]]:
    """``[begin, end)`` of the rows for each rank: consecutive, as even as groups of ``group`` rows allow, maybe empty.

    With rows ordered conditioning by conditioning, two ranks get the unconditional and the conditional half: CFG lanes
    come out of the same rule.
    """
    if rows % group:
        raise ValueError(f"{rows} rows are not groups of {group}")
    groups = rows // group
    return [(groups * r // ranks * group, groups * (r + 1) // ranks * group) for r in range(ranks)]
