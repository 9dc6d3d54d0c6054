"""ParaStep (arXiv 2505.14741, section 3), reuse-then-predict, for any sampler.

A sampler is taken as a sequence of evaluations of the denoiser. In a round several consecutive ones are evaluated at
once: the first at the sampler's true latent, the others at the latents that a copy of the sampler reaches on predicted
outputs. The fresh outputs are then given to the sampler in order, so that its history consists of fresh ones only.

Shapes: a latent ``x`` is ``[batch, ...]`` in the sampler's variables, ``x = signal + sigma * noise`` up to a scale.
What an evaluation gives is one or several denoised latents of the same shape (guided, unconditional). They are carried
from one latent to another in one of two spaces:

* slope: ``(x - denoised) / sigma``, which is dx/dsigma and the model's own output where it predicts noise or flow. What
  a deterministic sampler moves along is smooth in it.
* denoised: the prediction of the clean latent. Fresh noise of a stochastic sampler does not disturb it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .drift import distance

PREDICTORS = ("linear", "newest", "paper")
FORGET = 0.5
"""The share of a space's squared error that is carried over from one evaluation to the next."""
CLEARLY = 0.99
"""A space's squared error must be smaller than the other's by this factor: often both are the same but for rounding."""
APART = 0.5
"""Evaluations closer than this many steps tell nothing of the way between them."""

Outputs = tuple[torch.Tensor, ...]


def position(sigma: float, sigmas: Sequence[float]) -> float:
    """Where ``sigma`` lies in a schedule, falling or rising, in steps: between those of two steps, a fraction."""
    if sigmas[0] < sigmas[-1]:
        sigma, sigmas = -sigma, [-other for other in sigmas]
    for i, (here, there) in enumerate(pairwise(sigmas)):
        if sigma >= there:
            return i if sigma >= here or here == there else i + (here - sigma) / (here - there)
    return len(sigmas) - 1


def slope(x: torch.Tensor, denoised: torch.Tensor, sigma: float) -> torch.Tensor:
    return (x - denoised) / sigma if sigma else torch.zeros_like(x)


@dataclass
class _Known:
    """An evaluation's outputs at step ``at``, in both spaces."""

    at: float
    slopes: Outputs
    denoised: Outputs

    def of(self, space: str) -> Outputs:
        return self.slopes if space == "slope" else self.denoised


class Predictor:
    """Remembers fresh outputs and says what an evaluation to come will probably give.

    kind "linear": two outputs, ``spacing`` steps apart, continued linearly in step index. "newest": the newest output.
    "paper": lane r repeats what lane r computed last. Those two reuse slopes, as published; "linear" uses the space in
    which it has lately foretold better.
    """

    def __init__(self, kind: str = "linear", spacing: int = 1):
        self.kind = kind
        self.spacing = spacing
        self._known: dict[int, _Known] = {}
        self._by_lane: dict[int, _Known] = {}
        self._rejected: dict[int, _Known] = {}
        self._errors = {"slope": 0.0, "denoised": 0.0}

    @property
    def space(self) -> str:
        """The space in which outputs are carried over now."""
        return "denoised" if self._errors["denoised"] < CLEARLY * self._errors["slope"] else "slope"

    def add(self, index: int, at: float, x: torch.Tensor, sigma: float, outputs: Outputs, lane: int) -> None:
        """The fresh ``outputs`` of evaluation ``index``, at latent ``x`` and step ``at``, were given to the sampler."""
        new = self._entry(at, x, sigma, outputs)
        self._rejected = {i: one for i, one in self._rejected.items() if i > index}
        if self.kind == "linear" and self._known:
            for space in self._errors:
                guess = self._continued(at, space, list(self._known.values()))[0]
                off = torch.linalg.vector_norm(guess - new.of(space)[0]) * (sigma if space == "slope" else 1.0)
                self._errors[space] = FORGET * self._errors[space] + float(off) ** 2
        self._known[index] = self._by_lane[lane] = new
        for old in [i for i, one in self._known.items() if one.at < at - self.spacing - 2 * APART or i < index - 8]:
            del self._known[old]

    def reject(self, index: int, at: float, x: torch.Tensor, sigma: float, outputs: Outputs) -> None:
        """The outputs of evaluation ``index``, at a latent that drifted too far, are good enough for a prediction."""
        self._rejected[index] = self._entry(at, x, sigma, outputs)

    def forget(self) -> None:
        """What was known tells nothing of what comes."""
        self._known.clear()
        self._by_lane.clear()
        self._rejected.clear()

    def guess(self, index: int, at: float, x: torch.Tensor, sigma: float, lane: int) -> Outputs:
        """What evaluation ``index`` at latent ``x`` and step ``at`` will give. Something must be known."""
        if self.kind == "linear":
            if index in self._rejected:
                found = self._rejected[index].of(self.space)
            else:
                found = self._continued(at, self.space, [*self._known.values(), *self._rejected.values()])
            return carried(found, x, sigma) if self.space == "slope" else found
        newest = self._known[max(self._known)]
        reused = self._by_lane.get(lane, newest) if self.kind == "paper" else newest
        return carried(reused.slopes, x, sigma)

    def transfer(self, outputs: Outputs, point: torch.Tensor, x: torch.Tensor) -> Outputs:
        """Outputs found at ``point``, for the latent ``x`` with the same sigma."""
        if point is x or (self.kind == "linear" and self.space == "denoised"):
            return outputs
        return tuple(denoised + (x - point) for denoised in outputs)

    def _continued(self, at: float, space: str, known: list[_Known]) -> Outputs:
        newest = max(known, key=lambda one: one.at)
        earlier = [one for one in known if one.at <= newest.at - APART]
        if not earlier:
            return newest.of(space)
        older = min(earlier, key=lambda one: (abs(newest.at - one.at - self.spacing), one.at))
        share = (at - newest.at) / (newest.at - older.at)
        pairs = zip(newest.of(space), older.of(space), strict=True)
        return tuple(torch.lerp(new, old, -share) for new, old in pairs)

    @staticmethod
    def _entry(at: float, x: torch.Tensor, sigma: float, outputs: Outputs) -> _Known:
        return _Known(at, tuple(slope(x, denoised, sigma) for denoised in outputs), outputs)


def carried(slopes: Outputs, x: torch.Tensor, sigma: float) -> Outputs:
    """The denoised latents that ``slopes`` mean at ``x``."""
    return tuple(x - one * sigma for one in slopes)


class Guard:
    """How many evaluations a round has, and which of them are accepted.

    An evaluation is accepted while the latent at which it was made is within ``bound`` of the true one (relative, the
    worst sample of the batch). A round that is accepted whole lets the next one grow by one lane, if that lane would
    have been accepted, too: its latent is predicted and compared, not evaluated. A round that is cut lets the next
    one shrink to what was accepted. So the run starts with single steps for as long as predictions are poor.
    ``eager``: every round has all lanes all the same, to improve rejected ones. Within an infinite bound is everything.
    ``last_alone``: the run's last evaluation is a round of its own. As published it is not, but to end on a predicted
    latent costs up to 15 dB. ``accepted`` is the largest drift that a finite bound has let pass.
    """

    def __init__(
        self, lanes: int, warmup: int = 0, bound: float = math.inf, eager: bool = False, last_alone: bool = True
    ):
        """Raises ValueError for values out of range."""
        if lanes < 1 or warmup < 0 or not bound >= 0:
            raise ValueError(f"no such guard: {lanes=}, {warmup=}, {bound=}")
        self._lanes = lanes
        self._warmup = warmup
        self._bound = bound
        self._grown = lanes if math.isinf(bound) or eager else 1
        self._eager = eager
        self.last_alone = last_alone
        self.accepted = 0.0

    def length(self, index: int) -> int:
        """Evaluations in a round that begins with evaluation ``index``."""
        return 1 if index < max(1, self._warmup) else self._grown

    def accepts(self, point: torch.Tensor, x: torch.Tensor) -> bool:
        """Whether an evaluation at ``point`` may stand for one at ``x``."""
        if math.isinf(self._bound):
            return True
        drift = distance(point, x)
        if drift <= self._bound:
            self.accepted = max(self.accepted, drift)
        return drift <= self._bound

    def shrink(self, accepted: int) -> None:
        """A round of more than ``accepted`` evaluations had only the first of them accepted."""
        if not self._eager:
            self._grown = max(1, accepted)

    def spare(self, lane: int, point: torch.Tensor, x: torch.Tensor) -> None:
        """A round was accepted whole; ``point`` was predicted for one more ``lane``, whose true latent is ``x``."""
        if not self._eager and lane < self._lanes and distance(point, x) <= self._bound:
            self._grown = max(self._grown, lane + 1)


def row_shares(calls: Sequence[tuple[int, int]], ranks: int) -> list[dict[int, tuple[int, int]]]:
    """Who evaluates what: for each call of ``(rows, group)`` the rows ``[begin, end)`` of each rank that has some.

    All calls' rows are dealt as one sequence, consecutive and as even as groups of rows that stay together allow. With
    rows ordered evaluation by evaluation, and conditioning by conditioning in each, two ranks get one of two
    evaluations each, or the unconditional and the conditional half of a single one (CFG lanes): one rule for both.
    """
    sizes = [rows // group for rows, group in calls]
    total, shares, before = sum(sizes), [], 0
    for size, (_, group) in zip(sizes, calls, strict=True):
        own = {}
        for rank in range(ranks):
            begin, end = (min(size, max(0, total * r // ranks - before)) for r in (rank, rank + 1))
            if begin < end:
                own[rank] = (begin * group, end * group)
        shares.append(own)
        before += size
    return shares
