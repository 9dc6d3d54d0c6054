"""The pack as the package `leapfrog`, ComfyUI importable, and what a folder says about the tests in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import where
from pack import add_comfyui, load_pack

# Before torch is loaded, and for every process that a test starts: OpenMP threads that spin while they wait make a
# prompt 20 times slower where more processes compute than there are cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
where.choose()
add_comfyui(*where.FLAGS)
load_pack()

# Generated cases are judged by what they do, not by how busy the machine is.
settings.register_profile("leapfrog", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("leapfrog")

HERE = Path(__file__).parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = {
    "browser": None if CHROMIUM else "no Chromium is installed",
    "gpu": None if where.ON_GPUS else "no GPU, or not asked for: `make test` does where there is one",
    "full_size": None if os.environ.get("LEAPFROG_FULL_SIZE") == "1" else "minutes and gigabytes: `make families`",
}
"""Folder -> why its tests cannot run here, None where they can."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder != "unit":
            item.add_marker(folder)
        if reason := MISSING.get(folder):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish() -> None:
    import family_table

    family_table.write()


@pytest.fixture(scope="session", autouse=True)
def known_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """ComfyUI knows the folders in which tests have their models."""
    import folder_paths

    from comfy_setup import WEIGHTS
    from seeded import FOLDER

    for folder in (FOLDER, WEIGHTS, tmp_path_factory.getbasetemp()):
        for kind in ("diffusion_models", "checkpoints"):
            folder_paths.add_model_folder_path(kind, str(folder))


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the system's Chromium."""
    assert CHROMIUM is not None
    return CHROMIUM


@pytest.fixture
def graph() -> Callable[[str], dict[str, Any]]:
    """Reads tests/graphs/NAME.json, a fresh copy at every call."""
    return lambda name: json.loads((HERE / "graphs" / f"{name}.json").read_text())
