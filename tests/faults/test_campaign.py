"""The campaigns of `make faults` and `make soak`, in short: the same code in a real ComfyUI, a few prompts each."""

from __future__ import annotations

import pytest

import faults
import soak
from campaign import EXACT, KSAMPLER, PARASTEP
from where import ON_GPUS


@pytest.mark.timeout(300)
def test_whatever_breaks_the_next_prompts_are_right(capsys: pytest.CaptureFixture[str]):
    kinds = ("kill -9", "pause", "cancel", "garbage")
    figures = faults.run(4, 54, kinds, (EXACT, PARASTEP))
    assert figures.bad == 0, capsys.readouterr().out
    assert figures.injected.total() == 4
    assert figures.later >= 4
    assert set(figures.injected) == set(kinds)


@pytest.mark.timeout(300)
def test_no_picture_is_lost_with_a_rank_where_it_is_finished_on_the_other(capsys: pytest.CaptureFixture[str]):
    figures = faults.run(3, 5, ("kill -9",), (EXACT, KSAMPLER), carry_on=True)
    assert figures.bad == 0, capsys.readouterr().out
    assert figures.answers == {"right": 3}
    assert figures.finished >= 1


@pytest.mark.timeout(300)
def test_many_prompts_leave_no_more_than_a_few(capsys: pytest.CaptureFixture[str]):
    found = soak.run(20, every=10, settle_s=0.0)
    assert found.prompts == 20
    assert found.cancelled >= 1
    # so early the allocators still grow to what the largest picture needs, and a host with a GPU opens files
    assert found.good(bound=0.1, more_files=2 if ON_GPUS else 0), capsys.readouterr().out
