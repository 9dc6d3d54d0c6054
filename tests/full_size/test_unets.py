"""Async UNet Split on U-Nets of full size, small latents. Minutes and gigabytes: `make families` runs it."""

from __future__ import annotations

import gc

import pytest
import torch

import family_table
import full_size
from generation import distance
from leapfrog.parallel_backend import supervisor
from ranks import EXACT, in_ranks, split

STEPS = 2
SIZE = 8


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", full_size.MODELS)
def test_a_full_size_unet(name: str):
    there = full_size.checkpoint(name).exists()
    torch.set_num_threads(1)  # sums come out as in the ranks, which have as many
    with torch.inference_mode():
        theirs = full_size.sample(full_size.load(name), name, STEPS, SIZE)
        for mode, ranks in (("exact", 2), ("exact", 3), ("exact", 4), ("asyncdiff", 2), ("lookahead", 2)):
            model = split(full_size.load(name), ranks=ranks, mode=mode, warmup=1, drift_bound=1.0)
            gc.collect()
            ours = full_size.sample(model, name, STEPS if mode == "exact" else 5, SIZE)
            cut = in_ranks().cut
            assert cut
            assert torch.isfinite(ours).all()
            if mode == "exact":
                off = distance(ours, theirs)
                family_table.picture(name, f"exact {ranks}", theirs, ours)
                family_table.add(name, units=len(cut.units), exact={ranks: off})
                assert off < EXACT
            else:
                family_table.add(name, tested=[mode])
            del model
            supervisor.close_all()
            gc.collect()
    if not there:
        full_size.checkpoint(name).unlink()
