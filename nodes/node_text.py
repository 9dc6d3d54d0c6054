"""What several nodes say alike: a tooltip, and the line that a node shows on the page while it runs and after."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

log = logging.getLogger("leapfrog")
DEVICES = (
    "'auto': all GPUs that ComfyUI sees, slow ones too; without a GPU two processes on the CPU. Or a list: '0,1', "
    "'cpu,cpu', or '0,b/0' with a GPU of another machine, b."
)
"""Tooltip of the input ``devices``."""


def shower(node: Any) -> Callable[[str], None]:
    """A function that shows a line on ``node``, where a server is there to do that."""
    unique_id = getattr(getattr(node, "hidden", None), "unique_id", None)

    def show(text: str) -> None:
        server = sys.modules.get("server")  # ComfyUI's, which nobody should import for this
        there = getattr(getattr(server, "PromptServer", None), "instance", None)
        if there is not None and unique_id is not None:
            there.send_progress_text(text, unique_id)

    return show


def teller(node: Any) -> Callable[[str], None]:
    """A function that logs a line and shows it on ``node``."""
    show = shower(node)

    def tell(text: str) -> None:
        log.info("Leapfrog: %s", text)
        show(text)

    return tell
