"""What of a run reaches ComfyUI's log, and that a log which cannot be written costs no picture."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

import generation
import tiny_models
from full_disk import DEVICE, full_disk
from generation import Request, distance, generate
from leapfrog.parallel_backend import LeapfrogError, supervisor
from ranks import EXACT, load, parastep, reference, split, the_pool


def test_starting_shows_progress_and_not_comfyuis_noise(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    supervisor.close_all()
    generate(split(load("flux"), mode="exact"), Request())
    for said in (
        f"starting 2 ranks on {','.join(the_pool().devices)}",
        "rank 0 has loaded ComfyUI",
        "rank 1 has loaded",
        "2 ranks ready",
    ):
        assert said in caplog.text
    assert "[Leapfrog rank" not in caplog.text


def test_a_warning_in_a_rank_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "surplus.safetensors"
    save_file({**load_file(tiny_models.tiny_flux()), "surplus.weight": torch.ones(1)}, path)
    generate(comfy.sd.load_diffusion_model(str(path)), Request(), parastep(1))
    warnings = [record.getMessage() for record in caplog.records if record.name == "leapfrog"]
    for rank in (0, 1):
        assert any(f"[Leapfrog rank {rank}]" in said and "surplus" in said for said in warnings), warnings


@pytest.mark.skipif(not DEVICE.exists(), reason="no full device here")
def test_a_full_disk_costs_no_picture(monkeypatch: pytest.MonkeyPatch):
    supervisor.close_all()
    logger = logging.getLogger("leapfrog")
    level = logger.level
    with full_disk() as full:
        monkeypatch.setattr(sys, "stderr", full)
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(full)])
        monkeypatch.setenv("LEAPFROG_TRACE_DIR", str(DEVICE / "traces"))
        logger.setLevel(logging.DEBUG)
        try:
            ours = generate(split(load("flux"), mode="exact"), Request())
        finally:
            logger.setLevel(level)
            monkeypatch.undo()
    assert distance(ours, reference(Request())) < EXACT


@pytest.mark.parametrize("node", ["exact", "parastep"])
def test_nan_is_told_and_ends_a_run_of_which_nothing_is_left(node: str, caplog: pytest.LogCaptureFixture):
    positive = generation.prompt(1)
    positive[0][0][0, 0, 0] = float("inf")

    def run(model: Any, *sampler: Any) -> torch.Tensor:
        return generate(model, Request(), *sampler, positive=positive)

    caplog.set_level(logging.INFO, "leapfrog")
    assert run(load("flux")).isnan().all()
    with pytest.raises(LeapfrogError, match="the picture is lost") as caught:
        run(split(load("flux"), mode="exact")) if node == "exact" else run(load("flux"), parastep(1))
    told = [r for r in caplog.records if r.levelno == logging.WARNING and "gave NaN or infinity" in r.getMessage()]
    assert len(told) == 1, "of the first call, in which the negative prompt is still well"
    assert "rank 1 gave NaN or infinity in denoiser call 1" in told[0].getMessage()
    assert (caught.value.report.code, caught.value.report.step) == ("not_finite", 2)
    assert caplog.text.count("gave NaN or infinity") == 2  # once more in the report at the end
    good = split(load("flux"), mode="exact")
    assert distance(generate(good, Request()), reference(Request())) < EXACT
