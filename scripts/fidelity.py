"""How close both blocks come to ComfyUI alone: every mode, preset and predictor, on a trained model, with real ranks.

Prints a Markdown table. PSNR and SSIM compare each picture with the one that ComfyUI alone makes from the same prompt,
seed and steps. Closeness to one's own n-step picture flatters a parallel method, so two more things are printed: the
row below each mode has what one device draws in the same ideal time with DPM++ 2M and fewer steps, and a column
compares all with a nearly converged solution. Ideal speed counts, for the split, exact evaluations whole and others as
1/N; for ParaStep, rounds, however many evaluations they have. Nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from skimage.metrics import structural_similarity

from pack import BASE, ROOT, add_comfyui, load_pack

MODELS = BASE / "models"
CFG = 3.0
SCHEDULER = "simple"
SEED = 100
CONVERGED = ("dpmpp_2m", 125)
BASELINE = "dpmpp_2m"
SAME = 120.0
"""PSNR in dB from which two pictures count as the same."""


@dataclass(frozen=True)
class Mode:
    """A mode of Async UNet Split: its name there, its name in the table, the warm-up used (0: automatic)."""

    value: str
    title: str
    warmup: int


SPLITS = (
    Mode("lookahead", "lookahead", 0),
    Mode("extrapolated", "AsyncDiff, states extrapolated", 3),
    Mode("asyncdiff", "AsyncDiff as published", 3),
    Mode("exact", "exact", 3),
)


@dataclass(frozen=True)
class Preset:
    """A way to use ParaStep: its name in the table, the fidelity and predictor chosen on the node."""

    title: str
    fidelity: str
    predictor: str = "linear"

    def warmup(self, lanes: int) -> int:
        """Automatic where there is a guard."""
        return 0 if self.fidelity != "unguarded" else 5 if lanes >= 4 else 3


PRESETS = (
    Preset("ParaStep, faithful", "faithful"),
    Preset("ParaStep, balanced", "balanced"),
    Preset("ParaStep, fast", "fast"),
    Preset("ParaStep, unguarded", "unguarded"),
    Preset("ParaStep, unguarded, newest", "unguarded", "newest"),
    Preset("ParaStep as published", "unguarded", "paper"),
)


class Bench:
    """The proving model in this process, some prompts with a seed each, and what ComfyUI makes of them."""

    def __init__(self, samples: int, sampler: str):
        import comfy.sd
        import comfy.utils

        sys.path.append(str(ROOT / "proving"))
        from judge import load
        from shapes import HELD_OUT

        self.asked = [
            HELD_OUT[i * len(HELD_OUT) // min(samples, len(HELD_OUT)) % len(HELD_OUT)] for i in range(samples)
        ]
        self.sampler = sampler
        self.judge = load()
        self.model = comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models" / "shapes_flux.safetensors"))
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(MODELS / "vae" / "shapes_vae.safetensors")))
        clip = comfy.sd.load_clip(
            [str(MODELS / "text_encoders" / "shapes_clip.safetensors")], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION
        )
        with torch.inference_mode():
            self.positive = [clip.encode_from_tokens_scheduled(clip.tokenize(a.caption)) for a in self.asked]
            self.negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))

    def pictures(
        self, model: Any, steps: int, name: str, through: Callable[[Any], Any] = lambda sampler: sampler
    ) -> torch.Tensor:
        """One picture for each sample, each in a run of its own: ``[samples, 128, 128, 3]`` in 0..1.

        ``name`` is a sampler's, ``through`` makes a SAMPLER of that SAMPLER.
        """
        import comfy.sample
        import comfy.samplers

        latent, made = torch.zeros(1, 16, 16, 16), []
        sigmas = comfy.samplers.KSampler(model, steps, "cpu", name, SCHEDULER, 1.0, model.model_options).sigmas
        sampler = through(comfy.samplers.sampler_object(name))
        for i, positive in enumerate(self.positive):
            noise = comfy.sample.prepare_noise(latent, SEED + i)
            with torch.inference_mode():
                done = comfy.sample.sample_custom(
                    model, noise, CFG, sampler, sigmas, positive, self.negative, latent, disable_pbar=True,
                    seed=SEED + i,
                )  # fmt: skip
                made.append(self.vae.decode(done).clamp(0, 1))
        return torch.cat(made)

    @cache  # noqa: B019  one object for the whole script
    def alone(self, sampler: str, steps: int) -> torch.Tensor:
        """What ComfyUI alone draws."""
        return self.pictures(self.model, steps, sampler)

    def row(self, title: str, components: str, steps: int, of: int, speed: float, made: torch.Tensor) -> str:
        """A line of the table: ``made`` took ``steps`` and is compared with ``of`` steps of ComfyUI alone."""
        from judge import judge

        reference = self.alone(self.sampler, of)
        ssim = np.mean(
            [
                structural_similarity(a, b, channel_axis=2, data_range=1.0)
                for a, b in zip(reference.numpy(), made.numpy(), strict=True)
            ]
        )
        right = sum(a == b for a, b in zip(self.asked, judge(made, self.judge), strict=True))
        cells = (
            title, components, str(steps), f"{speed:.2f}x", spread(psnr(made, reference)), f"{ssim:.4f}",
            f"{right} of {len(self.asked)}", spread(psnr(made, self.alone(*CONVERGED))),
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


def psnr(made: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """In dB, one for each picture, at most SAME."""
    error = (made.double() - reference.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(10 ** (-SAME / 10)).log10()).numpy()


def spread(values: np.ndarray) -> str:
    """Mean and 95 % confidence interval of the mean."""
    if values.min() >= SAME:
        return "same"
    if len(values) < 2:
        return f"{values.mean():.1f}"
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.1f} ± {half:.1f}"


def split(bench: Bench, mode: Mode, components: int, steps: int, folder: Path) -> tuple[torch.Tensor, float]:
    """Pictures through the node, and their ideal speed by what the traces in ``folder`` say was exact."""
    from leapfrog.nodes import AsyncUNetSplit

    node = AsyncUNetSplit.execute(
        model=bench.model, devices=",".join(["cpu"] * components), components=components,
        warmup_steps=mode.warmup, stride=1, mode=mode.value, cfg_lanes="off",
    )  # fmt: skip
    made = bench.pictures(node.args[0], steps, bench.sampler)
    kinds = []
    for path in sorted(folder.glob("run-*.json")):
        events = json.loads(path.read_text())["traceEvents"]
        kinds += [event["name"] for event in events if event["ph"] == "X" and event["tid"] == components - 1]
        path.unlink()
    if not kinds:
        raise RuntimeError(f"mode {mode.value} left no trace: did ranks compute anything?")
    exact = kinds.count("exact") / (steps * len(made))  # conditionings of so small a latent go in one call
    return made, 1.0 if mode.value == "exact" else 1 / (exact + (1 - exact) / components)


def rounds(bench: Bench, preset: Preset, lanes: int, steps: int, calibrate: bool = False) -> tuple[torch.Tensor, float]:
    """Pictures through ParaStep on one rank, and their ideal speed by how many rounds there were."""
    from leapfrog.nodes.rounds_sampler import in_rounds
    from leapfrog.parallel_backend import LanesPlan

    plan = LanesPlan.choose("cpu", lanes, preset.warmup(lanes), preset.predictor, preset.fidelity, calibrate=calibrate)
    counts = []

    def through(base: Any) -> Any:
        sampler = in_rounds(plan, base)
        whole = sampler.sampler_function

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = whole(*args, **kwargs)
            counts.append(sampler.last_run.asked / sampler.last_run.count)
            return result

        sampler.sampler_function = counted
        return sampler

    made = bench.pictures(bench.model, steps, bench.sampler, through)
    return made, len(counts) / sum(1 / count for count in counts)


def numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", choices=["split", "parastep"], default="split")
    parser.add_argument("--steps", type=numbers, default=[20, 30, 50], help="such as 20,30,50")
    parser.add_argument("--degrees", type=numbers, help="components (2,3) or lanes (2,4,8)")
    parser.add_argument("--samples", type=int, default=8, help="pictures, each with a prompt and a seed of its own")
    parser.add_argument("--sampler", default="euler", help="of all but the baseline")
    parser.add_argument("--modes", help="only these modes or fidelities, such as lookahead,exact")
    parser.add_argument("--calibrate", action="store_true", help="ParaStep's bounds fitted to the model and sampler")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks
    torch.set_num_threads(1)
    add_comfyui("--cpu")
    load_pack()
    import folder_paths

    from leapfrog.parallel_backend.report import TRACE_DIR
    from leapfrog.parallel_backend.supervisor import close_all

    bench = Bench(options.samples, options.sampler)
    only = options.modes.split(",") if options.modes else None
    if options.block == "split":
        degrees = options.degrees or [2, 3]
        ways: list[Any] = [mode for mode in SPLITS if not only or mode.value in only]
    else:
        degrees = options.degrees or [2, 4, 8]
        ways = [preset for preset in PRESETS if not only or preset.fidelity in only]
    print(
        f"{options.samples} pictures, {options.sampler}, CFG {CFG}, scheduler {SCHEDULER}; PSNR in dB, mean ± 95 % CI;"
    )
    print(f"converged: {CONVERGED[1]} steps of {CONVERGED[0]} on one device.\n")
    of = "N" if options.block == "split" else "lanes"
    print(f"| mode | {of} | steps | ideal speed | PSNR | SSIM | all four right | PSNR to converged |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TRACE_DIR] = folder
        folder_paths.set_user_directory(folder)
        for steps in options.steps:
            reference = bench.alone(options.sampler, steps)
            print(bench.row("ComfyUI alone", "-", steps, steps, 1.0, reference), flush=True)
            for degree in degrees:
                for way in ways:
                    if isinstance(way, Mode):
                        made, speed = split(bench, way, degree, steps, Path(folder))
                    else:
                        made, speed = rounds(bench, way, degree, steps, options.calibrate)
                    print(bench.row(way.title, str(degree), steps, steps, speed, made), flush=True)
                    fewer = round(steps / speed)
                    if fewer < steps:
                        made = bench.alone(BASELINE, fewer)
                        print(bench.row("same time: DPM++ 2M", "-", fewer, steps, steps / fewer, made), flush=True)
                    gc.collect()
                close_all()
        for known in Path(folder).glob("leapfrog/calibration.json"):
            print("\nsensitivities:", known.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
