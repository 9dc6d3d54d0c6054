"""The denoiser as the host sees it: a call that goes to the pool. One class per family of schedule."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from typing import Any, ClassVar

import torch

from .errors import LeapfrogError
from .plan import LanesPlan, SplitPlan
from .protocol import Done, Evaluate, Load, Loaded, Payload, Profile, Recipe, Unload
from .report import RunReport
from .schedules.asyncdiff import Streams
from .schedules.parastep import row_shares
from .schedules.partition import partition, slowest_share
from .supervisor import ComfyHost, Pool, Tick, acquire, step_timeout_s
from .tensors import flatten, slice_rows

log = logging.getLogger("leapfrog")
WARM_TIMEOUT_S = 30.0
WARM_TIMEOUT_FACTOR = 20


# Weight patches (LoRA and the like) to bake into the ranks' weights: an id that changes whenever they do, and a tree.
Patches = tuple[str, dict[str, Any]]


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
        if self.report and self.report.round_trips:
            for line in self.report.lines():
                log.info("Leapfrog: %s", line)
            path = self.report.save_trace()
            if path:
                log.info("Leapfrog: trace written to %s", path)
        self.report = None

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

    def _ready(self, tick: Tick) -> Pool:
        if self._pool is None or not self._pool.alive:
            self._pool = acquire(self.devices, self.host, tick, self)
            self._slowest.clear()
        return self._pool

    def _load(self, pool: Pool, bounds: list[tuple[int, int]], patches: Patches, tick: Tick) -> list[Loaded]:
        wanted = (self.recipe, tuple(bounds), patches[0])
        current = pool.memory.get("loaded")
        if current and current[0] == wanted:
            return current[1]
        pool.memory.pop("loaded", None)
        began = time.monotonic()
        tree, _ = pool.payload(patches[1], tick, where="weight patches")
        message = {
            r: Load(recipe=self.recipe, bounds=bounds, patches=tree, patches_id=patches[0])
            for r in range(len(self.devices))
        }
        replies = pool.request(message, step_timeout_s(), tick)
        loaded: list[Loaded] = [replies[r] for r in range(len(self.devices))]
        pool.memory["loaded"] = (wanted, loaded)
        log.info("Leapfrog: weights in place after %.1f s", time.monotonic() - began)
        return loaded

    def _evaluate(
        self, pool: Pool, messages: dict[int, Evaluate], size: torch.Size, kind: str, tick: Tick
    ) -> list[torch.Tensor]:
        """Send, wait, return the result tensors in rank order. A call of known ``size`` gets a tighter deadline."""
        timeout = step_timeout_s()
        known = self._slowest.get(size)
        if known:
            timeout = min(timeout, max(WARM_TIMEOUT_S, WARM_TIMEOUT_FACTOR * known))
        began = time.perf_counter()
        replies: dict[int, Done] = pool.request(messages, timeout, tick)
        payloads = [replies[rank].output for rank in sorted(replies)]
        outputs = [pool.read(payload) for payload in payloads if payload]
        seconds = time.perf_counter() - began
        self._slowest[size] = max(known or 0.0, seconds)
        assert self.report
        self.report.add(len(self.report.round_trips), kind, seconds, replies)
        return [tensor for output in outputs for tensor in output]


def _no_tick() -> None:
    pass


def _room_for_output(x: torch.Tensor) -> int:
    """Bytes for a result: as many elements as ``x`` in float32, twice over, on a 64-byte boundary."""
    return x.nelement() * 8 + 64 & ~63


def _signature(payload: Payload) -> Hashable:
    return tuple((head.dtype, head.shape) for head in payload.heads)


class SplitDenoiser(RemoteDenoiser):
    """Async UNet Split: each rank holds one component."""

    title = "Async UNet Split"
    _costs: ClassVar[dict[Hashable, list[float]]] = {}

    def __init__(self, plan: SplitPlan, recipe: Recipe, host: ComfyHost):
        super().__init__(plan.devices, recipe, host)
        self.plan = plan
        self._streams = Streams(plan.warmup, plan.mode == "async")
        self._run = 0

    def begin_run(self) -> None:
        super().begin_run()
        self._forget_streams()

    def _forget_streams(self) -> None:
        self._streams = Streams(self.plan.warmup, self.plan.mode == "async")
        self._run = time.monotonic_ns()

    def __call__(self, inputs: Any, x: torch.Tensor, stream: Hashable, patches: Patches, tick: Tick) -> torch.Tensor:
        """Evaluate the denoiser. ``inputs`` is the tree (args, kwargs) of its forward, ``x`` the latent within it.

        ``stream`` names the conditioning whose stale state may be used. Returns a CPU tensor shaped like ``x`` (or as
        the model's output is). Raises LeapfrogError.
        """
        pool = self._ready(tick)
        with pool.lock:
            payload, out = pool.payload(inputs, tick, reserve=_room_for_output(x), where="denoiser input")
            shape = _signature(payload)
            if "bounds" not in pool.memory or pool.memory["bounds"][0] != self.recipe:
                pool.memory["bounds"] = (self.recipe, self._balance(pool, payload, shape, tick))
            loaded = pool.memory.get("loaded")
            bounds = pool.memory["bounds"][1]
            if not loaded or loaded[0] != (self.recipe, tuple(bounds), patches[0]):
                self._load(pool, bounds, patches, tick)
                self._forget_streams()  # the ranks may have lost theirs: weights can be unloaded in the middle of a run
                payload, out = pool.payload(inputs, tick, reserve=_room_for_output(x), where="denoiser input")
            assert self.report
            self.report.loaded = pool.memory["loaded"][1]
            shapes = pool.memory.setdefault("shapes", {})
            number = shapes.setdefault((self.recipe, tuple(bounds), shape), len(shapes))
            stream_number, exact = self._streams.next((stream, number))
            message = {
                rank: Evaluate(
                    inputs=payload, out=out, out_size=_room_for_output(x), run=self._run,
                    stream=stream_number, shape=number, exact=exact,
                )
                for rank in range(len(self.devices))
            }  # fmt: skip
            (output,) = self._evaluate(pool, message, x.shape, "exact" if exact else "async", tick)
        return output

    def _balance(self, pool: Pool, payload: Payload, shape: Hashable, tick: Tick) -> list[tuple[int, int]]:
        """Components whose slowest is as fast as possible, from unit times measured on the first rank's device."""
        key = (self.recipe, shape, self.devices)
        if key not in self._costs:
            reply = pool.request({0: Profile(recipe=self.recipe, inputs=payload)}, step_timeout_s(), tick)[0]
            self._costs[key] = reply.seconds
            log.info("Leapfrog: measured %d units, %.1f ms together", len(reply.seconds), 1e3 * sum(reply.seconds))
        costs = self._costs[key]
        bounds = list(partition(costs, self.plan.components))
        share = slowest_share(costs, bounds)
        log.info("Leapfrog: components %s, the slowest is %.0f %% of the denoiser", bounds, 100 * share)
        return bounds


class LanesDenoiser(RemoteDenoiser):
    """ParaStep Sampler: each rank holds the whole denoiser and evaluates its share of a call's rows."""

    title = "ParaStep Sampler"

    def __init__(self, plan: LanesPlan, recipe: Recipe, host: ComfyHost):
        super().__init__(plan.devices, recipe, host)
        self.plan = plan

    def __call__(self, inputs: Any, x: torch.Tensor, group: int, patches: Patches, tick: Tick) -> torch.Tensor:
        """Evaluate the denoiser on ``x`` of ``[rows, ...]``, rows spread over the ranks in groups of ``group``.

        Tensors in ``inputs`` whose first dimension is the number of rows are spread with them; the rest goes to all.
        """
        rows = x.shape[0]
        pool = self._ready(tick)
        with pool.lock:
            loaded = self._load(pool, [], patches, tick)
            room = _room_for_output(x)
            payload, out = pool.payload(inputs, tick, reserve=room * len(self.devices), where="denoiser input")
            assert self.report
            self.report.loaded = loaded
            messages = {}
            for rank, (begin, end) in enumerate(row_shares(rows, group, len(self.devices))):
                if begin < end:
                    heads = [slice_rows(head, rows, begin, end) for head in payload.heads]
                    share = Payload(payload.arena, payload.spec, heads)
                    messages[rank] = Evaluate(inputs=share, out=out + rank * room, out_size=room)
            parts = self._evaluate(pool, messages, x.shape, f"{rows} rows", tick)
        return torch.cat(parts) if len(parts) > 1 else parts[0]
