"""Async UNet Split's denoiser: each rank holds one component."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from .batching import Rows, rows_of
from .cutting import Chosen, choose_cut
from .denoiser import Patches, RemoteDenoiser, first_tensor, joined, room_for_output
from .errors import LeapfrogError
from .plan import STALE_MODES, SplitPlan
from .pool import Call, Pool, Tick
from .pool_memory import Held
from .protocol import Evaluate, Payload, Recipe
from .schedules.asyncdiff import Streams
from .schedules.parastep import Guard, Predictor
from .starting import ComfyHost
from .watching import Watched

log = logging.getLogger("leapfrog")
# The timesteps of the steps before and after the current one, as multiples of its own.
Times = tuple[float, float]


@dataclass(eq=False)
class Pending:
    """An evaluation under way. ``finals`` are the ranks that will have its rows, in order.

    ``true``: it is made where the sampler stands, not at a prediction. ``measured`` is to be told the drift. A call may
    serve two evaluations, its ``first`` and its ``last``.
    """

    call: Call
    finals: list[int]
    size: torch.Size
    sent_at: float
    true: bool
    measured: Callable[[float], None] | None = None
    first: bool = True
    last: bool = True


@dataclass
class Pipeline:
    """One pipeline in one call: the ranks of its components in order, the rows that it evaluates."""

    ranks: list[int]
    rows: tuple[int, int]


class SplitDenoiser(RemoteDenoiser):
    """Async UNet Split: each rank holds one component; with guidance, two pipelines of components share the rows."""

    title = "Async UNet Split"

    def __init__(
        self, plan: SplitPlan, recipe: Recipe, host: ComfyHost, nbytes: int = 0,
        show: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        """``show`` gets a line for the user when a run begins, if somebody has set its ``steps``, and when it ends."""
        super().__init__(plan.devices, recipe, host, nbytes)
        self.steps = 0
        self._show = show
        self._rests: dict[int, Pending] = {}
        self._wanted = plan
        self._take(plan)

    def _take(self, plan: SplitPlan) -> None:
        """Go by this plan from now on."""
        self.plan = plan
        self.devices = plan.devices
        self._watched = Watched(self.recipe, plan.devices)
        self._pipelines: list[list[int]] = []
        self._forget_streams()

    def _take_devices(self, lost: Set[int]) -> None:
        super()._take_devices(lost)
        self._take(self._wanted.without(lost) if lost else self._wanted)

    def end_run(self) -> None:
        self._forget_streams()
        stale = self.plan.mode in STALE_MODES and self.components > 1
        if stale and self.report and "async" not in self.report.calls.values():
            self.note("no step was asynchronous: take fewer warmup_steps, or a larger drift_bound")
        if self.report and self.report.calls:
            self._show("; ".join([self.report.summary(), *self.report.notes]))
        super().end_run()

    @property
    def components(self) -> int:
        """Components of the pipeline that serves the run; 0 before its first evaluation."""
        return self.plan.components(self._pipelines[0]) if self._pipelines else 0

    def lookahead(self) -> tuple[Guard, Predictor] | None:
        """The schedule of lookahead in this run; None with a single component.

        As many evaluations are under way as there are components, whatever was rejected before: a wave that is thrown
        away cost no time, because the components would have had nothing else to do. The first predicted evaluation
        follows the last one of the warm-up through the pipeline, so that the guard's has one less.
        """
        if self.components < 2:
            return None
        alone = max(0, self.plan.warmup - 1)
        return Guard(self.components, alone, self.plan.bound, eager=True), Predictor("linear", spacing=2)

    def _forget_streams(self) -> None:
        for rest in self._rests.values():
            self.drop(rest)
        self._rests.clear()
        self._streams = Streams(self.plan.warmup, self.plan.mode in STALE_MODES, self.plan.bound, self.plan.stride)
        self._run = time.monotonic_ns()

    def submit(
        self, inputs: Any, x: Any, patches: Patches, tick: Tick, *, chunks: Sequence[int], stream: Hashable,
        times: Times = (1.0, 1.0), ahead: bool = False, together: bool = False,
    ) -> Pending:  # fmt: skip
        """Start an evaluation. ``inputs`` is the tree (args, kwargs) of the denoiser's forward, ``x`` the latent in it.

        ``chunks`` say which conditioning each equal share of the rows belongs to. ``stream`` names the conditioning
        whose stale state may be used. ``times`` are the timesteps of the steps before and after this one, each as a
        multiple of this one's. ``ahead`` marks a step to come in the report. ``together``: the rows stay on one
        pipeline. Raises LeapfrogError.
        """
        pool = self._ready_pool(tick)
        with pool.lock:
            if not self._pipelines:
                guided = len(set(chunks)) > 1 and not together
                self._pipelines = self.plan.pipelines(guided, self._whole_fits(pool, tick))
            pipelines = _pipelines_of_call(self._pipelines, first_tensor(x).shape[0], chunks, together)
            payloads, out = self._write(pool, pipelines, inputs, x, tick)
            # what is asked meanwhile may take the place of the payloads, which no call holds yet
            if self._prepare(pool, payloads[0], patches, tick):
                payloads, out = self._write(pool, pipelines, inputs, x, tick)
            return self._send(pool, pipelines, payloads, out, x, stream, times, ahead, tick)

    def wait(self, pending: Sequence[Pending], tick: Tick) -> Pending:
        """The first of these evaluations that is ready. Raises LeapfrogError, or what ``tick`` raises."""
        finals = {rank for one in pending for rank in one.finals}
        try:
            call = self._wait([one.call for one in pending], sorted(finals), [one.size for one in pending], tick)
        except LeapfrogError as error:
            if error.report.code in ("layout_changed", "rank_error"):  # the one may be heard as the other
                self._watched.forget()
            raise
        return next(one for one in pending if one.call is call)

    def result(self, pending: Pending, tick: Tick) -> Any:
        """Wait for an evaluation and return its output, a CPU tensor (or a tree of them, as the model's output is)."""
        pool = self._pool
        assert pool
        try:
            self.wait([pending], tick)
            if pending.measured:
                self._wait([pending.call], sorted(pending.call.ranks), [pending.size], tick)
                pending.measured(max(reply.drift for reply in pending.call.replies.values()))
            with pool.lock:
                parts = [pool.read(pending.call.replies[rank].output) for rank in pending.finals]
                if pending.first:
                    self._took(pending.call, pending.size, pending.sent_at, pending.true)
        finally:
            self.drop(pending)
        return joined(parts)

    def drop(self, pending: Pending) -> None:
        """Nobody will ask for this evaluation's output (again)."""
        if self._pool and pending.last:
            self._pool.done(pending.call)

    def _write(
        self, pool: Pool, pipelines: list[Pipeline], inputs: Any, x: Any, tick: Tick
    ) -> tuple[list[Payload], int]:
        """What each pipeline gets, and where the room for outputs begins."""
        room = room_for_output(x) * len(pipelines) * self.plan.stride
        payload, out = pool.payload(inputs, tick, reserve=room, where="denoiser input")
        if len(pipelines) == 1:
            return [payload], out
        return rows_of(payload, Rows(inputs, first_tensor(x).shape[0]), [pipeline.rows for pipeline in pipelines]), out

    def _send(
        self, pool: Pool, pipelines: list[Pipeline], payloads: list[Payload], out: int, x: Any, stream: Hashable,
        times: Times, ahead: bool, tick: Tick,
    ) -> Pending:  # fmt: skip
        number, flow = self._watched.layout(pool, payloads[0]) if self.components > 1 else (0, None)
        learnt = pool.memory.learnt
        how = self._streams.next((stream, number))
        if how.rest:
            return self._rests.pop(how.stream)
        at_last = self.components - 1
        exact = how.exact or (self.components == 1 and self.plan.stride == 1)  # one device has nothing stale
        two_steps = not exact and self.plan.stride == 2
        room = room_for_output(x)
        messages = {}
        for at, (pipeline, payload) in enumerate(zip(pipelines, payloads, strict=True)):
            for position, rank in enumerate(pipeline.ranks):
                messages[rank] = Evaluate(
                    inputs=payload, out=out + room * (at * self.plan.stride + max(0, position - at_last)),
                    out_size=room, run=self._run, stream=how.stream, layout=number,
                    flow=None if (number, rank) in learnt else flow, exact=exact, measure=how.measure,
                    extrapolate=self.plan.mode == "extrapolated",
                    time=self._time(times, exact, two_steps and position <= at_last),
                )  # fmt: skip
        kind = "ahead" if ahead else "exact" if exact else "async"
        finals = [pipeline.ranks[-1] for pipeline in pipelines]
        sent_at = time.perf_counter()
        call = self._submit(pool, messages, payloads[0], kind, tick)
        pending = Pending(call, finals, first_tensor(x).shape, sent_at, not ahead)
        learnt.update((number, rank) for rank in messages)
        if two_steps:
            pending.last = False
            self._rests[how.stream] = replace(
                pending, finals=[pipeline.ranks[at_last] for pipeline in pipelines], first=False, last=True
            )
        if how.measure:
            pending.measured = lambda drift: self._streams.drifted(how, drift)
        return pending

    def _time(self, times: Times, exact: bool, for_next_step: bool) -> float:
        """What a component's timestep is to be multiplied with (AsyncDiff's time shift: the age of its input)."""
        before, after = times
        if exact:
            return 1.0
        if for_next_step:
            return 1.0 if self.plan.time_shift else after
        return before if self.plan.time_shift else 1.0

    def _prepare(self, pool: Pool, payload: Payload, patches: Patches, tick: Tick) -> bool:
        """Measure, cut and load what is not there yet; whether the pool was asked anything meanwhile."""
        assert self.report
        chosen, asked = self._chosen_cut(pool, payload, patches, tick) if self.components > 1 else (None, False)
        wanted, held = Held(self.recipe, chosen and chosen.cut, self._pipelines, patches.id), pool.memory.held
        if held is None or not held.same_but_for_patches(wanted):
            self._forget_streams()
        self.report.holds(self._load(pool, wanted.cut, self._pipelines, patches, tick))
        if self.steps and not self.report.calls:
            said = self.plan.promise(
                self.steps, len(self._pipelines), self.components, chosen.slowest if chosen else 1.0
            )
            said = f"{self.title}: " + "; ".join([said, *self.notes])
            log.info("Leapfrog: %s", said)
            self._show(said)
        return asked or held != wanted

    def _chosen_cut(self, pool: Pool, payload: Payload, patches: Patches, tick: Tick) -> tuple[Chosen, bool]:
        """How to cut for these inputs: as before, if it was for the same, because a stale mode draws the same picture
        again only with the same cut; and whether the ranks were asked for it."""
        purpose = (self.recipe, self._pipelines, self.plan.balance, self.plan.cut)
        chosen_for, chosen = pool.memory.cut
        if chosen_for != purpose:
            chosen = None
        at_start = not self.report or not self.report.calls
        starts = chosen is None or (at_start and self._watched.tells_times(payload))
        traces, asked = self._watched.look(
            pool, payload, patches.shapes, None if starts else self._pipelines[0][0], tick
        )
        if chosen and chosen.cut.units != self._watched.units:
            starts, chosen = True, None
            traces, asked = self._watched.look(pool, payload, patches.shapes, None, tick)
        if starts:
            chosen = choose_cut(traces, pool.free(tick), self._pipelines, self.plan, chosen and chosen.cut)
            pool.memory.cut = (purpose, chosen)
        assert chosen
        return chosen, asked


def _pipelines_of_call(pipelines: list[list[int]], rows: int, chunks: Sequence[int], together: bool) -> list[Pipeline]:
    """How a call's rows spread: half of its chunks to each of two pipelines, the odd one to the first, where a pipeline
    is one component; a single chunk to its conditioning's pipeline.

    They stay ``together`` where something inside the denoiser mixes them.
    """
    # what flows between components is for one number of rows
    alike = len(chunks) % len(pipelines) == 0 or len(pipelines[0]) == 1
    if len(pipelines) == 1 or together or len(chunks) < len(pipelines) or not alike:
        ranks = pipelines[chunks[0] % len(pipelines)] if len(chunks) == 1 else pipelines[0]
        return [Pipeline(ranks, (0, rows))]
    ends = [rows // len(chunks) * -(-len(chunks) * at // len(pipelines)) for at in range(len(pipelines) + 1)]
    return [Pipeline(ranks, (begin, end)) for ranks, begin, end in zip(pipelines, ends[:-1], ends[1:], strict=True)]
