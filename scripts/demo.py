"""`make demo`: one prompt after another through a real headless ComfyUI, alone and through both nodes.

Prints a table, saves a picture with the results side by side and what each rank did when, and leaves nothing running.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from comfy_server import ComfyServer
from pack import BUILD, ROOT, add_comfyui, load_pack
from quality_report import SAME

GRAPHS = ROOT / "tests" / "graphs"
OUT = BUILD / "demo"
WARMUP = 3  # of Split; ParaStep finds its own
MOST = 4  # ranks: the small model has no more than eight units
LANES = 2  # of ParaStep: by default it would give two devices a prompt each, as the row "Split, CFG lanes" shows
BATCH = 4  # pictures per prompt: a step of the small model takes long enough for its cost to be the denoiser's
CAPTIONS = (  # none of them was in the training set
    "a large red circle on the left",
    "a small blue square at the bottom",
    "a large purple triangle on the right",
    "a large yellow cross on the right",
)
BLUE, ORANGE, RED, GREEN = "#4c78a8", "#f58518", "#e45756", "#54a24b"
SHOWN = {"single": "one step", "round": "a round of steps"}
COLOURS = {"exact": BLUE, "ahead": ORANGE, "async": RED, "one step": BLUE, "a round of steps": GREEN}


@dataclass
class Mode:
    """One row of the table: a graph, what came out, and the trace of its last run. Seconds are of the sampling node;
    ``alone`` are those that ComfyUI alone needed for the same prompt right before, because a machine changes its pace.
    """

    name: str
    graph: dict[str, Any]
    ranks: int
    seconds: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    trace: dict[str, Any] | None = None

    @property
    def speed(self) -> float:
        return statistics.median(alone / own for alone, own in zip(self.alone, self.seconds, strict=True))


def modes(devices: str, ranks: int, steps: int) -> list[Mode]:
    """The rows. The first is ComfyUI alone; the last two are what a user has without us: as many steps as the same time
    buys, of the same solver and of a better one."""
    from leapfrog.parallel_backend import LanesPlan

    def graph(name: str, changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
        nodes = json.loads((GRAPHS / f"{name}.json").read_text())
        for node, inputs in changes.items():
            nodes[node]["inputs"].update(inputs)
        nodes["latent"]["inputs"]["batch_size"] = BATCH
        return nodes

    plain = {"sample": {"steps": steps}}
    fewer = round(steps / LanesPlan.choose(devices, LANES).ideal_speedup(steps, conditionings=1))
    lanes = {"sigmas": {"steps": steps}, "sampler": {"devices": devices, "lanes": LANES}}

    def split(mode: str, **inputs: Any) -> dict[str, Any]:
        inputs = {"components": ranks, "warmup_steps": WARMUP, "mode": mode, **inputs}
        changes = {"sample": {"steps": steps}, "split": {"devices": devices, **inputs}}
        return graph("async_unet_split", changes)

    def in_that_time(solver: str, sampler: str) -> Mode:
        changes = {"sample": {"steps": fewer, "sampler_name": sampler}}
        return Mode(f"ComfyUI, {fewer} steps {solver}", graph("stock_flux", changes), 0)

    return [
        Mode("ComfyUI alone", graph("stock_flux", plain), 0),
        Mode("Split, lookahead", split("lookahead"), ranks),
        Mode("Split, asyncdiff", split("asyncdiff"), ranks),
        Mode("Split, exact", split("exact"), ranks),
        Mode("Split, CFG lanes", split("lookahead", components=1), ranks),
        Mode("ParaStep Sampler", graph("parastep_sampler", lanes), min(ranks, 2 * LANES)),
        in_that_time("Euler", "euler"),
        in_that_time("DPM++ 2M", "dpmpp_2m"),
    ]


def sampling_seconds(server: ComfyServer, prompt: str) -> float:
    """How long the node called "sample" worked, by the times at which ComfyUI announced it and the next node."""
    events = server.events(prompt, "executing")
    begin = next(i for i, event in enumerate(events) if event.data.get("node") == "sample")
    return events[begin + 1].time - events[begin].time


def run(server: ComfyServer, mode: Mode, seed: int, caption: str) -> tuple[float, list[np.ndarray]]:
    """Seconds of the sampling node, and the pictures."""
    mode.graph["positive"]["inputs"]["text"] = caption
    mode.graph["sample"]["inputs"].update(
        {name: seed for name in ("seed", "noise_seed") if name in mode.graph["sample"]["inputs"]}
    )
    prompt = server.queue(mode.graph)
    entry = server.wait(prompt, timeout=600)
    server.wait_event("execution_success", prompt)
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in server.outputs(entry)]
    return sampling_seconds(server, prompt), pictures


def fidelity(mode: Mode, reference: Mode) -> tuple[float, float]:
    """Mean PSNR in dB and mean SSIM against the reference's pictures. PSNR of the same picture counts as ``SAME``."""
    pairs = list(zip(reference.pictures, mode.pictures, strict=True))
    with np.errstate(divide="ignore"):
        psnr = [min(SAME, peak_signal_noise_ratio(a, b)) for a, b in pairs]
    return float(np.mean(psnr)), float(np.mean([structural_similarity(a, b, channel_axis=2) for a, b in pairs]))


def table(rows: list[Mode]) -> list[str]:
    lines = [f"{'':26}{'ranks':>6}{'seconds':>9}{'speed':>8}{'PSNR':>11}{'SSIM':>8}"]
    for mode in rows:
        seconds = statistics.median(mode.seconds)
        psnr, ssim = fidelity(mode, rows[0])
        shown = "same" if psnr == SAME else f"{psnr:.1f} dB"
        ranks = str(mode.ranks) if mode.ranks else "-"
        lines.append(f"{mode.name:26}{ranks:>6}{seconds:9.2f}{mode.speed:7.2f}x{shown:>11}{ssim:8.4f}")
    return lines


def draw(rows: list[Mode], path: Path) -> None:
    pooled = [mode for mode in rows if mode.trace]
    figure = plt.figure(figsize=(11, 2.05 * len(rows) + 0.75 * len(pooled) + 1.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.05 * len(rows), 0.75 * len(pooled) + 1.2])
    top, bottom = parts
    axes = top.subplots(len(rows), len(CAPTIONS), squeeze=False)
    for row, mode in enumerate(rows):
        for column, picture in enumerate(mode.pictures[::BATCH]):
            ax = axes[row][column]
            ax.imshow(picture)
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title(CAPTIONS[column], fontsize=9)
            else:
                with np.errstate(divide="ignore"):
                    psnr = peak_signal_noise_ratio(rows[0].pictures[column * BATCH], picture)
                ax.set_xlabel("same picture" if np.isinf(psnr) else f"{psnr:.1f} dB", fontsize=8)
            if column == 0:
                ax.set_ylabel(f"{mode.name.replace(', ', chr(10))}\n{mode.speed:.2f}x", fontsize=9)
    lines = bottom.subplots(len(pooled), 1, squeeze=False, sharex=True)[:, 0]
    for ax, mode in zip(lines, pooled, strict=True):
        timeline(ax, mode)
    lines[-1].set_xlabel("milliseconds since the run began; grey: waiting for another rank")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def timeline(ax: plt.Axes, mode: Mode) -> None:
    """One bar per rank and denoiser call."""
    assert mode.trace
    spans = [event for event in mode.trace["traceEvents"] if event["ph"] == "X"]
    begin = min(span["ts"] for span in spans)
    used = {}
    for span in spans:
        name = str(span["name"])
        kind = SHOWN.get(name.split()[0], name)
        used[kind] = COLOURS[kind]
        start, length = (span["ts"] - begin) / 1e3, span["dur"] / 1e3
        waited = span["args"]["waited_ms"]
        ax.broken_barh([(start, length)], (span["tid"] - 0.4, 0.8), color="#dddddd")
        bar = [(start + waited, length - waited)]
        ax.broken_barh(bar, (span["tid"] - 0.4, 0.8), color=COLOURS[kind], edgecolor="white", linewidth=0.4)
    ranks = sorted({span["tid"] for span in spans})
    ax.set_yticks(ranks, [f"rank {rank}" for rank in ranks], fontsize=8)
    ax.invert_yaxis()
    ax.set_title(mode.name, fontsize=9, loc="left")
    ax.legend(
        handles=[Patch(color=c, label=k) for k, c in used.items()],
        fontsize=7,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
    )


def newest_trace(folder: Path) -> dict[str, Any] | None:
    files = sorted(folder.glob("run-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(files[-1].read_text()) if files else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cpu", action="store_true", help="ranks on the CPU, also where there is a GPU")
    options = parser.parse_args()
    import torch

    gpus = 0 if options.cpu or not torch.cuda.is_available() else torch.cuda.device_count()
    where = f"CPU, {os.cpu_count()} cores, one thread for ComfyUI and for each rank"
    devices, ranks, flags = "cpu,cpu", 2, ["--cpu"]
    if gpus:
        ranks, flags = min(gpus, MOST), []
        where = f"{ranks} GPUs"
        devices = ",".join(map(str, range(ranks)))
    if gpus == 1:
        where = "two ranks share one GPU, which makes nothing faster (scripts/demo.py --cpu uses the CPU)"
        devices, ranks = "0,0", 2
        os.environ["LEAPFROG_SHARE_GPU"] = "1"
    add_comfyui(*flags)
    load_pack()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = modes(devices, ranks, options.steps)
    print(f"Starting ComfyUI ({where}) ...", flush=True)
    with tempfile.TemporaryDirectory() as traces:
        env = {"LEAPFROG_TRACE_DIR": traces, "OMP_NUM_THREADS": "1"}
        with ComfyServer(*flags, output=options.out / "pictures", env=env) as server:
            for mode in rows:
                print(f"  {mode.name}: {len(CAPTIONS)} prompts, {BATCH} pictures each", flush=True)
                run(server, mode, 1, "a first run, to load and to start the ranks")
                for path in Path(traces).glob("*.json"):
                    path.unlink()
                for seed, caption in enumerate(CAPTIONS, 100):
                    before = 0.0 if mode is rows[0] else run(server, rows[0], seed, caption)[0]
                    seconds, pictures = run(server, mode, seed, caption)
                    mode.seconds.append(seconds)
                    mode.alone.append(before or seconds)
                    mode.pictures += pictures
                mode.trace = newest_trace(Path(traces))
    report = table(rows)
    print("\n".join(report))
    for mode in rows:
        held = mode.trace["otherData"]["ranks"] if mode.trace else []
        if held:
            print(f"{mode.name}: weights per rank " + ", ".join(f"{rank['bytes'] / 1e6:.2f} MB" for rank in held))
    (options.out / "table.txt").write_text("\n".join(report) + "\n")
    draw(rows, options.out / "first_picture.png")
    print(
        f"{options.steps} steps of Euler; seconds are of the sampling node, median of {len(CAPTIONS)} prompts; "
        "speed is beside ComfyUI alone with the same prompt right before, the median, too; "
        f"PSNR and SSIM to ComfyUI alone, mean of {len(CAPTIONS) * BATCH} pictures; the same one counts as {SAME:g} dB."
    )
    print(f"Picture: {options.out / 'first_picture.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
