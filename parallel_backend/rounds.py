"""The engine of both nodes: any sampler, with several of its evaluations under way at once. Knows none by name.

A sampler is something that asks for evaluations, one after another. The true one is answered with fresh outputs only.
To know where it will ask next, a scout is used: a copy of it that is answered with what the true one was given and,
from there on, with predictions. A sampler that keeps history, draws noise or evaluates twice a step needs no special
care, because its scout does the same. One that does not repeat itself is found out, because the scout must stand
exactly where the true one stands; it goes step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .errors import LeapfrogError
from .schedules.parastep import Guard, Outputs, Predictor, position


class Question(Protocol):
    """Where a sampler wants an evaluation: the latent ``[batch, ...]`` and its sigma."""

    @property
    def x(self) -> torch.Tensor: ...
    @property
    def level(self) -> float: ...


class Evaluation(Protocol):
    """An evaluation under way. ``finish`` waits for what it gives; after ``drop`` nobody asks."""

    def finish(self) -> Outputs: ...
    def drop(self) -> None: ...


class Scout(Protocol):
    """A copy of the sampler. ``question`` is what it waits for, None at its end; ``answered`` counts what is behind."""

    @property
    def question(self) -> Question | None: ...
    @property
    def answered(self) -> int: ...
    def answer(self, outputs: Outputs) -> None: ...
    def drop(self) -> None: ...


@dataclass
class _UnderWay:
    index: int
    lane: int
    question: Question
    evaluation: Any


@dataclass
class Taken:
    """What a run took: ``asked`` evaluations in ``count`` rounds; ``rejected`` more were of no use."""

    asked: int = 0
    count: int = 0
    rejected: int = 0

    def summary(self) -> str:
        """What a user should know of a run that has ended."""
        wasted = f", {self.rejected} more rejected" if self.rejected else ""
        return f"{self.asked} evaluations in {self.count} rounds{wasted}"


class Rounds:
    """One run of a sampler; ``taken`` is what it took so far.

    ``evaluate(question)`` evaluates at once, ``start(questions, first)`` starts evaluations that are to run at the same
    time, lanes ``first`` and following of a round. ``scout(answers)`` makes a scout that has been given these answers.
    ``sigmas`` is the schedule. ``schedule()`` is asked when the first evaluation, which may tell how many lanes there
    are, is done: None for one. ``section(level)`` changes with the conditioning: predictions do not reach across.
    ``note`` is told what a user should know. ``carry_on`` is told why evaluations failed, and says whether it is of use
    to ask again: then the run goes on as if it began there. ``rolling``: the next evaluations are started whenever the
    sampler asks, so that a pipeline stays full, and a round goes on until an evaluation is rejected; otherwise a round
    has to be used up before the next one starts.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], Outputs],
        start: Callable[[list[Any], int], Sequence[Evaluation]],
        scout: Callable[[Sequence[Outputs]], Scout],
        sigmas: Sequence[float],
        schedule: Callable[[], tuple[Guard, Predictor] | None],
        section: Callable[[float], Any] = lambda level: None,
        note: Callable[[str], None] = lambda text: None,
        carry_on: Callable[[LeapfrogError], bool] = lambda error: False,
        rolling: bool = False,
    ):
        self.taken = Taken()
        self._evaluate = evaluate
        self._start = start
        self._new_scout = scout
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._make_schedule = schedule
        self._section_of = section
        self._section: Any = None
        self._note = note
        self._carry_on = carry_on
        self._rolling = rolling
        self._schedule: tuple[Guard, Predictor] | None = None
        self._began = 0
        self._answers: list[Outputs] = []
        self._scout: Scout | None = None
        self._under_way: list[_UnderWay] = []
        self._spare: _UnderWay | None = None

    def ask(self, question: Question) -> Outputs:
        """The fresh outputs for what the true sampler asks next."""
        index = self.taken.asked
        outputs = None
        if self._schedule:
            try:
                outputs = self._in_rounds(index, question, *self._schedule)
            except LeapfrogError as error:
                if not self._carry_on(error):
                    raise
                self.close()
                self._began = index
        if outputs is None:
            outputs = self._alone(index, question)
        if self._schedule:
            self._answers.append(outputs)
        else:  # no scout will be sent any more
            self._answers.clear()
        self.taken.asked += 1
        return outputs

    def close(self) -> None:
        """End all that is under way."""
        while self._under_way:
            self._under_way.pop().evaluation.drop()
        self._spare = None
        if self._scout:
            self._scout.drop()
            self._scout = None

    def _alone(self, index: int, question: Question) -> Outputs:
        self.taken.count += 1
        outputs = self._evaluate(question)
        if index == self._began:
            self._section = self._section_of(question.level)
            self._schedule = self._make_schedule()
            if self._schedule:
                self._schedule[1].add(index, self._at(question), question.x, question.level, outputs, 0)
        return outputs

    def _in_rounds(self, index: int, question: Question, guard: Guard, predictor: Predictor) -> Outputs:
        if self._spare and self._spare.index == index:
            guard.spare(self._spare.lane, self._spare.question.x, question.x)
        if self._under_way and not self._accepts(self._under_way[0].question, question, guard):
            self._reject(guard, predictor)
        if self._rolling or not self._under_way:
            self._start_more(index, question, guard, predictor)
        one = self._under_way[0]
        outputs = predictor.transfer(one.evaluation.finish(), one.question.x, question.x)
        self._under_way.pop(0)
        section = self._section_of(question.level)
        if section != self._section:
            self._section = section
            predictor.forget()
        predictor.add(index, self._at(question), question.x, question.level, outputs, one.lane)
        return outputs

    @staticmethod
    def _accepts(there: Question, here: Question, guard: Guard) -> bool:
        return abs(there.level - here.level) <= 1e-6 * max(1.0, here.level) and guard.accepts(there.x, here.x)

    def _reject(self, guard: Guard, predictor: Predictor) -> None:
        guard.shrink(self._under_way[0].lane)
        self.taken.rejected += len(self._under_way)
        for one in self._under_way:
            if self._rolling:  # the next one is not to wait for them in front of the pipeline
                one.evaluation.drop()
                continue
            question = one.question
            outputs = one.evaluation.finish()
            predictor.reject(one.index, self._at(question), question.x, question.level, outputs)
        self._under_way.clear()

    def _start_more(self, index: int, question: Question, guard: Guard, predictor: Predictor) -> None:
        wanted = [question]
        self._spare = None
        if self._scout_waits_at(index, question):
            more, self._spare = self._predicted(index, question, guard, predictor)
            wanted += [one.question for one in more]
        under_way = len(self._under_way)
        if len(wanted) > under_way:
            self.taken.count += under_way == 0
            started = self._start(wanted[under_way:], under_way)
            for lane, evaluation in enumerate(started, under_way):
                self._under_way.append(_UnderWay(index + lane, lane, wanted[lane], evaluation))
        if self._schedule:  # the next scout is made while these are evaluated
            with suppress(Exception):  # happens again, and is told, when it is needed
                self._send_scout()

    def _predicted(
        self, index: int, question: Question, guard: Guard, predictor: Predictor
    ) -> tuple[list[_UnderWay], _UnderWay | None]:
        """Where the other evaluations of a round that begins with this one will be, and one more, for comparison only.

        There are fewer before a change of conditioning, which none crosses, and at the end of the run.
        """
        assert self._scout
        found: list[_UnderWay] = []
        for lane in range(guard.length(index - self._began)):
            if self._section_of(question.level) != self._section:
                return found[:-1], None
            try:
                self._scout.answer(predictor.guess(index + lane, self._at(question), question.x, question.level, lane))
            except Exception:  # a prediction that the sampler cannot work with
                return found, None
            there = self._scout.question
            if there is None:
                return found[:-1] if guard.last_alone else found, None
            question = there
            found.append(_UnderWay(index + lane + 1, lane + 1, question, None))
        return found[:-1], found[-1]

    def _scout_waits_at(self, index: int, question: Question) -> bool:
        """Whether a scout, answered as the true sampler was, asks just what that asks."""
        why = f"the sampler does not repeat itself (at evaluation {index})"
        try:
            scout = self._scout or self._send_scout()
            for outputs in self._answers[scout.answered :]:
                scout.answer(outputs)
            there = scout.question
            if there and there.level == question.level and torch.equal(there.x, question.x):
                return True
        except Exception as error:
            why = f"a second run of the sampler failed ({error})"
        self._schedule = None
        self.close()
        self._note(f"{why}, so steps are taken one by one")
        return False

    def _send_scout(self) -> Scout:
        if self._scout:
            self._scout.drop()
        self._scout = None
        self._scout = self._new_scout(self._answers)
        return self._scout

    def _at(self, question: Question) -> float:
        return position(question.level, self._sigmas)
