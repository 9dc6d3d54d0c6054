from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GRAPHS = Path(__file__).parent.parent / "graphs"


@pytest.fixture
def graph() -> Callable[[str], dict[str, Any]]:
    """Reads tests/graphs/NAME.json, a fresh copy at every call."""
    return lambda name: json.loads((GRAPHS / f"{name}.json").read_text())
