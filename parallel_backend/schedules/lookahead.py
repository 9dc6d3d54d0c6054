"""Lookahead: a pipeline of components fed with predicted latents, so that every evaluation is a consistent one.

With N components, the wave for step i + N - 1 enters the pipeline when step i begins, before the evaluations of steps i
to i + N - 2 are known. It is the whole evaluation (latent, timestep, everything) at the latent PREDICTED for that step;
N - 1 steps later its output is used with the step's true latent. This is ParaStep's reuse-then-predict (arXiv
2505.14741) with the memory cost of AsyncDiff (arXiv 2406.06911).

A prediction goes on from the true latent in Euler steps along slopes that are extrapolated linearly in step index, so
it needs no knowledge of the sampler. There are two kinds of slopes to extrapolate:

* paths: (x after - x before) / (sigma after - sigma before) of past steps, whatever made x go that way. Exact where a
  mask keeps a part of the picture.
* outputs: (x - denoised) / sigma, the model's own. Samplers of third and fourth order (UniPC, LMS, DEIS) amplify what
  is rough in the outputs several times over, so their paths are rougher, and predicted from those the run goes astray.

For Euler's method both are the same. The kind is used that has lately foretold the next path better.

The schedule is right for samplers that evaluate the model once per step, at the latents that they pass through. Fresh
noise cannot be predicted: there the guard makes every step exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from .drift import distance

SPACING = 2
BOUND = 0.02
FORGET = 0.5
"""The share of a kind's squared error that is carried over from one step to the next."""


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


@dataclass
class _Slopes:
    """The newest slopes of one kind, ``spacing`` + 1 of them, and how badly they have foretold paths lately."""

    spacing: int
    known: deque[torch.Tensor] = field(init=False)
    error: float = 0.0

    def __post_init__(self) -> None:
        self.known = deque(maxlen=self.spacing + 1)

    def integrate(self, lengths: Sequence[float]) -> torch.Tensor:
        """Where the coming steps of these ``lengths`` lead to, relative to the latent from which they start."""
        newest, gap = self.known[-1], len(self.known) - 1
        way = newest * sum(lengths)
        if gap:
            way += (newest - self.known[0]) * (sum(length * t for t, length in enumerate(lengths, 1)) / gap)
        return way


class Lookahead:
    """Decides step by step for one run; keeps ``depth + 2 * spacing + 4`` latents at most.

    The first ``warmup`` steps are exact; in any case the first two, because a prediction needs a slope, and the last
    one, because ending on a predicted latent is visible. After an exact step the whole pipeline is filled again. A step
    whose wave was evaluated at a latent that drifted by more than ``bound`` is exact. With ``warmup`` 0 nothing but
    that guard decides how long the run stays exact at its start: a wave that is thrown away cost no time, because the
    components would have had nothing else to do.
    """

    def __init__(
        self, sigmas: Sequence[float], depth: int, warmup: int = 0, bound: float = BOUND, spacing: int = SPACING
    ):
        """``sigmas`` has one entry more than there are steps; ``depth`` is the number of waves in flight, N - 1.

        ``spacing`` is how many steps lie between the two slopes that are extrapolated. Raises ValueError for values out
        of range.
        """
        if len(sigmas) < 2 or depth < 1 or warmup < 0 or spacing < 1 or not bound >= 0:
            raise ValueError(f"no such schedule: {len(sigmas)} sigmas, {depth=}, {warmup=}, {bound=}, {spacing=}")
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._depth = depth
        self._warmup = warmup
        self._bound = bound
        self._paths = _Slopes(spacing)
        self._outputs = _Slopes(spacing)
        self._in_flight: dict[int, torch.Tensor] = {}
        self._next = 0
        self._x: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

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
        self._arrive(i, x)
        point = self._in_flight.pop(i, None)
        drift = math.inf if point is None else distance(point, x)
        exact = point is None or not drift <= self._bound  # NaN is not within it either
        if exact:
            self._in_flight.clear()
        ahead = []
        if self._paths.known and self._next >= self._warmup:
            last = min(i + self._depth, self.steps - 2)
            ahead = [(step, self._predict(i, step)) for step in range(i + 1, last + 1) if step not in self._in_flight]
            self._in_flight.update(ahead)
        return Decision(exact, ahead, drift)

    def evaluated(self, denoised: torch.Tensor) -> None:
        """The denoised latent that the sampler is given for the step of the last ``step``.

        Optional: without it predictions rest on the paths alone. Call it after every step or after none.
        """
        if self._x is None:
            raise ValueError("nothing can have been evaluated before the first step")
        self._output = (self._x - denoised) / self._sigmas[self._next - 1]

    def _arrive(self, i: int, x: torch.Tensor) -> None:
        if self._x is not None:
            length = self._sigmas[i] - self._sigmas[i - 1]
            if length:
                path = (x - self._x) / length
                if self._paths.known and self._outputs.known:
                    for slopes in (self._paths, self._outputs):
                        slopes.error = FORGET * slopes.error + distance(slopes.integrate([1.0]), path) ** 2
                self._paths.known.append(path)
            elif self._paths.known:  # a schedule that repeats a sigma
                self._paths.known.append(self._paths.known[-1])
            if self._output is not None:
                self._outputs.known.append(self._output)
        self._x = x.clone()  # samplers may go on in place

    def _predict(self, i: int, step: int) -> torch.Tensor:
        assert self._x is not None
        better = self._outputs if self._outputs.known and self._outputs.error < self._paths.error else self._paths
        return self._x + better.integrate([self._sigmas[j + 1] - self._sigmas[j] for j in range(i, step)])


def ideal_speedup(exact: Iterable[bool], slowest: float) -> float:
    """Speed against one device of a run, given ``Decision.exact`` of its steps.

    An exact step takes one evaluation, a step served from the pipeline the slowest component's share of one.
    """
    costs = [1.0 if one else slowest for one in exact]
    return len(costs) / sum(costs)
