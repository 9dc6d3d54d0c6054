"""Weight hooks on a conditioning, with keyframes: the ranks bake other weights whenever ComfyUI asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.hooks
import folder_paths
import pytest
import torch
from comfy_extras.nodes_hooks import CreateHookKeyframe, SetHookKeyframes, SetModelHooksOnCond
from safetensors.torch import load_file

import tiny_models
from generation import Conditioning, Request, distance, generate, prompt
from leapfrog.nodes import remote_forward
from leapfrog.nodes.recipe import patches_of, recipe_of
from leapfrog.parallel_backend.worker.models.loader import build, decode_patches, place_weights
from ranks import EXACT, load, parastep, reference, split, with_lora

REQUEST = Request()
LONG = Request(steps=10)
HALFWAY = ((1.0, 0.0), (0.3, 0.5))
"""Keyframes: strength and the share of the run at which it begins."""


def hook(keyframes: Sequence[tuple[float, float]] = (), strength: float = 1.0, flip: bool = False) -> Any:
    """What Create Hook LoRA gives for the tiny LoRA (or, flipped, for another one), with keyframes."""
    weights = load_file(tiny_models.tiny_lora())
    if flip:
        weights = {key: value.flip(0) for key, value in weights.items()}
    hooks = comfy.hooks.create_hook_lora(weights, strength, 0.0)
    group: Any = None
    for at_strength, start in keyframes:
        (group,) = CreateHookKeyframe().create_hook_keyframe(at_strength, start, group)
    return SetHookKeyframes().set_hook_keyframes(hooks, group)[0] if group else hooks


def hooked(conditioning: Conditioning, hooks: Any) -> Conditioning:
    return SetModelHooksOnCond().attach_hook(conditioning, hooks)[0]


def one_after_another() -> Conditioning:
    return [*hooked(prompt(1), hook(HALFWAY)), *hooked(prompt(2), hook(strength=0.5, flip=True)), *prompt(3)]


def two_at_once() -> Conditioning:
    both = comfy.hooks.HookGroup.combine_all_hooks([hook(HALFWAY), hook(((0.0, 0.0), (1.0, 0.3)), flip=True)])
    return hooked(prompt(1), both)


CONDITIONINGS: dict[str, Callable[[], Conditioning]] = {
    "constant": lambda: hooked(prompt(1), hook()),
    "two keyframes": lambda: hooked(prompt(1), hook(HALFWAY)),
    "off at first": lambda: hooked(prompt(1), hook(((0.0, 0.0), (1.0, 0.3)))),
    "two hooks at once": two_at_once,
    "a hook per conditioning": one_after_another,
}


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_hooks_on_the_positive_only(name: str):
    positive = CONDITIONINGS[name]()
    model = split(load("flux"), mode="exact")
    theirs = generate(load("flux"), REQUEST, positive=positive)
    assert distance(theirs, reference(REQUEST)) > 0.1
    assert distance(generate(model, REQUEST, positive=positive), theirs) < EXACT
    assert distance(generate(model, REQUEST), reference(REQUEST)) < EXACT, "the hook outlived its prompt"


@pytest.mark.parametrize("name", CONDITIONINGS)
@pytest.mark.parametrize("lanes", [1, 3])
def test_hooks_in_rounds(name: str, lanes: int):
    """With fidelity "exact" every step is evaluated ahead, and again: keyframes must be as if it had not been."""
    positive = CONDITIONINGS[name]()
    theirs = generate(load("flux"), LONG, positive=positive)
    sampler = parastep(lanes, fidelity="exact")
    assert distance(generate(load("flux"), LONG, sampler, positive=positive), theirs) < EXACT
    assert lanes == 1 or sampler.last_run.rejected
    assert distance(generate(load("flux"), LONG, sampler), reference(LONG)) < EXACT, "the hook outlived its prompt"


def test_keyframes_begin_again_after_a_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    positive = hooked(prompt(1), hook(HALFWAY))
    sampler = parastep(2, warmup=0, fidelity="fast", calibrate=True)
    first, again = (generate(load("flux"), LONG, sampler, positive=positive) for _ in range(2))
    assert torch.equal(first, again)


def test_every_keyframe_counts():
    results = [
        generate(split(load("flux"), mode="exact"), REQUEST, positive=hooked(prompt(1), hook(keyframes)))
        for keyframes in ((), ((0.3, 0.0),), HALFWAY)
    ]
    assert all(distance(a, b) > 0.1 for a, b in zip(results, results[1:] + results[:1], strict=True))


@pytest.mark.parametrize("before", [True, False])
def test_a_lora_on_the_model_as_well(before: bool):
    positive = hooked(prompt(1), hook(HALFWAY, flip=True))
    theirs = generate(with_lora(load("flux"), 0.5), REQUEST, positive=positive)
    plain = generate(with_lora(load("flux"), 0.5), REQUEST)
    assert distance(theirs, plain) > 0.1
    model = split(with_lora(load("flux"), 0.5) if before else load("flux"), mode="exact")
    model = model if before else with_lora(model, 0.5)
    for _ in range(2):
        assert distance(generate(model, REQUEST, positive=positive), theirs) < EXACT
        assert distance(generate(model, REQUEST), plain) < EXACT


def test_weights_are_baked_anew_only_where_they_change(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def recorded(model: Any) -> Any:
        patches = patches_of(model)
        asked.append(patches[0])
        return patches

    monkeypatch.setattr(remote_forward, "patches_of", recorded)
    model = split(load("flux"), mode="exact")
    generate(model, REQUEST, positive=hooked(prompt(1), hook(HALFWAY)))
    assert len(asked) == 2 * REQUEST.steps
    assert len(set(asked)) == 3, "without the hook, and its two strengths"
    assert asked.count("") == REQUEST.steps
    generate(model, REQUEST)
    assert set(asked[2 * REQUEST.steps :]) == {""}


def test_an_asynchronous_run_repeats_exactly():
    positive = hooked(prompt(1), hook(HALFWAY))
    theirs = generate(load("flux"), REQUEST, positive=positive)
    model = split(load("flux"))
    ours = generate(model, REQUEST, positive=positive)
    assert distance(ours, theirs) < 0.3
    generate(model, REQUEST)
    assert torch.equal(generate(model, REQUEST, positive=positive), ours)


def test_weights_baked_many_times_neither_drift_nor_pile_up():
    model = with_lora(load("flux"))
    file = {key: value.cpu() for key, value in load("flux").model.diffusion_model.state_dict().items()}
    patches = decode_patches(patches_of(model)[1])
    held = build(recipe_of(model), lambda _: [])
    cpu = torch.device("cpu")
    place_weights(held, patches, cpu)
    baked = {key: value.clone() for key, value in held.model.diffusion_model.state_dict().items()}
    assert any(not torch.equal(baked[key], file[key]) for key in file)
    for _ in range(20):
        place_weights(held, {}, cpu)
        place_weights(held, patches, cpu)
        assert held.backup.keys() == patches.keys()
    again = held.model.diffusion_model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in baked.items())
    place_weights(held, {}, cpu)
    assert not held.backup
    assert all(torch.equal(value, file[key]) for key, value in held.model.diffusion_model.state_dict().items())
