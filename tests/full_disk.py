"""A file on a disk that is full."""

from __future__ import annotations

import io
from pathlib import Path

DEVICE = Path("/dev/full")


def full_disk() -> io.TextIOWrapper:
    """Every write raises OSError, and nothing is kept back for later."""
    return io.TextIOWrapper(DEVICE.open("wb", buffering=0), write_through=True)
