"""The evaluations of a round as one guided evaluation of a larger batch, where nothing in the host could tell.

ComfyUI's own work for a guided evaluation takes a millisecond or two, whatever the batch. Rows are ordered evaluation
by evaluation, each with a sigma of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.conds
import comfy.samplers
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS

from .coroutine import Coroutine
from .remote_forward import of_one_sigma
from .scout import Outputs, Question

# What a conditioning may have that looks at the batch as a whole, or at the sigma of its first row.
OWN_CALL = ("control", "hooks", "area", "mask", "gligen", "default")
# Model options that are ComfyUI's own bookkeeping.
ATTACHED = ("wrappers", "callbacks")
HARMLESS = ("transformer_options", "to_load_options", "sample_sigmas", TORCH_COMPILE_KWARGS, *ATTACHED)
OURS = ("leapfrog", COMPILE_KEY)  # of TorchCompileModel's wrapper evaluations are rid (ahead.py)
GUIDANCE = ("__call__", "outer_predict_noise", "predict_noise")
OF_ROWS = (comfy.conds.CONDRegular, comfy.conds.CONDNoiseShape, comfy.conds.CONDCrossAttn)


def can_be_one(guider: Any, questions: Sequence[Question]) -> bool:
    """Whether a guided evaluation treats its rows one by one: stock guidance of one latent without a mask, prompts
    only, and no function or wrapper of anybody else's around it."""
    x, sigma, options = questions[0].x, questions[0].sigma, questions[0].args.get("model_options", {})
    conds = [cond for several in guider.conds.values() for cond in several or ()]
    return (
        all(one.x.shape == x.shape and one.sigma.shape == sigma.shape == x.shape[:1] for one in questions)
        and all(one.args.get("model_options", {}) is options for one in questions)
        and all(one.args.get("denoise_mask") is None for one in questions)
        and _is_stock(guider)
        and _is_plain(options)
        and _is_plain(guider.model_options)
        and not any(key in cond for cond in conds for key in OWN_CALL)
        and all(_is_tiled(name, value, len(x)) for cond in conds for name, value in cond.get("model_conds", {}).items())
        and not of_one_sigma(guider.inner_model.diffusion_model, {})
    )


def _is_stock(guider: Any) -> bool:
    """Whether nobody has replaced the functions that the guidance consists of."""
    stock = comfy.samplers.CFGGuider
    methods = [getattr(getattr(guider, name, None), "__func__", None) is getattr(stock, name) for name in GUIDANCE]
    functions = comfy.samplers.sampling_function, comfy.samplers.calc_cond_batch
    return all(methods) and all(function.__module__ == comfy.samplers.__name__ for function in functions)


def _is_plain(model_options: dict[str, Any]) -> bool:
    inside = model_options.get("transformer_options", {})
    attached = [by_key for kind in ATTACHED for by_key in inside.get(kind, {}).values()]
    others = [value for options in (model_options, inside) for key, value in options.items() if key not in HARMLESS]
    return all(key in OURS for by_key in attached for key, them in by_key.items() if them) and not any(
        isinstance(value, torch.Tensor) or value for value in others
    )


def _is_tiled(name: str, value: Any, rows: int) -> bool:
    """Whether ComfyUI, which repeats a conditioning's rows to fill a batch, gives each evaluation of so many rows the
    same ones."""
    if type(value) is comfy.conds.CONDConstant:
        return name != "latent_shapes"
    tensors = value.cond if type(value) is comfy.conds.CONDList else [value.cond] if type(value) in OF_ROWS else [None]
    return all(isinstance(one, torch.Tensor) and one.ndim > 0 and rows % max(1, len(one)) == 0 for one in tensors)


def as_one(questions: Sequence[Question]) -> Question:
    """The question for all of these at once."""
    return Question(
        torch.cat([one.x for one in questions]), torch.cat([one.sigma for one in questions]), questions[0].args
    )


@dataclass(frozen=True)
class LaneOfWave:
    """One of the evaluations in a ``wave``, whose results are ``outputs``, evaluation by evaluation."""

    wave: Coroutine
    outputs: Callable[[], list[Outputs]]
    number: int

    def finish(self) -> Outputs:
        return self.outputs()[self.number]

    def drop(self) -> None:
        self.wave.drop()


def lanes_of(wave: Any, count: int) -> list[LaneOfWave]:
    """The evaluations in a wave that evaluates the question for ``count`` of them."""

    @cache
    def outputs() -> list[Outputs]:
        return list(zip(*(tensor.chunk(count) for tensor in wave.finish()), strict=True))

    return [LaneOfWave(wave, outputs, number) for number in range(count)]
