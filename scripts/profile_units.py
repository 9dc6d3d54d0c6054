"""Profiles for ``simulate.py``: how long each layer of a full-size denoiser takes here.

On a CPU layer by layer, in float32, with memory for one layer's weights only. On a GPU in whole forwards, in the dtype
that ComfyUI computes in there, with an event between any two layers: what a forward's launches wait for is part of the
layers' times, and nothing waits for a measurement.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from full_size import MODELS, TOKENS, empty

CUDA, CPU = "cuda", "cpu"
WARM_FORWARDS, WARM_SECONDS = 3, 1.0
"""At least so much before anything is timed on a GPU, whose clocks rise only under load."""
ROOM = 3e9
"""Bytes for activations and libraries, beside the weights."""

FLUX = {
    "image_model": "flux", "guidance_embed": True, "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "hidden_size": 3072, "num_heads": 24, "mlp_ratio": 4.0, "depth": 19, "depth_single_blocks": 38, "vec_in_dim": 768,
    "context_in_dim": 4096, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """``rows``: conditional and unconditional, or one where there is no CFG. ``side`` is that of the usual latent."""

    side: int
    rows: int = 2
    dtype: str = "float16"


SUBJECTS = {name: Subject(MODELS[name].side) for name in ("sd15", "sd21", "sdxl")} | {
    "flux": Subject(128, 1, "bfloat16")
}
FLUX_TOKENS = 512

Unit = tuple[str, list[int], list[str]]
"""``(path, needs, paths of its layers)``, as in a profile."""


def build(name: str) -> Any:
    """The denoiser on the meta device: shapes without memory."""
    if name in MODELS:
        return empty(name).diffusion_model
    import comfy.model_detection
    import torch

    config: Any = comfy.model_detection.model_config_from_unet_config(dict(FLUX))
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model({}, "", device="meta").diffusion_model


def call(name: str, rows: int, side: int, device: str, dtype: Any) -> dict[str, Any]:
    """Arguments of one evaluation."""
    import torch

    def noise(*shape: int) -> Any:
        return torch.randn(rows, *shape, device=device, dtype=dtype)

    def each(value: float) -> Any:
        return torch.full((rows,), value, device=device)

    if name not in MODELS:
        prompt = {"context": noise(FLUX_TOKENS, FLUX["context_in_dim"]), "y": noise(FLUX["vec_in_dim"])}
        return {"x": noise(FLUX["in_channels"], side, side), "timestep": each(0.5), "guidance": each(3.5), **prompt}
    config = MODELS[name].config
    pooled = {"y": noise(config["adm_in_channels"])} if config["adm_in_channels"] else {}
    x, context = noise(config["in_channels"], side, side), noise(TOKENS, config["context_dim"])
    return {"x": x, "timesteps": each(500.0), "context": context, **pooled}


def carried(name: str, rows: int, side: int) -> tuple[int, int]:
    """Bytes in 16 bits of what goes to the ranks for an evaluation (latent, prompt ...), and of what comes back."""
    import torch

    given = call(name, rows, side, "meta", torch.float16)
    return 2 * sum(tensor.numel() for tensor in given.values()), 2 * given["x"].numel()


def draw(module: Any) -> None:
    """Random weights into the memory that the module has, of a size that keeps activations within float16."""
    for weight in module.parameters():
        if weight.ndim > 1:
            weight.uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
        else:
            weight.fill_(0.5)


def units_of(denoiser: Any) -> list[Unit]:
    """In the order of the forward."""
    if hasattr(denoiser, "double_blocks"):
        both = ("double_blocks", "single_blocks")
        paths = [f"{blocks}.{index}" for blocks in both for index in range(len(getattr(denoiser, blocks)))]
        return [(path, [index - 1] if index else [], [path]) for index, path in enumerate(paths)]
    count = len(denoiser.input_blocks)
    paths = [f"input_blocks.{i}" for i in range(count)] + ["middle_block"]
    needs = [[index - 1] if index else [] for index in range(count + 1)]
    for index in range(len(denoiser.output_blocks)):
        paths.append(f"output_blocks.{index}")
        needs.append([count + index, count - 1 - index])  # the newest skip tensor is consumed first
    layers = [[f"{path}.{index}" for index in range(len(denoiser.get_submodule(path)))] for path in paths]
    return list(zip(paths, needs, layers, strict=True))


def written(
    denoiser: Any, seconds: Mapping[str, float], outputs: Mapping[str, int], stem: float, head: float, **facts: Any
) -> dict[str, Any]:
    """The profile. Bytes are those of 16 bits, which a GPU would use; ``outputs`` are numbers of elements."""

    def weights(path: str) -> int:
        return 2 * sum(weight.numel() for weight in denoiser.get_submodule(path).parameters())

    def layer(path: str) -> dict[str, Any]:
        return {"seconds": seconds[path], "output_bytes": 2 * outputs[path], "weight_bytes": weights(path)}

    found = units_of(denoiser)
    units = [{"name": path, "needs": needs, "layers": list(map(layer, layers))} for path, needs, layers in found]
    last = weights("out" if hasattr(denoiser, "out") else "final_layer")
    return {
        **facts,
        "units": units,
        "stem_seconds": stem,
        "stem_bytes": weights("") - last - sum(weights(path) for path, _, _ in found),
        "head_seconds": head,
        "head_bytes": last,
    }


# ------------------------------------------------------------------------------------------------------ layer by layer


class Stopwatch:
    """Times the layers of a U-Net whose weights have no memory: each gets random weights for its turn only.

    The blocks of ComfyUI's U-Net are not called through forward, their layers are, so layers are hooked. What the
    forward does between two layers (joining skip tensors) counts for the second.
    """

    def __init__(self, denoiser: Any, repeat: int, clock: Callable[[], float]):
        self.repeat, self.clock = repeat, clock
        self.seconds: dict[str, float] = {}
        self.outputs: dict[str, int] = {}
        self._left = clock()
        self._gap = 0.0
        for _, _, layers in units_of(denoiser):
            for path in layers:
                self._hook(path, denoiser.get_submodule(path))
        for path in ("time_embed", "label_emb", "out"):
            if hasattr(denoiser, path):
                self._hook(path, getattr(denoiser, path))

    def _hook(self, name: str, layer: Any) -> None:
        layer.register_forward_pre_hook(lambda *_: self._enter(layer))
        layer.register_forward_hook(lambda _layer, inputs, output: self._leave(name, layer, inputs, output))

    def _enter(self, layer: Any) -> None:
        self._gap = self.clock() - self._left
        layer.to_empty(device=CPU)
        draw(layer)
        self._began = self.clock()

    def _leave(self, name: str, layer: Any, inputs: Any, output: Any) -> None:
        times = [self.clock() - self._began]
        for _ in range(self.repeat - 1):
            began = self.clock()
            layer.forward(*inputs)
            times.append(self.clock() - began)
        self.seconds[name] = min(times) + self._gap
        self.outputs[name] = output.nelement()
        layer.to_empty(device="meta")
        self._left = self.clock()


def layer_by_layer(name: str, side: int, repeat: int, threads: int) -> dict[str, Any]:
    """Profile of a U-Net on this CPU."""
    import torch

    from leapfrog.parallel_backend.doctor.machine import cpu_name

    torch.set_num_threads(threads)
    rows = SUBJECTS[name].rows
    denoiser = build(name)
    denoiser.dtype = torch.float32
    denoiser.to(torch.float32)
    # on a machine that others use too, the time of a thread says more than that of the clock on the wall
    watch = Stopwatch(denoiser, repeat, time.thread_time if threads == 1 else time.perf_counter)
    with torch.inference_mode():
        denoiser(**call(name, rows, side, CPU, torch.float32))
    threads_used = "one thread (its CPU time)" if threads == 1 else f"{threads} threads"
    source = (
        f"{cpu_name()}, {threads_used}, float32, torch {torch.__version__}, best of {repeat}, "
        f"{rows} rows of {side}x{side}, random weights"
    )
    stem = sum(watch.seconds.get(path, 0.0) for path in ("time_embed", "label_emb"))
    facts = {"model": name, "source": source, "rows": rows, "side": side}
    return written(denoiser, watch.seconds, watch.outputs, stem, watch.seconds["out"], **facts)


# ---------------------------------------------------------------------------------------------------- whole forwards


class Moment:
    """On a CPU what ``torch.cuda.Event`` is on a GPU: work is done there when its call returns."""

    _at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, later: Moment) -> float:
        """Milliseconds."""
        return 1e3 * (later._at - self._at)


class Forwards:
    """Forwards of a denoiser that is on ``device`` with its weights."""

    def __init__(self, denoiser: Any, device: str):
        import torch

        self._denoiser = denoiser
        self._gpu = torch.device(device).type == CUDA
        self._wait: Callable[[], None] = torch.cuda.synchronize if self._gpu else lambda: None

    def warm_up(self, given: dict[str, Any]) -> None:
        began, done = time.perf_counter(), 0
        while done < WARM_FORWARDS or (self._gpu and time.perf_counter() - began < WARM_SECONDS):
            self._denoiser(**given)
            self._wait()
            done += 1

    def whole(self, given: dict[str, Any], repeat: int) -> float:
        """Seconds from the call to the result."""
        self.warm_up(given)
        times: list[float] = []
        for _ in range(repeat):
            began = time.perf_counter()
            self._denoiser(**given)
            self._wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def parts(self, given: dict[str, Any], layers: list[str], repeat: int) -> tuple[list[float], dict[str, int]]:
        """Seconds of everything before the first layer, of each layer and of what follows; the outputs' elements.

        What the forward does between two layers counts for the second.
        """
        import torch

        marks: list[Any] = [
            torch.cuda.Event(enable_timing=True) if self._gpu else Moment() for _ in range(len(layers) + 3)
        ]
        begin, first, *after, end = marks
        outputs: dict[str, int] = {}

        def entered(_layer: Any, _inputs: Any) -> None:
            first.record()

        def left(path: str, mark: Any) -> Callable[[Any, Any, Any], None]:
            def hook(_layer: Any, _inputs: Any, output: Any) -> None:
                mark.record()
                if path not in outputs:
                    made = output if isinstance(output, tuple) else (output,)
                    outputs[path] = sum(tensor.nelement() for tensor in made)

            return hook

        hooks = [self._denoiser.get_submodule(layers[0]).register_forward_pre_hook(entered)]
        for path, mark in zip(layers, after, strict=True):
            hooks.append(self._denoiser.get_submodule(path).register_forward_hook(left(path, mark)))
        self.warm_up(given)
        times: list[list[float]] = []
        for _ in range(repeat):
            begin.record()
            self._denoiser(**given)
            end.record()
            self._wait()
            times.append([1e-3 * one.elapsed_time(other) for one, other in pairwise(marks)])
        for hook in hooks:
            hook.remove()
        return [statistics.median(column) for column in zip(*times, strict=True)], outputs


def in_forwards(name: str, side: int, repeat: int, device: str = CUDA) -> dict[str, Any] | None:
    """Profile of a denoiser on a GPU; None, with a word on why, where it has no room."""
    import torch

    from leapfrog.parallel_backend.doctor.machine import cpu_name

    gpu = device.startswith(CUDA)
    rows, dtype = SUBJECTS[name].rows, getattr(torch, SUBJECTS[name].dtype)
    denoiser = build(name)
    denoiser.dtype = dtype
    if gpu:
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        needed = 2 * sum(weight.numel() for weight in denoiser.parameters()) + ROOM
        if free < needed:
            print(f"{name}: skipped, it takes {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free")
            return None
    layers = [path for _, _, paths in units_of(denoiser) for path in paths]
    with torch.inference_mode():
        denoiser.to(dtype).to_empty(device=device)
        draw(denoiser)
        given = call(name, rows, side, device, dtype)
        if not denoiser(**given).isfinite().all():
            print(f"{name}: not all values of the result are finite, which may change how long it takes")
        forwards = Forwards(denoiser, device)
        whole = forwards.whole(given, repeat)
        (stem, *each, head), outputs = forwards.parts(given, layers, repeat)
        alone = forwards.whole(call(name, 1, side, device, dtype), repeat) if rows > 1 else None
    where = torch.cuda.get_device_name(device) if gpu else cpu_name()
    source = (
        f"{where}, {str(dtype)[6:]}, torch {torch.__version__}, medians of {repeat} whole forwards, "
        f"{rows} {'rows' if rows > 1 else 'row'} of {side}x{side}, random weights"
    )
    if name not in MODELS:  # its rotary embedding takes far longer without compiled kernels
        import comfy_kitchen

        found = comfy_kitchen.list_backends()
        usable = [backend for backend in found if found[backend]["available"] and not found[backend]["disabled"]]
        source += f", kernels of comfy-kitchen: {', '.join(usable)}"
    facts = {"model": name, "source": source, "device": where, "rows": rows, "side": side, "whole_seconds": whole}
    if alone is not None:
        facts["row_seconds"] = alone
    return written(denoiser, dict(zip(layers, each, strict=True)), outputs, stem, head, **facts)
