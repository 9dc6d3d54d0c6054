"""A copy of a sampler that goes ahead of the true one to find out where it will evaluate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .coroutine import Coroutine, pause

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Question:
    """Where a sampler wants an evaluation: latent ``[batch, ...]``, sigma (a value per sample), other arguments."""

    x: torch.Tensor
    sigma: torch.Tensor
    args: dict[str, Any]

    @property
    def level(self) -> float:
        return self._level

    @cached_property
    def _level(self) -> float:
        return float(self.sigma.flatten()[0])


class Scout:
    """Runs ``sampler(ask)`` from its beginning with the given ``answers``, and then from evaluation to evaluation.

    ``question`` is where it wants its next evaluation, None once it has ended. ``answered`` counts the evaluations
    behind it. What it draws from torch's global generators are the numbers that the true run draws, and nobody else
    notices that it draws them.
    """

    def __init__(self, sampler: Callable[[Callable[..., Outputs]], Any], noise: NoiseState, answers: Sequence[Outputs]):
        self.question: Question | None = None
        self.answered = 0
        self._answers = list(answers)
        self._noise = copy.copy(noise)
        with self._noise.entered():
            self._coroutine = Coroutine(lambda: sampler(self._ask), "leapfrog scout")
        self._look()

    def answer(self, outputs: Outputs) -> None:
        """Let the sampler go on with these outputs, to its next evaluation or its end."""
        self._answers.append(outputs)
        with self._noise.entered():
            self._coroutine.resume()
        self._look()

    def drop(self) -> None:
        """End it."""
        self._coroutine.drop()
        self._answers.clear()

    def _look(self) -> None:
        self.question = self._coroutine.pending
        if self._coroutine.ended:
            self._coroutine.result()  # raises what the sampler raised

    def _ask(self, question: Question) -> Outputs:
        if self.answered == len(self._answers):
            pause(Question(question.x.clone(), question.sigma, question.args))
        self.answered += 1
        return self._answers[self.answered - 1]


class NoiseState:
    """torch's global generators as they are now, and then as those who entered have left them."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        outside = NoiseState()
        self._restore()
        try:
            yield
        finally:
            inside = NoiseState()
            self._cpu, self._cuda = inside._cpu, inside._cuda
            outside._restore()

    def _restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
