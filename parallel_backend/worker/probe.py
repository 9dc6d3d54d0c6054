"""How fast a link between two ranks is, and whether it carries what it was given."""

from __future__ import annotations

import statistics
import time

import torch

from ..protocol import Probe, Probed
from .links import Links

WARM = 2
LARGEST = 1 << 30
MOST = 1000
PATTERN = torch.arange(251, dtype=torch.uint8)


def probe(links: Links, message: Probe) -> Probed:
    """This rank's side of a :class:`Probe`. The way is that of hidden states, copies included.

    Raises ValueError for ranks that are not there, this one not among them, or sizes out of bounds.
    """
    pair = {message.first, message.second}
    if len(pair) != 2 or not pair <= set(range(links.world)) or links.rank not in pair:
        raise ValueError(
            f"rank {links.rank} of {links.world} cannot probe between {message.first} and {message.second}"
        )
    if not all(0 < size <= LARGEST for size in message.sizes) or not all(0 < n <= MOST for n in message.repeats):
        raise ValueError(f"a probe of {message.sizes} bytes, {message.repeats} times, is out of bounds")
    leads = links.rank == message.first
    other = message.second if leads else message.first
    seconds, intact = [], True
    for size, repeats in zip(message.sizes, message.repeats, strict=True):
        sent = PATTERN.to(links.device).repeat(size // len(PATTERN) + 1)[:size]
        times = []
        for _ in range(WARM + repeats):
            began = time.perf_counter()
            if leads:
                links.send(other, [sent])
            (arrived,) = links.wait(links.receive(other, [sent]))
            if not leads:
                links.send(other, [arrived])
            if arrived.is_cuda:
                torch.cuda.synchronize(arrived.device)
            times.append((time.perf_counter() - began) / 2)
        intact = intact and torch.equal(arrived, sent)
        seconds.append(statistics.median(times[WARM:]))
    return Probed(seconds=seconds, intact=intact)
