"""The nodes in a ComfyUI without a server, for the doctor: ``python <pack>/nodes``, orders as JSON on standard input.

That pipe is also the death pipe, as for a rank. Each line of JSON on standard output is a row of the doctor's report.
"""

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "leapfrog"


def _away_from_stdin() -> int:
    """The death pipe under another number, as in a rank (parallel_backend/__main__.py)."""
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return pipe


def _end_with_doctor(pipe: int) -> None:
    while os.read(pipe, 4096):
        pass
    os._exit(3)


def _rows() -> Callable[..., None]:
    """A function that writes a row; what anybody else prints goes to standard error from now on."""
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def row(**content: Any) -> None:
        rows.write(json.dumps(content) + "\n")
        rows.flush()

    return row


def _boot_comfyui(flags: list[str]) -> None:
    """What ComfyUI's main does before it imports nodes, as far as models are concerned."""
    sys.argv = ["main.py", *flags]
    import comfy.options

    comfy.options.enable_args_parsing()
    import folder_paths
    from comfy.cli_args import args
    from utils.extra_config import load_extra_path_config

    beside = Path(folder_paths.__file__).with_name("extra_model_paths.yaml")
    named = [path for several in args.extra_model_paths_config or [] for path in several]
    for path in [*([str(beside)] if beside.is_file() else []), *named]:
        load_extra_path_config(path)


def _load_pack(folder: Path) -> Any:
    """The pack as a package; what ComfyUI does under another name."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    orders = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_doctor, args=(_away_from_stdin(),), name="death-pipe", daemon=True).start()
    row = _rows()
    sys.path[0] = orders["comfy_root"]  # in place of this folder
    _boot_comfyui(orders["flags"])
    _load_pack(Path(orders["pack"]))
    trial = importlib.import_module(f"{PACKAGE}.nodes.trial")
    trial.run(row, orders["devices"], orders["model"])
    row(done=True)


if __name__ == "__main__":
    main()
