"""Start-up of a rank: ``python <pack>/parallel_backend``, orders as one JSON line on standard input.

Nothing heavy is imported until the guard thread watches the death pipe, so a rank cannot outlive its host.

A rank has no arguments. With ``--doctor`` this is the doctor's command line instead, with any others the joiner's.
"""

import gc
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path

EXIT_HOST_GONE = 3


def _away_from_stdin() -> int:
    """The death pipe under another number. On Windows what looks at standard input (NumPy's libraries, when they are
    loaded) would wait for the guard, which reads from the pipe."""
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return pipe


def _end_with_host(pipe: int) -> None:
    while os.read(pipe, 4096):
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


def _doctor(arguments: list[str]) -> int:
    """Only what the doctor needs to speak at all is checked here."""
    sys.path.pop(0)  # this folder, whose files are a package's and no modules of their own
    missing = ""
    if sys.version_info < (3, 10):  # noqa: UP036 (whoever starts the doctor may have any)
        missing = f"Leapfrog needs Python 3.10 or newer, this is {sys.version.split()[0]}"
    else:
        try:
            _import_backend()
            from parallel_backend.doctor.checkup import main as doctor
        except ImportError as error:
            missing = str(error)
    if missing:
        sys.stdout.write(
            f"problems\n  1. {missing}.\n"
            "     To do: start the doctor with the Python that runs ComfyUI; there,\n"
            "            `pip install -r requirements.txt` in the pack's folder gets what is missing.\n\n"
            "doctor: 1 problem\n"
        )
        return 1
    return doctor(arguments)


def _join(arguments: list[str]) -> int:
    sys.path.pop(0)  # as the doctor does
    _import_backend()
    from parallel_backend.joining import main as join

    return join(arguments)


def main() -> None:
    arguments = sys.argv[1:]
    if "--doctor" in arguments:
        arguments.remove("--doctor")
        sys.exit(_doctor(arguments))
    if arguments:
        sys.exit(_join(arguments))
    orders = _read_orders()
    threading.Thread(target=_end_with_host, args=(_away_from_stdin(),), name="death-pipe", daemon=True).start()
    sys.path[0] = json.loads(orders)["comfy_root"]
    gc.disable()  # until all is imported, which it makes a fifth slower
    _import_backend()
    from parallel_backend.worker.rank import run_rank

    run_rank(orders, lambda: os._exit(EXIT_HOST_GONE))


if __name__ == "__main__":
    main()
