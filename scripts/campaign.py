"""What the campaigns share: a base folder of their own, the workflows they queue, and what a server holds just now."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from comfy_server import ComfyServer
from pack import BASE, ROOT
from where import FLAGS, devices

GRAPHS = ROOT / "tests" / "graphs"
NODES = ROOT / "tests" / "faults" / "campaign_nodes.py"
DENOISER, LORA = "shapes_flux.safetensors", "campaign_lora.safetensors"
SHARED_MEMORY = Path("/dev/shm")
RANKS = 2
STEPS = 20
PATIENCE_S = 120.0
"""A prompt without an answer after this long hangs."""
ENDS = ("execution_success", "execution_error", "execution_interrupted")
Graph = dict[str, Any]


@dataclass(frozen=True)
class Workflow:
    """A graph under tests/graphs, with inputs of its nodes changed; ``lora`` is the strength of a LoRA in it."""

    name: str
    graph: str
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    lora: float = 0.0

    def prompt(self, number: int) -> Graph:
        """The graph to queue. ComfyUI has not seen this ``number`` yet, so it samples again; no node reads it."""
        nodes: Graph = json.loads((GRAPHS / f"{self.graph}.json").read_text())
        for node in ("split", "sampler", "sample"):
            if "devices" in nodes.get(node, {}).get("inputs", {}):
                nodes[node]["inputs"]["devices"] = devices(RANKS)
        nodes["sigmas" if "sigmas" in nodes else "sample"]["inputs"]["steps"] = STEPS
        if self.lora:
            behind = "split" if "split" in nodes else "model"
            for node in (one for one in nodes.values() if one["inputs"].get("model") == [behind, 0]):
                node["inputs"]["model"] = ["lora", 0]
            own = {"model": [behind, 0], "lora_name": LORA, "strength_model": self.lora}
            nodes["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": own}
        for node, inputs in self.inputs.items():
            nodes[node]["inputs"].update(inputs)
        nodes["sample"]["inputs"]["campaign"] = number
        nodes["save"]["inputs"]["filename_prefix"] = self.name
        return nodes

    def sized(self, width: int, height: int) -> Workflow:
        """The same for pictures of another size."""
        size = {"latent": {"width": width, "height": height}}
        return Workflow(f"{self.name}-{width}x{height}", self.graph, {**self.inputs, **size}, self.lora)

    def with_lora(self, strength: float) -> Workflow:
        return Workflow(f"{self.name}-lora{strength:g}", self.graph, self.inputs, strength)


def split(name: str, **inputs: Any) -> Workflow:
    # The cut is given: a measured one may differ from server to server, and with it the picture of a stale mode.
    return Workflow(name, "async_unet_split", {"split": {"cut": "3", **inputs}})


EXACT = split("exact", mode="exact")
LANES = split("cfg-lanes", mode="exact", components=0, cut="")
LOOKAHEAD = split("lookahead")
ASYNC = split("asyncdiff", mode="asyncdiff", warmup_steps=2)
EXTRAPOLATED = split("extrapolated", mode="extrapolated", warmup_steps=2)
PARASTEP = Workflow("parastep", "parastep_sampler")
KSAMPLER = Workflow("parastep-ksampler", "parastep_ksampler", {"sample": {"lanes": 1}})
WORKFLOWS = (EXACT, LANES, LOOKAHEAD, ASYNC, EXTRAPOLATED, PARASTEP, KSAMPLER)
ALONE = Workflow("alone", "stock_flux")


@contextmanager
def campaign_base() -> Iterator[Path]:
    """A base directory for ComfyUI that may be damaged: the proving model copied, a LoRA for it, our nodes."""
    with tempfile.TemporaryDirectory(prefix="leapfrog-campaign-") as folder:
        base = Path(folder)
        for kind in ("diffusion_models", "loras", "text_encoders", "vae"):
            (base / "models" / kind).mkdir(parents=True)
            for path in (BASE / "models" / kind).glob("*.safetensors"):
                (base / "models" / kind / path.name).symlink_to(path.resolve())
        denoiser = base / "models/diffusion_models" / DENOISER
        source = denoiser.resolve()
        denoiser.unlink()
        shutil.copy2(source, denoiser)
        save_file(lora_for(denoiser), base / "models/loras" / LORA)
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes/leapfrog").symlink_to(ROOT, target_is_directory=True)
        (base / "custom_nodes" / NODES.name).symlink_to(NODES)
        (base / "tmp").mkdir()
        yield base


def campaign_server(base: Path, **env: str) -> ComfyServer:
    """A server on that base, not started yet, with variables set. Its pictures and temporary files stay in the base."""
    # threads that spin while they wait cost far more than they gain where ranks need the cores
    own = {"OMP_WAIT_POLICY": "PASSIVE", "TMPDIR": str(base / "tmp"), **env}
    return ComfyServer(*FLAGS, base=base, output=base / "output", env=own)


@contextmanager
def until_told_to_stop() -> Iterator[threading.Event]:
    """Ctrl+C and SIGTERM set the event, so that the fault under way is the last and nothing is left behind."""
    stop = threading.Event()
    before = {what: signal.signal(what, lambda *_: stop.set()) for what in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for what, handler in before.items():
            signal.signal(what, handler)


def lora_for(path: Path) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 with seeded random weights for some layers of each kind."""
    rng = torch.Generator().manual_seed(3)
    out: dict[str, torch.Tensor] = {}
    for key, weight in load_file(path).items():
        if key.endswith(("img_attn.qkv.weight", "txt_mlp.0.weight", "linear1.weight")):
            name, (rows, columns) = f"diffusion_model.{key.removesuffix('.weight')}", weight.shape
            out[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=rng) * 0.05
            out[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=rng) * columns**-0.5
    return out


def ended(server: ComfyServer, prompt_id: str, seconds: float) -> dict[str, Any]:
    """The history entry of a prompt, or what `ComfyServer.wait` raises; asks ComfyUI only when its events say so.

    Asking for the history again and again costs as much as a small denoiser.
    """
    wait_until(lambda: any(event.kind in ENDS for event in server.events(prompt_id)), seconds)
    return server.wait(prompt_id, 1.0)


def pixels(server: ComfyServer, entry: dict[str, Any]) -> np.ndarray:
    """The picture of a history entry."""
    (path,) = server.outputs(entry)
    return np.asarray(Image.open(path))


def is_rank(process: psutil.Process) -> bool:
    try:
        return any(Path(part).name == "parallel_backend" for part in process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def ranks(server: ComfyServer) -> list[psutil.Process]:
    """The server's rank processes by rank; one that has ended but was not waited for is not among them."""
    found = [one for one in psutil.Process(server.pid).children() if is_rank(one)]
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def segments(pid: int) -> set[str]:
    """Names of the shared memory segments that a process has mapped and that are still there."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    names = {line.partition(f"{SHARED_MEMORY}/")[2] for line in lines if f"{SHARED_MEMORY}/" in line}
    return {name for name in names if not name.endswith("(deleted)")}


def wait_until(condition: Callable[[], bool], seconds: float, every: float = 0.02) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True
