"""The denoiser as the host sees it: a call that goes to the pool. One class per family of schedule."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .batching import Rows, batched, rows_of, with_chunks
from .cutting import FOR_WEIGHTS, choose_cut
from .errors import LeapfrogError
from .plan import CPU, STALE_MODES, LanesPlan, SplitPlan, kind_of
from .pool import Call, Pool, Tick
from .protocol import Cut, Evaluate, Load, Loaded, Payload, Recipe, Release, Trace, Traced, Unload
from .report import RunReport
from .schedules.asyncdiff import Streams
from .schedules.parastep import Guard, Predictor, row_shares
from .settings import step_timeout_s
from .starting import ComfyHost
from .supervisor import acquire
from .tensors import flatten, laid_out
from .units import Flow

log = logging.getLogger("leapfrog")
WARM_TIMEOUT_S = 30.0
WARM_TIMEOUT_FACTOR = 20
UNLOAD_TIMEOUT_S = 30.0
TRACE_ROUNDS = 3


# Weight patches (LoRA and the like) to bake into the ranks' weights: an id that changes whenever they do, a tree, and
# the new shapes of weights that they widen.
Patches = tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]
# The timesteps of the steps before and after the current one, as multiples of its own.
Times = tuple[float, float]


@dataclass(eq=False)
class Pending:
    """An evaluation under way. ``finals`` are the ranks that will have its rows, in order.

    ``measured`` is to be told the drift. Not the ``last`` of a call: another evaluation will ask for more of it.
    """

    call: Call
    finals: list[int]
    size: torch.Size
    sent_at: float
    measured: Callable[[float], None] | None = None
    last: bool = True


class RemoteDenoiser:
    """What both families share: the pool, what it has loaded, the report of the run, the way back."""

    title = ""

    def __init__(self, devices: tuple[str, ...], recipe: Recipe, host: ComfyHost):
        self.devices = devices
        self.recipe = recipe
        self.host = host
        self.report: RunReport | None = None
        self._pool: Pool | None = None
        self._slowest: dict[tuple[int, ...], float] = {}

    @staticmethod
    def check_patches(patches: Patches) -> None:
        """Raises LeapfrogError unsupported_patch, by name, for weight patches that cannot travel to a rank."""
        laid_out(patches[1], "weight patches")

    def begin_run(self) -> None:
        """Forget stale state; call before the first step of every sampling run."""
        self.report = RunReport(self.title, self.devices)

    def end_run(self) -> None:
        """Log what the run did; ranks' GPUs have room again for what comes after it (VAE)."""
        pool = self._pool
        if pool and any(kind_of(device) != CPU for device in self.devices):
            with pool.lock:
                pool.tell(Release(cache=True))
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

    def note(self, text: str) -> None:
        """A line for the run's report."""
        if self.report:
            self.report.notes.append(text)

    def unload(self) -> None:
        """Drop the weights in the ranks; the next call loads them again. Ranks that cannot do so end."""
        pool = self._pool
        if pool is None:
            return
        with pool.lock:
            if pool.dead:
                pool.close()
            if not pool.alive:
                return
            pool.memory.pop("loaded", None)
            try:
                pool.request({r: Unload() for r in range(len(self.devices))}, UNLOAD_TIMEOUT_S, _no_tick)
            except LeapfrogError as error:  # no reason to fail what the memory is for
                log.warning("Leapfrog: the ranks did not unload and are ended: %s", error.report.message)

    def close(self) -> None:
        """End the ranks."""
        if self._pool:
            with self._pool.lock:
                self._pool.close()
        self._pool = None

    def release(self) -> None:
        """Drop the weights in the ranks, which end if nobody comes back for them (``supervisor.UNUSED_S``)."""
        self.unload()
        if self._pool:
            self._pool.users.discard(self)
        self._pool = None

    def loaded_bytes(self, rank: int) -> int:
        """Bytes of weights that a rank holds now."""
        loaded = self._pool.memory.get("loaded") if self._pool and self._pool.alive else None
        return loaded[1][rank].nbytes if loaded else 0

    def _wait(self, calls: Sequence[Call], ranks: Sequence[int], sizes: Sequence[torch.Size], tick: Tick) -> Call:
        """The first of these calls that has the replies of those of ``ranks`` that it asked."""
        assert self._pool
        with self._pool.lock:
            return self._pool.wait(calls, ranks, self._deadline_s(self._pool, sizes), tick)

    def _deadline_s(self, pool: Pool, sizes: Sequence[torch.Size]) -> float:
        """How long an answer to calls of these sizes may take: many times as long as it ever took, where that is known.

        Never less than half a minute, nor more than the step timeout.
        """
        limit = step_timeout_s()
        if pool.catching_up:
            return limit
        known = max(self._slowest.get(size, limit) for size in sizes)
        return min(limit, max(WARM_TIMEOUT_S, WARM_TIMEOUT_FACTOR * known))

    def _took(self, call: Call, size: torch.Size, sent_at: float) -> None:
        seconds = time.perf_counter() - sent_at
        self._slowest[size] = max(self._slowest.get(size, 0.0), seconds)
        assert self.report and self._pool
        self.report.ended(call.number, seconds)
        self._look_at_outputs(call)

    def _look_at_outputs(self, call: Call) -> None:
        """Warn of the first output in a run that is not finite. No error: ComfyUI alone goes on, to a black picture."""
        assert self.report and self._pool
        for rank, done in call.replies.items():
            if not self.report.bad and done.output and not self._pool.is_finite(done.output):
                self.report.bad = (
                    f"rank {rank} gave NaN or infinity in denoiser call {call.step}; if ComfyUI alone does so too, the "
                    "model needs another precision (--bf16-unet, --fp32-unet)"
                )
                log.warning("Leapfrog: %s", self.report.bad)

    def _ready_pool(self, tick: Tick) -> Pool:
        pool = acquire(self.devices, self.host, tick, self)
        if pool is not self._pool:
            self._pool = pool
            self._slowest.clear()
        return pool

    def _whole_fits(self, pool: Pool) -> bool:
        """Whether each device can hold the whole denoiser."""
        size = self.recipe.stamp[0]
        return all(free is None or size <= FOR_WEIGHTS * free for free in pool.free)

    def _load(self, pool: Pool, cut: Cut | None, lanes: list[list[int]], patches: Patches, tick: Tick) -> list[Loaded]:
        """What the ranks hold, after loading what they do not. ``lanes`` are the ranks of each lane, in order."""
        wanted = (self.recipe, cut, lanes, patches[0])
        current = pool.memory.get("loaded")
        if current and current[0] == wanted:
            return current[1]
        pool.memory.pop("loaded", None)
        pool.memory.pop("learnt", None)
        began = time.monotonic()
        tree, _ = pool.payload(patches[1], tick, where="weight patches")
        message = {
            rank: Load(recipe=self.recipe, cut=cut, peers=lane, patches=tree, patches_id=patches[0])
            for lane in lanes
            for rank in lane
        }
        replies = pool.request(message, step_timeout_s(), tick, using=tree)
        loaded: list[Loaded] = [replies.get(r, Loaded()) for r in range(len(self.devices))]
        pool.memory["loaded"] = (wanted, loaded)
        log.info("Leapfrog: weights in place after %.1f s", time.monotonic() - began)
        return loaded

    def _submit(self, pool: Pool, messages: dict[int, Evaluate], payload: Payload, kind: str, tick: Tick) -> Call:
        assert self.report
        report = self.report
        step = len(report.calls) + 1
        call = pool.submit(messages, tick, payload, lambda call, rank, reply: report.replied(call, rank, reply), step)
        report.sent(call.number, kind)
        return call


def _no_tick() -> None:
    pass


def _joined(parts: list[Any]) -> Any:
    """One output of several lanes' outputs, row by row."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return type(parts[0])(_joined(list(items)) for items in zip(*parts, strict=True))


def room_for_output(x: Any) -> int:
    """Bytes for a result: as many elements as ``x`` in float32, twice over, on a 64-byte boundary."""
    elements = sum(t.nelement() for t in flatten(x)[1])
    return elements * 8 + 64 & ~63


def _layout_of(payload: Payload) -> str:
    """What decides the flow between units and the shapes in it: shapes, structure, code inside the denoiser.

    How many steps the run has does not.
    """

    def structure(node: Any) -> Any:
        kind, body = node
        if kind == "t":
            return payload.heads[body].dtype, payload.heads[body].shape
        if kind == "v":
            return type(body).__name__
        if kind in ("l", "u"):
            return [kind, *map(structure, body)]
        if kind == "d":
            known = [(key[1], value) for key, value in body if key[1] != "sample_sigmas"]
            return [[key, value if key == "id" else structure(value)] for key, value in known]
        return kind

    return json.dumps(structure(payload.spec), default=str)


@dataclass
class Lane:
    """One pipeline in one call: the ranks of its components in order, the rows that it evaluates."""

    ranks: list[int]
    rows: tuple[int, int]


class SplitDenoiser(RemoteDenoiser):
    """Async UNet Split: each rank holds one component; with guidance, two lanes of components share the rows."""

    title = "Async UNet Split"
    _traces: ClassVar[dict[tuple[Recipe, tuple[str, ...], str], dict[int, Traced]]] = {}
    _units: ClassVar[dict[Recipe, list[str]]] = {}

    def __init__(self, plan: SplitPlan, recipe: Recipe, host: ComfyHost):
        super().__init__(plan.devices, recipe, host)
        self.plan = plan
        self._lanes: list[list[int]] = []
        self._rests: dict[int, Pending] = {}
        self._forget_streams()

    def begin_run(self) -> None:
        super().begin_run()
        self._lanes = []
        self._forget_streams()

    def end_run(self) -> None:
        self._forget_streams()
        if self.plan.mode in STALE_MODES and self.report and "async" not in self.report.calls.values():
            self.note("no step was asynchronous: take fewer warmup_steps, or a larger drift_bound")
        super().end_run()

    @property
    def components(self) -> int:
        """Components of the pipeline that serves the run; 0 before its first evaluation."""
        return len(self._lanes[0]) - self.plan.stride + 1 if self._lanes else 0

    def lookahead(self) -> tuple[Guard, Predictor] | None:
        """The schedule of lookahead in this run; None with a single component.

        As many evaluations are under way as there are components, whatever was rejected before: a wave that is thrown
        away cost no time, because the components would have had nothing else to do.
        """
        if self.components < 2:
            return None
        return Guard(self.components, self.plan.warmup, self.plan.bound, eager=True), Predictor("linear", spacing=2)

    def _forget_streams(self) -> None:
        for rest in self._rests.values():
            self.drop(rest)
        self._rests.clear()
        self._streams = Streams(self.plan.warmup, self.plan.mode in STALE_MODES, self.plan.bound, self.plan.stride)
        self._run = time.monotonic_ns()

    def submit(
        self, inputs: Any, x: Any, patches: Patches, tick: Tick, *, chunks: Sequence[int], stream: Hashable,
        times: Times = (1.0, 1.0), ahead: bool = False,
    ) -> Pending:  # fmt: skip
        """Start an evaluation. ``inputs`` is the tree (args, kwargs) of the denoiser's forward, ``x`` the latent in it.

        ``chunks`` say which conditioning each equal share of the rows belongs to. ``stream`` names the conditioning
        whose stale state may be used. ``times`` are the timesteps of the steps before and after this one, each as a
        multiple of this one's. ``ahead`` marks a step to come in the report. Raises LeapfrogError.
        """
        pool = self._ready_pool(tick)
        with pool.lock:
            if not self._lanes:
                self._lanes = self.plan.lanes(len(set(chunks)) > 1, self._whole_fits(pool))
            inside = inputs[1].get("transformer_options", {}).get("inside_patches", {})
            together = "cond_or_uncond" in inside.get("reads", ())
            lanes = _lanes_of_call(self._lanes, first_tensor(x).shape[0], chunks, together)
            payloads, out = self._write(pool, lanes, inputs, x, tick)
            if self._prepare(pool, payloads[0], patches, tick):
                payloads, out = self._write(pool, lanes, inputs, x, tick)
            return self._send(pool, lanes, payloads, out, x, stream, times, ahead, tick)

    def wait(self, pending: Sequence[Pending], tick: Tick) -> Pending:
        """The first of these evaluations that is ready. Raises LeapfrogError, or what ``tick`` raises."""
        finals = {rank for one in pending for rank in one.finals}
        call = self._wait([one.call for one in pending], sorted(finals), [one.size for one in pending], tick)
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
            parts = [pool.read(pending.call.replies[rank].output) for rank in pending.finals]
        finally:
            self.drop(pending)
        self._took(pending.call, pending.size, pending.sent_at)
        return _joined(parts)

    def drop(self, pending: Pending) -> None:
        """Nobody will ask for this evaluation's output (again)."""
        if self._pool and pending.last:
            self._pool.done(pending.call)

    def _write(self, pool: Pool, lanes: list[Lane], inputs: Any, x: Any, tick: Tick) -> tuple[list[Payload], int]:
        """What each lane gets, and where the room for outputs begins."""
        room = room_for_output(x) * len(lanes) * self.plan.stride
        payload, out = pool.payload(inputs, tick, reserve=room, where="denoiser input")
        if len(lanes) == 1:
            return [payload], out
        return rows_of(payload, Rows(inputs, first_tensor(x).shape[0]), [lane.rows for lane in lanes]), out

    def _send(
        self, pool: Pool, lanes: list[Lane], payloads: list[Payload], out: int, x: Any, stream: Hashable,
        times: Times, ahead: bool, tick: Tick,
    ) -> Pending:  # fmt: skip
        number, flow = self._layout(pool, payloads[0]) if self.components > 1 else (0, None)
        learnt: set[tuple[int, int]] = pool.memory.setdefault("learnt", set())
        how = self._streams.next((stream, number))
        if how.rest:
            return self._rests.pop(how.stream)
        at_last = self.components - 1
        two_steps = not how.exact and self.plan.stride == 2
        room = room_for_output(x)
        messages = {}
        for at, (lane, payload) in enumerate(zip(lanes, payloads, strict=True)):
            for position, rank in enumerate(lane.ranks):
                messages[rank] = Evaluate(
                    inputs=payload, out=out + room * (at * self.plan.stride + max(0, position - at_last)),
                    out_size=room, run=self._run, stream=how.stream, layout=number,
                    flow=None if (number, rank) in learnt else flow, exact=how.exact, measure=how.measure,
                    extrapolate=self.plan.mode == "extrapolated",
                    time=self._time(times, how.exact, two_steps and position <= at_last),
                )  # fmt: skip
        kind = "ahead" if ahead else "exact" if how.exact else "async"
        finals = [lane.ranks[-1] for lane in lanes]
        sent_at = time.perf_counter()
        call = self._submit(pool, messages, payloads[0], kind, tick)
        pending = Pending(call, finals, first_tensor(x).shape, sent_at)
        learnt.update((number, rank) for rank in messages)
        if two_steps:
            pending.last = False
            self._rests[how.stream] = replace(pending, finals=[lane.ranks[at_last] for lane in lanes], last=True)
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
        held = pool.memory["loaded"][0] if "loaded" in pool.memory else None
        # outlives the weights: a stale mode draws the same picture again only with the same cut
        purpose = (self.recipe, self._lanes, self.plan.balance)
        chosen_for, wanted = pool.memory.get("cut", (purpose, None))
        if chosen_for != purpose:
            wanted = None
        asked = False
        if self.components > 1:
            starts = wanted is None or not self.report or not self.report.calls
            traces, asked = self._trace(pool, payload, patches, every_rank=starts, tick=tick)
            if wanted and wanted.units != self._units[self.recipe]:
                starts, wanted = True, None
                traces, asked = self._trace(pool, payload, patches, every_rank=True, tick=tick)
            if starts:
                wanted = choose_cut(traces, self._lanes, self.plan, wanted)
        if held == (self.recipe, wanted, self._lanes, patches[0]):
            loaded = pool.memory["loaded"][1]
        else:
            if held is None or held[:3] != (self.recipe, wanted, self._lanes):
                self._forget_streams()
            loaded = self._load(pool, wanted, self._lanes, patches, tick)
            pool.memory["cut"] = (purpose, wanted)
            asked = True
        assert self.report
        self.report.loaded = loaded
        return asked

    def _trace(
        self, pool: Pool, payload: Payload, patches: Patches, every_rank: bool, tick: Tick
    ) -> tuple[list[Traced], bool]:
        """What ranks saw of the denoiser with inputs of this layout, and whether they had to look now.

        Every rank measures unit times; one rank alone is asked for the flow only.
        """
        known = self._traces.setdefault(self._layout_key(payload), {})
        ranks = range(len(self.devices)) if every_rank else self._lanes[0][:1]
        if all(rank in known for rank in ranks) or (known and not every_rank):
            return [known[rank] for rank in sorted(known)], False
        units = self._units.get(self.recipe, [])
        rounds = TRACE_ROUNDS if every_rank else 0
        trace = Trace(recipe=self.recipe, inputs=payload, units=units, rounds=rounds, shapes=patches[2])
        began = time.monotonic()
        seen = pool.request(dict.fromkeys(ranks, trace), step_timeout_s(), tick, using=payload)
        first: Traced = next(iter(seen.values()))
        self._units[self.recipe] = [unit.path for unit in first.units]
        if units and units != self._units[self.recipe]:
            # a unit runs several times in a call of this kind, so nobody can hold it alone: all is to be cut anew
            for key in [key for key in self._traces if key[0] == self.recipe]:
                del self._traces[key]
        self._traces.setdefault(self._layout_key(payload), {}).update(seen)
        log.info("Leapfrog: watched %d units in %.1f s", len(first.units), time.monotonic() - began)
        return [seen[rank] for rank in ranks], True

    def _layout_key(self, payload: Payload) -> tuple[Recipe, tuple[str, ...], str]:
        return self.recipe, self.devices, _layout_of(payload)

    def _layout(self, pool: Pool, payload: Payload) -> tuple[int, Flow]:
        """The number of these inputs' layout, and what flows between units in it."""
        key = self._layout_key(payload)
        layouts: dict[Hashable, int] = pool.memory.setdefault("layouts", {})
        return layouts.setdefault(key, len(layouts)), next(iter(self._traces[key].values())).flow


def first_tensor(x: Any) -> torch.Tensor:
    """A latent's tensor, of several (audio and video) the first."""
    return x if isinstance(x, torch.Tensor) else x[0]


def _lanes_of_call(lanes: list[list[int]], rows: int, chunks: Sequence[int], together: bool) -> list[Lane]:
    """How a call's rows spread: half of its chunks to each of two lanes, a single chunk to its conditioning's lane.

    They stay ``together`` where something inside the denoiser mixes them.
    """
    if len(lanes) == 1 or together or len(chunks) % len(lanes):
        ranks = lanes[chunks[0] % len(lanes)] if len(chunks) == 1 else lanes[0]
        return [Lane(ranks, (0, rows))]
    share = rows // len(lanes)
    return [Lane(ranks, (share * at, share * (at + 1))) for at, ranks in enumerate(lanes)]


@dataclass(eq=False)
class LaneEvaluation:
    """An evaluation of so many lanes; once it is sent, rows from ``begin`` of a batch."""

    x: Any
    rows: Rows
    lanes: int = 1
    batch: _Batch | None = None
    begin: int = 0

    @property
    def ranks(self) -> list[int]:
        """The ranks that have its rows, in order."""
        assert self.batch
        end = self.begin + self.rows.count
        return [rank for rank, share in self.batch.shares.items() if share[0] < end and self.begin < share[1]]


@dataclass(eq=False)
class _Batch:
    """A call with the rows of ``unread`` evaluations. ``shares`` are the rows ``[begin, end)`` of each rank."""

    call: Call
    size: torch.Size
    sent_at: float
    shares: dict[int, tuple[int, int]]
    unread: int
    read: dict[int, Any]


class LanesDenoiser(RemoteDenoiser):
    """ParaStep: each rank holds the whole denoiser and evaluates its share of the rows of all lanes.

    Evaluations that were submitted travel together, when one of them is waited for or at :meth:`flush`: those that are
    alike as one batch, of which each rank computes its share at once.
    """

    title = "ParaStep Sampler"

    def __init__(self, plan: LanesPlan, recipe: Recipe, host: ComfyHost):
        super().__init__(plan.devices, recipe, host)
        self.plan = plan
        self.conditionings = 1
        self._run = 0
        self._unsent: list[LaneEvaluation] = []
        self._patches: Patches = ("", {}, {})

    def begin_run(self) -> None:
        super().begin_run()
        self.conditionings = 1
        self._unsent.clear()
        self._run = time.monotonic_ns()

    def submit(
        self, inputs: Any, x: Any, group: int, patches: Patches, tick: Tick, alone: bool = False, lanes: int = 1
    ) -> LaneEvaluation:
        """Take in an evaluation of the denoiser at ``x`` of ``[rows, ...]``; rows stay together in groups of ``group``.

        ``alone``: not in one batch with other evaluations. Each conditioning has the rows of so many ``lanes``.

        Tensors in ``inputs`` whose first dimension is the number of rows, or of groups, are spread with them; the rest
        goes to all. ``conditionings`` is how many the calls of the run have had, at most.
        """
        if self._unsent and patches[0] != self._patches[0]:
            self.flush(tick)
        self._patches = patches
        rows = Rows(inputs, first_tensor(x).shape[0], group, alone)
        chunks = rows.chunks
        self.conditionings = max(self.conditionings, len(chunks))
        if lanes > 1:
            rows.inputs = with_chunks(inputs, [chunk for chunk in chunks for _ in range(lanes)])
        evaluation = LaneEvaluation(x, rows, lanes)
        self._unsent.append(evaluation)
        return evaluation

    def _load_whole(self, pool: Pool, patches: Patches, tick: Tick) -> list[Loaded]:
        return self._load(pool, None, [[rank] for rank in range(len(self.devices))], patches, tick)

    def flush(self, tick: Tick) -> None:
        """Send what has been submitted. Raises LeapfrogError."""
        if not self._unsent:
            return
        waiting, self._unsent = self._unsent, []
        pool = self._ready_pool(tick)
        with pool.lock:
            assert self.report
            self.report.loaded = self._load_whole(pool, self._patches, tick)
            calls = batched([one.rows for one in waiting])
            shares = row_shares([(rows.count, rows.group) for rows, _ in calls], len(self.devices))
            for (rows, members), share in zip(calls, shares, strict=True):
                self._send(pool, rows, share, [waiting[number] for number in members], tick)

    def _send(
        self, pool: Pool, rows: Rows, shares: dict[int, tuple[int, int]], members: list[LaneEvaluation], tick: Tick
    ) -> None:
        sent_at = time.perf_counter()
        room = room_for_output(members[0].x) * len(members)
        payload, out = pool.payload(rows.inputs, tick, reserve=room * len(shares), where="denoiser input")
        payloads = zip(shares, rows_of(payload, rows, list(shares.values())), strict=True)
        messages = {
            rank: Evaluate(inputs=share, out=out + at * room, out_size=room, run=self._run)
            for at, (rank, share) in enumerate(payloads)
        }
        lanes = sum(member.lanes for member in members)
        call = self._submit(pool, messages, payload, f"round of {lanes}" if lanes > 1 else "single", tick)
        batch = _Batch(
            call, torch.Size((rows.count, *first_tensor(members[0].x).shape[1:])), sent_at, shares, len(members), {}
        )
        for at, member in enumerate(members):
            member.batch, member.begin = batch, at * member.rows.count

    def wait(self, evaluation: LaneEvaluation, tick: Tick) -> None:
        """Until the rows of this evaluation are there. Raises LeapfrogError, or what ``tick`` raises."""
        self.flush(tick)
        assert evaluation.batch
        self._wait([evaluation.batch.call], evaluation.ranks, [evaluation.batch.size], tick)

    def result(self, evaluation: LaneEvaluation, tick: Tick) -> Any:
        """Wait for an evaluation and return its output, a CPU tensor (or a tree of them, as the model's output is)."""
        try:
            self.wait(evaluation, tick)
            batch, pool = evaluation.batch, self._pool
            assert batch and pool
            parts = []
            for rank in evaluation.ranks:
                if rank not in batch.read:
                    batch.read[rank] = pool.read(batch.call.replies[rank].output)
                begin, end = (
                    max(0, at - batch.shares[rank][0])
                    for at in (evaluation.begin, evaluation.begin + evaluation.rows.count)
                )
                parts.append(_cut(batch.read[rank], begin, end))
            if batch.unread == 1:
                self._took(batch.call, batch.size, batch.sent_at)
        finally:
            self.drop(evaluation)
        return _joined(parts)

    def drop(self, evaluation: LaneEvaluation) -> None:
        """Nobody will ask for this evaluation's output (again)."""
        if evaluation.batch is None:
            self._unsent = [one for one in self._unsent if one is not evaluation]
            return
        evaluation.batch.unread -= 1
        if evaluation.batch.unread == 0 and self._pool:
            self._pool.done(evaluation.batch.call)


def _cut(output: Any, begin: int, end: int) -> Any:
    """Rows ``[begin, end)`` of a denoiser's output."""
    if isinstance(output, torch.Tensor):
        return output[begin:end]
    return type(output)(_cut(part, begin, end) for part in output)
