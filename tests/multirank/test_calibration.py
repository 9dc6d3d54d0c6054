"""Calibration with a real model and real ranks: once, and without a trace in the run that it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch

from generation import Request, generate
from ranks import load, parastep

REQUEST = Request(steps=10, cfg=1.0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return tmp_path


def calibrated(base: str = "euler", fidelity: str = "fast") -> Any:
    return parastep(2, base=base, fidelity=fidelity, warmup=0, calibrate=True)


@pytest.mark.parametrize("base", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
def test_the_first_run_draws_what_every_later_one_draws(folder: Path, base: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "leapfrog")
    first, again = (generate(load("flux"), REQUEST, calibrated(base)) for _ in range(2))
    assert caplog.text.count("calibrating") == 1
    assert torch.equal(first, again)
    (key,) = json.loads((folder / "leapfrog" / "calibration.json").read_text())
    assert key.endswith(base)


def test_where_nothing_is_predicted_nothing_is_measured(folder: Path):
    generate(load("flux"), Request(), parastep(0, fidelity="balanced", calibrate=True))
    assert not list(folder.iterdir())
