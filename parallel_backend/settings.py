"""What can be set from outside: environment variables, read whenever they matter."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

log = logging.getLogger("leapfrog")
SECONDS = {"LEAPFROG_STEP_TIMEOUT": 600.0, "LEAPFROG_START_TIMEOUT": 180.0, "LEAPFROG_IDLE_S": 3600.0}
"""What holds where nothing is set."""


def step_timeout_s() -> float:
    """The longest that a rank may take for an answer; calls of a known size get much less."""
    return _seconds("LEAPFROG_STEP_TIMEOUT")


def start_timeout_s() -> float:
    """The longest that ranks may take to start."""
    return _seconds("LEAPFROG_START_TIMEOUT")


def idle_s() -> float:
    """How long ranks wait for the next prompt before they end; 0 for ever."""
    return _seconds("LEAPFROG_IDLE_S")


def carries_on() -> bool:
    """Whether a run whose rank is lost goes on, on the devices that are left."""
    return os.environ.get("LEAPFROG_CARRY_ON") == "1"


def uses_nccl() -> bool:
    """Whether ranks on GPUs may talk NCCL."""
    return os.environ.get("LEAPFROG_NCCL") != "0"


def machines_file() -> Path | None:
    """The file that says which other machines there are; None where there are none."""
    path = os.environ.get("LEAPFROG_MACHINES")
    return Path(path).expanduser() if path else None


def trace_dir() -> Path | None:
    """The folder for a trace of each run; None where there is none."""
    path = os.environ.get("LEAPFROG_TRACE_DIR")
    return Path(path) if path else None


def shares_gpu() -> bool:
    """Whether several ranks may be on one GPU."""
    return os.environ.get("LEAPFROG_SHARE_GPU") == "1"


def _seconds(name: str) -> float:
    default, text = SECONDS[name], os.environ.get(name, "")
    if not text:
        return default
    if (seconds := seconds_in(text)) is not None:
        return seconds
    log.warning("Leapfrog: %s=%s is not a valid number of seconds; %g is used", name, text, default)
    return default


def seconds_in(text: str) -> float | None:
    """The time that a setting's text means; None if it means none."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None
