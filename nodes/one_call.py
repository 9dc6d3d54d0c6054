"""The evaluations of a round as one guided evaluation of a larger batch, where nothing in the host could tell.

ComfyUI's own work for a guided evaluation takes a millisecond or two, whatever the batch. Rows are ordered evaluation
by evaluation, each with a sigma of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.samplers
import torch

from .coroutine import Coroutine
from .remote_forward import of_one_sigma
from .scout import Outputs, Question

# What a conditioning may have that looks at the batch as a whole, or at the sigma of its first row.
OWN_CALL = ("control", "hooks", "area", "mask", "gligen", "default")
# Model options that are ComfyUI's own bookkeeping.
ATTACHED = ("wrappers", "callbacks")
HARMLESS = ("transformer_options", "to_load_options", "sample_sigmas", *ATTACHED)


def can_be_one(guider: Any, questions: Sequence[Question]) -> bool:
    """Whether a guided evaluation treats its rows one by one: stock guidance of one latent without a mask, prompts
    only, and no function or wrapper of anybody else's around it."""
    options = questions[0].args.get("model_options", {})
    conds = [cond for several in guider.conds.values() for cond in several or ()]
    return (
        type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise
        and all(one.args.get("model_options", {}) is options for one in questions)
        and all(one.args.get("denoise_mask") is None for one in questions)
        and _is_plain(options)
        and _is_plain(guider.model_options)
        and not any(key in cond for cond in conds for key in OWN_CALL)
        and not any("latent_shapes" in cond.get("model_conds", {}) for cond in conds)
        and not of_one_sigma(guider.inner_model.diffusion_model, {})
    )


def _is_plain(model_options: dict[str, Any]) -> bool:
    inside = model_options.get("transformer_options", {})
    attached = [by_key for kind in ATTACHED for by_key in inside.get(kind, {}).values()]
    others = [value for options in (model_options, inside) for key, value in options.items() if key not in HARMLESS]
    return all(key == "leapfrog" for by_key in attached for key, them in by_key.items() if them) and not any(
        isinstance(value, torch.Tensor) or value for value in others
    )


def as_one(questions: Sequence[Question]) -> Question:
    """The question for all of these at once."""
    return Question(
        torch.cat([one.x for one in questions]), torch.cat([one.sigma for one in questions]), questions[0].args
    )


@dataclass(frozen=True)
class Share:
    """One of the evaluations in a ``wave``, whose results are ``outputs``, evaluation by evaluation."""

    wave: Coroutine
    outputs: Callable[[], list[Outputs]]
    number: int

    def finish(self) -> Outputs:
        return self.outputs()[self.number]

    def drop(self) -> None:
        self.wave.drop()


def shares(wave: Any, count: int) -> list[Share]:
    """The evaluations in a wave that evaluates the question for ``count`` of them."""

    @cache
    def outputs() -> list[Outputs]:
        return list(zip(*(tensor.chunk(count) for tensor in wave.finish()), strict=True))

    return [Share(wave, outputs, number) for number in range(count)]
