"""The stand-in for a denoiser's forward: what of a call travels to the ranks, what stays, what is refused.

Everything up to ``diffusion_model(x, t, context, ...)`` stays ComfyUI's own code in the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..parallel_backend import LanesDenoiser, LeapfrogError, SplitDenoiser
from .ahead import ahead, is_wave_of, lanes_in_call, pause_for
from .inside_patches import ENTRIES, describe
from .recipe import patches_of

Remote = SplitDenoiser | LanesDenoiser
# Options that only the host's own code reads, and those that travel in a form of their own.
STAYS = {"wrappers", "callbacks", "uuids", "prefetch_dynamic_vbars", "context_window", "multigpu_clones", "easycache"}
STAYS |= set(ENTRIES)
# What samplers of RES4LYF leave there for functions of their own, which are refused by themselves.
STAYS |= {"ExtraOptions", "model_sampling"}
# Denoisers that use the largest timestep of a batch for all its rows, or halves of it as the two conditionings. (That
# of MeanFlow, which looks for the next timestep after its first row's, is known by its `time_r_in`.)
OF_ONE_SIGMA = ("LTXAVModel", "NaDiT")
# Denoisers in which the rows of a call change each other, so that they stay together as ComfyUI has them. (ACE-Step 1.5
# gives all that it knows of the timbre to the first row.)
OF_COUPLED_ROWS = ("AceStepConditionGenerationModel",)
# ComfyUI's own modules whose functions change the shapes inside the denoiser from one step to the next.
RESHAPING = ("comfy_extras.nodes_model_downscale",)


def travelling_options(options: dict[str, Any]) -> dict[str, Any]:
    """The transformer options that go along with a call.

    Raises LeapfrogError unsupported_patch, by name, for functions inside the denoiser that cannot travel.
    """
    going = {k: v for k, v in options.items() if k not in STAYS}
    inside = describe(options)
    return {**going, "inside_patches": inside} if inside else going


def refuse_inside(options: dict[str, Any], denoiser: Remote) -> None:
    """Raises LeapfrogError unsupported_patch for functions inside the denoiser that would be wrong when spread."""
    inside = options.get("inside_patches")
    if not inside:
        return
    if isinstance(denoiser, LanesDenoiser) and "cond_or_uncond" in inside["reads"]:
        raise LeapfrogError.of(
            "unsupported_patch",
            "A node on this MODEL mixes prompt and negative prompt inside the denoiser (NAGuidance does); ParaStep "
            "Sampler evaluates them on different devices. Async UNet Split can use it.",
        )
    if isinstance(denoiser, SplitDenoiser) and any(f'"{module}"' in inside["text"] for module in RESHAPING):
        raise LeapfrogError.of(
            "unsupported_patch",
            "PatchModelAddDownscale on this MODEL changes sizes inside the denoiser from step to step, which Async "
            "UNet Split cannot follow; ParaStep Sampler can.",
        )


def evaluate(denoiser: Remote, patcher: comfy.model_patcher.ModelPatcher, args: tuple, kwargs: dict) -> Any:
    """One call of the denoiser in the ranks; returns on the device of its first argument.

    Raises LeapfrogError (which is ComfyUI's out-of-memory error, too, where it means that), or ComfyUI's
    InterruptProcessingException.
    """
    x = args[0]
    options = kwargs.get("transformer_options", {})
    going = travelling_options(options)
    refuse_inside(going, denoiser)
    if kwargs.get("control"):
        denoiser.note("ControlNets are no faster: they run on ComfyUI's own device, one evaluation after another")
    tick = comfy.model_management.throw_exception_if_processing_interrupted
    patches = patches_of(patcher)
    submit: Callable[[], Any]
    if isinstance(denoiser, LanesDenoiser):
        rows = (x if isinstance(x, torch.Tensor) else x[0]).shape[0]
        tree = (args, {**kwargs, "transformer_options": per_row(going, rows)})
        alone = of_one_sigma(patcher.model.diffusion_model, going)
        group = rows if of_coupled_rows(patcher.model.diffusion_model) else int(kwargs.get("num_video_frames", 1))
        submit = partial(denoiser.submit, tree, x, group, patches, tick, alone, lanes_in_call())
    else:
        tree = (args, {**kwargs, "transformer_options": going})
        submit = partial(
            denoiser.submit, tree, x, patches, tick, chunks=options.get("cond_or_uncond") or [0],
            stream=patcher.attachments.setdefault(RUN, Run()).next_stream({**options, **going}, x),
            times=_times(patcher, options) if denoiser.plan.mode == "asyncdiff" else (1.0, 1.0), ahead=ahead(),
            together="cond_or_uncond" in going.get("inside_patches", {}).get("reads", ())
            or of_coupled_rows(patcher.model.diffusion_model),
        )  # fmt: skip
    while True:
        try:
            output = _answer(denoiser, submit, tick)
            break
        except LeapfrogError as error:
            if is_wave_of(denoiser) or not denoiser.carry_on(error):  # what becomes of waves is for rounds.py
                raise
    return output.to(x.device) if isinstance(x, torch.Tensor) else [part.to(x[0].device) for part in output]


def _answer(denoiser: Remote, submit: Callable[[], Any], tick: Callable[[], None]) -> Any:
    pending = submit()
    try:
        pause_for(denoiser, pending)
    except BaseException:
        denoiser.drop(pending)
        raise
    return denoiser.result(pending, tick)


def per_row(options: dict[str, Any], rows: int) -> dict[str, Any]:
    """Options for any share of the rows: sigmas row by row, so that they are spread along."""
    sigmas = options.get("sigmas")
    if isinstance(sigmas, torch.Tensor) and sigmas.numel() and rows % sigmas.numel() == 0:
        options = {**options, "sigmas": sigmas.repeat(rows // sigmas.numel())}
    return options


def of_one_sigma(dm: torch.nn.Module, options: dict[str, Any]) -> bool:
    """Whether all rows of a call must have the same sigma: something in the denoiser reads it off one of them."""
    inside = options.get("inside_patches", {}).get("reads", ())
    named = type(dm).__name__ in OF_ONE_SIGMA or of_coupled_rows(dm)
    return named or getattr(dm, "time_r_in", None) is not None or "sigmas" in inside


def of_coupled_rows(dm: torch.nn.Module) -> bool:
    """Whether the rows of a call must stay together: something in the denoiser mixes them."""
    return type(dm).__name__ in OF_COUPLED_ROWS


def _times(patcher: comfy.model_patcher.ModelPatcher, options: dict[str, Any]) -> tuple[float, float]:
    """The model's timesteps at the sigmas before and after the current one in the schedule, as multiples of its own."""
    sigmas, sigma = options.get("sample_sigmas"), options.get("sigmas")
    if not isinstance(sigmas, torch.Tensor) or not isinstance(sigma, torch.Tensor):
        return 1.0, 1.0
    at = int((sigmas - sigma.flatten()[0].to(sigmas)).abs().argmin())
    before, now, after = (
        float(patcher.model.model_sampling.timestep(sigmas[max(0, min(len(sigmas) - 2, i))]))
        for i in (at - 1, at, at + 1)
    )
    return (before / now, after / now) if now else (1.0, 1.0)


RUN = "leapfrog_run"


class Run:
    """What belongs to one sampling run of a MODEL: its streams. A clone of the MODEL starts with none."""

    def __init__(self) -> None:
        self._seen: dict[tuple, tuple[float, int]] = {}

    def on_model_patcher_clone(self) -> Run:
        return Run()

    def next_stream(self, options: dict[str, Any], x: torch.Tensor) -> tuple:
        """The key of the stale state that the next call may use: its conditionings, its window, its repeat at this
        sigma."""
        window = getattr(options.get("context_window"), "index_list", None)
        uuids = tuple(map(str, options.get("uuids", ())))
        shapes = tuple(tuple(part.shape) for part in ([x] if isinstance(x, torch.Tensor) else x))
        inside = options.get("inside_patches", {}).get("id")
        key = (tuple(options.get("cond_or_uncond", ())), uuids, shapes, str(window), inside)
        sigmas = options.get("sigmas")
        sigma = float(sigmas.flatten()[0]) if isinstance(sigmas, torch.Tensor) else 0.0
        last_sigma, repeat = self._seen.get(key, (None, 0))
        repeat = repeat + 1 if sigma == last_sigma else 0
        self._seen[key] = (sigma, repeat)
        return (*key, repeat)


def run_wrapped(dm: torch.nn.Module, forward: Callable[..., torch.Tensor], args: tuple, kwargs: dict) -> torch.Tensor:
    """Run ``forward`` inside the DIFFUSION_MODEL wrappers that the model's own forward would have run (EasyCache)."""
    wrappers = []
    if _runs_wrappers(type(dm)):
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, kwargs.get("transformer_options", {}))
    executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(forward, dm, wrappers)
    return executor.execute(*args, **kwargs)


@cache
def _runs_wrappers(kind: type) -> bool:
    """Whether a denoiser's forward runs these wrappers; that of Stable Audio, for one, does not."""
    forwards = [inspect.unwrap(vars(parent)["forward"]) for parent in kind.__mro__ if "forward" in vars(parent)]
    codes = [forward.__code__ for forward in forwards if isinstance(forward, FunctionType)]
    return any("DIFFUSION_MODEL" in code.co_names for code in codes)
