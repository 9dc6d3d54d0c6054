"""ComfyUI decides at every step, from free memory, which conditionings it evaluates in one call: no state may mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from generation import Request, distance, generate, prompt
from ranks import EXACT, load, reference, split

THREE = [*prompt(1), *prompt(2)]
"""Two positive prompts: with the negative one, three rows in up to three calls."""

Scarce = Callable[[Any, Sequence[int]], tuple[Any, list[int]]]


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Scarce:
    """``model, rows = scarce(model, steps)``: for one run, a MODEL whose device has no free memory in these steps, so
    that ComfyUI makes one call per conditioning there; ``rows`` will hold the rows of each call."""
    really_free = comfy.model_patcher.ModelPatcher.get_free_memory

    def free(self: Any, device: torch.device) -> Any:
        return 0 if self.attachments.get("scarce", bool)() else really_free(self, device)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", free)

    def put_on(model: Any, steps: Sequence[int]) -> tuple[Any, list[int]]:
        rows: list[int] = []
        begun = 0

        def step(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal begun
            begun += 1
            return executor(*args, **kwargs)

        def call(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            rows.append(x.shape[0])
            return executor(x, *args, **kwargs)

        model = model.clone()
        model.attachments["scarce"] = lambda: begun - 1 in steps
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "scarce", step)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "scarce", call)
        return model, rows

    return put_on


def evaluation_errors(model: Any, request: Request) -> list[float]:
    """How far each step's denoised latent is from what ComfyUI alone makes of the same latent at the same sigma."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    generate(model, request, on_step=lambda _, denoised, x: seen.append((x.clone(), denoised.clone())))
    exact: list[torch.Tensor] = []

    def again(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **_: Any) -> torch.Tensor:
        for (latent, _denoised), sigma in zip(seen, sigmas, strict=False):
            exact.append(denoise(latent, sigma.expand(latent.shape[0]), **extra_args))
        return x

    generate(load(request.family), request, comfy.samplers.KSAMPLER(again))
    return [distance(ours, theirs) for (_, ours), theirs in zip(seen, exact, strict=True)]


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_exact_mode_is_comfyui_however_it_groups(family: str, scarce: Scarce):
    request = Request(family, steps=4)
    expected = generate(load(family), request, positive=THREE)
    model = split(load(family), mode="exact")
    for steps, grouped in (((1, 2), [3, 1, 1, 1, 1, 1, 1, 3]), ((0, 1, 2, 3), [1] * 12), ((), [3] * 4)):
        regrouped, rows = scarce(model, steps)
        assert distance(generate(regrouped, request, positive=THREE), expected) < EXACT
        assert rows == grouped


def test_exact_mode_in_runs_of_all_sorts(scarce: Scarce):
    models = {family: split(load(family), mode="exact") for family in ("flux", "unet")}
    requests = [
        Request(steps=3), Request(steps=3, batch=3), Request("unet", steps=2, size=4), Request(steps=3, size=12),
        Request("unet", steps=2, batch=2), Request(steps=3, prompt=2), Request(steps=3, cfg=1.0), Request(steps=3),
    ]  # fmt: skip
    for request in requests:
        for steps in ((), (1,)):
            ours = generate(scarce(models[request.family], steps)[0], request)
            assert distance(ours, reference(request)) < EXACT, (request, steps)


def test_an_asynchronous_run_depends_on_its_own_grouping_only(scarce: Scarce):
    # cut by hand: another size may move the cut, where measured times say so, and with it what is stale
    model, request = split(load("flux"), cut="3"), Request(steps=8)

    def run(steps: Sequence[int]) -> torch.Tensor:
        return generate(scarce(model, steps)[0], request, positive=THREE)

    groupings = [(), (4, 5), (2, 3, 4, 5, 6, 7), (1, 3, 5)]
    first = [run(steps) for steps in groupings]
    theirs = generate(load("flux"), request, positive=THREE)
    for steps, expected in reversed(list(zip(groupings, first, strict=True))):
        assert EXACT < distance(expected, theirs) < 0.3
        for other in (Request(steps=4), Request(steps=4, batch=2), Request(steps=3, size=12), Request(prompt=7)):
            generate(scarce(model, (1, 2))[0], other)
        assert torch.equal(run(steps), expected), steps
    assert not torch.equal(first[0], first[1])


def test_a_new_group_starts_with_exact_steps(scarce: Scarce):
    model, rows = scarce(split(load("flux"), warmup=2), range(4, 8))
    errors = evaluation_errors(model, Request(steps=8))
    assert rows == [2] * 4 + [1] * 8
    assert [error < EXACT for error in errors] == [True, True, False, False, True, True, False, False]
