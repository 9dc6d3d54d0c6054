from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.ops
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

import bench_machine
import full_size
import profile_units
import simulate

BUILD: Any = {"sd15": UNetModel, "flux": Flux}
NARROW: Any = {
    "sd15": {**full_size.SD15, "model_channels": 32, "num_heads": 4},
    "flux": {
        **profile_units.FLUX, "hidden_size": 64, "num_heads": 2, "depth": 2, "depth_single_blocks": 3,
        "vec_in_dim": 32, "context_in_dim": 48, "axes_dim": [8, 12, 12],
    },
}  # fmt: skip
COUNTS = {"sd15": 25, "flux": 5}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str) -> torch.nn.Module:
        return BUILD[name](**NARROW[name], device="meta", operations=comfy.ops.disable_weight_init)

    monkeypatch.setattr(profile_units, "build", build)
    monkeypatch.setattr(profile_units, "FLUX", NARROW["flux"])


def in_forwards(name: str) -> dict[str, Any]:
    measured = profile_units.in_forwards(name, 8, 3, "cpu")
    assert measured is not None
    return measured


@pytest.mark.parametrize("name", COUNTS)
def test_every_part_of_whole_forwards_is_timed(name: str, monkeypatch: pytest.MonkeyPatch):
    reads = itertools.count()
    monkeypatch.setattr(profile_units, "time", SimpleNamespace(perf_counter=lambda: float(next(reads))))
    measured = in_forwards(name)
    units = measured["units"]
    assert len(units) == COUNTS[name]
    assert all(need < index for index, unit in enumerate(units) for need in unit["needs"])
    for layer in (layer for unit in units for layer in unit["layers"]):
        assert layer["seconds"] == pytest.approx(1)
        assert layer["output_bytes"] > 0
    assert [measured[key] for key in ("stem_seconds", "head_seconds", "whole_seconds")] == pytest.approx([1, 1, 1])
    held = sum(layer["weight_bytes"] for unit in units for layer in unit["layers"])
    weights = sum(weight.numel() for weight in profile_units.build(name).parameters())
    assert held + measured["stem_bytes"] + measured["head_bytes"] == 2 * weights
    assert ("row_seconds" in measured) == (measured["rows"] == 2)


def test_both_ways_to_measure_find_the_same_parts():
    def without_times(measured: dict[str, Any]) -> list[Any]:
        layers = [layer for unit in measured["units"] for layer in unit["layers"]]
        names = [(unit["name"], unit["needs"], len(unit["layers"])) for unit in measured["units"]]
        sizes = [(layer["output_bytes"], layer["weight_bytes"]) for layer in layers]
        return [names, sizes, measured["stem_bytes"], measured["head_bytes"], measured["rows"], measured["side"]]

    threads = torch.get_num_threads()
    apart = profile_units.layer_by_layer("sd15", 8, 1, threads)
    assert without_times(apart) == without_times(in_forwards("sd15"))


def test_on_a_gpu_nothing_is_waited_for_before_the_end_of_a_forward(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []

    class Event(profile_units.Moment):
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            super().record()
            log.append("mark")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(profile_units, "WARM_SECONDS", 0.0)
    denoiser = profile_units.build("flux").to(torch.float32).to_empty(device="cpu")
    with torch.inference_mode():
        profile_units.draw(denoiser)
        given = profile_units.call("flux", 1, 8, "cpu", torch.float32)
        layers = [path for _, _, paths in profile_units.units_of(denoiser) for path in paths]
        forwards = profile_units.Forwards(denoiser, "cuda")
        seconds, _ = forwards.parts(given, layers, 2)
        assert len(seconds) == len(layers) + 2
        timed = ["mark"] * (len(layers) + 3)
        warm = [*timed[2:], "wait"] * profile_units.WARM_FORWARDS
        assert log == [*warm, *[*timed, "wait"] * 2]
        log.clear()
        forwards.whole(given, 2)
        assert log == ["wait"] * (profile_units.WARM_FORWARDS + 2)


def test_a_model_without_room_on_the_gpu_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1e9, 8e9))
    assert profile_units.in_forwards("flux", 8, 1) is None
    assert capsys.readouterr().out == "flux: skipped, it takes 3 GB and 1 GB are free\n"


def test_the_tables_of_a_gpu_stand_beside_those_that_are_scaled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    def measure(name: str, _side: int, _repeat: int) -> dict[str, Any]:
        return {**in_forwards(name), "device": "GPU", "side": profile_units.SUBJECTS[name].side}

    monkeypatch.setattr(simulate, "FOLDER", tmp_path)
    monkeypatch.setattr(simulate, "in_forwards", measure)
    monkeypatch.setattr(simulate, "has_gpu", lambda: True)
    for key, value in bench_machine.KEEP_MEMORY.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", ["simulate.py", "--profile", "flux", "sd15"])
    simulate.main()
    paths = [tmp_path / "flux_cuda.json", tmp_path / "sd15_cuda.json"]
    assert json.loads(paths[1].read_text())["model"] == "sd15"
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["simulate.py", *map(str, paths), "--devices", "2", "--links", "12", "300"])
    simulate.main()
    scaled, _, unscaled = capsys.readouterr().out.partition("### SIMULATED speeds of several GPUs")
    assert "a step of 54 ms" in scaled
    assert "Flux" not in scaled
    assert "| ideal | 12 GB/s | 300 GB/s | MB a step |" in unscaled
    rows = [line.split(" | ") for line in unscaled.splitlines() if line.startswith(("| SD 1.5, GPU", "| Flux, GPU"))]
    assert [row[0] for row in rows] == ["| SD 1.5, GPU"] * 3 + ["| Flux, GPU"] * 3
    assert [row[4] for row in rows][2::3] == ["exact, CFG lanes x N=1", "ParaStep, 2 lanes"]
    for row in rows:
        ideal, slow, fast = (float(cell.removesuffix("x")) for cell in row[6:9])
        assert ideal >= fast >= slow


def test_a_slow_link_costs_a_split_its_speed_and_parastep_none():
    layer = {"seconds": 0.01, "output_bytes": 4_000_000, "weight_bytes": 1}
    units = [{"name": f"{index}", "needs": [index - 1] if index else [], "layers": [layer]} for index in range(8)]
    ends = {"stem_seconds": 0.0, "stem_bytes": 0, "head_seconds": 0.0, "head_bytes": 0}
    measured = {"model": "sd15", "source": "made up", "rows": 2, "side": 8, "units": units, **ends}
    given = {"links": [0.04, 400.0], "latency": 0.0, "host": 0.0, "rows": 0.5, "devices": [4]}
    made = simulate.Simulation(measured, None, layers=True)
    lines = [line.split(" | ") for line in simulate.by_link([(measured, made)], argparse.Namespace(**given))]
    speed = {row[4]: [float(cell.removesuffix("x")) for cell in row[6:9]] for row in lines[4:]}
    assert set(speed) == {
        "asyncdiff, N=4", "asyncdiff, N=3, S=2", "lookahead, N=4", "lookahead, CFG lanes x N=2",
        "exact, CFG lanes x N=2", "ParaStep, 2 lanes",
    }  # fmt: skip
    for way, (ideal, slow, fast) in speed.items():
        assert fast == pytest.approx(ideal, rel=0.01)
        assert slow > 0.8 * ideal if way.startswith("ParaStep") else slow < ideal / 2
    # an exact step of 80 ms and three messages of 100 ms; then as fast as the link takes one after another
    assert speed["asyncdiff, N=4"][1] == pytest.approx(50 * 80 / (380 + 49 * 100), rel=0.1)
    assert speed["ParaStep, 2 lanes"][0] == pytest.approx(2 * 50 / 27, abs=0.005)
