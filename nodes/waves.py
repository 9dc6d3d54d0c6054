"""Lookahead in the host: guided evaluations of steps to come, under way while the sampler waits for the current one.

A wave is one guided evaluation (conditionings, areas, ControlNets, CFG functions: all of ComfyUI's own code) at a
predicted point, run in a thread of its own. When its denoiser call has gone to the ranks the thread parks, and the
sampler's thread goes on. Only one thread runs at a time, so nothing in ComfyUI needs to know.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch

from ..parallel_backend import SplitDenoiser

log = logging.getLogger("leapfrog")
_current: contextvars.ContextVar[Wave | None] = contextvars.ContextVar("leapfrog_wave", default=None)


class WaveDropped(BaseException):
    """Unwinds a wave that nobody waits for any more."""


class Wave:
    """One guided evaluation in a thread of its own, which has started and parked, or ended, when this returns."""

    def __init__(self, x: torch.Tensor, predicted: bool, guider: Any, work: Callable[[], torch.Tensor]):
        self.x = x
        self.predicted = predicted
        self._guider = guider
        self._cfg = getattr(guider, "cfg", None)
        self.pending: Any = None
        self.ended = False
        self._result: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._dropped = False
        self._turn = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        state = _TorchState()
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run, state, work), name="leapfrog wave", daemon=True
        )
        self._thread.start()
        self.resume()

    def resume(self) -> None:
        """Hand the thread its turn; returns when it parks or ends."""
        self.pending = None
        # CFGOverride sets the guider's CFG for the time of an evaluation
        outside = getattr(self._guider, "cfg", None)
        self._guider.cfg = self._cfg
        self._turn.release()
        self._back.acquire()
        self._cfg, self._guider.cfg = self._guider.cfg, outside

    def park(self, pending: Any) -> None:
        """Called in the wave's thread: give the turn back until ``pending`` is ready."""
        self.pending = pending
        self._back.release()
        self._turn.acquire()
        if self._dropped:
            raise WaveDropped

    def result(self) -> torch.Tensor:
        """What the evaluation returned; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def drop(self) -> None:
        """End the thread; whatever it still does is thrown away."""
        self._dropped = True
        while not self.ended:
            self.resume()
        self._thread.join()

    def _run(self, state: _TorchState, work: Callable[[], torch.Tensor]) -> None:
        self._turn.acquire()
        _current.set(self)
        try:
            with state.entered():
                self._result = work()
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._back.release()


class _TorchState:
    """What torch keeps per thread and a sampler's code counts on."""

    def __init__(self) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
            if self._stream is None:
                yield
            else:
                with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
                    yield


def park(pending: Any) -> None:
    """In a wave, wait for one's turn again; elsewhere, nothing."""
    wave = _current.get()
    if wave is not None:
        wave.park(pending)


def ahead() -> bool:
    """Whether this is a wave at a predicted point."""
    wave = _current.get()
    return wave is not None and wave.predicted


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
