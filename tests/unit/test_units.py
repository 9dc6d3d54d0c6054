"""Which unit needs what from whom, checked against a walk through the denoiser."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from leapfrog.parallel_backend import LeapfrogError
from leapfrog.parallel_backend.units import Unit, find_units, needed_by, owner_of


def chain(length: int) -> list[Unit]:
    return [Unit(f"blocks.{i}") for i in range(length)]


def with_skips(inputs: int, middle: bool) -> list[Unit]:
    """As in a U-Net: each input unit is consumed by the output unit at the same distance from the end."""
    total = 2 * inputs + middle
    return [Unit(f"units.{i}", total - 1 - i if i < inputs else None) for i in range(total)]


UNITS = st.integers(1, 12).map(chain) | st.builds(with_skips, st.integers(1, 6), st.booleans())


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[Unit], list[tuple[int, int]]]:
    units = draw(UNITS)
    inner = sorted(draw(st.sets(st.integers(1, len(units) - 1), max_size=4))) if len(units) > 1 else []
    edges = [0, *inner, len(units)]
    return units, [(first, end - 1) for first, end in pairwise(edges)]


@given(cuts())
def test_a_rank_needs_exactly_what_its_units_read_and_others_made(case: tuple[list[Unit], list[tuple[int, int]]]):
    units, bounds = case
    reads: dict[int, set[int]] = {i: {i - 1} if i else set() for i in range(len(units))}
    for made, unit in enumerate(units):
        if unit.consumer is not None:
            reads[unit.consumer].add(made)
    for rank, (first, last) in enumerate(bounds):
        wanted = {made for i in range(first, last + 1) for made in reads[i] if made < first}
        assert needed_by(units, bounds, rank) == sorted(wanted)


@given(cuts())
def test_every_unit_has_one_owner(case: tuple[list[Unit], list[tuple[int, int]]]):
    units, bounds = case
    for unit in range(len(units)):
        first, last = bounds[owner_of(bounds, unit)]
        assert first <= unit <= last


def test_the_units_of_a_flux():
    with torch.device("meta"):
        units = find_units(tiny_models._flux())
    assert [unit.path for unit in units] == [f"double_blocks.{i}" for i in range(2)] + [
        f"single_blocks.{i}" for i in range(4)
    ]
    assert all(unit.consumer is None for unit in units)


def test_the_units_of_a_unet():
    with torch.device("meta"):
        units = find_units(tiny_models._unet())
    inputs = [f"input_blocks.{i}" for i in range(4)]
    assert [unit.path for unit in units] == [*inputs, "middle_block", *(f"output_blocks.{i}" for i in range(4))]
    assert [unit.consumer for unit in units] == [8, 7, 6, 5, None, None, None, None, None]


def test_a_denoiser_that_nobody_can_cut_is_refused_by_name():
    with pytest.raises(LeapfrogError, match="cannot cut a Linear") as caught:
        find_units(torch.nn.Linear(1, 1))
    assert caught.value.report.code == "unsupported_model"
