"""What a living pool listens on."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path

import psutil
import pytest

from generation import Request, distance, generate
from leapfrog.parallel_backend.starting import backend_of
from ranks import EXACT, load, reference, split, the_pool


def made_a_picture() -> bool:
    request = Request(steps=2)
    return distance(generate(split(load("flux"), 2, "exact"), request), reference(request)) < EXACT


def listeners(pid: int) -> list[tuple[str, int]]:
    found = psutil.Process(pid).net_connections("all")
    return [tuple(one.laddr) for one in found if one.status == psutil.CONN_LISTEN]  # type: ignore[misc]


def test_nothing_listens_outside_of_loopback():
    assert made_a_picture()
    found = {pid: listeners(pid) for pid in (os.getpid(), *the_pool().pids)}
    assert [found[pid] for pid in the_pool().pids] != [[], []], "gloo's and the store's are there, and seen"
    assert all(ipaddress.ip_address(host).is_loopback for each in found.values() for host, _ in each), found
    assert not found[os.getpid()], "the host's is closed when all ranks are in"


@pytest.mark.skipif(sys.platform != "linux", reason="doors can be shut on Linux only")
def test_strangers_reach_no_rank():
    assert made_a_picture()
    if backend_of(the_pool().devices)[0] == "nccl":
        pytest.skip("NCCL lets in who knows its communicator's number; the store's door is shut (unit/test_links.py)")
    ranks = [psutil.Process(pid) for pid in the_pool().pids]
    files = [rank.num_fds() for rank in ranks]
    for rank in ranks:
        for address in listeners(rank.pid):
            with socket.socket() as stranger:
                stranger.settimeout(0.2)
                assert stranger.connect_ex(address), f"{address} let somebody in"
    assert [rank.num_fds() for rank in ranks] == files
    assert made_a_picture()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux shows what a process has open")
def test_the_death_pipe_is_not_standard_input():
    assert made_a_picture()
    assert {os.readlink(f"/proc/{pid}/fd/0") for pid in the_pool().pids} == {os.devnull}
