"""Start-up of a rank: ``python <pack>/parallel_backend``, orders as one JSON line on standard input.

Nothing heavy is imported until the guard thread watches the death pipe, so a rank cannot outlive its host.
"""

import importlib.util
import json
import os
import sys
import threading
from pathlib import Path

EXIT_HOST_GONE = 3


def _end_with_host() -> None:
    while os.read(0, 4096):
        pass
    os._exit(EXIT_HOST_GONE)


def _read_orders() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            os._exit(EXIT_HOST_GONE)
        line += part
    return line


def _import_backend():
    """This package under its own name. Its parent stays off sys.path: ``nodes/`` would hide ComfyUI's nodes.py."""
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "parallel_backend", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec and spec.loader
    package = importlib.util.module_from_spec(spec)
    sys.modules["parallel_backend"] = package
    spec.loader.exec_module(package)


def main() -> None:
    orders = _read_orders()
    threading.Thread(target=_end_with_host, name="death-pipe", daemon=True).start()
    sys.path[0] = json.loads(orders)["comfy_root"]
    _import_backend()
    from parallel_backend.worker.rank import run_rank

    run_rank(orders)


if __name__ == "__main__":
    main()
