"""One real ComfyUI with the pack for all host tests that leave it running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from comfy_server import ComfyServer
from where import FLAGS


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    with ComfyServer(*FLAGS, output=tmp_path_factory.mktemp("output")) as server:
        yield server
