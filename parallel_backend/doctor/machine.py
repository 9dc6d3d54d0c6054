"""What is here: versions, devices, memory. Nothing of it is an assumption: what cannot be found out is said so."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ..command_line import PACK
from ..devices import this_machine
from ..machines import stated
from ..starting import nccl_version
from .sheet import Sheet

ASK_S = 10.0
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_LEAST = 64 << 20
INSTALL = "Run `pip install -r requirements.txt` in the pack's folder with the Python that runs ComfyUI."


def ask(*command: str) -> str:
    """What a command prints; empty if it is not there, fails, or takes longer than ten seconds."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions(sheet: Sheet, comfyui: Path | None, asked: str | None) -> None:
    """Rows of versions; problems for what is missing or too old. ``asked`` is where ComfyUI was said to be."""
    own = stated(PACK / "pyproject.toml", "version") or "unknown version"
    commit = ask("git", "-C", str(PACK), "rev-parse", "--short", "HEAD") if (PACK / ".git").exists() else ""
    sheet.row("Leapfrog", f"{own}, commit {commit}" if commit else own)
    if comfyui:
        there = stated(comfyui / "comfyui_version.py", "__version__")
        sheet.row("ComfyUI", there or "unknown version")
        needed = stated(PACK / "pyproject.toml", "requires-comfyui").removeprefix(">=")
        if there and needed and _number(there) < _number(needed):
            sheet.problem(f"ComfyUI {there} is older than {needed}, which Leapfrog needs.", "Update ComfyUI.")
    else:
        sheet.failed(
            "ComfyUI", f"No ComfyUI was found {f'in {asked}' if asked else 'around this pack or the current folder'}.",
            "Start the doctor in ComfyUI's folder, or say where it is: --comfyui FOLDER.",
        )  # fmt: skip
    sheet.row("Python", f"{platform.python_version()} ({platform.python_implementation()}, {sys.platform})")
    sheet.row("system", _system())
    sheet.row("torch", f"{torch.__version__}, {_toolkit()}, {_distributed()}")
    if not dist.is_available():
        sheet.problem("This torch has no torch.distributed, which the ranks talk.", "Install another build of torch.")
    sheet.row("packages", ", ".join(_packages(sheet)))


def devices(sheet: Sheet) -> None:
    """Rows of devices; problems for those that ought to work and do not."""
    cores = this_machine().cores
    total = os.cpu_count() or cores
    of = f" of {total}" if total != cores else ""
    sheet.row("CPU", f"{cpu_name()}, {cores}{of} core{'s' if cores > 1 else ''} for this process{_memory()}")
    _shared_memory(sheet)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        has = torch.cuda.get_device_properties(i)
        kind = f"{has.gcnArchName}" if torch.version.hip else f"compute capability {has.major}.{has.minor}"
        sheet.row(f"cuda:{i}", f"{has.name}, {has.total_memory / 1e9:.1f} GB, {kind}")
    driver = ask("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    if driver:
        sheet.row("NVIDIA driver", driver.splitlines()[0].split(",")[0])
    if count > 1:
        sheet.row("direct access", _peers(count))
    if not count:
        sheet.row("GPUs", f"none that torch can use{_why_no_gpu(sheet, bool(driver))}")


def _toolkit() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"


def _distributed() -> str:
    if not dist.is_available():
        return "no torch.distributed"
    if not dist.is_nccl_available():
        return "gloo, no NCCL"
    try:
        version = ".".join(map(str, nccl_version()))
    except (AttributeError, RuntimeError):
        version = "of unknown version"
    return f"gloo, NCCL {version}"


def _packages(sheet: Sheet) -> list[str]:
    said = []
    for line in _text(PACK / "requirements.txt").splitlines():
        name, _, needed = line.partition(">=")
        if not needed or line.startswith("#"):
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            sheet.problem(f"The package {name} is missing.", INSTALL)
            said.append(f"{name} MISSING")
            continue
        if _number(version) < _number(needed):
            sheet.problem(f"{name} {version} is older than {needed}, which Leapfrog needs.", INSTALL)
        said.append(f"{name} {version}")
    return said


def _system() -> str:
    release = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = platform.mac_ver()[0] and f"macOS {platform.mac_ver()[0]}"
    inside = " in a container" if Path("/.dockerenv").exists() else ""
    return f"{name}, {release}{inside}" if name else release


def cpu_name() -> str:
    """The processor, as the system calls it."""
    names: Sequence[str] = re.findall(r"^model name\s*: (.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return names[0].strip() if names else platform.processor() or platform.machine()


def _memory() -> str:
    try:
        import psutil
    except ImportError:  # said among the packages
        return ""
    memory = psutil.virtual_memory()
    return f", {memory.total / 1e9:.1f} GB of memory, {memory.available / 1e9:.1f} GB free"


def _shared_memory(sheet: Sheet) -> None:
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    sheet.row("shared memory", f"{free / 1e9:.2f} GB free")
    if free < SHARED_MEMORY_LEAST:
        sheet.problem(
            f"Only {free / 1e6:.0f} MB of shared memory (/dev/shm) are free; the tensors of a step go through it.",
            "Start a container with --shm-size=8g, or remove what fills /dev/shm.",
        )


def _peers(count: int) -> str:
    """Which pairs of GPUs cannot reach each other's memory."""
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    without = [f"{i} and {j}" for i, j in pairs if not torch.cuda.can_device_access_peer(i, j)]
    if not without:
        return "between all GPUs (P2P)"
    if len(without) == len(pairs):
        return "between no GPUs (no P2P): data goes through host memory"
    return f"between all GPUs but {', '.join(without)} (P2P)"


def _why_no_gpu(sheet: Sheet, has_nvidia: bool) -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return ": CUDA_VISIBLE_DEVICES hides them"
    if has_nvidia:
        sheet.problem(
            f"This machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it.",
            "Install a build of torch with CUDA that the driver supports (ComfyUI's manual says which).",
        )
    elif not torch.version.cuda and not torch.version.hip:
        return ": this torch was built without CUDA"
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
