"""Where things are in a checkout, and how to import them from outside ComfyUI.

ComfyUI imports the pack under a name made of its folder's path. Tests and scripts need a name that they can write down,
so here the same folder becomes the package `leapfrog`:

    from pack import load_pack
    load_pack()
    from leapfrog.parallel_backend.plan import SplitPlan

The repository's root never goes on sys.path: its `nodes/` would be found instead of ComfyUI's `nodes.py`.
Only the standard library is imported here, because the set-up uses this file before anything is installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
BASE = BUILD / "comfy"
"""ComfyUI's --base-directory: models, custom_nodes, input, output."""


def comfyui_dir() -> Path:
    """The ComfyUI checkout in use: $COMFYUI_DIR, else the one that the set-up unpacks. It may not exist yet."""
    given = os.environ.get("COMFYUI_DIR")
    return Path(given).expanduser().resolve() if given else ROOT / ".comfyui"


def has_gpu() -> bool:
    """Whether PyTorch can use a CUDA (or ROCm) device in this process."""
    import torch

    return torch.cuda.is_available()


def load_pack() -> ModuleType:
    """The repository's root, imported once as the package `leapfrog`."""
    if "leapfrog" in sys.modules:
        return sys.modules["leapfrog"]
    spec = importlib.util.spec_from_file_location(
        "leapfrog", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT / '__init__.py'} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules["leapfrog"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["leapfrog"]
        raise
    return module


def add_comfyui(*flags: str) -> Path:
    """Make ComfyUI importable in this process and return its folder. The first call decides; later ones change nothing.

    ComfyUI reads its command line while it is imported, so it gets one of its own here: the base directory of this
    checkout, `--cpu` where there is no GPU, and `flags`.

    Raises FileNotFoundError when there is no ComfyUI yet.
    """
    comfyui = comfyui_dir()
    if not (comfyui / "main.py").is_file():
        raise FileNotFoundError(f"no ComfyUI in {comfyui}: run `make setup`, or point COMFYUI_DIR at a checkout")
    if "comfy.cli_args" in sys.modules:
        return comfyui
    shadowing = {ROOT, comfyui}
    sys.path[:] = [str(comfyui), *(entry for entry in sys.path if Path(entry or ".").resolve() not in shadowing)]
    own_argv = sys.argv
    sys.argv = [own_argv[0], "--base-directory", str(BASE), *([] if has_gpu() else ["--cpu"]), *flags]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = own_argv
    return comfyui
