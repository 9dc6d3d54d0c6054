"""What the doctor shows and hides, without ranks."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leapfrog.parallel_backend import starting
from leapfrog.parallel_backend.doctor.checkup import see_as_comfyui
from leapfrog.parallel_backend.doctor.choice import SETTINGS, choices, settings
from leapfrog.parallel_backend.doctor.sheet import WIDTH, Hiding, Sheet
from leapfrog.parallel_backend.protocol import Probe
from leapfrog.parallel_backend.starting import backend_of
from leapfrog.parallel_backend.worker.probe import probe
from pack import ROOT

DOCS = (ROOT / "docs/settings.md").read_text()


@pytest.fixture
def sheet() -> Sheet:
    return Sheet(io.StringIO())


def written(sheet: Sheet) -> str:
    out = sheet._out
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def test_places_are_hidden_however_they_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    home = tmp_path / "people/anna"
    (home / "ComfyUI").mkdir(parents=True)
    (tmp_path / "link").symlink_to(home / "ComfyUI")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "anna")
    hiding = Hiding()
    hiding.hide(tmp_path / "link", "<comfyui>")
    shown = {
        f"{home}/ComfyUI/models": "<comfyui>/models",
        f"'{tmp_path}/link'": "'<comfyui>'",
        f"in {home}.": "in ~.",
        f"{home}/ComfyUI-old/x": "~/ComfyUI-old/x",
        f"{home}sson/x": f"{home}sson/x",
        "/mnt/anna/models": "/mnt/<user>/models",
        "/home/bob/x and /Users/eve": "~/x and ~",
        r"C:\Users\bob\x": r"~\x",
        r"'C:\\Users\\bob\\x'": r"'~\\x'",
        "annals": "annals",
    }
    assert {text: hiding(text) for text in shown} == shown


def test_a_home_at_the_top_is_not_found_in_other_paths(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/pat")
    assert Hiding()("/pat/x /srv/pat/x /pattern") == "~/x /srv/pat/x /pattern"


def test_problems_come_last_with_what_to_do(sheet: Sheet):
    sheet.section("a section")
    sheet.failed("a row", "It is broken " * 20, "Mend it " * 20)
    sheet.failed("a row", "It is broken " * 20, "Mend it " * 20)
    sheet.problem("So is this.", "Mend this.")
    sheet.remark("but never mind")
    assert sheet.end() == 1
    lines = written(sheet).splitlines()
    assert lines[-1] == "doctor: 2 problems"
    assert "     To do: Mend this." in lines
    assert max(map(len, lines)) <= WIDTH


def test_all_is_well(sheet: Sheet):
    sheet.remark("but never mind")
    assert sheet.end() == 0
    assert written(sheet).splitlines()[-1] == "doctor: everything works; but never mind"


def test_settings_that_mean_nothing_are_problems(sheet: Sheet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEAPFROG_STEP_TIMEOUT", "soon")
    monkeypatch.setenv("LEAPFROG_SHARE_GPU", "yes")
    monkeypatch.setenv("LEAPFROG_IDLE_S", "30")
    monkeypatch.setenv("LEAPFROG_STEP_TIMEOUTS", "1")
    assert not settings(sheet)
    assert [text.split()[0] for text, _ in sheet.problems] == ["LEAPFROG_SHARE_GPU", "LEAPFROG_STEP_TIMEOUT"]
    assert "LEAPFROG_IDLE_S=30 (without it:" in written(sheet)
    assert "LEAPFROG_STEP_TIMEOUTS=1 (nothing here reads it)" in written(sheet)


def test_every_setting_is_documented():
    tables = re.findall(r"^\| `(LEAPFROG_\w+)` \| ([^|]+) \|(?: [^|]+ \|)?$", DOCS, re.MULTILINE)
    users, developers = DOCS.split("For development:")
    assert {name: default for name, default in tables if f"`{name}`" in users} == {
        name: setting.default for name, setting in SETTINGS.items()
    }
    doctor = ROOT / "parallel_backend/doctor"
    code = [path for folder in ("parallel_backend", "nodes") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in code if doctor not in path.parents for name in _names(path)}
    assert read == set(SETTINGS)
    scripts = [ROOT / "Makefile", *(ROOT / "scripts").glob("*.py"), ROOT / "tests/conftest.py"]
    assert {name for path in scripts for name in _names(path)} <= set(SETTINGS) | set(_names_in(developers))


def _names(path: Path) -> set[str]:
    return _names_in(path.read_text())


def _names_in(text: str) -> set[str]:
    return set(re.findall(r"\bLEAPFROG_[A-Z][A-Z_]*[A-Z]\b", text))


def test_devices_that_are_not_there(sheet: Sheet):
    assert choices(sheet, "cuda:99") == ()
    assert "there is no GPU 99" in sheet.problems[0][0]


def test_what_both_nodes_would_choose(sheet: Sheet):
    assert choices(sheet, "cpu,cpu,cpu,cpu") == ("cpu",) * 4
    assert not sheet.problems
    text = " ".join(written(sheet).split())
    assert "backend gloo, through host memory, because ranks are on the CPU" in text
    assert "CFG above 1: prompt and negative prompt apart, each on 2 components of it, a device each" in text
    assert "CFG 1: one pipeline of 4 parts, mode lookahead" in text
    assert "ParaStep Sampler CFG above 1: at most" in text


@pytest.mark.parametrize(
    ("flags", "visible"),
    [
        ([], None),
        (["--cpu", "--cuda-device", "1,2"], "1,2"),
        (["--default-device", "3"], ",".join(map(str, [3, 0, 1, 2, *range(4, 32)]))),
    ],
)
def test_gpus_are_numbered_as_comfyuis_flags_have_them(
    flags: list[str], visible: str | None, monkeypatch: pytest.MonkeyPatch
):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    see_as_comfyui(flags)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == os.environ.get("HIP_VISIBLE_DEVICES") == visible


def test_one_device_passes_through(sheet: Sheet):
    assert choices(sheet, "cpu") == ("cpu",)
    assert "passes the MODEL through" in written(sheet)


def test_why_the_ranks_talk_what_they_talk(monkeypatch: pytest.MonkeyPatch):
    assert "on the CPU" in backend_of(("cuda:0", "cpu"))[1]
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    import torch.distributed as dist

    if dist.is_nccl_available():
        assert "one rank for each GPU" in backend_of(("cuda:0", "cuda:0"))[1]
        assert "this torch has NCCL" in backend_of(("cuda:0", "cuda:1"))[1]
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        monkeypatch.setattr(starting, "nccl_version", lambda: (2, 29, 9))
        assert "one rank for each GPU" in backend_of(("cuda:0", "cuda:0"))[1]
        monkeypatch.setattr(starting, "nccl_version", lambda: (2, 30, 7))
        assert backend_of(("cuda:0", "cuda:0"))[0] == "nccl"
        assert "share a GPU" in backend_of(("cuda:0", "cuda:0"))[1]
    monkeypatch.setenv("LEAPFROG_NCCL", "0")
    assert backend_of(("cuda:0", "cuda:1")) == ("gloo", "through host memory, because LEAPFROG_NCCL is 0")
    monkeypatch.delenv("LEAPFROG_NCCL")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert backend_of(("cuda:0", "cuda:1"))[0] == "gloo", "a log line, not an error"
    assert "this torch has no NCCL" in backend_of(("cuda:0", "cuda:1"))[1]


@pytest.mark.parametrize("arguments", [["--doctor"], ["--devices", "cpu,cpu", "--doctor"]], ids=len)
def test_a_python_without_torch_says_which_one_to_take(tmp_path: Path, arguments: list[str]):
    command = [sys.executable, "-I", "-S", ROOT / "parallel_backend", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert "the Python that runs ComfyUI" in done.stdout
    assert done.stdout.splitlines()[-1] == "doctor: 1 problem"
    assert done.stderr == ""


@pytest.mark.parametrize(
    "wrong", [{"second": 7}, {"second": 0}, {"first": 1, "second": 2}, {"sizes": [1 << 40]}, {"repeats": [0]}], ids=str
)
def test_a_probe_that_cannot_be_is_refused(wrong: dict[str, Any]):
    """Before anything is sent: gloo ends the process where a rank is not there."""
    links: Any = SimpleNamespace(rank=0, world=3)
    with pytest.raises(ValueError, match=r"cannot probe|out of bounds"):
        probe(links, Probe(**{"first": 0, "second": 1, "sizes": [1], "repeats": [1], **wrong}))
