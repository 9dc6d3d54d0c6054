"""Emulated devices: ranks whose layers take as long as a profile says compute what they would compute anyway."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import comfy.model_base
import pytest

import emulate
import families
from emulated_device import VARIABLE, emulate_all, paces
from generation import distance
from leapfrog.nodes.adviser import measured
from leapfrog.parallel_backend import supervisor
from ranks import EXACT
from validate import row_of
from where import ON_GPUS

SLOWER = {"sd15": 10.0, "flux": 2.0}


@pytest.fixture(autouse=True)
def ranks_of_its_own() -> Iterator[None]:
    supervisor.close_all()
    yield
    supervisor.close_all()


@pytest.mark.skipif(ON_GPUS, reason="emulated devices stand for GPUs that are not there")
@pytest.mark.parametrize("name", emulate.TITLES)
def test_layers_of_ranks_take_as_long_as_the_profile_says(name: str, monkeypatch: pytest.MonkeyPatch):
    path = emulate.PROFILES / f"{name}_h100.json"
    monkeypatch.setenv("PYTHONPATH", str(emulate.SITE), prepend=os.pathsep)
    monkeypatch.setenv(VARIABLE, f"{path}:{SLOWER[name]}")
    family = emulate.narrow_families()[name]
    alone = families.sample(families.load(family), family)
    monkeypatch.setattr(comfy.model_base.BaseModel, "__init__", comfy.model_base.BaseModel.__init__)  # to be put back
    emulate_all(comfy.model_base)
    model = families.load(family)

    latent = {"samples": families.latent(family, 1, None)}
    facts = measured(model, families.prompt(family, 1), latent, "cpu,cpu").facts
    pace = dict(paces(model.model.diffusion_model, json.loads(path.read_text()), SLOWER[name]))
    assert facts
    for conditionings in (1, 2):
        assert facts.whole(conditionings) >= sum(one.of(conditionings) for one in pace.values())

    def run(model: Any, sampler: Any, steps: int) -> Any:
        return families.sample(model, family, steps, sampler)

    exact = dict(emulate.plans(("cpu", "cpu"), False, 1))["exact, N=2"]
    assert distance(row_of(model, exact, run, 1).run(3), alone) < EXACT
