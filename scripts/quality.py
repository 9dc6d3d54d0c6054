"""How close both blocks come to ComfyUI alone: every mode, preset and predictor, on models that really denoise.

For each model a table, a CSV file and a picture (fidelity against speed) go to docs/quality/. Every sample has a prompt
that training never saw and a seed of its own; it is compared with the one that ComfyUI alone makes in as many steps.
Closeness to one's own n steps flatters a parallel method, so each sample is also compared with a nearly converged one
and judged, and one device's ways to save the same time stand beside: fewer steps of Euler and DPM++ 2M, and ComfyUI's
EasyCache. Nothing is timed. Ideal speed counts, for the split, exact evaluations whole and others as 1/N; for ParaStep,
rounds, however many evaluations they have; for the cache, evaluations that are not skipped.

    python scripts/quality.py --samples 4     # what `make quality` does
    python scripts/quality.py --samples 64    # the long form
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pack import BASE, ROOT, add_comfyui, load_pack
from quality_report import Row, compared, write
from quality_summary import write_summary

SEED = 100
CONVERGED = ("dpmpp_2m", 125)
PEERS = {"euler": "Euler, fewer steps", "dpmpp_2m": "DPM++ 2M, fewer steps"}
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""EasyCache's reuse_threshold."""


@dataclass(frozen=True)
class SplitWay:
    """A mode of Async UNet Split: its name in the table and there, the warm-up used (0: automatic)."""

    title: str
    mode: str
    warmup: int

    def made(self, bench: Bench, degree: int, steps: int) -> tuple[torch.Tensor, float]:
        """Latents through the node, and their ideal speed by what the traces say was exact."""
        from leapfrog.nodes import AsyncUNetSplit

        node = AsyncUNetSplit.execute(
            model=bench.ground.model, devices=",".join(["cpu"] * degree), components=degree,
            warmup_steps=self.warmup, stride=1, mode=self.mode, cfg_lanes="off",
        )  # fmt: skip
        made = bench.sampled(node.args[0], steps, bench.sampler)
        kinds = []
        for path in sorted(bench.folder.glob("run-*.json")):
            events = json.loads(path.read_text())["traceEvents"]
            kinds += [event["name"] for event in events if event["ph"] == "X" and event["tid"] == degree - 1]
            path.unlink()
        if not kinds:
            raise RuntimeError(f"mode {self.mode} left no trace: did ranks compute anything?")
        exact = kinds.count("exact") / (steps * len(made))  # conditionings of so small a latent go in one call
        return made, 1.0 if self.mode == "exact" else 1 / (exact + (1 - exact) / degree)


@dataclass(frozen=True)
class RoundsWay:
    """A way to use ParaStep: its name in the table, the fidelity and predictor chosen on the node."""

    title: str
    fidelity: str
    predictor: str = "linear"

    def made(self, bench: Bench, degree: int, steps: int) -> tuple[torch.Tensor, float]:
        """Latents through ParaStep on one rank, and their ideal speed by how many rounds there were."""
        from leapfrog.nodes.rounds_sampler import in_rounds
        from leapfrog.parallel_backend import LanesPlan

        warmup = 0 if self.fidelity != "unguarded" else 5 if degree >= 4 else 3
        plan = LanesPlan.choose("cpu", degree, warmup, self.predictor, self.fidelity, calibrate=bench.calibrate)
        shares = []

        def through(base: Any) -> Any:
            sampler = in_rounds(plan, base)
            whole = sampler.sampler_function

            def counted(*args: Any, **kwargs: Any) -> Any:
                result = whole(*args, **kwargs)
                shares.append(sampler.last_run.count / sampler.last_run.asked)
                return result

            sampler.sampler_function = counted
            return sampler

        made = bench.sampled(bench.ground.model, steps, bench.sampler, through)
        return made, len(shares) / sum(shares)


SPLITS = (
    SplitWay("lookahead", "lookahead", 0),
    SplitWay("AsyncDiff, states extrapolated", "extrapolated", 3),
    SplitWay("AsyncDiff as published", "asyncdiff", 3),
)
EXACT = SplitWay("exact", "exact", 3)
ROUNDS = (
    RoundsWay("ParaStep, faithful", "faithful"),
    RoundsWay("ParaStep, balanced", "balanced"),
    RoundsWay("ParaStep, fast", "fast"),
    RoundsWay("ParaStep, unguarded", "unguarded"),
    RoundsWay("ParaStep, unguarded, newest", "unguarded", "newest"),
    RoundsWay("ParaStep as published", "unguarded", "paper"),
)


class Bench:
    """One proving model in this process, some prompts with a seed each, and what ComfyUI makes of them."""

    def __init__(self, name: str, samples: int, sampler: str, calibrate: bool, folder: Path):
        from grounds import GROUNDS, Prompts

        self.ground: Any = GROUNDS[name]()
        prompts, count = Prompts(BASE / "models" / "text_encoders" / "shapes_clip.safetensors"), len(self.ground.asked)
        self.asked = [self.ground.asked[i * count // min(samples, count) % count] for i in range(samples)]
        self.positive, self.negative = [prompts(one.caption) for one in self.asked], prompts("")
        self.sampler, self.calibrate, self.folder = sampler, calibrate, folder

    def sampled(
        self, model: Any, steps: int, name: str, through: Callable[[Any], Any] = lambda sampler: sampler
    ) -> torch.Tensor:
        """One latent for each sample, each in a run of its own. ``through`` makes a SAMPLER of that named ``name``."""
        import comfy.sample
        import comfy.samplers

        latent, settings, made = torch.zeros(1, *self.ground.latent), self.ground.settings, []
        sigmas = comfy.samplers.KSampler(model, steps, "cpu", name, settings.scheduler, 1.0, model.model_options).sigmas
        sampler = through(comfy.samplers.sampler_object(name))
        for seed, positive in enumerate(self.positive, SEED):
            noise = comfy.sample.prepare_noise(latent, seed)
            with torch.inference_mode():
                made.append(
                    comfy.sample.sample_custom(
                        model, noise, settings.cfg, sampler, sigmas, positive, self.negative, latent, disable_pbar=True,
                        seed=seed,
                    )
                )  # fmt: skip
        return torch.cat(made)

    @cache  # noqa: B019  one object for the whole script
    def alone(self, sampler: str, steps: int) -> torch.Tensor:
        """What ComfyUI alone makes."""
        return self.sampled(self.ground.model, steps, sampler)

    @cache  # noqa: B019
    def pictures(self, sampler: str, steps: int) -> torch.Tensor:
        """What ComfyUI alone makes, to compare with."""
        return self.ground.pictures(self.ground.decode(self.alone(sampler, steps)))

    @cache  # noqa: B019
    def cached(self, threshold: float, steps: int) -> tuple[torch.Tensor, float]:
        """What ComfyUI alone makes with EasyCache, and the speed by the evaluations that it did not skip.

        The speed is infinite for a denoiser that EasyCache does not reach.
        """
        from comfy.patcher_extension import WrappersMP
        from comfy_extras.nodes_easycache import EasyCacheNode

        def with_copy(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return executor(x.clone(), *args, **kwargs)  # which it writes into; in float32 that is the sampler's own

        model = self.ground.model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "before the cache", with_copy)
        model = EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).args[0]
        evaluated = []

        def count(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = next(one for one in (*args, *kwargs.values()) if isinstance(one, dict) and "uuids" in one)
            evaluated.extend(options["uuids"])
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "behind the cache", count)
        made = self.sampled(model, steps, self.sampler)
        conditionings = 2
        return made, steps * len(made) * conditionings / len(evaluated) if evaluated else math.inf

    def row(self, title: str, degree: int | None, steps: int, of: int, speed: float, made: torch.Tensor) -> Row:
        """A line of the table: ``made`` took ``steps`` and is compared with ``of`` steps of ComfyUI alone."""
        decoded = self.ground.decode(made)
        right = sum(a == b for a, b in zip(self.asked, self.ground.judge(decoded), strict=True))
        pictures = self.ground.pictures(decoded), self.pictures(self.sampler, of), self.pictures(*CONVERGED)
        return compared(title, degree, steps, of, speed, made, self.alone(self.sampler, of), *pictures, right)


def rows(bench: Bench, steps: int, degrees: Sequence[int], splits: Sequence[int]) -> Iterator[Row]:
    """All that is compared with so many steps of ComfyUI alone."""
    from leapfrog.parallel_backend.supervisor import close_all

    yield bench.row("ComfyUI alone", None, steps, steps, 1.0, bench.alone(bench.sampler, steps))
    saved = set()
    for ways, chosen in ((SPLITS, splits), (ROUNDS, degrees)):
        for degree in chosen:
            for way in (EXACT, *ways) if ways is SPLITS and degree == min(chosen) else ways:
                made, speed = way.made(bench, degree, steps)
                yield bench.row(way.title, degree, steps, steps, speed, made)
                saved.add(round(steps / speed))
                gc.collect()
            close_all()
    for sampler, title in PEERS.items():
        for fewer in sorted(saved - {steps}, reverse=True):
            yield bench.row(title, None, fewer, steps, steps / fewer, bench.alone(sampler, fewer))
    for threshold in THRESHOLDS:
        made, speed = bench.cached(threshold, steps)
        if math.isfinite(speed):
            yield bench.row(f"EasyCache, threshold {threshold}", None, steps, steps, speed, made)


def units_of(model: Any) -> int:
    """Into how many components the model can be cut."""
    from leapfrog.parallel_backend.units import find_units

    return len(find_units(model.model.diffusion_model))


def measure(name: str, options: argparse.Namespace) -> None:
    """One model, in this process."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks
    torch.set_num_threads(1)
    add_comfyui("--cpu")
    load_pack()
    sys.path.append(str(ROOT / "proving"))
    import folder_paths

    from comfy_setup import WEIGHTS
    from leapfrog.parallel_backend.report import TRACE_DIR

    for kind in ("diffusion_models", "checkpoints"):
        folder_paths.add_model_folder_path(kind, str(WEIGHTS))
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TRACE_DIR] = folder
        folder_paths.set_user_directory(folder)
        bench = Bench(name, options.samples, options.sampler, options.calibrate, Path(folder))
        splits = [degree for degree in options.degrees if degree <= units_of(bench.ground.model)]
        found = []
        about = (
            f"{options.samples} samples, {options.sampler}, CFG {bench.ground.settings.cfg:g}, scheduler "
            f"{bench.ground.settings.scheduler}; converged: {CONVERGED[1]} steps of {CONVERGED[0]}"
        )
        for steps in options.steps:
            for row in rows(bench, steps, options.degrees, splits):
                print(name, row.text(), flush=True)
                found.append(row)
            write(options.out, f"{name}-{options.sampler}", bench.ground.title, about, options.command, found)
            write_summary(options.out)
        for known in Path(folder).glob("leapfrog/calibration.json"):
            print("sensitivities:", known.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["flux", "unet", "wan"])
    parser.add_argument("--steps", type=numbers, default=[20, 50, 8], help="such as 20,50")
    parser.add_argument("--degrees", type=numbers, default=[2, 4, 8], help="components and lanes")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sampler", default="euler", help="of all but the peers")
    parser.add_argument("--calibrate", action="store_true", help="ParaStep's bounds fitted to the model and sampler")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="models at the same time")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality")
    options = parser.parse_args()
    options.command = " ".join(["python scripts/quality.py", *sys.argv[1:]])
    if len(options.models) == 1:
        measure(options.models[0], options)
        return 0

    def alone(name: str) -> int:
        return subprocess.run([sys.executable, __file__, *sys.argv[1:], "--models", name], check=False).returncode

    with ThreadPoolExecutor(options.jobs) as jobs:
        return max(jobs.map(alone, options.models))


def numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
