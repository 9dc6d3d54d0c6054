"""Finding ComfyUI and importing it without letting it read this script's command line."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with --comfyui (default: $COMFYUI_DIR, else .comfyui beside this folder)."""
    out = argparse.ArgumentParser(description=description)
    default = os.environ.get("COMFYUI_DIR", HERE.parent / ".comfyui")
    out.add_argument("--comfyui", type=Path, default=Path(default), help="folder that ComfyUI is unpacked in")
    out.add_argument("--threads", type=int, default=2, help="CPU threads")
    return out


def prepare(comfyui: Path, threads: int) -> None:
    """Puts ComfyUI first on sys.path and loads it for the CPU, with PyTorch's attention."""
    import torch

    torch.set_num_threads(threads)
    sys.path.insert(0, str(comfyui.resolve()))
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.model_management
    finally:
        sys.argv = arguments
