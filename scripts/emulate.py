"""Both nodes on two, four and eight devices that are not at hand: EMULATED ones, in real runs; a Markdown table.

    python scripts/emulate.py                              # SD 1.5 with CFG 7 and a Flux with CFG 1
    python scripts/emulate.py --models flux --devices 2 --steps 12

Models are narrow ones with all the layers of the published ones. Each layer takes as long as it took on the GPU of a
profile, times a factor (`emulated_device.py`), both in ComfyUI alone and in ranks. All else is real: ComfyUI's
sampling, a process for each device, the cut that they measure, their messages. So this shows whether schedules do what
they are to do with more devices than this machine has cores, and how far the simulator is off there. It does not show
links, because what travels is as narrow as the model, nor what a step costs beside its evaluation, which weighs less by
that factor. Nothing is rejected. Beside each time stands what the simulator predicts from what ranks measure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from bench import ALONE, CFG
from bench_machine import CPU
from emulated_device import VARIABLE, Pace, emulate_all, paces
from full_size import SD15
from pack import ROOT, add_comfyui, load_pack
from profile_units import FLUX
from validate import BOUND, Row, row_of

PROFILES = ROOT / "docs" / "profiles"
SITE = Path(__file__).resolve().parent / "emulated_site"
GUIDED = ("sd15",)
TITLES = {"sd15": "SD 1.5, CFG 7", "flux": "Flux, CFG 1"}
SLOWER = {"sd15": 40.0, "flux": 8.0}
"""How many times as long as on the profile's GPU layers take: enough that computing a narrow one counts for little."""

HEAD = "| model | devices | plan | predicted, ms per step | measured, ms per step | difference | speed | at best |"


def narrow_families() -> dict[str, Any]:
    """The narrow models (`tests/family.py`)."""
    from families import FAMILIES, Family

    flux = FAMILIES["flux"]
    depth = {key: FLUX[key] for key in ("depth", "depth_single_blocks")}
    unet = Family(
        "sd15_narrow", "SD15", {**SD15, "model_channels": 32, "context_dim": 64, "num_heads": 8},
        latent=(4, 16, 16), context=64, lists=("input_blocks", "output_blocks"), cfg=CFG,
        narrowed=("model_channels", "context_dim"), detected={"model_channels": 320, "context_dim": 768},
    )  # fmt: skip
    return {"sd15": unet, "flux": replace(flux, config={**flux.config, **depth}, cfg=1.0)}


def plans(devices: tuple[str, ...], guided: bool, warmup: int) -> Iterator[tuple[str, Any]]:
    """What the nodes can do with all of these devices: title and plan."""
    from leapfrog.parallel_backend import LanesPlan, SplitPlan

    count = len(devices)
    for mode in ("exact", "lookahead", "asyncdiff"):
        yield f"{mode}, N={count}", SplitPlan(devices, count, warmup, mode, cfg_lanes="off", bound=BOUND)
    if count > 2:
        yield (
            f"asyncdiff, N={count - 1}, S=2",
            SplitPlan(devices, count - 1, warmup, "asyncdiff", 2, cfg_lanes="off", bound=BOUND),
        )
    if guided and count == 2:
        yield "CFG lanes", LanesPlan(devices, 1)
    elif guided and count % 2 == 0:
        named = f"lookahead, CFG lanes x N={count // 2}"
        yield named, SplitPlan(devices, count // 2, warmup, cfg_lanes="on", bound=BOUND)
        yield f"ParaStep, {count // 2} lanes", LanesPlan(devices, count // 2, warmup)
    yield f"ParaStep, {count} lanes", LanesPlan(devices, count, warmup)


def at_best(plan: Any, steps: int, conditionings: int, pace: Pace) -> float:
    """Speed if evaluations could be divided evenly and nothing else took time. ``pace`` is that of a whole evaluation
    by the number of conditionings."""
    from leapfrog.parallel_backend import LanesPlan
    from leapfrog.parallel_backend.schedules.simulate import rounds_seconds

    whole = pace.of(conditionings)
    if isinstance(plan, LanesPlan):
        rounds = plan.rounds(steps, conditionings)
        return steps * whole / rounds_seconds(rounds, conditionings, len(plan.devices), pace.of)
    pipelines = plan.pipelines(conditionings > 1, whole_fits=True)
    components = plan.components(pipelines[0])
    share = pace.of(conditionings // len(pipelines)) / whole
    return plan.ideal_speedup(steps, components, 1 / components) / share


def timed(row: Row, steps: int, repeat: int) -> None:
    """``repeat`` runs, after one in which ranks load what it needs."""
    row.run(max(4, steps // 3))
    for _ in range(repeat):
        began = time.perf_counter()
        row.run(steps)
        row.measured.append(time.perf_counter() - began)


def lines(name: str, options: argparse.Namespace) -> Iterator[str]:
    """The table's lines for one model."""
    import comfy.samplers

    import families as tiny
    from leapfrog.nodes.adviser import measured
    from leapfrog.parallel_backend.supervisor import close_all

    path, slower, steps = PROFILES / f"{name}_h100.json", SLOWER[name], options.steps
    os.environ[VARIABLE] = f"{path}:{slower}"
    profile = json.loads(path.read_text())
    family, conditionings = narrow_families()[name], 2 if name in GUIDED else 1
    model = tiny.load(family)

    def run(model: Any, sampler: Any, steps: int) -> Any:
        return tiny.sample(model, family, steps, sampler)

    def survey(devices: tuple[str, ...]) -> Any:
        image = {"samples": tiny.latent(family, 1, None)}
        return measured(model, tiny.prompt(family, 1), image, ",".join(devices)).facts

    layers = [pace for _, pace in paces(model.model.diffusion_model, profile, slower)]
    whole = Pace(sum(pace.seconds for pace in layers), profile["rows"], layers[0].one_row)
    step_s = whole.of(conditionings)
    print(
        f"{TITLES[name]}: a step takes {1e3 * step_s:.0f} ms, {slower:g} times as long as on {profile['device']}"
        + (f", one prompt of it {whole.of(1) / step_s:.2f} of that" if conditionings > 1 else "")
    )
    euler = comfy.samplers.sampler_object("euler")
    alone = Row(lambda n: run(model, euler, n), lambda _facts, n: n * step_s)
    rows = [(1, ALONE, 1.0, alone)]
    timed(alone, steps, options.repeat)
    alone.predicted.append(alone.predict(None, steps))
    for count in options.devices:
        devices = (CPU,) * count
        known = [survey(devices)]
        here = []
        for title, plan in plans(devices, conditionings > 1, options.warmup):
            if options.only in title:
                print(f"  {name}, {count} devices: {title} ...", file=sys.stderr, flush=True)
                one = row_of(model, plan, run, conditionings)
                timed(one, steps, options.repeat)
                here.append((count, title, at_best(plan, steps, conditionings, whole), one))
        known.append(survey(devices))
        for *_, one in here:
            one.predicted += [one.predict(facts, steps) for facts in known]
        rows += here
        print(
            f"{TITLES[name]}, {count} devices: a round trip {1e3 * known[0].host:.2f} ms, "
            f"{max(facts.crowd for facts in known):.2f} times as long while all evaluate"
        )
    close_all()
    for count, title, best, one in rows:
        predicted, took = (1e3 * statistics.median(times) / steps for times in (one.predicted, one.measured))
        speed = statistics.median(alone.measured) / statistics.median(one.measured)
        times = f"{predicted:.1f} | {took:.1f} | {one.off:+.1%}"
        yield f"| {TITLES[name]} | {count} | {title} | {times} | {speed:.2f}x | {best:.2f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--devices", nargs="+", type=int, choices=range(2, 9), default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", default="", help="only plans whose names contain this")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    add_comfyui()
    load_pack()
    sys.path += [str(ROOT / "tests"), str(ROOT / "proving")]
    import comfy.model_base
    import folder_paths
    import torch

    from seeded import FOLDER

    torch.set_num_threads(1)
    emulate_all(comfy.model_base)
    folder_paths.add_model_folder_path("diffusion_models", str(FOLDER))
    runs = f"medians of {options.repeat} runs" if options.repeat > 1 else "one run of each"
    slower = " and ".join(f"{SLOWER[name]:g} times ({TITLES[name]})" for name in options.models)
    print(
        f"{date.today()}, EMULATED devices on {os.cpu_count()} cores, whose layers take {slower} as long as on the GPU "
        f"of the profile; {options.steps} steps of Euler, {options.warmup} of warm-up, nothing rejected, {runs}",
        flush=True,
    )
    for name in options.models:
        table = list(lines(name, options))
        print("\n".join(["", HEAD, "|---" * 8 + "|", *table]), flush=True)


if __name__ == "__main__":
    main()
