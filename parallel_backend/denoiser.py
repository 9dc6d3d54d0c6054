"""The denoiser as the host sees it: a call that goes to the pool. One class per family of schedule."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .cutting import FOR_WEIGHTS, choose_cut
from .errors import LeapfrogError
from .plan import STALE_MODES, LanesPlan, SplitPlan
from .protocol import Cut, Evaluate, Load, Loaded, Payload, Recipe, Trace, Traced, Unload
from .report import RunReport
from .schedules.asyncdiff import Streams
from .schedules.lookahead import Lookahead
from .schedules.parastep import row_shares
from .supervisor import Call, ComfyHost, Pool, Tick, acquire, step_timeout_s
from .tensors import flatten, slice_rows
from .units import Flow

log = logging.getLogger("leapfrog")
WARM_TIMEOUT_S = 30.0
WARM_TIMEOUT_FACTOR = 20
TRACE_ROUNDS = 3
# Options whose tensors have no rows, whatever their first dimension is.
WHOLE = frozenset(("inside_patches", "sample_sigmas"))


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
        try:
            flatten(patches[1], "weight patches")
        except TypeError as error:
            raise LeapfrogError.of("unsupported_patch", f"{error}.") from None

    def begin_run(self) -> None:
        """Forget stale state; call before the first step of every sampling run."""
        self.report = RunReport(self.title, self.devices)

    def end_run(self) -> None:
        """Log what the run did."""
        if self.report and self.report.calls:
            for line in self.report.lines():
                log.info("Leapfrog: %s", line)
            path = self.report.save_trace()
            if path:
                log.info("Leapfrog: trace written to %s", path)
        self.report = None

    def note(self, text: str) -> None:
        """A line for the run's report."""
        if self.report:
            self.report.notes.append(text)

    def unload(self) -> None:
        """Drop the weights in the ranks; the next call loads them again."""
        pool = self._pool
        if pool and pool.alive:
            with pool.lock:
                pool.memory.pop("loaded", None)
                pool.request({r: Unload() for r in range(len(self.devices))}, step_timeout_s(), _no_tick)

    def close(self) -> None:
        """End the ranks."""
        if self._pool:
            with self._pool.lock:
                self._pool.close()
        self._pool = None

    def loaded_bytes(self, rank: int) -> int:
        """Bytes of weights that a rank holds now."""
        loaded = self._pool.memory.get("loaded") if self._pool and self._pool.alive else None
        return loaded[1][rank].nbytes if loaded else 0

    def wait(self, pending: Sequence[Pending], tick: Tick) -> Pending:
        """The first of these evaluations that is ready. Raises LeapfrogError, or what ``tick`` raises."""
        assert self._pool
        # a call of known size gets a tighter deadline; those before it in the pipeline come first
        known = max(self._slowest.get(one.size, step_timeout_s()) for one in pending)
        timeout = min(step_timeout_s(), max(WARM_TIMEOUT_S, WARM_TIMEOUT_FACTOR * known))
        with self._pool.lock:
            finals = {rank for one in pending for rank in one.finals}
            call = self._pool.wait([one.call for one in pending], sorted(finals), timeout, tick)
        return next(one for one in pending if one.call is call)

    def ready(self, pending: Pending) -> bool:
        return all(rank in pending.call.replies for rank in pending.finals)

    def result(self, pending: Pending, tick: Tick) -> Any:
        """Wait for an evaluation and return its output, a CPU tensor (or a tree of them, as the model's output is)."""
        pool = self._pool
        assert pool and self.report
        try:
            self.wait([pending], tick)
            if pending.measured:
                pool.wait([pending.call], sorted(pending.call.ranks), step_timeout_s(), tick)
                pending.measured(max(reply.drift for reply in pending.call.replies.values()))
            parts = [pool.read(pending.call.replies[rank].output) for rank in pending.finals]
        finally:
            self.drop(pending)
        seconds = time.perf_counter() - pending.sent_at
        self._slowest[pending.size] = max(self._slowest.get(pending.size, 0.0), seconds)
        self.report.ended(pending.call.number, seconds)
        return _joined(parts)

    def drop(self, pending: Pending) -> None:
        """Nobody will ask for this evaluation's output (again)."""
        if self._pool and pending.last:
            self._pool.done(pending.call)

    def _ready_pool(self, tick: Tick) -> Pool:
        if self._pool is None or not self._pool.alive:
            self._pool = acquire(self.devices, self.host, tick, self)
            self._slowest.clear()
        return self._pool

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

    def _submit(
        self, pool: Pool, messages: dict[int, Evaluate], payload: Payload, finals: list[int], size: torch.Size,
        kind: str, tick: Tick,
    ) -> Pending:  # fmt: skip
        assert self.report
        report = self.report
        call = pool.submit(messages, tick, payload, lambda call, rank, reply: report.replied(call, rank, reply))
        report.sent(call.number, kind)
        return Pending(call, finals, size, time.perf_counter())


def _no_tick() -> None:
    pass


def _joined(parts: list[Any]) -> Any:
    """One output of several lanes' outputs, row by row."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return type(parts[0])(_joined(list(items)) for items in zip(*parts, strict=True))


def _room_for_output(x: Any) -> int:
    """Bytes for a result: as many elements as ``x`` in float32, twice over, on a 64-byte boundary."""
    elements = sum(t.nelement() for t in flatten(x)[1])
    return elements * 8 + 64 & ~63


def _layout_of(payload: Payload) -> str:
    """What decides the flow between units and the shapes in it: shapes, structure, code inside the denoiser."""

    def structure(node: Any) -> Any:
        kind, body = node
        if kind == "v":
            return type(body).__name__
        if kind in ("l", "u"):
            return [kind, *map(structure, body)]
        if kind == "d":
            return [[key[1], value if key[1] == "id" else structure(value)] for key, value in body]
        return kind

    return json.dumps([structure(payload.spec), [(head.dtype, head.shape) for head in payload.heads]], default=str)


@dataclass
class Lane:
    """One pipeline in one call: the ranks of its components in order, the rows and the chunks that it evaluates."""

    ranks: list[int]
    rows: tuple[int, int]
    chunks: tuple[int, int]


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
        super().end_run()

    @property
    def components(self) -> int:
        """Components of the pipeline that serves the run; 0 before its first evaluation."""
        return len(self._lanes[0]) - self.plan.stride + 1 if self._lanes else 0

    def lookahead(self, sigmas: Sequence[float]) -> Lookahead:
        """The schedule of a run with these sigmas."""
        return Lookahead(sigmas, self.components - 1, self.plan.warmup, self.plan.bound)

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
            lanes = _lanes_of_call(self._lanes, _first(x).shape[0], chunks, together)
            payloads, out = self._write(pool, lanes, inputs, x, chunks, tick)
            if self._prepare(pool, payloads[0], patches, tick):
                payloads, out = self._write(pool, lanes, inputs, x, chunks, tick)
            return self._send(pool, lanes, payloads, out, x, stream, times, ahead, tick)

    def _write(
        self, pool: Pool, lanes: list[Lane], inputs: Any, x: Any, chunks: Sequence[int], tick: Tick
    ) -> tuple[list[Payload], int]:
        """What each lane gets, and where the room for outputs begins."""
        trees = [_with_chunks(inputs, chunks[slice(*lane.chunks)]) for lane in lanes]
        payload, out = pool.payload(
            trees[0], tick, reserve=_room_for_output(x) * len(lanes) * self.plan.stride, where="denoiser input"
        )
        if len(lanes) == 1:
            return [payload], out
        rows = _first(x).shape[0]
        return [_rows_of(payload, tree, rows, *lane.rows) for tree, lane in zip(trees, lanes, strict=True)], out

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
        room = _room_for_output(x)
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
        pending = self._submit(pool, messages, payloads[0], finals, _first(x).shape, kind, tick)
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

    def _whole_fits(self, pool: Pool) -> bool:
        size = self.recipe.stamp[0]
        return all(free is None or size <= FOR_WEIGHTS * free for free in pool.free)

    def _prepare(self, pool: Pool, payload: Payload, patches: Patches, tick: Tick) -> bool:
        """Measure, cut and load what is not there yet; whether the pool was asked anything meanwhile."""
        recipe, cut, lanes, patches_id = pool.memory["loaded"][0] if "loaded" in pool.memory else (None, None, None, "")
        same = recipe == self.recipe and lanes == self._lanes
        asked = False
        wanted = cut if same else None
        if self.components > 1:
            starts = wanted is None or not self.report or not self.report.calls
            traces, asked = self._trace(pool, payload, patches, every_rank=starts, tick=tick)
            if wanted and wanted.units != self._units[self.recipe]:
                starts, wanted = True, None
                traces, asked = self._trace(pool, payload, patches, every_rank=True, tick=tick)
            if starts:
                wanted = choose_cut(traces, self._lanes, self.plan, wanted)
        if same and wanted == cut and patches_id == patches[0]:
            loaded = pool.memory["loaded"][1]
        else:
            if not same or wanted != cut:
                self._forget_streams()
            loaded = self._load(pool, wanted, self._lanes, patches, tick)
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


def _first(x: Any) -> torch.Tensor:
    """A latent's tensor, of several (audio and video) the first."""
    return x if isinstance(x, torch.Tensor) else x[0]


def _lanes_of_call(lanes: list[list[int]], rows: int, chunks: Sequence[int], together: bool) -> list[Lane]:
    """How a call's rows spread: half of its chunks to each of two lanes, a single chunk to its conditioning's lane.

    They stay ``together`` where something inside the denoiser mixes them.
    """
    if len(lanes) == 1 or together or len(chunks) % len(lanes):
        ranks = lanes[chunks[0] % len(lanes)] if len(chunks) == 1 else lanes[0]
        return [Lane(ranks, (0, rows), (0, len(chunks)))]
    each, share = len(chunks) // len(lanes), rows // len(lanes)
    return [Lane(ranks, (share * at, share * (at + 1)), (each * at, each * (at + 1))) for at, ranks in enumerate(lanes)]


def _rows_of(payload: Payload, tree: Any, rows: int, begin: int, end: int) -> Payload:
    """A payload with rows ``[begin, end)`` of its tensors of ``rows`` rows, for a tree that has the same tensors."""
    spec, _ = flatten(tree, "denoiser input")
    whole = set(_tensors_under(spec, WHOLE))
    heads = [head if i in whole else slice_rows(head, rows, begin, end) for i, head in enumerate(payload.heads)]
    return Payload(payload.arena, spec, heads)


def _tensors_under(node: Any, keys: frozenset[str], inside: bool = False) -> Iterator[int]:
    """Numbers of a spec's tensors below dict entries with these keys."""
    kind, body = node
    if kind == "t" and inside:
        yield body
    elif kind in ("l", "u"):
        for item in body:
            yield from _tensors_under(item, keys, inside)
    elif kind == "d":
        for key, value in body:
            yield from _tensors_under(value, keys, inside or key[1] in keys)


def _with_chunks(inputs: Any, chunks: Sequence[int]) -> Any:
    """The inputs for some of the chunks: their tensors are sliced later, this is what names the chunks."""
    args, kwargs = inputs
    options = kwargs.get("transformer_options")
    if not options or "cond_or_uncond" not in options:
        return inputs
    return args, {**kwargs, "transformer_options": {**options, "cond_or_uncond": list(chunks)}}


class LanesDenoiser(RemoteDenoiser):
    """ParaStep Sampler: each rank holds the whole denoiser and evaluates its share of a call's rows."""

    title = "ParaStep Sampler"

    def __init__(self, plan: LanesPlan, recipe: Recipe, host: ComfyHost):
        super().__init__(plan.devices, recipe, host)
        self.plan = plan
        self._run = 0

    def begin_run(self) -> None:
        super().begin_run()
        self._run = time.monotonic_ns()

    def __call__(self, inputs: Any, x: torch.Tensor, group: int, patches: Patches, tick: Tick) -> torch.Tensor:
        """Evaluate the denoiser on ``x`` of ``[rows, ...]``, rows spread over the ranks in groups of ``group``.

        Tensors in ``inputs`` whose first dimension is the number of rows are spread with them; the rest goes to all.
        """
        rows = x.shape[0]
        pool = self._ready_pool(tick)
        with pool.lock:
            assert self.report
            self.report.loaded = self._load(pool, None, [[rank] for rank in range(len(self.devices))], patches, tick)
            room = _room_for_output(x)
            payload, out = pool.payload(inputs, tick, reserve=room * len(self.devices), where="denoiser input")
            chunks = inputs[1].get("transformer_options", {}).get("cond_or_uncond") or [0]
            messages = {}
            for rank, (begin, end) in enumerate(row_shares(rows, group, len(self.devices))):
                if begin < end:
                    own = chunks[begin * len(chunks) // rows : -(-end * len(chunks) // rows)]
                    share = _rows_of(payload, _with_chunks(inputs, own), rows, begin, end)
                    messages[rank] = Evaluate(inputs=share, out=out + rank * room, out_size=room, run=self._run)
            pending = self._submit(pool, messages, payload, sorted(messages), x.shape, f"{rows} rows", tick)
        return self.result(pending, tick)
