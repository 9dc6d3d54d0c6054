"""The machine that a benchmark runs on: where its ranks are, what several processes get of it, a round trip to ranks.

python scripts/bench_machine.py sd15 16    # a process of its own, for machine_factor
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

from full_size import MODELS, load
from pack import add_comfyui, load_pack

CPU = "cpu"
RANKS = 2
SECONDS_SOLO = 12.0
# All processes alike: glibc keeps what is freed. By default it gives large blocks back to the system, and the page
# faults that follow cost more than the arithmetic, the more so the more weights a process works on.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}


def keep_memory() -> None:
    """Start this program anew with KEEP_MEMORY, unless it has it: the C library reads it at start."""
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})


def devices(ranks: int = RANKS) -> tuple[str, ...]:
    """The ranks' devices: GPUs where there are so many or LEAPFROG_SHARE_GPU is 1, else the CPU."""
    import torch

    gpus = torch.cuda.device_count()  # does not start CUDA: it can still be hidden
    enough = gpus >= ranks or (gpus and os.environ.get("LEAPFROG_SHARE_GPU") == "1")
    return tuple(f"cuda:{i % gpus}" for i in range(ranks)) if enough else (CPU,) * ranks


def machine(ranks: int = RANKS) -> str:
    """What this machine is, and where the ranks are on it."""
    import torch

    named = devices(ranks)
    text = f"{platform.machine()}, {os.cpu_count()} cores, ranks on {', '.join(named)}"
    if named[0] == CPU:
        return text
    part = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
    mps = f", {part} % of its multiprocessors for each process (MPS)" if part else ""
    return f"{text} ({torch.cuda.get_device_name()}{mps}), torch {torch.__version__}"


def solo(name: str, size: int) -> None:
    """Evaluate the denoiser again and again on one thread for a while; print the calls per second. Starts at a line on
    standard input, after its own "ready"."""
    import torch

    torch.set_num_threads(1)
    model = load(name).model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser, dtype = model.diffusion_model.to(device), model.get_dtype_inference()
    t = torch.full((2,), 500.0, device=device)
    shapes = (2, 4, size, size), (2, 77, MODELS[name].config["context_dim"])
    x, context = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    pooled = MODELS[name].config["adm_in_channels"]
    y = torch.randn(2, pooled, device=device, dtype=dtype) if pooled else None
    with torch.inference_mode():
        denoiser(x, t, context=context, y=y)
        print("ready", flush=True)
        sys.stdin.readline()
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS_SOLO:
            denoiser(x, t, context=context, y=y).sum().item()  # waits for a GPU
            calls += 1
        print(calls / (time.perf_counter() - began), flush=True)


def machine_factor(name: str, size: int, ranks: int) -> float:
    """Throughput of so many independent one-thread processes of the denoiser together, against one alone."""
    from leapfrog.parallel_backend.launcher import visible

    def together(count: int) -> float:
        command = [sys.executable, __file__, name, str(size)]
        jobs = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible(device)},
            )
            for device in devices(ranks)[:count]
        ]  # fmt: skip
        for job in jobs:
            said: Any = job.stdout
            while said.readline().strip() != "ready":
                if job.poll() is not None:
                    raise RuntimeError("a solo process ended early")
        for job in jobs:
            orders: Any = job.stdin
            orders.write("go\n")
            orders.flush()
        return sum(float(job.communicate()[0].split()[-1]) for job in jobs)

    return together(ranks) / together(1)


def round_trip_ms(ranks: int) -> float:
    """Median of 500 round trips of a 4x64x64 float32 latent to an idle rank and back, in milliseconds."""
    import torch

    from leapfrog.nodes.recipe import comfy_host
    from leapfrog.parallel_backend.roundtrips import round_trip
    from leapfrog.parallel_backend.supervisor import acquire

    pool = acquire(devices(ranks), comfy_host(), lambda: None, round_trip_ms)
    latent = torch.randn(1, 4, 64, 64)
    return 1e3 * statistics.median(round_trip(pool, latent, range(ranks), lambda: None)[0] for _ in range(500))


if __name__ == "__main__":
    if devices(1)[0] == CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    add_comfyui()
    load_pack()
    solo(sys.argv[1], int(sys.argv[2]))
