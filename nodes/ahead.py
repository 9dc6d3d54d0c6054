"""A SAMPLER around any of ComfyUI's, with evaluations to come under way while that one waits for the current one.

A wave is one guided evaluation (conditionings, areas, masks, ControlNets, CFG functions: all of ComfyUI's own code) in
a thread of its own. When its denoiser call has gone to the ranks the thread pauses. Only one thread runs at a time, so
nothing in ComfyUI needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ..parallel_backend import OWN_PACKAGES, LeapfrogError, Rounds
from .boundaries import conditioning_at, rewind
from .coroutine import Coroutine, current, pause
from .inside_patches import variables
from .scout import NoiseState, Outputs, Question, Scout
from .shared_noise import with_shared_noise

# What functions that a sampler adds behind the guidance may ask for (the cfg_pp samplers do).
GUIDED = ("denoised", "cond_denoised", "uncond_denoised")
SHORT_STEPS = 16
# Samplers that are no sequence of evaluations of one latent.
REFUSED = {
    "sample_ar_video": "makes a video piece by piece, each from the one before",
    "sample_lcm_upscale": "makes the latent larger as it goes",
}


class Wave(Coroutine):
    """A guided evaluation under way, of so many ``lanes``; it pauses where it has asked ``denoiser``.

    ``predicted``: where the sampler has not been.
    """

    def __init__(
        self, denoiser: Any, guider: Any, work: Callable[[], Outputs], predicted: bool = False, lanes: int = 1
    ):
        self.denoiser = denoiser
        self.predicted = predicted
        self.lanes = lanes
        self._guider = guider
        self._cfg = getattr(guider, "cfg", None)
        super().__init__(work, "leapfrog wave")

    def resume(self) -> None:
        # CFGOverride sets the guider's CFG for the time of an evaluation
        outside = getattr(self._guider, "cfg", None)
        self._guider.cfg = self._cfg
        try:
            super().resume()
        finally:
            self._cfg, self._guider.cfg = self._guider.cfg, outside


def ahead() -> bool:
    """Whether this is a wave at a predicted latent."""
    wave = current()
    return isinstance(wave, Wave) and wave.predicted


def lanes_in_call() -> int:
    """How many lanes have rows in the calls of this wave; 1 elsewhere."""
    wave = current()
    return wave.lanes if isinstance(wave, Wave) else 1


def is_wave_of(denoiser: Any) -> bool:
    """Whether this is a wave that waits for this denoiser; a guider's second model has another one."""
    wave = current()
    return isinstance(wave, Wave) and wave.denoiser is denoiser


def pause_for(denoiser: Any, pending: Any) -> None:
    """In a wave of this denoiser, wait for one's turn again; elsewhere, nothing."""
    if is_wave_of(denoiser):
        pause(pending)


def sampler_name(sampler: Any) -> str:
    return getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)


def is_comfyuis(sampler: Any) -> bool:
    """Whether a SAMPLER's function is one of ComfyUI's own. Those of its extra nodes may not be known as such: a server
    names their modules by path."""
    return getattr(sampler.sampler_function, "__module__", "").split(".")[0] in OWN_PACKAGES


def with_own_options(extra_args: dict[str, Any]) -> dict[str, Any]:
    """A sampler's extra arguments, with model options that nobody else sees: samplers of other packs write into them as
    they go, and several runs of one go at the same time."""
    options = comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))
    return {**extra_args, "model_options": options}


def uncompiled(model_options: dict[str, Any]) -> dict[str, Any]:
    """A copy without TorchCompileModel's wrapper, which puts its own denoiser into the model for the time of a call.

    Of calls at the same time the last to end would leave it there for good; and the ranks compute uncompiled.
    """
    copied = comfy.model_patcher.create_model_options_clone(model_options)
    wrappers = copied.get("transformer_options", {}).get("wrappers", {})
    wrappers.get(comfy.patcher_extension.WrappersMP.APPLY_MODEL, {}).pop(COMPILE_KEY, None)
    return copied


def remembering(model_options: dict[str, Any]) -> str:
    """The name of a function of the guidance that sets variables around it (APG's momentum does); empty for none.

    It would take a rejected evaluation for a step that was taken.
    """
    functions = [model_options.get("sampler_cfg_function")]
    for kind in ("sampler_pre_cfg_function", "sampler_post_cfg_function"):
        functions += model_options.get(kind, ())
    own = [function for function in functions if isinstance(function, FunctionType)]
    return next((function.__qualname__.split(".")[0] for function in own if variables(function.__code__)[1]), "")


def check_sampler(sampler: Any) -> None:
    """Raises LeapfrogError unsupported_sampler, by name, for a SAMPLER that cannot be looked ahead of."""
    name = sampler_name(sampler)
    if isinstance(sampler, AheadSampler):
        raise LeapfrogError.of("unsupported_sampler", "This sampler runs in parallel already.")
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise LeapfrogError.of("unsupported_sampler", f"{name} cannot run in parallel: use a stock sampler.")
    if name in REFUSED:
        raise LeapfrogError.of("unsupported_sampler", f"{name} cannot run in parallel: it {REFUSED[name]}.")


class AheadSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER around ``base``. ``last_run`` is what its last run took (``rounds.Taken``)."""

    rolling = False

    @property
    def denoiser(self) -> Any:
        """What evaluates, in a run."""
        raise NotImplementedError

    @property
    def finishes_rejected(self) -> bool:
        """Whether the guidance sees evaluations that are rejected: a pipeline drops them before."""
        return False

    def __init__(self, base: comfy.samplers.KSAMPLER):
        super().__init__(self.sampler_function, dict(base.extra_options), base.inpaint_options)
        del self.sampler_function  # the method does: a value that is kept by its own object would keep that alive
        self.base = base
        self.last_run: Any = None

    def start(
        self, guider: Any, evaluate: Callable[[Question], Outputs], questions: Sequence[Question], first: int
    ) -> Sequence[Any]:
        """Start evaluations of a round from its lane ``first`` on, all of them to run at once."""
        raise NotImplementedError

    def schedule(self, steps: int, short: Callable[[Any], torch.Tensor]) -> Any:
        """The schedule of a run, when its first evaluation is done; None for one evaluation at a time.

        ``short`` makes a latent in fewer steps, by another schedule, without a trace in this run.
        """
        raise NotImplementedError

    @torch.no_grad()
    def sampler_function(self, model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        """k-diffusion's sampler signature: ``model`` is KSamplerX0Inpaint around the guider, ``x`` ``[batch, ...]``."""
        extra_args = dict(extra_args or {})
        extra_args["model_options"] = uncompiled(extra_args.get("model_options", {}))
        options = with_shared_noise(self.base.sampler_function, x, sigmas, extra_args.get("seed"), options)
        run = partial(self._run, model, x, extra_args, options)

        def short(schedule: Any) -> torch.Tensor:
            few = sigmas[torch.linspace(0, len(sigmas) - 1, min(len(sigmas), SHORT_STEPS + 1)).round().long()]
            try:
                with NoiseState().entered():
                    return run(few, lambda: schedule, None, True)[0]
            finally:
                rewind(model.inner_model.conds)

        def schedule() -> Any:
            if "easycache" in extra_args.get("model_options", {}).get("transformer_options", {}):
                self.denoiser.note("steps are taken one by one: EasyCache or LazyCache decides from one to the next")
                return None
            if self.finishes_rejected and (name := remembering(extra_args["model_options"])):
                self.denoiser.note(f"steps are taken one by one: {name} remembers the step before")
                return None
            return self.schedule(len(sigmas) - 1, short)

        result, self.last_run = run(sigmas, schedule, callback, disable)
        return result

    def _run(
        self, model: Any, x: torch.Tensor, extra_args: dict[str, Any], options: dict[str, Any], sigmas: torch.Tensor,
        schedule: Callable[[], Any], callback: Any, disable: Any,
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        guider = model.inner_model
        behind = tuple(extra_args.get("model_options", {}).get("sampler_post_cfg_function", ()))
        evaluate = partial(evaluated, model, behind)
        own = dict if is_comfyuis(self.base) else with_own_options

        def run(ask: Callable[[Question], Outputs], callback: Any, disable: Any) -> torch.Tensor:
            asking = Asking(model, ask, behind, own)
            return self.base.sampler_function(
                asking, x.clone(), sigmas, extra_args=own(extra_args), callback=callback, disable=disable, **options
            )

        noise = NoiseState()
        rounds = Rounds(
            evaluate,
            partial(self.start, guider, evaluate),
            lambda answers: Scout(partial(run, callback=lambda info: None, disable=True), noise, answers),
            sigmas.tolist(),
            schedule,
            partial(conditioning_at, guider.conds),
            self.denoiser.note,
            self.denoiser.carry_on,
            self.rolling,
        )
        try:
            return run(rounds.ask, callback, disable), rounds.taken
        finally:
            rounds.close()


class Asking:
    """What a sampler is given in place of its model: asks, and does what the sampler added behind the guidance."""

    def __init__(
        self, model: Any, ask: Callable[[Question], Outputs], behind: tuple[Any, ...],
        own: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ):  # fmt: skip
        self._model = model
        self._ask = ask
        self._behind = behind
        self._own = own

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **args: Any) -> torch.Tensor:
        outputs = self._ask(Question(x, sigma, self._own(args)))
        result = outputs[0].clone()  # samplers may go on in place
        for function in _added(args, self._behind):
            result = function(
                {
                    **dict(zip(GUIDED, (result, *outputs[1:]), strict=True)),
                    "input": x,
                    "sigma": sigma,
                    "model": self._model,
                }
            )
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _added(args: dict[str, Any], behind: tuple[Any, ...]) -> list[Any]:
    """The functions that the sampler itself put behind the guidance."""
    functions = args.get("model_options", {}).get("sampler_post_cfg_function", ())
    return [function for function in functions if function not in behind]


def evaluated(model: Any, behind: tuple[Any, ...], question: Question) -> Outputs:
    """The guided evaluation that a question asks for, with all that a sampler's own functions will want of it."""
    if not _added(question.args, behind):
        return (model(question.x, question.sigma, **question.args),)
    seen: dict[str, torch.Tensor] = {}

    def look(about: dict[str, Any]) -> torch.Tensor:
        seen.update({name: about[name] for name in GUIDED})
        return about["denoised"]

    options = {**question.args["model_options"], "sampler_post_cfg_function": [*behind, look]}
    denoised = model(question.x, question.sigma, **{**question.args, "model_options": options})
    return (denoised, *(seen[name] for name in GUIDED[1:]))
