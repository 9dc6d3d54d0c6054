"""Async UNet Split on a small denoiser of every transformer family."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode

import families
import family_table
from families import FAMILIES, QUICK, Family
from generation import distance
from leapfrog.parallel_backend import LeapfrogError, supervisor
from ranks import EXACT, in_ranks, parastep, split

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


def test_rows_that_change_each_other_are_evaluated_together():
    """ACE-Step 1.5 gives all that it knows of the timbre to the first row of a call."""
    model, family = model_of("ace_step15"), FAMILIES["ace_step15"]
    apart = torch.cat([families.sample(model, family, batch=2, cfg=1.0)[1:], families.sample(model, family, cfg=1.0)])
    assert distance(apart[:1], apart[1:]) > EXACT
    theirs = families.sample(model, family, batch=2, cfg=3.0)
    lanes = split(model, components=1, mode="exact", cfg_lanes="on")
    for ours, sampler in ((model, parastep(1)), (lanes, "euler"), (split(model, mode="exact"), "euler")):
        assert distance(families.sample(ours, family, batch=2, cfg=3.0, sampler=sampler), theirs) < EXACT
    cut = split(model, components=0, mode="exact")
    assert distance(families.sample(cut, family, batch=2, cfg=3.0), theirs) < EXACT
    assert len(in_ranks().pipelines[0]) == 2, "two devices are not left to one prompt each"
    two, one = (families.sample(model, family, steps=6, cfg=1.0, sampler=parastep(2, ranks=n)) for n in (2, 1))
    assert distance(one, two) < EXACT, "steps at once on one rank do not share a call"


@pytest.mark.parametrize("name", ["stable_audio", "flux2"])
def test_easycache_skips_what_it_skips_in_comfyui(name: str):
    """Stable Audio's forward does not run the wrappers that it consists of."""
    family = FAMILIES[name]
    model = EasyCacheNode.execute(model_of(name), 0.9, 0.1, 0.9, False).args[0]
    theirs = families.sample(model, family, steps=8)
    skipped = distance(theirs, families.sample(model_of(name), family, steps=8)) > EXACT
    assert skipped == (name != "stable_audio")
    assert distance(families.sample(model, family, steps=8, sampler=parastep(1)), theirs) < EXACT
    assert distance(families.sample(split(model, mode="exact"), family, steps=8), theirs) < EXACT


def test_a_denoiser_that_goes_another_way_is_looked_at_anew():
    """LTXV drops the tokens of a guide that are masked below zero: their number is in no shape of the inputs."""
    model, family = model_of("ltxv"), FAMILIES["ltxv"]

    def guided(downscale: int) -> Any:
        """What LTXVAddGuide with an IC-LoRA puts into the prompt: the last frame is a guide, of fewer tokens."""
        mask = torch.ones(1, 1, *family.latent[1:])
        mask[:, :, -1] = -1
        mask[:, :, -1, ::downscale, ::downscale] = 1
        entry = {
            "pre_filter_count": 16,
            "strength": 1.0,
            "pixel_mask": None,
            "latent_shape": [1, *[4 // downscale] * 2],
        }
        places = torch.zeros(1, 3, 16, 2)
        places[..., 1] = 1

        def add(apply_model: Any, given: dict[str, Any]) -> torch.Tensor:
            rows = len(given["input"])
            guide = {
                "keyframe_idxs": places.expand(rows, -1, -1, -1),
                "denoise_mask": mask.expand(rows, -1, -1, -1, -1),
            }
            return apply_model(
                given["input"], given["timestep"], **given["c"], **guide, guide_attention_entries=[entry]
            )

        made = model.clone()
        made.set_model_unet_function_wrapper(add)
        return made

    whole, fewer = (split(guided(downscale), mode="exact") for downscale in (1, 2))
    families.sample(whole, family)
    with pytest.raises(LeapfrogError) as caught:
        families.sample(fewer, family)
    assert caught.value.report.code == "layout_changed"
    assert distance(families.sample(fewer, family), families.sample(guided(2), family)) < EXACT
