"""The nodes in a ComfyUI of its own, a process without a server, as the backend imports neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command_line import PACK, USAGE
from .sheet import Sheet

NODES = PACK / "nodes"
END_S = 5.0


def nodes_in_comfyui(
    sheet: Sheet, comfyui: Path, flags: Sequence[str], devices: Sequence[str], model: str, seconds: float
) -> None:
    """Rows of what ``nodes/__main__.py`` reports from a ComfyUI without a server; problems for what fails there."""
    orders = {
        "comfy_root": str(comfyui), "flags": list(flags), "model": model, "pack": str(PACK), "devices": list(devices),
    }  # fmt: skip
    environment = dict(os.environ)
    if len(set(devices)) < len(devices):
        environment["LEAPFROG_SHARE_GPU"] = "1"
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, str(NODES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=environment, cwd=comfyui, start_new_session=os.name == "posix",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )  # fmt: skip
        how = "late"
        try:
            how = _answers(process, orders, seconds, sheet)
        finally:
            _end(process, by_itself=how != "late")
        if how == "done":
            return
        errors.seek(0)
        words = errors.read().decode(errors="replace").splitlines()
    last = next((line for line in reversed(words) if line.strip()), "nothing")
    if how == "late":
        sheet.failed(
            "nodes", f"The nodes had not done their part after {seconds:.0f} s.",
            "Try again when the machine is not busy, with a smaller model, or with a longer --timeout.",
        )  # fmt: skip
    elif process.returncode == USAGE:
        sheet.failed("nodes", f"ComfyUI does not take its flags: {last}", "Correct what stands behind --.")
    else:
        sheet.failed(
            "nodes", f"ComfyUI ended with exit code {process.returncode}. Its last words: {last}",
            "Start ComfyUI itself with the same Python: if it says the same, its installation is broken; if not, "
            "please report this.",
        )  # fmt: skip
    sheet.last_words(words)


def _answers(process: subprocess.Popen[bytes], orders: Any, seconds: float, sheet: Sheet) -> str:
    """Write the rows that the process sends until it says that it is "done", has "ended" without, or is "late"."""
    assert process.stdin and process.stdout
    lines: list[bytes] = []
    rows = process.stdout
    reading = threading.Thread(target=lambda: lines.extend(iter(rows.readline, b"")), daemon=True)
    reading.start()
    try:
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        pass  # it ended already, and its last words say why
    deadline = time.monotonic() + seconds
    shown = 0
    while True:
        running = reading.is_alive()
        for raw in lines[shown:]:
            shown += 1
            said = json.loads(raw)
            if said.get("done"):
                return "done"
            if "remark" in said:
                sheet.remark(said["remark"])
            if "todo" in said:
                sheet.failed(said["name"], said["text"], said["todo"])
                sheet.last_words(said["last_words"])
            else:
                sheet.row(said["name"], said["text"])
        if not running:
            return "ended"
        if time.monotonic() > deadline:
            return "late"
        reading.join(0.05)


def _end(process: subprocess.Popen[bytes], by_itself: bool) -> None:
    """Wait for the end, which closing the death pipe brings about; kill what does not hear it. Its ranks go along."""
    assert process.stdin and process.stdout
    try:
        if by_itself:
            process.wait(END_S)
    except subprocess.TimeoutExpired:
        pass
    try:
        process.stdin.close()
    except OSError:
        pass
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
