"""How long something takes from here to ranks and back, and from rank to rank."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .pool import Pool, Tick
from .protocol import Echo, Probe, Probed
from .schedules.simulate import Link

ANSWER_S = 30.0
SMALL, LARGE = 4 << 10, 16 << 20
"""Bytes that are sent from rank to rank, for the latency and for the bandwidth."""
REPEATS = [50, 5]


def round_trip(
    pool: Pool, tensor: torch.Tensor, ranks: Sequence[int], tick: Tick
) -> tuple[float, dict[int, torch.Tensor]]:
    """The seconds in which a CPU tensor goes to all of these ranks and comes back, and what came back from each.

    Raises LeapfrogError, or what ``tick`` raises.
    """
    room = tensor.nbytes + 63 & ~63
    began = time.perf_counter()
    with pool.lock:
        payload, out = pool.payload(tensor, tick, reserve=room * len(ranks))
        asked = {rank: Echo(inputs=payload, out=out + room * at, out_size=room) for at, rank in enumerate(ranks)}
        replies = pool.request(asked, ANSWER_S, tick, using=payload)
        back = {rank: pool.read(replies[rank].output) for rank in ranks}
    return time.perf_counter() - began, back


def link_between(pool: Pool, first: int, second: int, tick: Tick, large: int = LARGE) -> tuple[Link, bool]:
    """The link between two ranks, and whether all arrived as it was sent. Errors as in :func:`round_trip`."""
    ask = Probe(first=first, second=second, sizes=[SMALL, large], repeats=REPEATS)
    with pool.lock:
        replies: dict[int, Probed] = pool.request({first: ask, second: ask}, ANSWER_S, tick)
    quick, slow = replies[first].seconds
    bandwidth = (large - SMALL) / max(slow - quick, 1e-9)
    return Link(bandwidth, quick), all(reply.intact for reply in replies.values())
