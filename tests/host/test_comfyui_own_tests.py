"""ComfyUI's own unit tests, in a copy of ComfyUI that has the pack installed and loaded and a pool of ranks alive."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pack import ROOT, comfyui_dir

NEED_A_NETWORK = [
    "tests-unit/app_test/frontend_manager_test.py::test_init_frontend_invalid_version",
    "tests-unit/app_test/frontend_manager_test.py::test_init_frontend_invalid_provider",
]
NOT_COPIED = {".git", "custom_nodes", "input", "models", "output", "temp", "user"}
"""Top-level names: what belongs to a user, and may be large."""

PLUGIN = '''
"""Loads the packs of custom_nodes the way ComfyUI does, and starts a pool, before its tests start."""

import asyncio
import importlib
import sys

import torch
from comfy.cli_args import args


def pytest_sessionstart(session):
    args.cpu = not torch.cuda.is_available()
    before = list(sys.path)
    import nodes

    asyncio.run(nodes.init_external_custom_nodes())
    sys.path[:] = before  # it puts comfy/ first, where the tests would find another `utils`
    pack = nodes.NODE_CLASS_MAPPINGS["LeapfrogParaStepSampler"].__module__.rpartition(".nodes.")[0]
    recipe, session.supervisor = (
        importlib.import_module(f"{pack}.{name}") for name in ("nodes.recipe", "parallel_backend.supervisor")
    )
    session.pool = session.supervisor.acquire(("cpu", "cpu"), recipe.comfy_host(), lambda: None, session)


def pytest_sessionfinish(session):
    alive = [process.exit_code is None for process in session.pool.processes]
    session.supervisor.close_all()
    assert alive == [True, True]
'''


@pytest.fixture
def comfyui_with_pack(tmp_path: Path) -> Path:
    source, copy = comfyui_dir(), tmp_path / "comfyui"
    if not (source / "tests-unit").is_dir():
        pytest.skip(f"{source} has no tests-unit")

    def skipped(folder: str, names: list[str]) -> set[str]:
        return NOT_COPIED.intersection(names) if Path(folder) == source else set()

    shutil.copytree(source, copy, ignore=skipped)
    packs = copy / "custom_nodes"
    packs.mkdir()
    (packs / "leapfrog").symlink_to(ROOT, target_is_directory=True)
    # Some tests start a server with a base directory of their own: this is how it finds the pack.
    (copy / "extra_model_paths.yaml").write_text(f"leapfrog:\n  custom_nodes: {packs}\n")
    (copy / "with_packs.py").write_text(PLUGIN)
    return copy


@pytest.mark.timeout(600)
def test_they_pass_with_the_pack_installed_and_a_pool_alive(comfyui_with_pack: Path):
    deselected = [part for test in NEED_A_NETWORK for part in ("--deselect", test)]
    plugins = ["-p", "with_packs", "-p", "no:cacheprovider", "-p", "no:timeout"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests-unit", "-q", "--no-header", *plugins, *deselected],
        cwd=comfyui_with_pack,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 1000
