"""Every family's small denoiser is loaded as what it is, and its result depends on everything it should depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from families import FAMILIES, QUICK, Family, load, path, published, sample
from generation import distance

torch.set_num_threads(1)  # such small tensors gain nothing from a second one

VISIBLE = 1e-3
"""Relative distance from which a change counts: a hundred times what the exact mode may be off."""


def by_name(families: Sequence[Family]) -> Any:
    return pytest.mark.parametrize("family", families, ids=str)


def halve_step(_denoiser: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    latent, step, *rest = args
    halved = tuple(part / 2 for part in step) if isinstance(step, tuple) else step / 2
    return (latent, halved, *rest)


@by_name(list(QUICK.values()))
def test_a_small_denoiser_depends_on_its_prompt_its_step_and_its_blocks(family: Family) -> None:
    model = load(family)
    denoiser = model.model.diffusion_model

    def evaluate(prompt: int = 1) -> torch.Tensor:
        return sample(model, family, steps=1, cfg=1.0, prompt_seed=prompt)

    expected = evaluate()
    changed = {"prompt": evaluate(prompt=2)}
    with denoiser.register_forward_pre_hook(halve_step):
        changed["step"] = evaluate()
    for name in family.lists:
        blocks = list(denoiser.get_submodule(name).children())
        for block in (blocks[0], blocks[-1]):
            kept = {key: value.clone() for key, value in block.state_dict().items()}
            for value in block.state_dict().values():
                value.zero_()
            changed[f"{name} {blocks.index(block)}"] = evaluate()
            block.load_state_dict(kept)

    distances = {name: distance(result, expected) for name, result in changed.items()}
    assert all(value > VISIBLE for value in distances.values()), distances
    assert torch.equal(evaluate(), expected), "the denoiser is as it was"


@by_name(list(QUICK.values()))
def test_the_loader_picks_the_class_and_reads_every_weight(family: Family) -> None:
    model = load(family)
    assert type(model.model.model_config).__name__ == family.loaded_as

    prefix = "model.model." if family.checkpoint else ""
    written = {k.removeprefix(prefix): v for k, v in load_file(path(family)).items() if k.startswith(prefix)}
    read = model.model.diffusion_model.state_dict()
    assert written.keys() == read.keys()
    assert all(torch.equal(value.cpu(), written[key].to(value.dtype)) for key, value in read.items())

    latent = sample(model, family)
    assert latent.isfinite().all() and latent.std() > 0.1


@by_name([family for family in FAMILIES.values() if family.published])
def test_at_full_size_it_is_built_without_memory(family: Family) -> None:
    denoiser = published(family)
    blocks = [block for name in family.lists for block in denoiser.get_submodule(name).children()]
    weights = [weight for block in blocks for weight in block.parameters()]
    assert sum(weight.numel() for weight in weights) > 4e8
    assert sum(weight.nbytes for weight in denoiser.parameters() if not weight.is_meta) < 1e7
