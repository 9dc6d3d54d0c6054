"""`make bench`: times of both nodes against ComfyUI alone, side by side in one run, on one thread per process.

The denoiser is a full-size Stable Diffusion 1.5 U-Net with random weights, made at run time. Each figure stands beside
what the schedule could reach at best, its bound, and beside what was reachable here: the bound, less what independent
processes take from each other on this machine. Among the rows are one device's own ways to be faster, ComfyUI's own
MultiGPU CFG Split where there are GPUs, and the published ParaStep. ``--scaling`` and ``--ranks`` show how it scales;
``--batch`` has several steps as one batch on one device, of a CPU with all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_machine import CPU, RANKS, devices, keep_memory, machine, machine_factor, round_trip_ms
from full_size import checkpoint, load, sample
from pack import ROOT, add_comfyui, load_pack

CFG = 7.0
ALONE, ALONE_UNGUIDED = "ComfyUI alone", "ComfyUI alone, CFG 1"
CFG_LANES, NATIVE = "ParaStep, CFG lanes", "MultiGPU CFG Split"
TITLES = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1", "sdxl": "Stable Diffusion XL"}


def milliseconds(seconds: float) -> str:
    """Three digits, or more in front of the point."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def timed(options: argparse.Namespace, model: Any, sampler: Any, steps: int, cfg: float) -> tuple[Any, float]:
    """``(latent, seconds)`` of one run."""
    began = time.perf_counter()
    how = {"cfg": cfg, "sampler": sampler, "pictures": options.pictures}
    return sample(model, options.model, steps, options.size, **how), time.perf_counter() - began


@dataclass
class Row:
    """A line of the table: ``run(steps)`` gives latent and seconds; compared with the row ``beside``."""

    run: Callable[[int], tuple[Any, float]]
    bound: float
    beside: str
    seconds: list[float] = field(default_factory=list)
    latent: Any = None


def each_speed(rows: dict[str, Row], name: str) -> list[float]:
    """Of each repetition: how many times as fast as the row that this one is compared with."""
    beside = rows[rows[name].beside].seconds
    return [theirs / ours for theirs, ours in zip(beside, rows[name].seconds, strict=True)]


def spread(speeds: list[float]) -> str:
    """The least and the most; empty for a single run."""
    return f"{min(speeds):.2f} to {max(speeds):.2f}" if len(speeds) > 1 else ""


def with_spread(speeds: list[float]) -> str:
    among = spread(speeds)
    return f"{statistics.median(speeds):.2f}x" + (f" ({among})" if among else "")


def round_overheads_ms(folder: Path) -> tuple[list[float], list[float]]:
    """From the traces of runs: by how much each round, from writing its inputs to having its result, was longer than
    its slowest evaluation; and the times between the last rank's end of one and the first one's begin of the next."""
    beyond, between = [], []
    for path in folder.glob("run-*.json"):
        trace = json.loads(path.read_text())
        spans: dict[int, list[tuple[float, float]]] = {}
        for event in trace["traceEvents"]:
            if event["ph"] == "X":
                spans.setdefault(event["args"]["call"], []).append((event["ts"], event["ts"] + event["dur"]))
        calls = [spans[call] for call in sorted(spans)]
        for call, seconds in zip(calls, trace["otherData"]["call_s"], strict=True):
            beyond.append(1e3 * seconds - max(end - begin for begin, end in call) / 1e3)
        for before, after in pairwise(calls):
            between.append((min(begin for begin, _ in after) - max(end for _, end in before)) / 1e3)
    return beyond, between


def batches(options: argparse.Namespace) -> None:
    """BatchStep: several steps as one batch on ONE device, against the same steps one after another."""
    import comfy.samplers
    import torch

    from leapfrog.nodes.rounds_sampler import RoundsSampler
    from leapfrog.parallel_backend import LanesPlan
    from leapfrog.parallel_backend.devices import this_machine
    from leapfrog.parallel_backend.supervisor import close_all

    sys.path.append(str(ROOT / "tests"))
    import folder_paths

    import families
    from seeded import FOLDER

    folder_paths.add_model_folder_path("diffusion_models", str(FOLDER))

    def unet(size: int) -> Callable[[Any, int], Any]:
        whole = load(options.model)
        return lambda sampler, steps: sample(whole, options.model, steps, size, cfg=1.0, sampler=sampler)

    def small(name: str, **changes: Any) -> Callable[[Any, int], Any]:
        family = replace(families.FAMILIES[name], **changes)
        model = families.load(families.FAMILIES[name])
        return lambda sampler, steps: families.sample(model, family, steps, sampler, cfg=1.0)

    euler = comfy.samplers.sampler_object("euler")
    title = f"{TITLES[options.model]} U-Net"
    cases = {
        f"{title}, 128x128": unet(16),
        f"{title}, {8 * options.size}x{8 * options.size}": unet(options.size),
        "Stable Audio, narrow, latent 64x256": small("stable_audio", latent=(64, 256)),
        "Wan 2.1, narrow, latent 16x4x8x8": small("wan21", latent=(16, 4, 8, 8)),
    }
    device, threads = devices(1)[0], this_machine().cores
    torch.set_num_threads(threads)  # as many as the only rank on a CPU has
    what = torch.cuda.get_device_name() if device != CPU else f"the CPU, {threads} threads"
    print(f"{date.today()}, one device ({what}), {options.steps} steps, CFG 1, nothing rejected")
    print("| model | lanes | rounds | seconds | speed | at best |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, run in cases.items():
        if options.only not in name:
            continue
        alone = 0.0
        for lanes in (0, 1, 2, 4, 8):
            sampler: Any = euler
            if lanes:
                sampler = RoundsSampler(LanesPlan((device,), lanes, options.warmup), euler, lambda text: None)
            run(sampler, 2)
            took = []
            for _ in range(options.repeat):
                began = time.perf_counter()
                run(sampler, options.steps)
                took.append(time.perf_counter() - began)
            seconds = statistics.median(took)
            alone = alone or seconds
            rounds = sampler.last_run.count if lanes and sampler.last_run else options.steps
            shown = f"{seconds:.2f} | {alone / seconds:.2f}x | {options.steps / rounds:.2f}x"
            print(f"| {name} | {lanes or ALONE} | {rounds} | {shown} |", flush=True)
    close_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=16, help="side of the latent")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1, help="in a batch")
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--model", choices=TITLES, default="sd15")
    parser.add_argument(
        "--only", default="", help="only rows whose names contain this, and what they are compared with"
    )
    parser.add_argument("--batch", action="store_true", help="steps as one batch on one device, instead")
    parser.add_argument("--scaling", action="store_true", help="one thing changed at a time, instead")
    options = parser.parse_args()
    keep_memory()
    if devices(1 if options.batch else options.ranks)[0] == CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    add_comfyui()
    load_pack()
    import torch

    checkpoint(options.model)  # gigabytes, written at first use
    torch.set_num_threads(1)
    (batches if options.batch else scaling if options.scaling else run)(options)


def rows_of(options: argparse.Namespace, whole: Any) -> dict[str, Row]:
    """The lines of the table."""
    import comfy.samplers
    from comfy_extras.nodes_easycache import EasyCacheNode

    from leapfrog.nodes import AsyncUNetSplit
    from leapfrog.nodes.rounds_sampler import in_rounds
    from leapfrog.parallel_backend import LanesPlan, SplitPlan

    ranks, steps, warmup = options.ranks, options.steps, options.warmup
    euler, named = comfy.samplers.sampler_object("euler"), ",".join(devices(ranks))

    def row(model: Any = whole, sampler: Any = euler, cfg: float = CFG, bound: float = 1.0, share: float = 1.0) -> Row:
        beside = ALONE if cfg == CFG else ALONE_UNGUIDED
        return Row(lambda n: timed(options, model, sampler, max(1, round(share * n)), cfg), bound, beside)

    def split(mode: str) -> Row:
        bound = SplitPlan(devices(ranks), ranks, warmup, mode).ideal_speedup(steps, ranks, 1 / ranks)
        return row(AsyncUNetSplit.execute(whole, named, ranks, warmup, 1, mode, cfg_lanes="off").args[0], bound=bound)

    def lanes(count: int, cfg: float, predictor: str = "linear", fidelity: str = "balanced") -> Row:
        plan = LanesPlan.choose(named, count, warmup, predictor, fidelity)
        conditionings = 1 if cfg == 1 else 2
        bound = plan.ideal_speedup(steps, conditionings, options.pictures)
        return row(sampler=in_rounds(plan, euler), cfg=cfg, bound=bound)

    def cached(cfg: float) -> Row:
        return row(EasyCacheNode.execute(whole, 0.2, 0.15, 0.95, False).args[0], cfg=cfg)

    ahead, parallel_lanes = split("lookahead"), lanes(ranks, 1.0)
    native = {}
    if len(set(devices(ranks))) > 1:  # it counts CUDA devices only
        from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

        native[NATIVE] = row(MultiGPUCFGSplitNode.execute(whole.clone(), 2).args[0])
    return {
        ALONE: row(),
        "EasyCache, threshold 0.2": cached(CFG),
        f"{round(steps / ahead.bound)} steps": row(share=1 / ahead.bound),
        **native,
        "Async UNet Split, exact": split("exact"),
        "Async UNet Split, lookahead": ahead,
        "Async UNet Split, asyncdiff": split("asyncdiff"),
        CFG_LANES: lanes(1, CFG),
        ALONE_UNGUIDED: row(cfg=1.0),
        "EasyCache, threshold 0.2, CFG 1": cached(1.0),
        f"{round(steps / parallel_lanes.bound)} steps, CFG 1": row(cfg=1.0, share=1 / parallel_lanes.bound),
        parallel(options): parallel_lanes,
        "ParaStep as published, CFG 1": lanes(ranks, 1.0, "paper", "unguarded"),
    }


def parallel(options: argparse.Namespace) -> str:
    """The row with as many lanes as ranks."""
    return f"ParaStep, {options.ranks} lanes, CFG 1"


def scaling(options: argparse.Namespace) -> None:
    """How speeds change with the latent, the batch and the steps: one thing changed at a time."""
    from leapfrog.parallel_backend.supervisor import close_all

    guided = (CFG_LANES, "Async UNet Split, lookahead")
    unguided = parallel(options)
    print(f"{date.today()}, {machine(options.ranks)}")
    print(f"{TITLES[options.model]} U-Net, random weights, medians of {options.repeat}; else as in the first line")
    print(f"| | {ALONE}, CFG {CFG:g} | {' | '.join(guided)} | {ALONE_UNGUIDED} | {unguided} |\n{'|---' * 6}|")
    whole = load(options.model)
    first = {"size": options.size, "pictures": options.pictures, "steps": options.steps}
    cases = [first, {"size": 8}, {"size": 32}, {"pictures": 2}, {"pictures": 4}, {"steps": 20}, {"steps": 50}]
    for changed in cases:
        rows = rows_of(argparse.Namespace(**vars(options) | changed), whole)
        shown = (ALONE, *guided, ALONE_UNGUIDED, unguided)
        for _ in range(options.repeat):
            for name in shown:
                rows[name].run(2)  # the ranks load what this row needs, and measure for the cut
                rows[name].seconds.append(rows[name].run(changed.get("steps", options.steps))[1])
        seconds = {name: statistics.median(rows[name].seconds) for name in shown}
        speeds = {name: with_spread(each_speed(rows, name)) for name in (*guided, unguided)}
        what = ", ".join(f"{key} {value}" for key, value in changed.items())
        print(
            f"| {what} | {seconds[ALONE]:.1f} s | {speeds[guided[0]]} | {speeds[guided[1]]} | "
            f"{seconds[ALONE_UNGUIDED]:.1f} s | {speeds[unguided]} |",
            flush=True,
        )
    close_all()


def run(options: argparse.Namespace) -> None:
    from leapfrog.parallel_backend.supervisor import close_all
    from leapfrog.parallel_backend.watching import Watched

    ranks, steps = options.ranks, options.steps
    print(f"{date.today()}, {machine(ranks)}")
    print(
        f"{TITLES[options.model]} U-Net, random weights, latent side {options.size}, {options.steps} steps, CFG {CFG}"
    )
    factor = machine_factor(options.model, options.size, ranks)
    print(f"{ranks} independent processes reach {factor:.2f}x of one on this machine")
    print(f"host round trip, 4x64x64 latent, {ranks} idle ranks: {round_trip_ms(ranks):.3f} ms median", flush=True)

    rows = rows_of(options, load(options.model))
    if options.only:
        wanted = {name for name in rows if options.only in name}
        wanted |= {rows[name].beside for name in wanted} | ({ALONE_UNGUIDED} if wanted & {CFG_LANES, NATIVE} else set())
        rows = {name: one for name, one in rows.items() if name in wanted}
    beyond, between = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeat):
            for name, one in rows.items():
                print(f"  {name} ...", file=sys.stderr, flush=True)
                one.run(1)  # the ranks load what this row needs
                os.environ["LEAPFROG_TRACE_DIR"] = folder
                one.latent, took = one.run(steps)
                del os.environ["LEAPFROG_TRACE_DIR"]
                one.seconds.append(took)
                if name == parallel(options):
                    found = round_overheads_ms(Path(folder))
                    beyond += found[0]
                    between += found[1]
                for trace in Path(folder).iterdir():
                    trace.unlink()
    for name in {CFG_LANES, NATIVE} & rows.keys():  # one prompt may take more than half of the time of both
        both, one_prompt = (statistics.median(rows[alone].seconds) for alone in (ALONE, ALONE_UNGUIDED))
        rows[name].bound = both / one_prompt
    for name in (ALONE, ALONE_UNGUIDED):
        if name in rows:
            print(f"{name}: {milliseconds(statistics.median(rows[name].seconds) / steps)} ms per step")
    print("| row | seconds | speed | each time | bound | of the reachable | relative difference |")
    print("|---" * 7 + "|")
    table = []
    for name, one in rows.items():
        beside, took = rows[one.beside], statistics.median(one.seconds)
        speed = statistics.median(beside.seconds) / took
        apart = float((one.latent - beside.latent).norm() / beside.latent.norm())
        bound = f"{one.bound:.2f}x" if one.bound > 1.001 else ""
        reached = f"{speed / (one.bound / ranks * factor):.0%}" if bound else ""
        own = one is beside
        among = "" if own else spread(each_speed(rows, name))
        shown = "" if own else f"{apart:.1e}" if apart else "0"
        print(f"| {name} | {took:.2f} | {speed:.2f}x | {among} | {bound} | {reached} | {shown} |")
        table.append({"name": name, "seconds": one.seconds, "speed": speed, "bound": one.bound, "difference": apart})
    if between:
        print(
            f"a round of ParaStep takes {statistics.median(beyond):.2f} ms longer than its slowest evaluation, and "
            f"{statistics.median(between):.2f} ms pass until ranks evaluate again (medians)"
        )
    for traced in Watched._traces.values():
        print("unit times, ms: " + " ".join(milliseconds(unit.seconds) for unit in traced[0].units))
    result = {"steps": options.steps, "size": options.size, "factor": factor, "rows": table}
    (ROOT / "build" / "bench").mkdir(parents=True, exist_ok=True)
    (ROOT / "build" / "bench" / "result.json").write_text(json.dumps(result, indent=1))
    close_all()


if __name__ == "__main__":
    main()
