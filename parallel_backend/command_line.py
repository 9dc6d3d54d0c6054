"""What the command lines of doctor and joiner have in common: where ComfyUI is, and its flags behind ``--``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Not resolved: the pack may be a link in custom_nodes, and ComfyUI is where the link is.
PACK = Path(os.path.abspath(__file__)).parents[1]
USAGE = 2
"""Exit code for a command that means nothing, as argparse has it."""


def own_and_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before ``--`` on a command line, and the flags of ComfyUI behind it."""
    own = list(arguments)
    at = own.index("--") if "--" in own else len(own)
    return own[:at], own[at + 1 :]


def find_comfyui(given: str | None) -> Path | None:
    """ComfyUI's folder: the one given, else one around the pack or the current folder, else that of a checkout.

    The pack may be a link in custom_nodes: the path that the user wrote comes first.
    """
    if given:
        starts = [Path(given).expanduser().absolute()]
        return next(filter(_is_comfyui, starts), None)
    for folder in _candidates():
        if _is_comfyui(folder):
            return folder
    return None


def _candidates() -> Iterator[Path]:
    for start in (Path(sys.argv[0]).absolute(), PACK, Path.cwd() / "ComfyUI"):
        yield from (start, *start.parents)
    if os.environ.get("COMFYUI_DIR"):  # as the scripts of a checkout look for it
        yield Path(os.environ["COMFYUI_DIR"]).expanduser().absolute()
    yield PACK / ".comfyui"


def _is_comfyui(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("main.py", "folder_paths.py", "comfy/samplers.py"))
