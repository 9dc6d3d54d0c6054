"""Lookahead: a pipeline of components fed with predicted latents, so that every evaluation is a consistent one.

With N components, the wave for step i + N - 1 enters the pipeline when step i begins, before the evaluations of steps i
to i + N - 2 are known. It is the whole evaluation (latent, timestep, everything) at the latent PREDICTED for that step;
N - 1 steps later its output is used with the step's true latent. This is ParaStep's reuse-then-predict (arXiv
2505.14741) with the memory cost of AsyncDiff (arXiv 2406.06911).

The prediction needs no knowledge of the sampler. The slope of a step, (x after - x before) / (sigma after - sigma
before), is Euler's method's model output; in other methods it also holds their corrections. Slopes are extrapolated
linearly in step index, and Euler steps along them lead to the predicted latent. So the schedule is right for samplers
that evaluate the model once per step, at the latents that they pass through; fresh noise cannot be predicted, and then
the guard makes every step exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Decision:
    """What to do for one step.

    exact: evaluate the step at its true latent and throw away all waves in flight; otherwise the step is served by the
    wave that was sent for it. ahead: ``(step, predicted latent)`` of the waves to send now, in order, behind the exact
    evaluation if there is one. drift: the largest relative distance, over the samples of the batch, between the latent
    at which the step's wave was evaluated and the true one; infinite if there was no wave.
    """

    exact: bool
    ahead: list[tuple[int, torch.Tensor]]
    drift: float


class Lookahead:
    """Decides step by step for one run; keeps ``depth + spacing + 2`` latents at most.

    The first ``warmup`` steps are exact, and in any case the first two, because a prediction needs a slope, and the
    last one, because ending on a predicted latent is visible. After an exact step the whole pipeline is filled again.
    A step whose wave was evaluated at a latent that drifted by more than ``bound`` is exact. With ``warmup`` 0 nothing
    but that guard decides how long the run stays exact at its start: a wave that is thrown away cost no time, because
    the components would have had nothing else to do.
    """

    def __init__(
        self, sigmas: Sequence[float], depth: int, warmup: int = 0, bound: float = math.inf, spacing: int | None = None
    ):
        """``sigmas`` has one entry more than there are steps; ``depth`` is the number of waves in flight, N - 1.

        ``spacing`` is how many steps lie between the two slopes that are extrapolated: None for 1, and for 2 where
        ``depth`` is 3 or more. Raises ValueError for values out of range.
        """
        spacing = (1 if depth < 3 else 2) if spacing is None else spacing
        if len(sigmas) < 2 or depth < 1 or warmup < 0 or spacing < 1 or not bound >= 0:
            raise ValueError(f"no such schedule: {len(sigmas)} sigmas, {depth=}, {warmup=}, {bound=}, {spacing=}")
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._depth = depth
        self._warmup = warmup
        self._bound = bound
        self._slopes: deque[torch.Tensor] = deque(maxlen=spacing + 1)
        self._in_flight: dict[int, torch.Tensor] = {}
        self._next = 0
        self._x: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self._sigmas) - 1

    def step(self, i: int, x: torch.Tensor) -> Decision:
        """To be called for every step in order, before its evaluation, with the true latent ``x`` of ``[batch, ...]``.

        Raises ValueError for a step that is not the next one.
        """
        if i != self._next or i >= self.steps:
            raise ValueError(f"step {i} came where step {self._next} of {self.steps} was expected")
        self._next += 1
        self._learn(i, x)
        point = self._in_flight.pop(i, None)
        drift = math.inf if point is None else _distance(point, x)
        exact = point is None or not drift <= self._bound  # NaN is not within it either
        if exact:
            self._in_flight.clear()
        ahead = []
        if self._slopes and self._next >= self._warmup:
            last = min(i + self._depth, self.steps - 2)
            ahead = [(step, self._predict(i, step)) for step in range(i + 1, last + 1) if step not in self._in_flight]
            self._in_flight.update(ahead)
        return Decision(exact, ahead, drift)

    def _learn(self, i: int, x: torch.Tensor) -> None:
        if self._x is not None:
            apart = self._sigmas[i] - self._sigmas[i - 1]
            if apart:
                self._slopes.append((x - self._x) / apart)
            elif self._slopes:  # a schedule that repeats a sigma
                self._slopes.append(self._slopes[-1])
        self._x = x.clone()  # samplers may go on in place

    def _predict(self, i: int, step: int) -> torch.Tensor:
        assert self._x is not None
        newest, gap = self._slopes[-1], len(self._slopes) - 1
        lengths = [self._sigmas[j + 1] - self._sigmas[j] for j in range(i, step)]
        point = self._x + newest * sum(lengths)
        if gap:
            bend = sum(length * ahead for ahead, length in enumerate(lengths, 1)) / gap
            point += (newest - self._slopes[0]) * bend
        return point


def _distance(point: torch.Tensor, x: torch.Tensor) -> float:
    dtype = torch.promote_types(x.dtype, torch.float32)
    off, size = (torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=dtype) for v in (point - x, x))
    return float((off / size.clamp_min(torch.finfo(torch.float32).tiny)).max())


def ideal_speedup(exact: Iterable[bool], slowest: float) -> float:
    """Speed against one device of a run, given ``Decision.exact`` of its steps.

    An exact step takes one evaluation, a step served from the pipeline the slowest component's share of one.
    """
    costs = [1.0 if one else slowest for one in exact]
    return len(costs) / sum(costs)
