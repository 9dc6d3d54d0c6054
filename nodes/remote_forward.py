"""The stand-in for a denoiser's forward: what of a call travels to the ranks, what stays, what is refused.

Everything up to ``diffusion_model(x, t, context, ...)`` stays ComfyUI's own code in the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..parallel_backend import LanesDenoiser, LeapfrogError, SplitDenoiser
from .recipe import patches_of
from .waves import LookaheadRun, park

Remote = SplitDenoiser | LanesDenoiser
# Options that only the host's own code reads.
STAYS = {"wrappers", "callbacks", "uuids", "prefetch_dynamic_vbars", "context_window", "multigpu_clones", "easycache"}
MUST_BE_EMPTY = ("patches", "patches_replace", "optimized_attention_override")


def travelling_options(options: dict[str, Any]) -> dict[str, Any]:
    """The transformer options that go along with a call.

    Raises LeapfrogError unsupported_patch, by name, for functions that would have to run inside the model.
    """
    for name in MUST_BE_EMPTY:
        if options.get(name):
            inside = options[name]
            names = ", ".join(sorted(map(str, inside))) if isinstance(inside, dict) else type(inside).__name__
            raise LeapfrogError.of(
                "unsupported_patch", f"A node on this MODEL runs code inside the denoiser ({name}: {names})."
            )
    return {k: v for k, v in options.items() if k not in STAYS and k not in MUST_BE_EMPTY}


def refuse_hooks(hooks: comfy.hooks.HookGroup | None) -> None:
    """Raises LeapfrogError unsupported_patch where a conditioning changes the weights."""
    if hooks is not None:
        raise LeapfrogError.of(
            "unsupported_patch", "A conditioning carries weight hooks, which cannot travel to a rank."
        )


def evaluate(denoiser: Remote, patcher: comfy.model_patcher.ModelPatcher, args: tuple, kwargs: dict) -> Any:
    """One call of the denoiser in the ranks; returns on the device of its first argument.

    Raises LeapfrogError, ComfyUI's InterruptProcessingException, or its out-of-memory error.
    """
    x = args[0]
    options = kwargs.get("transformer_options", {})
    going = travelling_options(options)
    tick = comfy.model_management.throw_exception_if_processing_interrupted
    refuse_hooks(patcher.current_hooks)
    patches = patches_of(patcher)
    tree = (args, {**kwargs, "transformer_options": going})
    try:
        if isinstance(denoiser, LanesDenoiser):
            tree = (args, {**kwargs, "transformer_options": per_row(going, x.shape[0])})
            output = denoiser(tree, x, int(kwargs.get("num_video_frames", 1)), patches, tick)
        else:
            chunks = options.get("cond_or_uncond") or [0]
            pending = denoiser.submit(tree, x, chunks, _stream(patcher, options, x), patches, tick)
            try:
                park(pending)
            except BaseException:
                denoiser.drop(pending)
                raise
            output = denoiser.result(pending, tick)
    except LeapfrogError as error:
        if error.report.code == "rank_oom":
            raise torch.OutOfMemoryError(str(error)) from error
        raise
    return output.to(x.device) if isinstance(x, torch.Tensor) else [part.to(x[0].device) for part in output]


def per_row(options: dict[str, Any], rows: int) -> dict[str, Any]:
    """Options for any share of the rows: sigmas row by row, so that they are spread along."""
    sigmas = options.get("sigmas")
    if isinstance(sigmas, torch.Tensor) and sigmas.numel() and rows % sigmas.numel() == 0:
        options = {**options, "sigmas": sigmas.repeat(rows // sigmas.numel())}
    return options


def _stream(patcher: comfy.model_patcher.ModelPatcher, options: dict[str, Any], x: torch.Tensor) -> tuple:
    """The key of the stale state that a call may use: its conditionings, its window, its repeat at this sigma."""
    window = getattr(options.get("context_window"), "index_list", None)
    uuids = tuple(map(str, options.get("uuids", ())))
    shapes = tuple(tuple(part.shape) for part in ([x] if isinstance(x, torch.Tensor) else x))
    key = (tuple(options.get("cond_or_uncond", ())), uuids, shapes, str(window))
    sigmas = options.get("sigmas")
    sigma = float(sigmas.flatten()[0]) if isinstance(sigmas, torch.Tensor) else 0.0
    seen = patcher.attachments.setdefault(RUN, Run()).seen
    last_sigma, repeat = seen.get(key, (None, 0))
    repeat = repeat + 1 if sigma == last_sigma else 0
    seen[key] = (sigma, repeat)
    return (*key, repeat)


RUN = "leapfrog_run"


class Run:
    """What belongs to one sampling run of a MODEL: its streams and its waves. A clone of the MODEL starts with none."""

    def __init__(self, denoiser: SplitDenoiser | None = None):
        self.seen: dict[tuple, tuple[float, int]] = {}
        self.lookahead = LookaheadRun(denoiser) if denoiser and denoiser.plan.mode == "lookahead" else None

    def on_model_patcher_clone(self) -> Run:
        return Run()


def run_wrapped(dm: torch.nn.Module, forward: Callable[..., torch.Tensor], args: tuple, kwargs: dict) -> torch.Tensor:
    """Run ``forward`` inside the DIFFUSION_MODEL wrappers that the model's own forward would have run (EasyCache)."""
    wrappers = []
    if hasattr(type(dm), "_forward"):
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, kwargs.get("transformer_options", {}))
    executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(forward, dm, wrappers)
    return executor.execute(*args, **kwargs)
