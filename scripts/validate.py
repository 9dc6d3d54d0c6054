"""How far the simulator is from real runs: predicted and measured times of both nodes on two ranks, a Markdown table.

    python scripts/validate.py            # a full-size Stable Diffusion 1.5 U-Net, one thread for each rank
    python scripts/validate.py --quick    # a small U-Net, to see that it works

What is predicted from is measured in the ranks, on the real weights, before and after each run, because other work on
the machine comes and goes: shares of the units in an evaluation, evaluations of one and of two rows while one rank
computes and while both do (``survey.py``). Nothing is fitted to the runs. ComfyUI's own work around the denoiser is in
the measured times and not in the predicted ones.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from bench import ALONE, ALONE_UNGUIDED, CFG, TITLES
from bench_machine import CPU, RANKS, devices, keep_memory, machine
from full_size import conditioning, load, sample
from pack import ROOT, add_comfyui, load_pack

BOUND = math.inf
"""Drift bound of lookahead with random weights: nothing is to be rejected."""


@dataclass
class Row:
    """A plan: ``run(steps)`` takes a run, ``predict(facts, steps)`` says how many seconds it should take."""

    run: Callable[[int], Any]
    predict: Callable[[Any, int], float]
    predicted: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)

    @property
    def each(self) -> list[float]:
        """By which share each prediction is longer than the run that it was made around."""
        return [predicted / measured - 1 for predicted, measured in zip(self.predicted, self.measured, strict=True)]

    @property
    def off(self) -> float:
        """The median of that: pairs, because the machine's pace at one run says nothing of another's."""
        return statistics.median(self.each)


def row_of(model: Any, plan: Any, run: Callable[[Any, Any, int], Any], conditionings: int) -> Row:
    """A SplitPlan or a LanesPlan through its node; ``run(model, sampler, steps)`` takes a run of ComfyUI's own sampling
    code, whose evaluations have so many conditionings."""
    import comfy.samplers

    from leapfrog.nodes import AsyncUNetSplit
    from leapfrog.nodes.rounds_sampler import in_rounds
    from leapfrog.parallel_backend import LanesPlan
    from leapfrog.parallel_backend.adviser import lanes_seconds, split_seconds

    euler = comfy.samplers.sampler_object("euler")
    if isinstance(plan, LanesPlan):
        sampler = in_rounds(plan, euler)
        return Row(lambda n: run(model, sampler, n), lambda facts, n: lanes_seconds(facts, plan, n, conditionings))
    split = AsyncUNetSplit.execute(
        model, ",".join(plan.devices), plan.degree, plan.warmup, plan.stride, plan.mode, cfg_lanes=plan.cfg_lanes,
        drift_bound=plan.bound,
    ).args[0]  # fmt: skip
    return Row(lambda n: run(split, euler, n), lambda facts, n: split_seconds(facts, plan, n, conditionings)[0])


def plan_rows(model: Any, run: Callable[[Any, Any, float, int], Any], warmup: int) -> dict[str, Row]:
    """``run(model, sampler, cfg, steps)`` takes a run of ComfyUI's own sampling code."""
    import comfy.samplers

    from leapfrog.parallel_backend import LanesPlan, SplitPlan

    euler = comfy.samplers.sampler_object("euler")

    def alone(cfg: float) -> Row:
        conditionings = 1 if cfg == 1 else 2
        return Row(lambda n: run(model, euler, cfg, n), lambda facts, n: n * facts.whole(conditionings))

    def with_ranks(plan: Any, cfg: float) -> Row:
        return row_of(model, plan, lambda model, sampler, n: run(model, sampler, cfg, n), 1 if cfg == 1 else 2)

    def split(mode: str) -> Row:
        return with_ranks(SplitPlan(devices(), RANKS, warmup, mode, cfg_lanes="off", bound=BOUND), CFG)

    def parastep(lanes: int, cfg: float) -> Row:
        return with_ranks(LanesPlan(devices(), lanes, warmup), cfg)

    return {
        ALONE: alone(CFG),
        "Async UNet Split, exact": split("exact"),
        "Async UNet Split, lookahead": split("lookahead"),
        "Async UNet Split, asyncdiff": split("asyncdiff"),
        "CFG lanes": parastep(1, CFG),
        "ParaStep, 2 lanes": parastep(2, CFG),
        ALONE_UNGUIDED: alone(1.0),
        "one rank, CFG 1": parastep(1, 1.0),
        "ParaStep, 2 lanes, CFG 1": parastep(2, 1.0),
    }


def full_size(name: str, size: int) -> tuple[Any, Any, Any, Callable[[Any, Any, float, int], Any]]:
    """MODEL, prompt, latent and run of one of the full-size U-Nets."""
    import torch

    def run(model: Any, sampler: Any, cfg: float, steps: int) -> Any:
        return sample(model, name, steps, size, cfg=cfg, sampler=sampler)

    return load(name), conditioning(name, 1, size), torch.zeros(1, 4, size, size), run


def small(size: int) -> tuple[Any, Any, Any, Callable[[Any, Any, float, int], Any]]:
    """The same of the tests' tiny U-Net."""
    sys.path.append(str(ROOT / "tests"))
    import comfy.sd
    import folder_paths
    import torch

    from generation import Request, generate, prompt
    from seeded import FOLDER
    from tiny_models import tiny_unet

    folder_paths.add_model_folder_path("diffusion_models", str(FOLDER))

    def run(model: Any, sampler: Any, cfg: float, steps: int) -> Any:
        return generate(model, Request("unet", size, steps=steps, cfg=cfg), sampler)

    return comfy.sd.load_diffusion_model(str(tiny_unet())), prompt(1), torch.zeros(1, 4, size, size), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TITLES, default="sd15")
    parser.add_argument("--size", type=int, default=16, help="side of the latent")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", help="only rows whose names contain this")
    parser.add_argument("--quick", action="store_true", help="a small U-Net")
    options = parser.parse_args()
    keep_memory()
    if devices()[0] == CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    add_comfyui()
    load_pack()
    import torch

    from leapfrog.nodes.adviser import measured
    from leapfrog.parallel_backend.supervisor import close_all

    torch.set_num_threads(1)
    size = options.size
    title = "A small U-Net" if options.quick else f"{TITLES[options.model]} U-Net"
    model, positive, latent, run = small(size) if options.quick else full_size(options.model, size)
    rows = plan_rows(model, run, options.warmup)
    rows = {name: row for name, row in rows.items() if options.only in name}

    def survey() -> Any:
        return measured(model, positive, {"samples": latent}, ",".join(devices())).facts

    known = [survey()]
    for _ in range(options.repeat):
        for name, row in rows.items():
            print(f"  {name} ...", file=sys.stderr, flush=True)
            row.run(options.steps)  # the ranks load what this row needs, and measure for the cut
            began = time.perf_counter()
            row.run(options.steps)
            row.measured.append(time.perf_counter() - began)
            known.append(survey())
            row.predicted.append(statistics.mean(row.predict(facts, options.steps) for facts in known[-2:]))
    close_all()
    print(
        f"{date.today()}, {title}, random weights, latent side {size}, {options.steps} steps of Euler, "
        f"{options.warmup} of warm-up, CFG {CFG:g} where nothing else is said; {machine()}; "
        f"medians of {options.repeat}"
    )
    for what, values in {
        "an evaluation of one prompt, ms": [1e3 * facts.whole(1) for facts in known],
        "of two prompts, ms": [1e3 * facts.whole(2) for facts in known],
        "times as long while both ranks compute": [facts.crowd for facts in known],
        "host to rank and back, ms": [1e3 * facts.host for facts in known],
        "link, GB/s": [facts.link.bytes_per_second / 1e9 for facts in known],
    }.items():
        print(f"* {what}: {min(values):.3g} to {max(values):.3g}, median {statistics.median(values):.3g}")
    print("\n| plan | predicted, ms per step | measured, ms per step | difference | each time |\n|---|---|---|---|---|")
    for name, row in rows.items():
        predicted, took = (1e3 * statistics.median(times) / options.steps for times in (row.predicted, row.measured))
        spread = f"{min(row.each):+.1%} to {max(row.each):+.1%}"
        print(f"| {name} | {predicted:.1f} | {took:.1f} | {row.off:+.1%} | {spread} |")
    worst = max(rows, key=lambda name: abs(rows[name].off))
    print(f"\nlargest difference: {rows[worst].off:+.1%} ({worst})")


if __name__ == "__main__":
    main()
