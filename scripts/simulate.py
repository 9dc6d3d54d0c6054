"""Speeds on machines that are not at hand, from measured unit times: a Markdown table, beside the published figures.

    python scripts/simulate.py --profile sd15 sd21 sdxl      # measure units here, into build/simulate/<name>.json
    python scripts/simulate.py build/simulate/*.json         # print the tables

A profile is JSON: {"model", "source", "units": [{"name", "needs", "layers": [{"seconds", "output_bytes",
"weight_bytes"}]}], "stem_seconds", "stem_bytes", "head_seconds", "head_bytes"}. ``needs`` are the indices of the
earlier units whose outputs a unit reads; a unit is one layer or several in a row, of which the first reads those. The
stem is what every rank runs, the head follows the last unit. Whatever measures units on another device can write one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import KEEP_MEMORY
from full_size import MODELS, TOKENS, empty
from pack import BUILD, add_comfyui, load_pack

FOLDER = BUILD / "simulate"
STEPS = 50
ROWS = 2
"""Conditional and unconditional."""

# AsyncDiff (arXiv 2406.06911), 50 steps, NVIDIA A5000: seconds of the unmodified run, and (components, stride): speed.
PUBLISHED: dict[str, tuple[str, float, dict[tuple[int, int], float]]] = {
    "sd21": ("SD 2.1", 5.51, {(2, 1): 1.8, (3, 1): 2.3, (4, 1): 2.6, (2, 2): 3.0, (3, 2): 4.0}),
    "sd15": ("SD 1.5", 2.70, {(2, 1): 1.8, (3, 1): 2.2, (4, 1): 2.6, (2, 2): 2.9, (3, 2): 3.7}),
    "sdxl": ("SDXL", 13.81, {(2, 1): 1.7, (3, 1): 2.4, (4, 1): 2.7, (2, 2): 2.8, (3, 2): 3.8}),
}
PUBLISHED_WARMUP = {"sd21": 1, "sd15": 1, "sdxl": 3}

# The published splits, by hand: the first layer (unit, part) of every component but the first. SDXL's are no runs of
# consecutive layers; there, (unit, part) ranges that make up all components but the last, which has the rest.
PUBLISHED_CUTS: dict[str, dict[int, list[tuple[str, int]]]] = {
    "sd21": {
        2: [("output_blocks.5", 1)],
        3: [("middle_block", 0), ("output_blocks.9", 0)],
        4: [("input_blocks.7", 0), ("output_blocks.6", 0), ("output_blocks.9", 1)],
    },
    "sd15": {
        2: [("output_blocks.4", 1)],
        3: [("middle_block", 0), ("output_blocks.8", 1)],
        4: [("input_blocks.7", 0), ("output_blocks.4", 1), ("output_blocks.9", 0)],
    },
}
PUBLISHED_SETS = {
    "sdxl": {
        2: [(("input_blocks.7", 0), ("output_blocks.2", 0))],
        3: [(("input_blocks.7", 0), ("output_blocks.0", 1)), (("output_blocks.0", 1), ("output_blocks.3", 0))],
        4: [
            (("input_blocks.4", 1), ("middle_block", 0)),
            (("middle_block", 0), ("output_blocks.1", 0)),
            (("output_blocks.1", 0), ("output_blocks.3", 0)),
        ],
    }
}


# ---------------------------------------------------------------------------------------------------------- profiling


class Stopwatch:
    """Times the layers of a U-Net whose weights have no memory: each gets random weights for its turn only.

    The blocks of ComfyUI's U-Net are not called through forward, their layers are, so layers are hooked. What the
    forward does between two layers (joining skip tensors) counts for the second.
    """

    def __init__(self, denoiser: Any, repeat: int, clock: Callable[[], float]):
        from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential

        self.repeat, self.clock = repeat, clock
        self.seconds: dict[str, float] = {}
        self.outputs: dict[str, int] = {}
        self._left = clock()
        self._gap = 0.0
        for path, module in denoiser.named_modules():
            if isinstance(module, TimestepEmbedSequential):
                for index, layer in enumerate(module):
                    self._hook(f"{path}.{index}", layer)
        for path in ("time_embed", "label_emb", "out"):
            if hasattr(denoiser, path):
                self._hook(path, getattr(denoiser, path))

    def _hook(self, name: str, layer: Any) -> None:
        layer.register_forward_pre_hook(lambda *_: self._enter(layer))
        layer.register_forward_hook(lambda _layer, inputs, output: self._leave(name, layer, inputs, output))

    def _enter(self, layer: Any) -> None:
        self._gap = self.clock() - self._left
        layer.to_empty(device="cpu")
        for weight in layer.parameters():
            if weight.ndim > 1:
                weight.uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
            else:
                weight.fill_(0.5)
        self._began = self.clock()

    def _leave(self, name: str, layer: Any, inputs: Any, output: Any) -> None:
        times = [self.clock() - self._began]
        for _ in range(self.repeat - 1):
            began = self.clock()
            layer.forward(*inputs)
            times.append(self.clock() - began)
        self.seconds[name] = min(times) + self._gap
        self.outputs[name] = output.nelement()
        layer.to_empty(device="meta")
        self._left = self.clock()


def profile(name: str, side: int, repeat: int, threads: int) -> dict[str, Any]:
    """Unit times of a full-size U-Net on this CPU for ROWS rows at a latent of ``side``, in the form of a profile.

    Times are of float32; bytes are those of float16, which a GPU would use.
    """
    import torch

    torch.set_num_threads(threads)
    denoiser = empty(name).diffusion_model
    denoiser.dtype = torch.float32
    denoiser.to(torch.float32)
    config = MODELS[name].config
    arguments: dict[str, Any] = {"context": torch.randn(ROWS, TOKENS, config["context_dim"])}
    if config["adm_in_channels"]:
        arguments["y"] = torch.randn(ROWS, config["adm_in_channels"])
    # on a machine that others use too, the time of a thread says more than that of the clock on the wall
    watch = Stopwatch(denoiser, repeat, time.thread_time if threads == 1 else time.perf_counter)
    with torch.inference_mode():
        denoiser(torch.randn(ROWS, config["in_channels"], side, side), torch.full((ROWS,), 500.0), **arguments)

    def weights(path: str) -> int:
        return 2 * sum(weight.numel() for weight in denoiser.get_submodule(path).parameters())

    def layers(path: str) -> list[dict[str, Any]]:
        return [
            {
                "seconds": watch.seconds[f"{path}.{index}"],
                "output_bytes": 2 * watch.outputs[f"{path}.{index}"],
                "weight_bytes": weights(f"{path}.{index}"),
            }
            for index in range(len(denoiser.get_submodule(path)))
        ]

    count = len(denoiser.input_blocks)
    paths = [f"input_blocks.{i}" for i in range(count)] + ["middle_block"]
    needs = [[index - 1] if index else [] for index in range(count + 1)]
    for index in range(len(denoiser.output_blocks)):
        paths.append(f"output_blocks.{index}")
        needs.append([count + index, count - 1 - index])  # the newest skip tensor is consumed first
    units = [{"name": path, "needs": needed, "layers": layers(path)} for path, needed in zip(paths, needs, strict=True)]
    stem = [path for path in ("time_embed", "label_emb") if hasattr(denoiser, path)]
    threads_used = "one thread (its CPU time)" if threads == 1 else f"{threads} threads"
    return {
        "model": name,
        "source": (
            f"{_cpu()}, {threads_used}, float32, torch {torch.__version__}, best of {repeat}, "
            f"{ROWS} rows of {side}x{side}, random weights"
        ),
        "units": units,
        "stem_seconds": sum(watch.seconds[path] for path in stem),
        "stem_bytes": sum(weights(path) for path in stem),
        "head_seconds": watch.seconds["out"],
        "head_bytes": weights("out"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------------- tables


class Simulation:
    """One profile, its times scaled so that the whole denoiser takes ``step_seconds`` (None: as measured).

    ``layers``: a component may begin at any layer, instead of with a whole unit.
    """

    def __init__(self, measured: dict[str, Any], step_seconds: float | None, layers: bool = False):
        units = measured["units"]
        shared = measured["stem_seconds"], measured["head_seconds"]
        whole = sum(layer["seconds"] for unit in units for layer in unit["layers"]) + sum(shared)
        scale = 1.0 if step_seconds is None else step_seconds / whole
        self.model, self.source, self.whole = measured["model"], measured["source"], whole * scale
        self.stem, self.head = (seconds * scale for seconds in shared)
        self.shared = measured["stem_bytes"] + measured["head_bytes"]
        self.names: list[tuple[str, int]] = []
        self.needs: list[list[int]] = []
        self.costs, self.outputs, self.weights = [], [], []
        last: list[int] = []  # of each unit, where its output is made
        for unit in units:
            rows = [[layer] for layer in unit["layers"]] if layers else [unit["layers"]]
            for index, row in enumerate(rows):
                self.names.append((unit["name"], index))
                self.needs.append([len(self.costs) - 1] if index else [last[need] for need in unit["needs"]])
                self.costs.append(sum(layer["seconds"] for layer in row) * scale)
                self.weights.append(sum(layer["weight_bytes"] for layer in row))
                self.outputs.append(row[-1]["output_bytes"])
            last.append(len(self.costs) - 1)

    def bounds(self, components: int, most: float | None = None) -> Any:
        """The fastest cut; with ``most``, the fastest where no rank holds more than this share of all bytes."""
        from leapfrog.parallel_backend.schedules.partition import partition

        limit = None if most is None else int(most * (sum(self.weights) + self.shared)) - self.shared
        limits = None if limit is None else [limit] * components
        fixed = {"stem": self.stem, "head": self.head}
        return partition(self.costs, components, **fixed, nbytes=self.weights, limits=limits)

    def speed(self, mode: str, components: int, options: argparse.Namespace, **changes: Any) -> tuple[float, float]:
        """``(speed against one device, bytes between devices per evaluation)`` at the fastest cut."""
        from leapfrog.parallel_backend.schedules.partition import component_seconds
        from leapfrog.parallel_backend.schedules.simulate import Link, crossing, run_seconds

        bounds = self.bounds(components)
        traffic = crossing(self.outputs, self.needs, bounds)
        seconds: Any = run_seconds
        took = seconds(
            mode, STEPS, component_seconds(self.costs, bounds, head=self.head), traffic,
            Link(options.bandwidth * 1e9, options.latency * 1e-6), stem=self.stem, host=options.host * 1e-3, **changes,
        )  # fmt: skip
        return STEPS * self.whole / took, sum(traffic.values())

    def share(self, bounds: Any) -> float:
        """Time of the slowest component against the whole."""
        from leapfrog.parallel_backend.schedules.partition import slowest_share

        return slowest_share(self.costs, bounds, stem=self.stem, head=self.head)

    def largest(self, bounds: Any) -> float:
        """The largest part of the weights' bytes that a rank holds, what all ranks hold included."""
        held = max(sum(self.weights[first : last + 1]) for first, last in bounds)
        return (held + self.shared) / (sum(self.weights) + self.shared)

    def by_hand(self, components: int) -> float | None:
        """Time of the slowest component of the published cut against the whole, None where none was published."""
        cuts, sets = PUBLISHED_CUTS.get(self.model, {}), PUBLISHED_SETS.get(self.model, {})
        at = {name: position for position, name in enumerate(self.names)}
        if components in cuts:
            edges = [0, *(at[edge] for edge in cuts[components]), len(self.costs)]
            groups = [sum(self.costs[begin:end]) for begin, end in pairwise(edges)]
        elif components in sets:
            groups = [sum(self.costs[at[begin] : at[end]]) for begin, end in sets[components]]
            groups.append(sum(self.costs) - sum(groups))
        else:
            return None
        groups[-1] += self.head
        return (max(groups) + self.stem) / self.whole


def tables(simulations: list[tuple[Simulation, Simulation]], options: argparse.Namespace) -> Iterable[str]:
    """``simulations`` are pairs: cut between units, cut between layers."""
    yield f"### SIMULATED speeds, {STEPS} steps, against one device"
    yield ""
    yield (
        f"Nothing below was run on the devices it is about. Link: {options.bandwidth:g} GB/s, {options.latency:g} us; "
        f"host round trip {options.host:g} ms a step; activations in float16. CFG lanes: a half's time is "
        f"{options.rows:g} of the whole's. Each part of a step is as long as its share of the measured unit times; the "
        "whole step is as long as a step of the published run on one A5000. Unit times:"
    )
    yield ""
    for one, _ in simulations:
        yield f"* {PUBLISHED[one.model][0]}: {one.source}; a step of {1e3 * one.whole:.0f} ms"
    yield ""
    yield "Published speeds stand beside the warm-up that they probably had: 1, and 3 for SDXL."
    yield ""
    yield "| model | devices | mode | warm-up | cut between blocks | between layers | published | MB a step |"
    yield "|---|---|---|---|---|---|---|---|"
    for one, fine in simulations:
        title, _, published = PUBLISHED[one.model]
        for devices in options.devices:
            for mode, components, stride, lanes, warmup in rows(one.model, devices):
                changes: dict[str, Any] = {"warmup": warmup, "stride": stride}
                if lanes:
                    changes |= {"row_scale": options.rows, "row_bytes": 0.5}
                speed, nbytes = one.speed(mode, components, options, **changes)
                finer, _ = fine.speed(mode, components, options, **changes)
                theirs = published.get((components, stride)) if mode == "asyncdiff" else None
                label = f"{mode}, {'CFG lanes x ' if lanes else ''}N={components}" + (", S=2" if stride == 2 else "")
                beside = f"{theirs:.1f}x" if theirs and warmup == PUBLISHED_WARMUP[one.model] else "-"
                waits = "all" if mode == "exact" else warmup
                speeds = f"{speed:.2f}x | {finer:.2f}x | {beside}"
                yield f"| {title} | {devices} | {label} | {waits} | {speeds} | {nbytes / 1e6:.1f} |"
    yield ""
    yield "### Balance: time of the slowest component against the whole"
    yield ""
    yield "| model | N | 1/N | the published cut, same unit times | ours, between blocks | ours, between layers |"
    yield "|---|---|---|---|---|---|"
    for one, fine in simulations:
        for components in (2, 3, 4, 8):
            hand = fine.by_hand(components)
            ours = f"{one.share(one.bounds(components)):.3f} | {fine.share(fine.bounds(components)):.3f}"
            theirs = f"{hand:.3f}" if hand else "-"
            yield f"| {PUBLISHED[one.model][0]} | {components} | {1 / components:.3f} | {theirs} | {ours} |"
    yield ""
    yield "### Weights: the largest part of all bytes that one rank holds, and the slowest component's part of the time"
    yield ""
    yield "| model | N | cut between | fastest cut: bytes, time | fastest with at most 1/N + 0.10 of the bytes |"
    yield "|---|---|---|---|---|"
    for pair in simulations:
        for components in (2, 3, 4, 8):
            for one, what in zip(pair, ("blocks", "layers"), strict=True):
                free = one.bounds(components)
                try:
                    held = one.bounds(components, 1 / components + 0.10)
                    limited = f"{one.largest(held):.3f}, {one.share(held):.3f}"
                except ValueError as error:
                    limited = f"none: {error}"
                both = f"{one.largest(free):.3f}, {one.share(free):.3f} | {limited}"
                yield f"| {PUBLISHED[one.model][0]} | {components} | {what} | {both} |"


def rows(name: str, devices: int) -> Iterable[tuple[str, int, int, bool, int]]:
    """``(mode, components, stride, CFG lanes, warm-up)`` of the ways to use so many devices."""
    for warmup in dict.fromkeys((1, PUBLISHED_WARMUP[name])):
        yield "asyncdiff", devices, 1, False, warmup
        if devices > 2:
            yield "asyncdiff", devices - 1, 2, False, warmup
    for warmup in (1, 3):
        yield "lookahead", devices, 1, False, warmup
    if devices > 2 and devices % 2 == 0:
        yield "lookahead", devices // 2, 1, True, 3
    yield "exact", devices, 1, False, 0
    if devices % 2 == 0:
        yield "exact", devices // 2, 1, True, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="profiles, or with --profile names of models")
    parser.add_argument("--profile", action="store_true", help="measure here")
    parser.add_argument("--side", type=int, help="of the latent; default: what the model is made for")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--bandwidth", type=float, default=12.0, help="of a link, GB/s each way")
    parser.add_argument("--latency", type=float, default=30.0, help="of a message, microseconds")
    parser.add_argument("--host", type=float, default=0.5, help="host round trip of a step, milliseconds")
    parser.add_argument("--rows", type=float, default=0.55, help="time of half the rows against all")
    parser.add_argument("--as-measured", action="store_true", help="do not scale to the published step")
    options = parser.parse_args()
    if options.profile:
        if not KEEP_MEMORY.items() <= os.environ.items():  # read by the C library at start
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
        add_comfyui("--use-pytorch-cross-attention")
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in options.what:
            side = options.side or MODELS[name].side
            measured = profile(name, side, options.repeat, options.threads)
            path = FOLDER / (f"{name}.json" if side == MODELS[name].side else f"{name}_{side}.json")
            path.write_text(json.dumps(measured, indent=1))
            seconds = [layer["seconds"] for unit in measured["units"] for layer in unit["layers"]]
            print(f"{path}: {sum(seconds):.2f} s in {len(measured['units'])} units, {len(seconds)} layers")
        return
    add_comfyui()
    load_pack()
    simulations = []
    for path in options.what:
        measured = json.loads(Path(path).read_text())
        step = None if options.as_measured else PUBLISHED[measured["model"]][1] / STEPS
        simulations.append((Simulation(measured, step), Simulation(measured, step, layers=True)))
    simulations.sort(key=lambda pair: list(PUBLISHED).index(pair[0].model))
    print("\n".join(tables(simulations, options)))


if __name__ == "__main__":
    sys.exit(main())
