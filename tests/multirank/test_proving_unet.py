"""The trained U-Net: ComfyUI alone draws held-out captions with it, and the exact split gives the same latents."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import trained
from generation import distance
from judge_shapes import judge
from leapfrog.parallel_backend import supervisor
from pack import ROOT
from ranks import EXACT, split
from shapes import HELD_OUT

ASKED = HELD_OUT[::6]


@pytest.fixture(autouse=True)
def ranks_that_know_its_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    supervisor.close_all()
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "proving" / "rank_site"), prepend=os.pathsep)
    yield
    supervisor.close_all()


def test_exact_split_is_comfyui_which_draws_what_is_asked():
    model, request = trained.load_unet(), {"captions": tuple(a.caption for a in ASKED), "scheduler": "normal"}
    alone = trained.latents(model, 20, **request)
    ours = trained.latents(split(model, mode="exact"), 20, **request)
    assert distance(ours, alone) < EXACT
    assert judge(trained.decode(alone)) == list(ASKED)
