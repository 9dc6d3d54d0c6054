"""Three ranks, and several lanes on one. Each number of ranks is a pool of its own, so these tests come last."""

from __future__ import annotations

import pytest
import torch

from generation import Request, distance, generate
from ranks import EXACT, in_ranks, load, parastep, reference, split, the_pool


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_three_components_in_exact_mode_are_comfyui(family: str):
    request = Request(family)
    assert distance(generate(split(load(family), 3, "exact"), request), reference(request)) < EXACT
    assert len(the_pool().pids) == 3
    assert all(rank.units for rank in in_ranks().parts)


def test_three_asynchronous_components_come_close():
    request = Request(steps=8)
    model = split(load("flux"), 3, warmup=3)
    ours = generate(model, request)
    assert EXACT < distance(ours, reference(request)) < 0.4
    assert torch.equal(generate(model, request), ours)


def test_one_lane_on_three_ranks_is_comfyui():
    """Two rows for three ranks: one has nothing to do."""
    assert distance(generate(load("flux"), Request(), parastep(1, ranks=3)), reference(Request())) < EXACT


def test_two_lanes_on_one_rank_are_two_lanes_on_three():
    on_three = generate(load("flux"), Request(), parastep(2, ranks=3))
    on_one = generate(load("flux"), Request(), parastep(2, ranks=1))
    assert len(the_pool().pids) == 1
    assert distance(on_one, on_three) < EXACT
