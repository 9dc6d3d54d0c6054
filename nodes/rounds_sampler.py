"""The SAMPLER that both ParaStep nodes give: any of ComfyUI's, with its evaluations taken in rounds by a pool."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import folder_paths
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..parallel_backend import LanesDenoiser, LanesPlan, LeapfrogError, Recipe
from .ahead import AheadSampler, Wave, check_sampler, sampler_name
from .inside_patches import refuse_replaced_methods
from .one_call import as_one, can_be_one, lanes_of
from .ranks_memory import LanesMemory, calls_that_fit
from .recipe import comfy_host, patches_of, recipe_of, weight_bytes
from .scout import Outputs, Question
from .standin import StandInPatcher, remote_twin

log = logging.getLogger("leapfrog")


def in_rounds(plan: LanesPlan, base: Any, tell: Callable[[str], None] = lambda text: None) -> Any:
    """A SAMPLER that takes the evaluations of SAMPLER ``base`` in rounds; ``base`` itself where there is nothing to do.

    Raises LeapfrogError unsupported_sampler, by name. ``tell`` shows a line to the user.
    """
    check_sampler(base)
    if len(plan.devices) == 1 and plan.lanes < 2:
        tell(f"one device ({plan.devices[0]}), so ParaStep is plain {sampler_name(base).removeprefix('sample_')}.")
        return base
    return RoundsSampler(plan, base, tell)


class RoundsSampler(AheadSampler):
    """Rounds of evaluations whose rows are spread over ranks that each hold the whole denoiser."""

    def __init__(self, plan: LanesPlan, base: comfy.samplers.KSAMPLER, tell: Callable[[str], None]):
        super().__init__(base)
        self.plan = plan
        self._tell = tell
        self._memory: LanesMemory | None = None
        self._direct = True

    @property
    def finishes_rejected(self) -> bool:
        return self.plan.bound < math.inf

    @property
    def denoiser(self) -> LanesDenoiser:
        assert self._memory
        return self._memory.denoiser

    def sampler_function(self, model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        guider = model.inner_model
        self._direct = type(model) is comfy.samplers.KSamplerX0Inpaint
        denoiser = self._denoiser_for(guider, x)
        args = extra_args or {}
        base = guider.inner_model
        twin = remote_twin(base, copy.copy(base.diffusion_model), denoiser)
        if TORCH_COMPILE_KWARGS in args.get("model_options", {}):
            log.warning("Leapfrog: TorchCompileModel has no effect with ParaStep; the ranks compute uncompiled.")
        through = _through(args.get("model_options", {}), twin, guider)
        denoiser.begin_run()
        try:
            with calls_that_fit(base):
                args = {**args, "model_options": through}
                result = super().sampler_function(model, x, sigmas, args, callback, disable, **options)
            self._tell("ParaStep: " + "; ".join([self.last_run.summary(), *denoiser.notes]))
            return result
        finally:
            denoiser.end_run()

    def start(
        self, guider: Any, evaluate: Callable[[Question], Outputs], questions: Sequence[Question], first: int
    ) -> Sequence[Any]:
        # what another sampler has put around the model may treat all sigmas of a call as one (Detail Daemon does)
        together = len(questions) > 1 and self._direct and can_be_one(guider, questions)
        lanes = len(questions) if together else 1
        group: list[LaneWave] = []
        try:
            for question in [as_one(questions)] if together else questions:
                group.append(LaneWave(self.denoiser, group, guider, partial(evaluate, question), lanes))
            self.denoiser.flush(comfy.model_management.throw_exception_if_processing_interrupted)
        except BaseException:
            for wave in list(group):
                wave.drop()
            raise
        return lanes_of(group[0], lanes) if together else group

    def schedule(self, steps: int, short: Any) -> Any:
        denoiser, plan = self.denoiser, self.plan
        conditionings = denoiser.conditionings
        if plan.calibrate and plan.lanes_for(conditionings) > 1:
            name = sampler_name(self.base).removeprefix("sample_")
            kept = Path(folder_paths.get_user_directory()) / "leapfrog" / "calibration.json"
            plan = plan.calibrated(kept, denoiser.recipe, name, short, self._tell)
            denoiser.note(f"drift bound {plan.bound:.2g} for this model")
        plan = replace(plan, devices=denoiser.devices)  # some may be lost by now
        promise = plan.promise(steps, conditionings, denoiser.pictures)
        self._tell("ParaStep: " + "; ".join([promise, *denoiser.notes]))
        return plan.schedule(conditionings)

    def _denoiser_for(self, guider: Any, x: torch.Tensor) -> LanesDenoiser:
        patcher = guider.model_patcher
        second = getattr(guider, "uncond_model_patcher", None)
        if isinstance(patcher, StandInPatcher) or isinstance(second, StandInPatcher):
            raise LeapfrogError.of(
                "unsupported_patch",
                "ParaStep does not take a MODEL from Async UNet Split, whose mode lookahead has all devices at work on "
                "several steps already; use one of them.",
            )
        if patcher.get_additional_models_with_key("multigpu"):
            raise LeapfrogError.of(
                "unsupported_patch", "This MODEL went through MultiGPU CFG Split; use one of the two."
            )
        recipe = recipe_of(patcher)
        self._memory = memory = self.memory_for(patcher, recipe)
        memory.denoiser.check_patches(patches_of(patcher))
        refuse_replaced_methods(patcher.model.diffusion_model)
        also = [getattr(guider, name, None) or () for name in ("loaded_models", "uncond_loaded")]
        rows = math.ceil(len(x) * max(1.0, 2 * self.plan.lanes / len(self.plan.devices)))
        memory.announce(patcher, [*also[0], *also[1], second], patcher.memory_required([rows, *x.shape[1:]]))
        let_step_aside(patcher)
        return memory.denoiser

    def memory_for(self, patcher: comfy.model_patcher.ModelPatcher, recipe: Recipe) -> LanesMemory:
        """What ranks hold of this MODEL on these devices: the same for every sampler, as long as the MODEL lives, but
        for one that runs within the run of another."""
        kept = _memories.setdefault(patcher.model, {})
        key = self.plan.devices, recipe
        known = kept.get(key)
        if known is None or known.denoiser.report:  # in the middle of a run
            size = weight_bytes(patcher.model.diffusion_model)
            known = LanesMemory(patcher, LanesDenoiser(*key, comfy_host(), size))
            kept.setdefault(key, known)
        return known


def let_step_aside(model: comfy.model_patcher.ModelPatcher) -> None:
    """Have the ranks of a MODEL step aside while ComfyUI loads its own copy."""
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    if not model.get_wrappers(kind, "leapfrog"):
        model.add_wrapper_with_key(kind, "leapfrog", stepping_aside)


def stepping_aside(executor: Any, noise: Any, latent_image: Any, sampler: Any, *args: Any, **kwargs: Any) -> Any:
    """An OUTER_SAMPLE wrapper of a MODEL that ParaStep samples: what comes next is that ComfyUI loads its copy, and it
    is not to have the ranks drop theirs to make room for that."""
    memories = _memories.get(executor.class_obj.model_patcher.model, {}) if isinstance(sampler, RoundsSampler) else {}
    aside = [memory for memory in memories.values() if memory.step_aside()]
    try:
        return executor(noise, latent_image, sampler, *args, **kwargs)
    finally:  # those that were not announced meanwhile
        for memory in aside:
            if memory.holds:
                memory.be_known()


_memories: WeakKeyDictionary[comfy.model_base.BaseModel, dict[tuple[tuple[str, ...], Recipe], LanesMemory]] = (
    WeakKeyDictionary()
)


class LaneWave(Wave):
    """The evaluation of one or several lanes. Those of its round, the ``group`` in order, go in step from one denoiser
    call to the next, so that their rows travel together."""

    def __init__(
        self, denoiser: LanesDenoiser, group: list[LaneWave], guider: Any, work: Callable[[], Outputs], lanes: int
    ):
        self._group = group
        super().__init__(denoiser, guider, work, lanes=lanes)

    def finish(self) -> Outputs:
        """Wait for what it gives."""
        while not self.ended:
            self._go_on()
            for other in self._group if not self.ended else ():
                if not other.ended and other.pauses < self.pauses:
                    other._go_on()
        self._leave()
        return self.result()

    def drop(self) -> None:
        super().drop()
        self._leave()

    def _leave(self) -> None:
        if self in self._group:  # or they would keep each other alive, and the MODEL with them
            self._group.remove(self)

    def _go_on(self) -> None:
        self.denoiser.wait(self.pending, comfy.model_management.throw_exception_if_processing_interrupted)
        self.resume()


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
