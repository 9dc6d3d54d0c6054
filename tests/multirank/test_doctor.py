"""The doctor's command line with ranks and a ComfyUI that are real, or really broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import tiny_models
from leapfrog.parallel_backend import supervisor
from leapfrog.parallel_backend.protocol import Probe, Probed
from leapfrog.parallel_backend.starting import ComfyHost
from pack import ROOT, comfyui_dir

MARK = "LEAPFROG_TEST_MARK"
WIDTH = 100
DEADLINE_S = 280.0


def doctor(folder: Path, *arguments: object, **options: Any) -> tuple[int, str]:
    """``(exit code, text)`` of the doctor, started in ``folder`` as a user would; no process of it is left."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "HOME": str(folder), "LOGNAME": "anna", MARK: mark, **options.pop("env", {})}
    done = subprocess.run(
        [sys.executable, ROOT / "parallel_backend", "--doctor", *map(str, arguments)], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S, **options,
    )  # fmt: skip
    assert not [process for process in psutil.process_iter() if _has(process, mark)]
    assert max(map(len, done.stdout.splitlines())) <= WIDTH, done.stdout
    for place in (folder, ROOT, comfyui_dir(), comfyui_dir().resolve()):
        assert str(place) not in done.stdout, done.stdout
    return done.returncode, done.stdout


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a ComfyUI whose first module is the given code."""

    def make(code: str) -> Path:
        folder = tmp_path / "ComfyUI"
        (folder / "comfy").mkdir(parents=True)
        for name in ("main.py", "folder_paths.py", "comfy/__init__.py", "comfy/samplers.py"):
            (folder / name).touch()
        (folder / "comfy/options.py").write_text(code)
        return folder

    return make


@pytest.mark.timeout(DEADLINE_S + 20)
def test_everything_works(tmp_path: Path):
    folder = tmp_path / "models/diffusion_models/of mine"
    folder.mkdir(parents=True)
    (folder / "tiny.safetensors").symlink_to(tiny_models.tiny_flux())
    code, text = doctor(
        tmp_path, "--comfyui", comfyui_dir(), "--devices", "cpu,cpu", "--model", "of mine/tiny.safetensors",
        "--", "--base-directory", tmp_path,
    )  # fmt: skip
    assert code == 0, text
    assert text.splitlines()[-1] == "doctor: everything works"
    assert re.search(r"^  ComfyUI +\d+\.\d+", text, re.MULTILINE)
    assert re.search(r"^  round trip +rank 0 [\d.]+ ms, rank 1 [\d.]+ ms", text, re.MULTILINE)
    assert re.search(r"^  rank 0 to 1 +[\d,]+ MB/s, latency [\d,]+ us", text, re.MULTILINE)
    assert "ok, Async UNet Split, ParaStep Sampler, ParaStep KSampler" in text
    assert re.search(r"ok, Flux in 2 parts, relative difference \d\.\de[-+]\d+ to ComfyUI alone", text)
    assert re.search(r"^  advice +CFG above 1: (one device|ParaStep|Async UNet Split)", text, re.MULTILINE)
    assert "at a latent of 16x32x32" in text


def test_no_comfyui_and_a_setting_that_means_nothing(tmp_path: Path):
    code, text = doctor(tmp_path, "--comfyui", tmp_path, env={"LEAPFROG_STEP_TIMEOUT": "soon"})
    assert code == 1
    assert "1. No ComfyUI was found in ~." in text
    assert "--comfyui FOLDER" in text
    assert "2. LEAPFROG_STEP_TIMEOUT is 'soon', not seconds." in text
    assert "left out: ranks need ComfyUI" in text
    assert text.splitlines()[-1] == "doctor: 2 problems"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process cannot be held to one core here")
def test_one_core_and_ranks_that_cannot_start(tmp_path: Path, broken: Callable[[str], Path]):
    one = min(os.sched_getaffinity(0))
    code, text = doctor(
        tmp_path, "--comfyui", broken("raise RuntimeError('no options today')"),
        env={"CUDA_VISIBLE_DEVICES": ""}, preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )  # fmt: skip
    assert code == 1
    assert "passes the MODEL through: there is no second device" in text
    assert "two ranks share it for this test only" in text
    assert re.search(r"^  start +FAILED", text, re.MULTILINE)
    assert re.search(r"^  nodes +FAILED", text, re.MULTILINE)
    assert "| RuntimeError: no options today" in text
    assert text.splitlines()[-1] == "doctor: 2 problems"


def test_ranks_that_never_start(tmp_path: Path, broken: Callable[[str], Path]):
    code, text = doctor(
        tmp_path, "--comfyui", broken("import time\ntime.sleep(600)"), "--devices", "cpu,cpu", "--timeout", 8
    )
    assert code == 1
    assert "1. 'self-test on 2 devices: cpu, cpu' was not done when the 8 s were over." in text
    assert text.splitlines()[-1] == "doctor: 1 problem"


def test_a_link_carries_what_it_is_given():
    pool = supervisor.acquire(("cpu", "cpu"), ComfyHost(str(comfyui_dir()), ("--cpu",)), lambda: None, doctor)
    ask = Probe(first=1, second=0, sizes=[1, 1000, 1 << 20], repeats=[3, 2, 1])
    replies: dict[int, Probed] = pool.request({0: ask, 1: ask}, 60.0, lambda: None)
    for reply in replies.values():
        assert reply.intact
        assert len(reply.seconds) == 3
        assert min(reply.seconds) > 0
