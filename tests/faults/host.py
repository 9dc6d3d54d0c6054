"""A small host without ComfyUI's server: starts two ranks, prints what it holds, and evaluates until it is ended.

Usage: host.py COMFYUI DENOISER [DEVICE DEVICE]. Prints one line of JSON: the process ids of this machine's ranks and
the name of the shared memory.
SIGUSR1 makes it another program in the same process, as ComfyUI-Manager's reboot does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch

BACKEND = Path(__file__).resolve().parents[2] / "parallel_backend"


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    signal.signal(signal.SIGUSR1, lambda *_: os.execv(sys.executable, [sys.executable, "-c", "input()"]))
    spec = importlib.util.spec_from_file_location(
        "parallel_backend", BACKEND / "__init__.py", submodule_search_locations=[str(BACKEND)]
    )
    assert spec and spec.loader
    backend = importlib.util.module_from_spec(spec)
    sys.modules["parallel_backend"] = backend
    spec.loader.exec_module(backend)

    recipe = backend.Recipe.of("diffusion_model", sys.argv[2], {})
    plan = backend.SplitPlan(tuple(sys.argv[3:]) or ("cpu", "cpu"), warmup=1, mode="asyncdiff")
    denoiser = backend.SplitDenoiser(plan, recipe, backend.ComfyHost(sys.argv[1], ("--cpu",)))
    x, step = torch.randn(1, 16, 8, 8), torch.ones(1)
    options = {"y": torch.randn(1, 768), "guidance": torch.ones(1), "transformer_options": {}}
    denoiser.begin_run()
    count = 0
    while True:
        inputs = ((x, step, torch.randn(1, 16, 768)), options)
        sent = denoiser.submit(inputs, x, backend.Patches(), lambda: None, chunks=[0], stream="a stream")
        denoiser.result(sent, lambda: None)
        count += 1
        if count == 3:
            pool = denoiser._pool
            print(json.dumps({"ranks": pool.pids, "memory": next(iter(pool.arenas))}), flush=True)


if __name__ == "__main__":
    main()
