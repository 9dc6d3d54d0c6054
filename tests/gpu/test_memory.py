"""A GPU's memory: what ranks take comes back when it is wanted; where there is too little, ComfyUI hears of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from campaign import wait_until
from comfy_server import ComfyServer
from generation import Request, distance, generate
from leapfrog.parallel_backend import supervisor
from ranks import EXACT, load, reference, split
from where import devices

MB = 1 << 20
SLACK = 64 * MB


def free() -> int:
    """Bytes of the first GPU that nobody has."""
    return torch.cuda.mem_get_info(0)[0]


def test_what_a_server_s_ranks_took_is_given_back(graph: Callable[[str], Any], tmp_path: Path):
    ours = graph("async_unet_split")
    ours["split"]["inputs"]["devices"] = devices(2)
    with ComfyServer(output=tmp_path) as server:
        server.run(graph("stock_flux"))
        before = free()
        server.run(ours)
        assert free() < before - 2 * SLACK
        server.post("/free", {"unload_models": True, "free_memory": True})
        assert wait_until(lambda: free() > before - SLACK, 20), f"{(before - free()) / MB:.0f} MB are still taken"


@pytest.mark.parametrize("mode", ["exact", "lookahead"])
def test_a_rank_without_memory_is_comfyui_s_own_out_of_memory(mode: str):
    model = split(load("flux"), mode=mode)
    generate(model, Request())
    large = Request(size=128, batch=16, steps=2)
    assert distance(generate(model, large), reference(large)) < (EXACT if mode == "exact" else 1)
    supervisor.close_all()  # with what their allocators hold
    generate(model, Request())
    kept = torch.empty(256 * MB, dtype=torch.uint8, device="cuda")
    taken = [torch.empty(free() - SLACK, dtype=torch.uint8, device="cuda")]
    del kept  # this process's allocator has it, for what the host needs
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            generate(model, large)
    finally:
        taken.clear()
        torch.cuda.empty_cache()
    assert "rank" in str(caught.value)
    assert distance(generate(model, Request()), reference(Request())) < (EXACT if mode == "exact" else 1)
