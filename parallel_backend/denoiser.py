"""The denoiser as the host sees it, whatever the schedule: a call that goes to a pool that has it loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cutting import FOR_WEIGHTS
from .devices import CPU, kind_of, machine_of
from .errors import ErrorReport, LeapfrogError, error_of
from .pool import Call, Pool, Tick
from .pool_memory import Held
from .protocol import Cut, Evaluate, Load, Loaded, Payload, Recipe, Release, Unload
from .report import RunReport
from .settings import carries_on, step_timeout_s
from .starting import ComfyHost
from .supervisor import acquire, living
from .tensors import flatten, laid_out

log = logging.getLogger("leapfrog")
WARM_TIMEOUT_S = 30.0
WARM_TIMEOUT_FACTOR = 20
UNLOAD_TIMEOUT_S = 30.0
LOST = ("rank_start", "rank_died", "rank_timeout", "device_fault")
"""What other devices may be spared."""
# Idle ranks take less; those that still compute what nobody wants may take seconds, and Cancel is not to wait for that.
RELEASE_S = 0.1


class Patches(NamedTuple):
    """Weight patches (LoRA and the like) to bake into the ranks' weights: an id that changes whenever they do, a tree
    that can travel, and the new shapes of weights that they widen."""

    id: str = ""
    tree: dict[str, Any] = {}  # noqa: RUF012 - a tuple: nobody writes to it
    shapes: dict[str, tuple[int, ...]] = {}  # noqa: RUF012


class RemoteDenoiser:
    """What both families of schedule share: the pool, what it has loaded, the report of the run, the way back."""

    title = ""
    whole = False
    """Whether each rank holds all of it."""

    def __init__(self, devices: tuple[str, ...], recipe: Recipe, host: ComfyHost, nbytes: int = 0):
        """``nbytes`` are those of the denoiser's weights; 0: take the file's size."""
        self.devices = self._all_devices = devices
        self.recipe = recipe
        self.host = host
        self.nbytes = nbytes or recipe.stamp[0]
        self.report: RunReport | None = None
        self._pool: Pool | None = None
        self._leaving = False
        self._slowest: dict[tuple[int, ...], float] = {}
        self._first: dict[tuple[int, ...], float] = {}
        self._free_since: dict[int, float] = {}

    @staticmethod
    def check_patches(patches: Patches) -> None:
        """Raises LeapfrogError unsupported_patch, by name, for weight patches that cannot travel to a rank."""
        laid_out(patches.tree, "weight patches")

    def begin_run(self) -> None:
        """Forget stale state; call before the first step of every sampling run."""
        if (recipe := self.recipe.renewed()) != self.recipe:  # or ranks that read it now would not fit those that did
            log.warning("Leapfrog: %s has changed since it was loaded; all ranks read it anew", Path(recipe.path).name)
            self.recipe = recipe
        self._take_devices(set())
        self.report = RunReport(self.title, self.devices)

    def end_run(self) -> None:
        """Log what the run did; ranks' GPUs have room again for what comes after it (VAE)."""
        pool = self._pool
        if pool and pool.alive and any(kind_of(device) != CPU for device in self.devices):
            with pool.lock:
                pool.tell(Release(cache=True))
                with suppress(LeapfrogError):  # the next call tells why
                    pool.catch_up(RELEASE_S)
        if self.report and self.report.calls:
            for line in self.report.lines():
                log.info("Leapfrog: %s", line)
            try:
                path = self.report.save_trace()
            except OSError as error:  # the picture is there, and a full disk is no reason to lose it
                log.warning("Leapfrog: no trace written: %s", error)
                path = None
            if path:
                log.info("Leapfrog: trace written to %s", path)
        self.report = None
        self._take_devices(set())
        self._leave()

    def carry_on(self, error: LeapfrogError) -> bool:
        """Whether the run can go on after this error, on the devices that are left, where the user wants that.

        All that was under way is lost, and so is stale state. The next evaluation starts the ranks anew; the next run
        has all devices again. With a device of another machine all of that machine are given up.
        """
        run, pool, failed = self.report, self._pool, error.report
        if not (run and carries_on() and failed.code in LOST and 0 <= failed.rank < len(self.devices)):
            return False
        if pool and (pool.alive or any(user is not self and getattr(user, "report", None) for user in pool.users)):
            return False  # it is the error of another denoiser, or another would go on with the lost device
        lost = {run.ranks[failed.rank]}
        if machine := machine_of(self.devices[failed.rank]):
            lost |= {rank for rank in run.ranks if machine_of(run.devices[rank]) == machine}
        if len(lost) == len(run.ranks):
            return False
        run.ranks = [rank for rank in run.ranks if rank not in lost]
        self._take_devices({rank for rank in range(len(run.devices)) if rank not in run.ranks})
        names = " and ".join(f"rank {rank} on {run.devices[rank]}" for rank in sorted(lost))
        text = f"finished on {','.join(self.devices)} without {names}"
        log.warning("Leapfrog: %s The run is %s", failed.message, text)
        self.note(text)
        return True

    def _take_devices(self, lost: Set[int]) -> None:
        """Do without those of these ranks, which are numbered as at the start of the run."""
        left = tuple(device for rank, device in enumerate(self._all_devices) if rank not in lost)
        if self.devices != left:
            self.close()  # nobody would know what these ranks hold
            self.devices = left

    @property
    def notes(self) -> list[str]:
        """The lines that the run's report has by now."""
        return self.report.notes if self.report else []

    def note(self, text: str) -> None:
        """A line for the run's report."""
        if self.report and text not in self.report.notes:
            self.report.notes.append(text)

    def unload(self, ranks: Sequence[int] = ()) -> None:
        """Drop the weights in these ranks, or all, where they are this denoiser's; the next call loads them again.

        Ranks that cannot do so end. Raises nothing, and Cancel has to wait: ComfyUI's memory manager, which calls this,
        would be left in the middle of things.
        """
        pool = self._holder
        if pool is None:
            return
        with pool.lock:
            if pool.dead:
                pool.close()
            if not pool.alive or not self._loaded:
                return
            pool.memory.held = None
            try:
                # behind an evaluation that was cancelled, whatever that takes
                limit = step_timeout_s() if pool.catching_up else UNLOAD_TIMEOUT_S
                pool.request({r: Unload() for r in ranks or range(len(self.devices))}, limit, lambda: None)
            except LeapfrogError as error:  # no reason to fail what the memory is for
                log.warning("Leapfrog: the ranks did not unload and are ended: %s", error.report.message)

    def close(self) -> None:
        """End the ranks."""
        if self._pool:
            with self._pool.lock:
                self._pool.close()
        self._pool = None

    def release(self, ranks: Sequence[int] = ()) -> None:
        """As :meth:`unload`; the ranks end if nobody comes back for them (``supervisor.UNUSED_S``)."""
        self.unload(ranks)
        self._leaving = True
        if not self.report:  # calls of a run under way still come back from there
            self._leave()

    def _leave(self) -> None:
        if self._leaving and self._pool:
            self._pool.users.discard(self)
            self._pool = None
        self._leaving = False

    def fits(self, free: int) -> bool:
        """Whether all of it fits a device with so many bytes free."""
        return self.nbytes <= FOR_WEIGHTS * free

    def loaded_bytes(self, rank: int) -> int:
        """Bytes of this denoiser's weights that a rank holds now."""
        return self._loaded[rank].nbytes if self._loaded else 0

    @property
    def _holder(self) -> Pool | None:
        """The pool that may hold this denoiser, whoever had it loaded there."""
        return self._pool or living(self.devices)

    @property
    def _loaded(self) -> list[Loaded]:
        """What the ranks hold of this denoiser; [] where they hold nothing, or another."""
        pool = self._holder
        held = pool.memory.held if pool and pool.alive else None
        return held.parts if held and held.recipe == self.recipe and (not self.whole or held.cut is None) else []

    def _wait(self, calls: Sequence[Call], ranks: Sequence[int], sizes: Sequence[torch.Size], tick: Tick) -> Call:
        """The first of these calls that has the replies of those of ``ranks`` that it asked."""
        assert self._pool
        with self._pool.lock:
            return self._pool.wait(calls, ranks, self._deadline_s(self._pool, sizes), tick)

    def _deadline_s(self, pool: Pool, sizes: Sequence[torch.Size]) -> float:
        """How long an answer to calls of these sizes may take: many times as long as it ever took, where that is known,
        the first one and the wait behind others left out.

        Never less than half a minute, nor more than the step timeout.
        """
        limit = step_timeout_s()
        if pool.catching_up:
            return limit
        known = max(self._slowest.get(size) or self._first.get(size, limit) for size in sizes)
        return min(limit, max(WARM_TIMEOUT_S, WARM_TIMEOUT_FACTOR * known))

    def _took(self, call: Call, size: torch.Size, sent_at: float, true: bool) -> None:
        """A call has its result. ``true``: an evaluation in it was made where the sampler stood, not at a prediction.

        Raises LeapfrogError not_finite.
        """
        now = time.perf_counter()
        # behind an earlier call of the same ranks it had to wait
        seconds, alone = now - sent_at, now - max(sent_at, min(self._free_since.get(rank, 0.0) for rank in call.ranks))
        self._free_since.update(dict.fromkeys(call.ranks, now))
        if size in self._first:
            self._slowest[size] = max(self._slowest.get(size, 0.0), alone)
        else:  # it has costs that come once: NCCL connects, kernels are chosen
            self._first[size] = alone
        assert self.report and self._pool
        self.report.ended(call.step, seconds)
        self._look_at_outputs(call, true)

    def _look_at_outputs(self, call: Call, true: bool) -> None:
        """Warn of the first output in a run that is not finite.

        Raises LeapfrogError not_finite where nothing is left of the picture. What an evaluation at a predicted latent
        gives is no reason: it may be rejected.
        """
        assert self.report and self._pool
        found = {rank: self._pool.finite(done.output) for rank, done in call.replies.items() if done.output}
        bad = [rank for rank, (whole, _) in found.items() if not whole]
        if bad and not self.report.bad:
            self.report.bad = f"rank {bad[0]} gave NaN or infinity in denoiser call {call.step}"
            log.warning("Leapfrog: %s", self.report.bad)
        if bad and true and not any(some for _, some in found.values()):
            message = f"No number of what the denoiser gave in its call {call.step} is finite: the picture is lost."
            raise error_of(ErrorReport("not_finite", message, bad[0], call.step))

    def _ready_pool(self, tick: Tick) -> Pool:
        pool = acquire(self.devices, self.host, tick, self)
        self._leaving = False
        if pool is not self._pool:
            self._pool = pool
            self._slowest.clear()
            self._first.clear()
        return pool

    def _whole_fits(self, pool: Pool, tick: Tick) -> bool:
        """Whether each device can hold the whole denoiser, or does."""
        held = pool.memory.held
        if held and held.recipe == self.recipe and held.cut is None:
            return True
        return all(free is None or self.fits(free) for free in pool.free(tick))

    def _load(
        self, pool: Pool, cut: Cut | None, pipelines: list[list[int]], patches: Patches, tick: Tick
    ) -> list[Loaded]:
        """What the ranks hold, after loading what they do not. ``pipelines`` are the ranks of each, in order."""
        wanted = Held(self.recipe, cut, pipelines, patches.id)
        held = pool.memory.held
        if held and held == wanted:
            return held.parts
        pool.memory.held = None
        pool.memory.learnt.clear()
        began = time.monotonic()
        tree, _ = pool.payload(patches.tree, tick, where="weight patches")
        message = {
            rank: Load(recipe=self.recipe, cut=cut, peers=pipeline, patches=tree, patches_id=patches.id)
            for pipeline in pipelines
            for rank in pipeline
        }
        replies = pool.request(message, step_timeout_s(), tick, using=tree)
        pool.memory.held = replace(wanted, parts=[replies.get(r, Loaded()) for r in range(len(self.devices))])
        log.info("Leapfrog: weights in place after %.1f s", time.monotonic() - began)
        return pool.memory.held.parts

    def _submit(self, pool: Pool, messages: dict[int, Evaluate], payload: Payload, kind: str, tick: Tick) -> Call:
        assert self.report
        report = self.report
        step = len(report.calls) + 1
        call = pool.submit(messages, tick, payload, report.replied, step)
        report.sent(step, kind)
        return call


def first_tensor(x: Any) -> torch.Tensor:
    """A latent's tensor, of several (audio and video) the first."""
    return x if isinstance(x, torch.Tensor) else x[0]


def joined(parts: list[Any]) -> Any:
    """One output of several ranks' outputs, row by row."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return type(parts[0])(joined(list(items)) for items in zip(*parts, strict=True))


def room_for_output(x: Any) -> int:
    """Bytes for a result: as many elements as ``x`` in float32, twice over, on a 64-byte boundary."""
    elements = sum(t.nelement() for t in flatten(x)[1])
    return elements * 8 + 64 & ~63
