"""What ranks send each other."""

from __future__ import annotations

import psutil

from generation import Request, generate
from leapfrog.parallel_backend.protocol import Probe
from ranks import load, split, the_pool

MESSAGE = 1 << 20


def test_messages_that_have_left_are_given_back():
    model = split(load("flux"), mode="exact")
    generate(model, Request(steps=2))
    pool = the_pool()
    rank = psutil.Process(pool.pids[0])
    before = rank.memory_info().rss
    for _ in range(2):
        probe = {r: Probe(first=0, second=1, sizes=[MESSAGE], rounds=[150]) for r in (0, 1)}
        with pool.lock:
            pool.request(probe, 60.0, lambda: None)
    assert rank.memory_info().rss - before < 60 * MESSAGE
