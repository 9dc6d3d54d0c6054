"""What can be refused only once sampling has begun; the ranks serve the next prompt all the same."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_extras.nodes_sag import SelfAttentionGuidance

from generation import Request, distance, generate
from leapfrog.parallel_backend import LeapfrogError
from ranks import EXACT, load, parastep, reference, split, the_pool


def self_attention_guidance(model: Any) -> Any:
    return SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]


def option_of_a_pack(model: Any) -> Any:
    model = model.clone()
    model.model_options["transformer_options"]["from_a_pack"] = object()
    return model


@pytest.mark.parametrize(
    ("family", "node", "named"),
    [
        ("unet", self_attention_guidance, "runs code inside the denoiser that cannot travel"),
        ("flux", option_of_a_pack, "from_a_pack"),
    ],
)
@pytest.mark.parametrize("block", ["async_unet_split", "parastep"])
def test_a_node_that_reaches_into_the_denoiser_is_named(family: str, node: Any, named: str, block: str):
    request = Request(family, steps=3)
    in_split = block == "async_unet_split"
    model, sampler = (split(load(family), mode="exact"), "euler") if in_split else (load(family), parastep(1))
    generate(model, request, sampler)
    pids = the_pool().pids
    with pytest.raises(LeapfrogError) as caught:
        generate(node(model), request, sampler)
    assert caught.value.report.code == "unsupported_patch"
    assert named in str(caught.value)
    assert distance(generate(model, request, sampler), reference(request)) < EXACT
    assert the_pool().pids == pids
