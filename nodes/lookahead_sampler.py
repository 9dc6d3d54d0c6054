"""Lookahead in the host: the sampler of a run on a split MODEL, with evaluations of steps to come in the pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import torch

from ..parallel_backend import LeapfrogError, SplitDenoiser
from .ahead import AheadSampler, Wave, check_sampler
from .scout import Outputs, Question

log = logging.getLogger("leapfrog")


def look_ahead(
    executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """An OUTER_SAMPLE wrapper of a split MODEL: the run's sampler, whichever it is, looks ahead."""
    denoiser: SplitDenoiser = executor.class_obj.model_patcher.denoiser
    denoiser.steps = len(sigmas) - 1
    if denoiser.plan.mode == "lookahead" and not isinstance(sampler, AheadSampler):
        try:
            check_sampler(sampler)
            sampler = LookaheadSampler(denoiser, sampler)
        except LeapfrogError as error:
            log.warning(
                "Leapfrog: Async UNet Split cannot look ahead, so all steps are exact: %s", error.report.message
            )
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


class LookaheadSampler(AheadSampler):
    """A pipeline of components that is fed with predicted latents."""

    rolling = True

    def __init__(self, denoiser: SplitDenoiser, base: comfy.samplers.KSAMPLER):
        super().__init__(base)
        self._denoiser = denoiser
        self._waves: list[PipelineWave] = []

    @property
    def denoiser(self) -> SplitDenoiser:
        return self._denoiser

    def start(
        self, guider: Any, evaluate: Callable[[Question], Outputs], questions: Sequence[Question], first: int
    ) -> list[PipelineWave]:
        started: list[PipelineWave] = []
        try:
            for lane, question in enumerate(questions, first):
                work = partial(evaluate, question)
                started.append(PipelineWave(self._denoiser, self._waves, guider, work, lane > 0))
                self._waves.append(started[-1])
        except BaseException:
            for wave in started:
                wave.drop()
            raise
        return started

    def schedule(self, steps: int, short: Any) -> Any:
        return self._denoiser.lookahead()


class PipelineWave(Wave):
    """An evaluation in the pipeline, ``waves`` are all of them that are under way."""

    def __init__(
        self, denoiser: SplitDenoiser, waves: list[PipelineWave], guider: Any, work: Callable[[], Outputs],
        predicted: bool,
    ):  # fmt: skip
        self._waves = waves
        super().__init__(denoiser, guider, work, predicted)

    def finish(self) -> Outputs:
        """Wait for what it gives; whoever has something to do meanwhile does it."""
        tick = comfy.model_management.throw_exception_if_processing_interrupted
        while not self.ended:
            paused = {id(wave.pending): wave for wave in self._waves if wave.pending is not None}
            ready = self.denoiser.wait([wave.pending for wave in paused.values()], tick)
            paused[id(ready)].resume()
        self._waves.remove(self)
        return self.result()

    def drop(self) -> None:
        super().drop()
        if self in self._waves:
            self._waves.remove(self)
