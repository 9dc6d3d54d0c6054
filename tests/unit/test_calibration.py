"""How sensitive a model is: measured by short runs, kept in a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from leapfrog.parallel_backend import LanesPlan, Recipe
from leapfrog.parallel_backend.calibration import BOUNDS, USUAL, Calibration, measure

RECIPE = Recipe("diffusion_model", "/models/model.safetensors", "[]", (1000, 5))
TRUE = torch.ones(1, 4)


class Model:
    """Makes short runs whose result is off by ``factor`` times what the guard lets pass."""

    def __init__(self, factor: float):
        self.factor = factor
        self.runs = 0

    def __call__(self, schedule: Any) -> torch.Tensor:
        self.runs += 1
        if schedule is None:
            return TRUE
        drift = next(at / 1e4 for at in range(1000, 0, -1) if schedule[0].accepts(TRUE * (1 + at / 1e4), TRUE))
        return TRUE * (1 + self.factor * drift)


@pytest.mark.parametrize("factor", [0.01, 0.1, 1.0])
def test_the_sensitivity_is_what_comes_out_for_what_is_let_in(factor: float):
    assert measure(Model(factor)) == pytest.approx(factor, rel=0.01)


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf])
def test_runs_that_tell_nothing_leave_the_usual_bounds(factor: float):
    assert measure(Model(factor)) == USUAL


def test_a_run_in_which_nothing_was_accepted_tells_nothing():
    """What differs then is rounding."""
    assert measure(lambda schedule: TRUE * (1 if schedule is None else 1 + 1e-6)) == USUAL


def test_each_model_and_sampler_is_measured_once(tmp_path: Path):
    file, said = tmp_path / "new" / "calibration.json", []
    model = Model(0.2)
    for _ in range(2):  # the second from the file
        found = Calibration(file).sensitivity(RECIPE, "euler", model, said.append)
        assert found == pytest.approx(0.2, rel=0.01)
    assert (model.runs, len(said)) == (1 + len(BOUNDS), 1)
    Calibration(file).sensitivity(RECIPE, "heun", model, said.append)
    changed = Recipe(RECIPE.loader, RECIPE.path, RECIPE.options, (1000, 6))
    Calibration(file).sensitivity(changed, "euler", model, said.append)
    assert len(said) == 3
    assert "/models" not in file.read_text()
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"model.safetensors 1000 5 euler": "soon"}'])
def test_an_unreadable_file_is_measured_over(tmp_path: Path, content: str):
    file = tmp_path / "calibration.json"
    file.write_text(content)
    assert Calibration(file).sensitivity(RECIPE, "euler", Model(0.2), print) == pytest.approx(0.2, rel=0.01)
    assert Calibration(file).sensitivity(RECIPE, "euler", Model(0.4), print) == pytest.approx(0.2, rel=0.01)


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "leapfrog").write_text("a file where the folder should be")
    file = tmp_path / "leapfrog" / "calibration.json"
    assert Calibration(file).sensitivity(RECIPE, "euler", Model(0.2), print) == pytest.approx(0.2, rel=0.01)
    assert "could not be kept" in caplog.text


@pytest.mark.parametrize(("factor", "scale"), [(USUAL, 1.0), (2 * USUAL, 0.5), (100.0, 0.25), (1e-4, 4.0)])
def test_a_sensitive_model_gets_a_tighter_bound(tmp_path: Path, factor: float, scale: float):
    plan = LanesPlan(("cpu", "cpu"), 2, calibrate=True, bound=0.012)
    fitted = plan.calibrated(tmp_path / "calibration.json", RECIPE, "euler", Model(factor), print)
    assert fitted.bound == pytest.approx(scale * plan.bound, rel=0.01)
    assert not fitted.calibrate


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, True), ({"bound": 0.01}, False), ({"fidelity": "exact"}, False), ({"fidelity": "unguarded"}, False)],
)
def test_only_bounds_of_presets_are_calibrated(options: dict[str, Any], wanted: bool):
    assert LanesPlan.choose("cpu,cpu", 2, calibrate=True, **options).calibrate == wanted
