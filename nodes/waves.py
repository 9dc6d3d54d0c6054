"""Lookahead in the host: guided evaluations of steps to come, under way while the sampler waits for the current one.

A wave is one guided evaluation (conditionings, areas, ControlNets, CFG functions: all of ComfyUI's own code) at a
predicted point, run in a thread of its own. When its denoiser call has gone to the ranks the thread parks, and the
sampler's thread goes on. Only one thread runs at a time, so nothing in ComfyUI needs to know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from ..parallel_backend import SplitDenoiser
from .coroutine import Coroutine, current

log = logging.getLogger("leapfrog")


class Wave(Coroutine):
    """One guided evaluation at latent ``x``, under way until it ends; ``predicted``: ahead of the sampler."""

    def __init__(self, x: torch.Tensor, predicted: bool, guider: Any, work: Callable[[], Any]):
        self.x = x
        self.predicted = predicted
        self._guider = guider
        self._cfg = getattr(guider, "cfg", None)
        super().__init__(work, "leapfrog wave")

    def resume(self) -> None:
        # CFGOverride sets the guider's CFG for the time of an evaluation
        outside = getattr(self._guider, "cfg", None)
        self._guider.cfg = self._cfg
        super().resume()
        self._cfg, self._guider.cfg = self._guider.cfg, outside


def ahead() -> bool:
    """Whether this is a wave at a predicted point."""
    wave = current()
    return isinstance(wave, Wave) and wave.predicted


class LookaheadRun:
    """The waves of one sampling run."""

    def __init__(self, denoiser: SplitDenoiser):
        self._denoiser = denoiser
        self._waves: dict[int, Wave] = {}
        self._schedule: Any = None
        self._next = 0
        self._off = False

    def predict_noise(self, executor: Any, x: torch.Tensor, sigma: torch.Tensor, options: dict, seed: Any) -> Any:
        """A wrapper of ComfyUI's kind PREDICT_NOISE: the guided evaluation at ``x``, steps to come under way."""
        inner = options.get("transformer_options", {})
        sigmas = inner.get("sample_sigmas")
        if "easycache" in inner:
            self._stop("EasyCache or LazyCache decides from step to step what to compute")
        if self._off or sigmas is None or not self._on_schedule(sigmas, float(sigma.flatten()[0])):
            self._stop("the sampler evaluates at other points than the steps of its schedule")
            return executor(x, sigma, options, seed)
        step, self._next = self._next, self._next + 1
        if self._schedule is None:
            # the first evaluation is exact, and tells how many components there are
            result = executor(x, sigma, options, seed)
            if self._denoiser.components < 2:
                self._off = True
            else:
                self._schedule = self._denoiser.lookahead(sigmas.tolist())
                self._schedule.step(step, x)
                self._schedule.evaluated(result)
            return result
        decision = self._schedule.step(step, x)

        def launch(at: int, point: torch.Tensor) -> None:
            level = sigmas[at].to(sigma).expand_as(sigma)
            self._waves[at] = Wave(point, at != step, executor.class_obj, lambda: executor(point, level, options, seed))

        if decision.exact:
            self.drop()
            if not decision.ahead:
                result = executor(x, sigma, options, seed)
                self._schedule.evaluated(result)
                return result
            launch(step, x)
        for at, point in decision.ahead:
            launch(at, point)
        wave = self._finish(step)
        # the slope found at the predicted point, applied at the true one
        result = wave.result() + (x - wave.x) if wave.predicted else wave.result()
        self._schedule.evaluated(result)
        return result

    def _on_schedule(self, sigmas: torch.Tensor, sigma: float) -> bool:
        return self._next < len(sigmas) and abs(float(sigmas[self._next]) - sigma) <= 1e-6 * max(1.0, sigma)

    def _finish(self, step: int) -> Wave:
        wave = self._waves.pop(step)
        self._waves = {step: wave, **self._waves}
        tick = comfy.model_management.throw_exception_if_processing_interrupted
        while not wave.ended:
            parked = {id(w.pending): w for w in self._waves.values() if w.pending is not None}
            ready = self._denoiser.wait([w.pending for w in parked.values()], tick)
            parked[id(ready)].resume()
        return self._waves.pop(step)

    def _stop(self, why: str) -> None:
        if not self._off:
            self._off = True
            self.drop()
            self._denoiser.note(f"lookahead is off in this run, all steps are exact: {why}")

    def drop(self) -> None:
        """End all waves under way."""
        while self._waves:
            self._waves.popitem()[1].drop()
