"""One real ComfyUI with the pack for all host tests that leave it running."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from comfy_server import ComfyServer
from where import FLAGS

GRAPHS = Path(__file__).parent.parent / "graphs"


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(*FLAGS, output=tmp_path_factory.mktemp("output")) as server:
        yield server


@pytest.fixture
def graph() -> Callable[[str], dict[str, Any]]:
    """Reads tests/graphs/NAME.json, a fresh copy at every call."""
    return lambda name: json.loads((GRAPHS / f"{name}.json").read_text())
