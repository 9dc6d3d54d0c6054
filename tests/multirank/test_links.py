"""What ranks send each other and what they share with the host."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from generation import Request, generate
from leapfrog.parallel_backend.protocol import Probe
from ranks import load, split, the_pool, with_lora

MESSAGE = 1 << 20


def test_messages_that_have_left_are_given_back():
    model = split(load("flux"), mode="exact")
    generate(model, Request(steps=2))
    pool = the_pool()
    rank = psutil.Process(pool.pids[0])
    before = rank.memory_info().rss
    for _ in range(2):
        probe = {r: Probe(first=0, second=1, sizes=[MESSAGE], repeats=[150]) for r in (0, 1)}
        with pool.lock:
            pool.request(probe, 60.0, lambda: None)
    assert rank.memory_info().rss - before < 60 * MESSAGE


@pytest.mark.parametrize("mode", ["exact", "lookahead"])
def test_shared_memory_is_given_back_at_rest(mode: str):
    model, request = split(with_lora(load("flux")), mode=mode), Request(steps=5)
    before = generate(model, request)
    pool = the_pool()
    given_back = set(pool.arenas)
    assert given_back
    with pool.lock:
        pool.rest()
    assert not pool.arenas
    assert torch.equal(generate(model, request), before)
    mapped = {Path(part.path).name for pid in pool.pids for part in psutil.Process(pid).memory_maps()}
    assert mapped & set(pool.arenas)
    assert not mapped & given_back
