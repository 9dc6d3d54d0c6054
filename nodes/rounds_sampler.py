"""The SAMPLER that both ParaStep nodes give: any of ComfyUI's, with its evaluations taken in rounds by a pool."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch

from ..parallel_backend import LanesDenoiser, LanesPlan, LeapfrogError, Rounds
from .boundaries import conditioning_at
from .recipe import comfy_host, patches_of, recipe_of
from .scout import NoiseState, Outputs, Question, Scout
from .standin import StandInPatcher, weightless
from .waves import Wave

log = logging.getLogger("leapfrog")
# What functions that a sampler adds behind the guidance may ask for (the cfg_pp samplers do).
GUIDED = ("denoised", "cond_denoised", "uncond_denoised")


# Samplers that are no sequence of evaluations of one latent.
REFUSED = {"sample_ar_video": "makes a video piece by piece, each from the one before; use it without ParaStep"}


def in_rounds(plan: LanesPlan, base: Any, tell: Callable[[str], None] = lambda text: None) -> Any:
    """A SAMPLER that takes the evaluations of SAMPLER ``base`` in rounds; ``base`` itself where there is nothing to do.

    Raises LeapfrogError unsupported_sampler, by name. ``tell`` shows a line to the user.
    """
    name = getattr(getattr(base, "sampler_function", base), "__name__", type(base).__name__)
    if isinstance(base, RoundsSampler) or not isinstance(base, comfy.samplers.KSAMPLER):
        raise LeapfrogError.of(
            "unsupported_sampler", f"ParaStep cannot run {name} in parallel: connect a stock sampler."
        )
    if name in REFUSED:
        raise LeapfrogError.of("unsupported_sampler", f"ParaStep cannot run {name} in parallel: it {REFUSED[name]}.")
    if len(plan.devices) == 1 and plan.lanes < 2:
        log.info("Leapfrog: one device (%s), so ParaStep has nothing to do.", plan.devices[0])
        return base
    return RoundsSampler(plan, base, tell)


class RoundsSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER around another one. ComfyUI's KSAMPLER does the rest. ``last_run`` has the figures of its last run."""

    def __init__(self, plan: LanesPlan, base: comfy.samplers.KSAMPLER, tell: Callable[[str], None]):
        super().__init__(self._sample_parastep, dict(base.extra_options), base.inpaint_options)
        self.plan = plan
        self.base = base
        self.last_run: Rounds | None = None
        self._tell = tell
        self._denoiser: LanesDenoiser | None = None

    @torch.no_grad()
    def _sample_parastep(self, model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        """k-diffusion's sampler signature: ``model`` is KSamplerX0Inpaint around the guider, ``x`` ``[batch, ...]``."""
        guider = model.inner_model
        denoiser = self._denoiser_for(guider.model_patcher)
        extra_args = dict(extra_args or {})
        given = extra_args.get("model_options", {})
        extra_args["model_options"] = _through(given, weightless(guider.inner_model, denoiser), guider)
        behind = tuple(given.get("sampler_post_cfg_function", ()))

        def run(ask: Callable[[Question], Outputs], **how: Any) -> torch.Tensor:
            return self.base.sampler_function(
                _Model(model, ask, behind), x.clone(), sigmas, extra_args=dict(extra_args), **how, **options
            )

        def lanes() -> Any:
            if "easycache" in given.get("transformer_options", {}):
                denoiser.note("steps are taken one by one: EasyCache or LazyCache decides from one to the next")
                return None
            self._tell(self.plan.promise(len(sigmas) - 1, denoiser.conditionings))
            return self.plan.schedule(denoiser.conditionings)

        noise = NoiseState()
        rounds = Rounds(
            partial(_evaluate, model, behind),
            lambda questions: _start(denoiser, guider, questions, partial(_evaluate, model, behind)),
            lambda answers: Scout(partial(run, callback=lambda info: None, disable=True), noise, answers),
            sigmas.tolist(),
            lanes,
            partial(conditioning_at, guider.conds),
            denoiser.note,
        )
        self.last_run = rounds
        denoiser.begin_run()
        try:
            samples = run(rounds.ask, callback=callback, disable=disable)
            done = f"{rounds.asked} evaluations in {rounds.count} rounds ({rounds.asked / rounds.count:.2f} per round)"
            denoiser.note(done + (f", {rounds.rejected} more thrown away" if rounds.rejected else ""))
            self._tell(done)
            return samples
        finally:
            rounds.close()
            denoiser.end_run()

    def _denoiser_for(self, patcher: comfy.model_patcher.ModelPatcher) -> LanesDenoiser:
        if isinstance(patcher, StandInPatcher):
            raise LeapfrogError.of(
                "unsupported_patch",
                "ParaStep Sampler does not take a MODEL from Async UNet Split yet; use one of them.",
            )
        if patcher.get_additional_models_with_key("multigpu"):
            raise LeapfrogError.of(
                "unsupported_patch", "This MODEL went through MultiGPU CFG Split; use one of the two."
            )
        recipe = recipe_of(patcher)
        if self._denoiser is None or self._denoiser.recipe != recipe:
            self._denoiser = LanesDenoiser(self.plan, recipe, comfy_host())
        self._denoiser.check_patches(patches_of(patcher))
        _close_with(patcher, self._denoiser)
        if patcher.load_device.type == "cuda":
            # ComfyUI has just put the weights on a GPU that the ranks need for their own
            patcher.partially_unload(patcher.offload_device, patcher.loaded_size())
        return self._denoiser


def _close_with(patcher: comfy.model_patcher.ModelPatcher, denoiser: LanesDenoiser) -> None:
    """End the ranks when ComfyUI unloads the MODEL whose weights they hold (/free, "unload models")."""
    kind = comfy.patcher_extension.CallbacksMP.ON_DETACH
    known = weakref.ref(denoiser)

    def on_detach(_patcher: Any, unpatch_all: bool) -> None:
        still_there = known()
        if unpatch_all and still_there:
            still_there.close()

    patcher.remove_callbacks_with_key(kind, "leapfrog")
    patcher.add_callback_with_key(kind, "leapfrog", on_detach)


def _through(options: dict[str, Any], twin: Any, guider: Any) -> dict[str, Any]:
    """Model options with which the guider's denoiser calls go through ``twin`` instead of the loaded model."""

    def apply_remotely(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if executor.class_obj is not guider.inner_model:
            return executor(*args, **kwargs)  # a guider's second model stays where it is
        twin.current_patcher = guider.model_patcher
        return twin._apply_model(*args, **kwargs)

    options = comfy.model_patcher.create_model_options_clone(options)
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    comfy.patcher_extension.add_wrapper_with_key(kind, "leapfrog", apply_remotely, options, is_model_options=True)
    return options


class _Model:
    """What a sampler is given in place of its model: asks, and does what the sampler added behind the guidance."""

    def __init__(self, model: Any, ask: Callable[[Question], Outputs], behind: tuple[Any, ...]):
        self._model = model
        self._ask = ask
        self._behind = behind

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **args: Any) -> torch.Tensor:
        outputs = self._ask(Question(x, sigma, args))
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


def _evaluate(model: Any, behind: tuple[Any, ...], question: Question) -> Outputs:
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


def _start(
    denoiser: LanesDenoiser, guider: Any, questions: Sequence[Question], evaluate: Callable[[Question], Outputs]
) -> list[LaneWave]:
    """Start guided evaluations that run in step, so that their calls of the denoiser travel together."""
    group: list[LaneWave] = []
    try:
        for question in questions:
            group.append(LaneWave(denoiser, guider, question, evaluate, group))
        denoiser.flush(comfy.model_management.throw_exception_if_processing_interrupted)
    except BaseException:
        for wave in group:
            wave.drop()
        raise
    return group


class LaneWave(Wave):
    """A guided evaluation of one lane; ``group`` are those of its round, in order."""

    def __init__(
        self, denoiser: LanesDenoiser, guider: Any, question: Question, evaluate: Callable[[Question], Outputs],
        group: list[LaneWave],
    ):  # fmt: skip
        self._denoiser = denoiser
        self._group = group
        super().__init__(question.x, False, guider, partial(evaluate, question))

    def finish(self) -> Outputs:
        """What it gives. The others are brought as far as this one, one call of the denoiser after another."""
        while not self.ended:
            self._go_on()
            for other in self._group if not self.ended else ():
                if not other.ended and other.pauses < self.pauses:
                    other._go_on()
        return self.result()

    def _go_on(self) -> None:
        self._denoiser.wait(self.pending, comfy.model_management.throw_exception_if_processing_interrupted)
        self.resume()
