"""A component's state from step to step, with links that are made up."""

from __future__ import annotations

from typing import Any

import torch

from leapfrog.parallel_backend.tensors import flatten
from leapfrog.parallel_backend.units import Flow, Output
from leapfrog.parallel_backend.worker.component import Component
from leapfrog.parallel_backend.worker.models.inputs import forward_inputs

CPU = torch.device("cpu")


class MadeUpLinks:
    """Those of the second of two ranks. The first one sends 10, 20, 30 ..."""

    rank, device = 1, CPU

    def __init__(self) -> None:
        self.asked = self.waited_for = 0

    def receive(self, _source: int, _like: Any) -> int:
        self.asked += 1
        return self.asked

    def wait(self, incoming: int) -> list[torch.Tensor]:
        self.waited_for += 1
        return [torch.full((2,), 10.0 * incoming)]


class Made:
    """The second component of a denoiser of two units, whose forward adds to what it got in place (ControlNet does)."""

    def __init__(self) -> None:
        self.links = MadeUpLinks()
        self.saw: list[float] = []
        bounds = [(0, 0), (1, 1)]
        self.component = Component(self.forward, bounds, [0, 1], self.links)  # type: ignore[arg-type]
        output = Output(flatten(torch.zeros(2))[0], [("float32", (2,))], [(0,)])
        self.component.learn(0, Flow(reads=[[], [0]], head=[1], outputs=[output, output]))

    def forward(self) -> torch.Tensor:
        hidden = self.component.answer(0)
        self.saw.append(float(hidden[0]))
        hidden += 1
        self.component.produced(1, hidden)
        return hidden

    def evaluate(self, exact: bool, run: int = 1, measure: bool = False) -> None:
        self.component.evaluate((), {}, 0, run, 0, exact, False, measure)


def test_what_the_forward_does_to_an_exact_state_is_not_in_the_next_step():
    for measure in (False, True):
        made = Made()
        made.evaluate(exact=True, measure=measure)
        made.evaluate(exact=False)
        made.evaluate(exact=False)
        assert made.saw == [10, 10, 20]


def test_the_forward_waits_where_it_gets_to_what_another_rank_holds():
    made = Made()
    waited = []
    forward = made.forward

    def after_the_stem() -> torch.Tensor:
        waited.append(made.links.waited_for)
        return forward()

    made.component._forward = after_the_stem
    made.evaluate(exact=True)
    made.evaluate(exact=True)
    assert waited == [0, 1]
    assert made.links.asked == made.links.waited_for == 2


def test_what_the_forward_did_not_ask_for_is_awaited_all_the_same():
    made = Made()
    made.component._forward = lambda: made.component.produced(1, torch.zeros(2))
    made.evaluate(exact=True)
    assert made.links.asked == made.links.waited_for == 1
    made.evaluate(exact=False)
    made.evaluate(exact=False)
    assert made.links.asked == made.links.waited_for + 1 == 3


def test_what_is_on_its_way_is_awaited_before_a_component_is_let_go_of():
    made = Made()
    made.evaluate(exact=True)
    made.evaluate(exact=False)
    assert made.links.asked == made.links.waited_for + 1
    made.component.settle()
    assert made.links.asked == made.links.waited_for == 2
    made.evaluate(exact=True, run=2)
    assert made.saw == [10, 10, 30]


def test_inputs_of_a_host_that_computes_in_another_precision():
    sigmas = torch.tensor([14.6146])
    half = {"y": torch.ones(1, 3).half(), "transformer_options": {"sigmas": sigmas, "cond_or_uncond": [0]}}
    tree = (torch.ones(1, 4).half(), torch.tensor([999.0]), torch.ones(1, 7).half()), half
    (x, timesteps, context), options = forward_inputs(tree, CPU, torch.float32)
    assert x.dtype == context.dtype == options["y"].dtype == torch.float32
    back = (x, timesteps, context), options
    (x, timesteps, context), options = forward_inputs(back, CPU, torch.bfloat16)
    assert x.dtype == context.dtype == options["y"].dtype == torch.bfloat16
    assert float(timesteps) == 999.0
    assert torch.equal(options["transformer_options"]["sigmas"], sigmas)


def test_timesteps_of_audio_and_video_are_shifted_alike():
    tree = (torch.ones(1, 4), (torch.tensor([8.0]), torch.tensor([4.0]))), {}
    (_, (video, audio)), _ = forward_inputs(tree, CPU, torch.float32, time=0.5)
    assert (float(video), float(audio)) == (4.0, 2.0)
