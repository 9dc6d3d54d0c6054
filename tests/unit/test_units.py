"""Which unit needs what from whom."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import comfy.ops
import pytest
import torch
from comfy.ldm.cascade.stage_c import StageC
from hypothesis import given
from hypothesis import strategies as st

import full_size
import tiny_models
from leapfrog.parallel_backend import LeapfrogError
from leapfrog.parallel_backend.units import Flow, Output, find_units, needed_by, owner_of

OUTPUT = Output(["t", 0], [("float32", (1,))])


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Flow, list[tuple[int, int]]]:
    """Any flow that goes forward, and any cut of its units."""
    units = draw(st.integers(1, 12))
    reads = [sorted(draw(st.sets(st.integers(0, u - 1), max_size=3))) if u else [] for u in range(units)]
    head = sorted(draw(st.sets(st.integers(0, units - 1), min_size=1, max_size=3)))
    inner = sorted(draw(st.sets(st.integers(1, units - 1), max_size=4))) if units > 1 else []
    bounds = [(first, end - 1) for first, end in pairwise([0, *inner, units])]
    return Flow(reads, head, [OUTPUT] * units), bounds


@given(cuts())
def test_a_rank_needs_exactly_what_its_units_read_and_others_made(case: tuple[Flow, list[tuple[int, int]]]):
    flow, bounds = case
    for position, (first, last) in enumerate(bounds):
        wanted = {made for unit in range(first, last + 1) for made in flow.reads[unit] if made < first}
        if position == len(bounds) - 1:
            wanted |= {made for made in flow.head if made < first}
        assert needed_by(flow, bounds, position) == sorted(wanted)


@given(cuts())
def test_every_unit_has_one_owner(case: tuple[Flow, list[tuple[int, int]]]):
    flow, bounds = case
    for unit in range(len(flow.reads)):
        first, last = bounds[owner_of(bounds, unit)]
        assert first <= unit <= last


def test_the_units_of_a_flux():
    with torch.device("meta"):
        units = find_units(tiny_models._flux())
    assert units == [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(4)]


def test_the_units_of_a_unet():
    with torch.device("meta"):
        units = find_units(tiny_models._unet())
    merged = (0, 1, 1, 2, 3)
    assert [unit.rpartition(".")[0] for unit in units] == [
        *(f"input_blocks.{i}" for i in (0, 1, 1, 2, 3)), "middle_block", *(f"output_blocks.{i}" for i in merged)
    ]  # fmt: skip


def test_the_units_of_sdxl():
    units = find_units(full_size.empty("sdxl").diffusion_model)
    deep = [unit for unit in units if unit.startswith("middle_block.1.")]
    assert deep == [f"middle_block.1.transformer_blocks.{i}" for i in range(10)]
    assert "input_blocks.1.0" in units
    assert len(units) == 92


def test_the_units_of_a_stable_cascade():
    """Its lists are of levels, which are lists of blocks."""
    made: dict[str, Any] = {"c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 2], [2, 1]]}
    with torch.device("meta"):
        units = find_units(StageC(**made, operations=comfy.ops.disable_weight_init))
    assert units[:4] == ["down_blocks.0.0", "down_blocks.0.1", "down_blocks.0.2", "down_blocks.1.0"]
    assert {unit.partition(".")[0] for unit in units} == {"down_blocks", "up_blocks"}
    assert len(units) == 18


def test_lists_that_are_small_or_inside_a_unit_are_not_cut():
    block = torch.nn.Module()
    block.inner = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(2)])
    denoiser = torch.nn.Module()
    denoiser.embedders = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    denoiser.trunk = torch.nn.Module()
    denoiser.trunk.blocks = torch.nn.ModuleDict({"a": block, "b": torch.nn.Linear(64, 64)})
    assert find_units(denoiser) == ["trunk.blocks.a", "trunk.blocks.b"]


def test_a_denoiser_that_nobody_can_cut_is_refused_by_name():
    with pytest.raises(LeapfrogError, match="cannot cut a Linear") as caught:
        find_units(torch.nn.Linear(1, 1))
    assert caught.value.report.code == "unsupported_model"
