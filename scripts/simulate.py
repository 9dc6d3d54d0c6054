"""Speeds on machines that are not at hand, from measured unit times: a Markdown table, beside the published figures.

    python scripts/simulate.py --profile sd15 sd21 sdxl      # measure units here, into build/simulate/<name>.json
    python scripts/simulate.py build/simulate/*.json         # print the tables
    python scripts/simulate.py build/simulate/*.json --by-link --devices 2 4   # slow links and fast ones, instead

A profile is JSON: {"model", "source", "units": [{"name", "needs", "layers": [{"seconds", "output_bytes",
"weight_bytes"}]}], "stem_seconds", "stem_bytes", "head_seconds", "head_bytes"}. ``needs`` are the indices of the
earlier units whose outputs a unit reads; a unit is one layer or several in a row, of which the first reads those. The
stem is what every rank runs, the head follows the last unit. Whatever measures units on another device can write one.

It says "rows" and "side" of the latent. One measured on a GPU names it as "device", with "whole_seconds" of a
forward in one go and, where there are two rows, "row_seconds" of a forward with one: it gets a table of its own, in
which nothing is scaled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bench_machine import keep_memory
from pack import BUILD, add_comfyui, has_gpu, load_pack
from profile_units import CPU, CUDA, SUBJECTS, carried, in_forwards, layer_by_layer

FOLDER = BUILD / "simulate"
STEPS = 50
REPEAT = {CPU: 3, CUDA: 20}
LINKS = [0.125, 1.25, 12.0, 50.0, 300.0]
"""GB/s each way in the tables by link, about: Ethernet of 1 and of 10 Gbit/s; PCIe by way of the host's memory, which
the other tables have; 16 lanes of PCIe 5.0; NVLink between two H100."""

# AsyncDiff (arXiv 2406.06911), 50 steps, NVIDIA A5000: seconds of the unmodified run, and (components, stride): speed.
PUBLISHED: dict[str, tuple[str, float, dict[tuple[int, int], float]]] = {
    "sd21": ("SD 2.1", 5.51, {(2, 1): 1.8, (3, 1): 2.3, (4, 1): 2.6, (2, 2): 3.0, (3, 2): 4.0}),
    "sd15": ("SD 1.5", 2.70, {(2, 1): 1.8, (3, 1): 2.2, (4, 1): 2.6, (2, 2): 2.9, (3, 2): 3.7}),
    "sdxl": ("SDXL", 13.81, {(2, 1): 1.7, (3, 1): 2.4, (4, 1): 2.7, (2, 2): 2.8, (3, 2): 3.8}),
}
# ParaStep (arXiv 2505.14741): steps and warm-up of its code, the highest speed of its abstract.
PUBLISHED_LANES = {"SVD": (50, 5, 3.88), "CogVideoX-2b": (50, 13, 2.43), "AudioLDM2-large": (200, 5, 6.56)}
PUBLISHED_WARMUP = {"sd21": 1, "sd15": 1, "sdxl": 3}
TITLES = {name: title for name, (title, _, _) in PUBLISHED.items()} | {"flux": "Flux"}

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


class Way(NamedTuple):
    """A way to use several devices: a split, with ``lanes`` in two pipelines of half the rows each."""

    mode: str
    components: int
    stride: int
    lanes: bool
    warmup: int

    @property
    def cells(self) -> str:
        """Mode and warm-up."""
        way = f"{self.mode}, {'CFG lanes x ' if self.lanes else ''}N={self.components}"
        return f"{way}{', S=2' if self.stride == 2 else ''} | {'all' if self.mode == 'exact' else self.warmup}"


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
        self.title = TITLES[self.model] + (f", {measured['device']}" if "device" in measured else "")
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

    def speed(self, way: Way, link: Any, host: float, half: float) -> tuple[float, float]:
        """``(speed against one device, bytes between devices per evaluation)`` at the fastest cut; ``half`` is the time
        of half the rows as a share of that of all."""
        from leapfrog.parallel_backend.schedules.partition import component_seconds
        from leapfrog.parallel_backend.schedules.simulate import crossing, run_seconds

        bounds = self.bounds(way.components)
        traffic = crossing(self.outputs, self.needs, bounds)
        seconds: Any = run_seconds
        took = seconds(
            way.mode, STEPS, component_seconds(self.costs, bounds, head=self.head), traffic, link,
            stem=self.stem, host=host, warmup=way.warmup, stride=way.stride,
            row_scale=half if way.lanes else 1.0, row_bytes=0.5 if way.lanes else 1.0,
        )  # fmt: skip
        return STEPS * self.whole / took, sum(traffic.values())

    def speed_in_rounds(self, rows: int, half: float, devices: int, host: float) -> tuple[int, float]:
        """``(lanes, speed against one device)`` of ParaStep with as many lanes as occupy the devices, if nothing is
        rejected; ``half`` is the time of one row as a share of that of two."""
        from leapfrog.parallel_backend.schedules.simulate import rounds_seconds, rounds_taken

        lanes = devices // rows
        rounds = rounds_taken(STEPS, lanes, grows=True)
        took = rounds_seconds(rounds, rows, devices, lambda n: self.whole * (half if n < rows else n / rows), host=host)
        return lanes, STEPS * self.whole / took

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
    from leapfrog.parallel_backend.schedules.simulate import Link

    link, host = Link(options.bandwidth * 1e9, options.latency * 1e-6), options.host * 1e-3
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
        yield f"* {one.title}: {one.source}; a step of {1e3 * one.whole:.0f} ms"
    yield ""
    yield "Published speeds stand beside the warm-up that they probably had: 1, and 3 for SDXL."
    yield ""
    yield "| model | devices | mode | warm-up | cut between blocks | between layers | published | MB a step |"
    yield "|---|---|---|---|---|---|---|---|"
    for one, fine in simulations:
        published = PUBLISHED[one.model][2]
        for devices in options.devices:
            for way in ways_to_use(devices, one.model):
                speed, nbytes = one.speed(way, link, host, options.rows)
                finer, _ = fine.speed(way, link, host, options.rows)
                theirs = published.get((way.components, way.stride)) if way.mode == "asyncdiff" else None
                beside = f"{theirs:.1f}x" if theirs and way.warmup == PUBLISHED_WARMUP[one.model] else "-"
                speeds = f"{speed:.2f}x | {finer:.2f}x | {beside}"
                yield f"| {one.title} | {devices} | {way.cells} | {speeds} | {nbytes / 1e6:.1f} |"
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
            yield f"| {one.title} | {components} | {1 / components:.3f} | {theirs} | {ours} |"
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
                yield f"| {one.title} | {components} | {what} | {both} |"


def lanes_table() -> Iterable[str]:
    """ParaStep's bounds, which need no unit times: steps against rounds."""
    from leapfrog.parallel_backend import LanesPlan

    yield "### ParaStep: the ideal speed of its schedule, if nothing is rejected and nothing but evaluations takes time"
    yield ""
    counts = (2, 4, 8)
    heads = [f"{way}, {lanes} lanes" for way in ("as published", "balanced") for lanes in counts]
    yield f"| model | steps | published warm-up | {' | '.join(heads)} | published, at most |"
    yield "|---" * (4 + len(heads)) + "|"
    for model, (steps, warmup, speed) in PUBLISHED_LANES.items():
        theirs = [LanesPlan(("cpu",) * lanes, lanes, warmup, "paper") for lanes in counts]
        balanced = LanesPlan.FIDELITIES["balanced"][0]
        ours = [LanesPlan(("cpu",) * lanes, lanes, bound=balanced) for lanes in counts]
        ideal = " | ".join(f"{plan.ideal_speedup(steps, 1):.2f}x" for plan in (*theirs, *ours))
        yield f"| {model} | {steps} | {warmup} | {ideal} | {speed:.2f}x |"


def as_measured(profiles: list[dict[str, Any]], options: argparse.Namespace) -> Iterable[str]:
    """Of profiles that were measured on a GPU: several such GPUs against one, with the times as they are."""
    yield f"### SIMULATED speeds of several GPUs against the one that was measured, {STEPS} steps"
    yield ""
    yield "Unit times, and those of one row instead of two, as measured, not scaled."
    yield from by_link([(measured, Simulation(measured, None, layers=True)) for measured in profiles], options)
    yield ""
    yield "One GPU, measured:"
    yield ""
    yield "| model | latent | sum of the parts, ms | in one go, ms | one row, ms | source |"
    yield "|---|---|---|---|---|---|"
    for measured in profiles:
        alone = f"{1e3 * measured['row_seconds']:.1f}" if "row_seconds" in measured else "-"
        times = f"{1e3 * Simulation(measured, None).whole:.1f} | {1e3 * measured['whole_seconds']:.1f} | {alone}"
        yield f"| {TITLES[measured['model']]} | {latent(measured)} | {times} | {measured['source']} |"


def by_link(profiles: list[tuple[dict[str, Any], Simulation]], options: argparse.Namespace) -> Iterable[str]:
    """The same plans with slow links and with fast ones; the simulations are cut between layers."""
    from leapfrog.parallel_backend.schedules.simulate import Link

    yield (
        "Cut between layers. Ideal: no time between devices. Else links of so many GB/s each way, over which inputs "
        f"(latent, prompt) and outputs of a step travel, too; {options.latency:g} us a message, a host round trip of "
        f"{options.host:g} ms a step."
    )
    yield ""
    columns = "".join(f" {bandwidth:g} GB/s |" for bandwidth in options.links)
    yield f"| model | latent | ms a step | devices | mode | warm-up | ideal |{columns} MB a step |"
    yield "|---" * (8 + len(options.links)) + "|"
    for measured, fine in profiles:
        sizes = carried(fine.model, measured["rows"], measured["side"])
        links = [Link(rate * 1e9, options.latency * 1e-6) for rate in options.links]
        hosted = [(Link(), 0.0), *((link, options.host * 1e-3 + sum(map(link.seconds, sizes))) for link in links)]
        half = measured["row_seconds"] / measured["whole_seconds"] if "row_seconds" in measured else options.rows
        begin = f"{fine.title} | {latent(measured)} | {1e3 * fine.whole:.1f}"
        for devices in options.devices:
            for way in ways_to_use(devices, fine.model):
                if (way.mode == "lookahead" and way.warmup == 1) or (way.mode == "exact" and not way.lanes):
                    continue
                if way.lanes and measured["rows"] == 1:
                    continue
                found = [fine.speed(way, link, host, half) for link, host in hosted]
                speeds = " | ".join(f"{speed:.2f}x" for speed, _ in found)
                yield f"| {begin} | {devices} | {way.cells} | {speeds} | {found[0][1] / 1e6:.1f} |"
            if devices > measured["rows"] and devices % measured["rows"] == 0:
                runs = [fine.speed_in_rounds(measured["rows"], half, devices, host) for _, host in hosted]
                speeds = " | ".join(f"{speed:.2f}x" for _, speed in runs)
                yield f"| {begin} | {devices} | ParaStep, {runs[0][0]} lanes | auto | {speeds} | 0.0 |"


def latent(measured: dict[str, Any]) -> str:
    return f"{measured['rows']}x{measured['side']}x{measured['side']}"


def ways_to_use(devices: int, name: str) -> Iterable[Way]:
    """All that the tables have of so many devices."""
    for warmup in dict.fromkeys((1, PUBLISHED_WARMUP.get(name, 1))):
        yield Way("asyncdiff", devices, 1, False, warmup)
        if devices > 2:
            yield Way("asyncdiff", devices - 1, 2, False, warmup)
    for warmup in (1, 3):
        yield Way("lookahead", devices, 1, False, warmup)
    if devices > 2 and devices % 2 == 0:
        yield Way("lookahead", devices // 2, 1, True, 3)
    yield Way("exact", devices, 1, False, 0)
    if devices % 2 == 0:
        yield Way("exact", devices // 2, 1, True, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help=f"profiles, or with --profile names of models: {', '.join(SUBJECTS)}")
    parser.add_argument("--profile", action="store_true", help="measure here")
    parser.add_argument("--device", choices=(CPU, CUDA), help="to measure on; default: a GPU where PyTorch sees one")
    parser.add_argument("--side", type=int, nargs="+", help="of the latent; default: what the model is made for")
    parser.add_argument("--repeat", type=int, help=f"default: {REPEAT[CPU]}, on a GPU {REPEAT[CUDA]}")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--bandwidth", type=float, default=12.0, help="of a link, GB/s each way")
    parser.add_argument("--links", type=float, nargs="+", default=LINKS, help="the same, for the tables by link")
    parser.add_argument("--by-link", action="store_true", help="the same plans with slow links and with fast ones")
    parser.add_argument("--latency", type=float, default=30.0, help="of a message, microseconds")
    parser.add_argument("--host", type=float, default=0.5, help="host round trip of a step, milliseconds")
    parser.add_argument("--rows", type=float, default=0.55, help="time of half the rows against all")
    parser.add_argument("--as-measured", action="store_true", help="do not scale to the published step")
    options = parser.parse_args()
    if options.profile:
        if unknown := set(options.what) - set(SUBJECTS):
            parser.error(f"no such model: {', '.join(sorted(unknown))}")
        keep_memory()
        device = options.device or (CUDA if has_gpu() else CPU)
        if device == CUDA and not has_gpu():
            parser.error("PyTorch sees no GPU")
        measure(options, device)
        return
    add_comfyui()
    load_pack()
    profiles = [json.loads(Path(path).read_text()) for path in options.what]
    profiles.sort(key=lambda measured: list(TITLES).index(measured["model"]))
    scaled = []
    for measured in profiles:
        published, usual = PUBLISHED.get(measured["model"]), SUBJECTS[measured["model"]].side
        if published and measured["side"] == usual:
            step = None if options.as_measured else published[1] / STEPS
            scaled.append((measured, Simulation(measured, step), Simulation(measured, step, layers=True)))
    if scaled and options.by_link:
        print(f"### SIMULATED speeds by link, {STEPS} steps, against one device\n")
        print("\n".join(by_link([(measured, fine) for measured, _, fine in scaled], options)), end="\n\n")
    elif scaled:
        print("\n".join(tables([(one, fine) for _, one, fine in scaled], options)), end="\n\n")
        print("\n".join(lanes_table()), end="\n\n")
    if on_gpu := [measured for measured in profiles if "device" in measured]:
        print("\n".join(as_measured(on_gpu, options)))


def measure(options: argparse.Namespace, device: str) -> None:
    """Write a profile of each model at each size."""
    add_comfyui("--use-pytorch-cross-attention")
    load_pack()
    FOLDER.mkdir(parents=True, exist_ok=True)
    repeat = options.repeat or REPEAT[device]
    for name in options.what:
        usual = SUBJECTS[name].side
        for side in options.side or [usual]:
            if device == CUDA:
                measured = in_forwards(name, side, repeat)
            elif name == "flux":
                print("flux: skipped, it is measured on a GPU only")
                continue
            else:
                measured = layer_by_layer(name, side, repeat, options.threads)
            if measured is None:
                continue
            parts = [name, *([str(side)] if side != usual else []), *([CUDA] if device == CUDA else [])]
            path = FOLDER / f"{'_'.join(parts)}.json"
            path.write_text(json.dumps(measured, indent=1))
            seconds = [layer["seconds"] for unit in measured["units"] for layer in unit["layers"]]
            total = sum(seconds) + measured["stem_seconds"] + measured["head_seconds"]
            whole = f", {measured['whole_seconds']:.4f} s in one go" if "whole_seconds" in measured else ""
            count = f"{len(measured['units'])} units, {len(seconds)} layers"
            print(f"{path}: {total:.4g} s in {count}{whole}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
