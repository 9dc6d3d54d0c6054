"""The ways to make samples that scripts/quality.py compares: ComfyUI alone, both nodes, ComfyUI's EasyCache."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from quality_bench import Bench


class Made(NamedTuple):
    """Latents ``[samples, ...]``, and for each what its ideal speed is computed from."""

    latents: np.ndarray
    counts: list[float]


class Way(Protocol):
    """A way to make samples: its name in the table, the components or lanes."""

    @property
    def title(self) -> str: ...
    @property
    def degree(self) -> int | None: ...

    def made(self, bench: Bench, steps: int, part: range) -> Made:
        """These of the samples."""
        ...

    def speed(self, counts: Sequence[float], steps: int) -> float:
        """The ideal speed of all samples."""
        ...


class Run(NamedTuple):
    """A way in so many steps."""

    way: Way
    steps: int


@dataclass(frozen=True)
class Alone:
    """ComfyUI alone."""

    sampler: str
    title: str = "ComfyUI alone"
    degree: int | None = None

    def made(self, bench: Bench, steps: int, part: range) -> Made:
        return Made(bench.sampled(bench.ground.model, steps, self.sampler, part).numpy(), [1.0] * len(part))

    def speed(self, counts: Sequence[float], steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class SplitWay:
    """A mode of Async UNet Split: its name in the table and there, the warm-up used (0: automatic), where to cut.

    With ``stride`` 2 it takes a device more than it has components.
    """

    title: str
    mode: str
    warmup: int
    degree: int = 0
    cut: str = ""
    stride: int = 1
    time_shift: bool = False

    @property
    def ranks(self) -> int:
        return self.degree + self.stride - 1

    def made(self, bench: Bench, steps: int, part: range) -> Made:
        """Through the node; counts what the traces say was exact."""
        made, traces = self.traced(bench, steps, part)
        exact = []
        for trace in traces:
            last = (one for one in trace["traceEvents"] if one["ph"] == "X" and one["tid"] == self.degree - 1)
            exact.append(sum(event["name"] == "exact" for event in last))
        return Made(made.numpy(), exact)

    def speed(self, counts: Sequence[float], steps: int) -> float:
        exact = sum(counts) / (steps * len(counts))  # conditionings of so small a latent go in one call
        return 1.0 if self.mode == "exact" else 1 / (exact + (1 - exact) / self.degree / self.stride)

    def traced(self, bench: Bench, steps: int, part: range) -> tuple[torch.Tensor, list[Any]]:
        """Latents, and the trace of each."""
        from leapfrog.nodes import AsyncUNetSplit

        node = AsyncUNetSplit.execute(
            model=bench.ground.model, devices=",".join(["cpu"] * self.ranks), components=self.degree,
            warmup_steps=self.warmup, stride=self.stride, mode=self.mode, cfg_lanes="off", cut=self.cut,
            time_shift=self.time_shift,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LEAPFROG_TRACE_DIR"] = folder
            made = bench.sampled(node.args[0], steps, bench.subject.sampler, part)
            del os.environ["LEAPFROG_TRACE_DIR"]
            traces = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        if len(traces) != len(part):
            raise RuntimeError(f"mode {self.mode} left {len(traces)} traces: did ranks compute anything?")
        return made, traces


@dataclass(frozen=True)
class RoundsWay:
    """A way to use ParaStep: its name in the table, the fidelity and predictor chosen on the node."""

    title: str
    fidelity: str
    predictor: str = "linear"
    degree: int = 0

    def made(self, bench: Bench, steps: int, part: range) -> Made:
        """Through ParaStep on one rank; counts rounds, as a share of evaluations."""
        from leapfrog.nodes.rounds_sampler import in_rounds
        from leapfrog.parallel_backend import LanesPlan

        warmup = 0 if self.fidelity != "unguarded" else 5 if self.degree >= 4 else 3
        calibrate = bench.subject.calibrate > 0
        plan = LanesPlan.choose("cpu", self.degree, warmup, self.predictor, self.fidelity, calibrate=calibrate)
        shares: list[float] = []

        def through(base: Any) -> Any:
            sampler = in_rounds(plan, base)
            whole = sampler.sampler_function

            def counted(*args: Any, **kwargs: Any) -> Any:
                result = whole(*args, **kwargs)
                shares.append(sampler.last_run.count / sampler.last_run.asked)
                return result

            sampler.sampler_function = counted
            return sampler

        made = bench.sampled(bench.ground.model, steps, bench.subject.sampler, part, through)
        return Made(made.numpy(), shares)

    def speed(self, counts: Sequence[float], steps: int) -> float:
        return len(counts) / sum(counts)


@dataclass(frozen=True)
class CacheWay:
    """ComfyUI's EasyCache with a reuse_threshold."""

    threshold: float
    degree: int | None = None

    @property
    def title(self) -> str:
        return f"EasyCache, threshold {self.threshold}"

    def made(self, bench: Bench, steps: int, part: range) -> Made:
        """Counts the guided evaluations that were not skipped."""
        from comfy.patcher_extension import WrappersMP
        from comfy_extras.nodes_easycache import EasyCacheNode

        def with_copy(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return executor(x.clone(), *args, **kwargs)  # which it writes into; in float32 that is the sampler's own

        model = bench.ground.model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "before the cache", with_copy)
        model = EasyCacheNode.execute(model, self.threshold, 0.15, 0.95, False).args[0]
        evaluated: list[Any] = []

        def count(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = next(one for one in (*args, *kwargs.values()) if isinstance(one, dict) and "uuids" in one)
            evaluated.extend(options["uuids"])
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "behind the cache", count)
        made, counts = [], []
        for at in part:
            evaluated.clear()
            made.append(bench.sampled(model, steps, bench.subject.sampler, range(at, at + 1)))
            counts.append(len(evaluated) / (1 if bench.cfg == 1 else 2))
        return Made(torch.cat(made).numpy(), counts)

    def speed(self, counts: Sequence[float], steps: int) -> float:
        """Infinite for a denoiser that EasyCache does not reach."""
        return steps * len(counts) / sum(counts) if any(counts) else math.inf


SPLITS = (
    SplitWay("lookahead", "lookahead", 0),
    SplitWay("AsyncDiff, states extrapolated", "extrapolated", 3),
    SplitWay("AsyncDiff as published", "asyncdiff", 3),
    SplitWay("AsyncDiff, time shift", "asyncdiff", 3, time_shift=True),
    SplitWay("AsyncDiff, stride 2", "asyncdiff", 3, stride=2),
)
EXACT = SplitWay("exact", "exact", 3)
EXACT_ROUNDS = RoundsWay("ParaStep, exact", "exact")
"""These two draw what ComfyUI alone draws, so the smallest number of components or lanes will do."""
ROUNDS = (
    RoundsWay("ParaStep, faithful", "faithful"),
    RoundsWay("ParaStep, balanced", "balanced"),
    RoundsWay("ParaStep, balanced, newest", "balanced", "newest"),
    RoundsWay("ParaStep, balanced, paper", "balanced", "paper"),
    RoundsWay("ParaStep, fast", "fast"),
    RoundsWay("ParaStep, unguarded", "unguarded"),
    RoundsWay("ParaStep, unguarded, newest", "unguarded", "newest"),
    RoundsWay("ParaStep as published", "unguarded", "paper"),
)
