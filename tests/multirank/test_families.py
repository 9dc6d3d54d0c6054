"""Async UNet Split on a small denoiser of every transformer family."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import families
import family_table
from families import FAMILIES, QUICK, Family
from generation import distance
from leapfrog.parallel_backend import LeapfrogError, supervisor
from ranks import EXACT, in_ranks, split

# What ComfyUI itself asks of a denoiser's weights outside its forward, and objects in its inputs.
REFUSED = {
    "ltxav_text": "computes with the denoiser's weights outside the ranks",
    "minimax_h3_text": "computes with the denoiser's weights outside the ranks",
    "minimax_h3": "PackedLayout, which cannot travel",
}
# Its first component encodes the prompt.
ENCODES_FIRST = "ace_step15"
# Units that read the prompt alone, which is the same in every step: nothing in them can be stale. Whether they make up
# the whole first component depends on measured times.
PROMPT_ALONE = ("context_refiner", "embeddings_connector", "text_transformer", "token_refiner", "txtfusion")
SERVED = [name for name in QUICK if name not in REFUSED]
ALL = os.environ.get("LEAPFROG_FULL_SIZE") == "1"
CUTS = [(ranks, name) for ranks in (2, 3, 4) for name in SERVED if ALL or ranks == 3 or name in SERVED[::6]]
ASYNCHRONOUS = [
    (mode, name)
    for at, name in enumerate(SERVED)
    for turn, mode in enumerate(("asyncdiff", "lookahead"))
    if ALL or at % 2 == turn
]
"""`make families` takes every family with every number of ranks and in both modes."""


@pytest.fixture(scope="module", autouse=True)
def ranks_that_know_narrowed_files(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[None]:
    supervisor.close_all()
    families.for_ranks(monkeypatch_module)
    yield
    supervisor.close_all()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


@cache
def model_of(name: str) -> Any:
    return families.load(FAMILIES[name])


@cache
def reference(name: str) -> torch.Tensor:
    return families.sample(model_of(name), FAMILIES[name])


@pytest.mark.parametrize(("ranks", "name"), CUTS)
def test_exact_mode_is_comfyui(ranks: int, name: str):
    family = FAMILIES[name]
    model = split(model_of(name), ranks=ranks, mode="exact")
    ours = families.sample(model, family)
    off = distance(ours, reference(name))
    cut = in_ranks().cut
    assert cut
    assert len(cut.bounds) == ranks
    family_table.add(name, units=len(cut.units), exact={ranks: off})
    assert off < EXACT


@pytest.mark.parametrize(("mode", "name"), ASYNCHRONOUS)
def test_asynchronous_modes_run_and_repeat(mode: str, name: str):
    """Random weights drift too far to be close; that both are close on a trained model is tested elsewhere."""
    family: Family = FAMILIES[name]
    model = split(model_of(name), mode=mode, warmup=1, drift_bound=1.0)
    ours = families.sample(model, family, steps=6)
    assert torch.isfinite(ours).all()
    theirs = families.sample(model_of(name), family, steps=6)
    cut = in_ranks().cut
    assert cut
    first = cut.units[: cut.bounds[0][1] + 1]
    fresh = name == ENCODES_FIRST or all(any(part in unit for part in PROMPT_ALONE) for unit in first)
    if not fresh or mode == "lookahead":
        assert distance(ours, theirs) > EXACT, "no step was asynchronous"
    assert torch.equal(families.sample(model, family, steps=6), ours)
    family_table.add(name, tested=[mode])
    family_table.picture(name, mode, theirs, ours)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused_by_name(name: str):
    with pytest.raises(LeapfrogError) as caught:
        families.sample(split(model_of(name), mode="exact"), FAMILIES[name])
    assert caught.value.report.code == "unsupported_patch"
    assert REFUSED[name] in str(caught.value)
    family_table.add(name, refused=REFUSED[name])
