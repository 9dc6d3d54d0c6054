"""What is seen of a denoiser's flow, on denoisers whose flow is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import families
import tiny_models
from generation import TOKENS
from leapfrog.nodes.recipe import recipe_of
from leapfrog.parallel_backend.protocol import Recipe, Traced
from leapfrog.parallel_backend.worker.models.trace import Watch, marks_of, trace
from leapfrog.parallel_backend.worker.unknown import Unknown, is_unknown

CPU = torch.device("cpu")


class Made(torch.nn.Module):
    """Three blocks and whatever happens between them."""

    def __init__(self, between: Callable[[Made, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.between(self, x)


def chain(made: Made, x: torch.Tensor) -> torch.Tensor:
    for block in made.blocks:
        x = block(x)
    return x


def skip(made: Made, x: torch.Tensor) -> torch.Tensor:
    first = made.blocks[0](x)
    second = made.blocks[1](first * 2)
    return made.blocks[2](torch.cat([first, second])[:3])


def in_place(made: Made, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(3, 2)
    total[:, 1] += made.blocks[0](x)[:, 0]
    other = made.blocks[1](x)
    other[:1].add_(total[:1])
    return made.blocks[2](other) + total.mean()


@pytest.mark.parametrize(
    ("between", "reads", "head"),
    [
        (chain, [set(), {0}, {1}], {2}),
        (skip, [set(), {0}, {0, 1}], {2}),
        (in_place, [set(), set(), {0, 1}], {0, 2}),
    ],
)
@torch.no_grad()
def test_what_a_unit_reads_is_seen_through_the_code_in_between(between: Any, reads: list[set[int]], head: set[int]):
    made = Made(between)
    watch = Watch(made, [f"blocks.{i}" for i in range(3)], CPU, marking=True)
    with watch:
        result = made(torch.ones(3, 2))
    assert watch.reads == reads
    assert marks_of(result) == head


def traced(path: Any, args: tuple, kwargs: dict, units: Any = (), repeats: int = 1) -> Traced:
    return trace(Recipe.of("diffusion_model", str(path), {}), (args, kwargs), CPU, units, repeats, {})


def test_a_flux_is_a_chain():
    kwargs = {"y": torch.ones(1, 768), "guidance": torch.ones(1), "transformer_options": {}}
    seen = traced(tiny_models.tiny_flux(), (torch.ones(1, 16, 8, 8), torch.ones(1), torch.ones(1, TOKENS, 768)), kwargs)
    assert [unit.path for unit in seen.units] == ["double_blocks.0", "double_blocks.1"] + [
        f"single_blocks.{i}" for i in range(4)
    ]
    assert seen.flow.reads == [[], [0], [1], [2], [3], [4]]
    assert seen.flow.head == [5]
    first, last = seen.flow.outputs[0], seen.flow.outputs[5]
    assert first is not None
    assert last is not None
    assert first.tensors == [("float32", (1, 16, 128)), ("float32", (1, TOKENS, 128))]
    assert last.tensors == [("float32", (1, 16 + TOKENS, 128))]
    assert all(unit.seconds > 0 for unit in seen.units)
    assert seen.shared + sum(unit.nbytes for unit in seen.units) == pytest.approx(
        tiny_models.tiny_flux().stat().st_size, rel=0.01
    )


def test_a_unet_has_its_skips():
    args = (torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, TOKENS, 768))
    seen = traced(tiny_models.tiny_unet(), args, {"transformer_options": {}})
    assert [unit.path for unit in seen.units] == [
        "input_blocks.0.0", "input_blocks.1.0", "input_blocks.1.1", "input_blocks.2.0", "input_blocks.3.0",
        "middle_block.0", "output_blocks.0.0", "output_blocks.1.0", "output_blocks.1.1", "output_blocks.2.0",
        "output_blocks.3.0",
    ]  # fmt: skip
    assert seen.flow.reads == [[], [0], [1], [2], [3], [4], [4, 5], [3, 6], [7], [2, 8], [0, 9]]


def test_the_units_of_a_cut_keep_their_numbers():
    args = (torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, TOKENS, 768))
    names = ["output_blocks.1.0", "middle_block.0"]
    seen = traced(tiny_models.tiny_unet(), args, {"transformer_options": {}}, names, repeats=0)
    assert [unit.path for unit in seen.units] == names
    assert seen.flow.reads == [[1], []]
    assert seen.units[0].seconds == 0


def test_what_comes_of_the_unknown_is_unknown():
    unknown = Unknown(torch.empty(2, 3, device="meta"), CPU)
    for made in (
        torch.ones(2, 3) + unknown,
        torch.cat([torch.ones(2, 3), unknown]),
        torch.nn.functional.linear(unknown, torch.ones(4, 3)),
        unknown.transpose(0, 1).reshape(6).to(torch.float16),
    ):
        assert is_unknown(made)
        assert made.device == CPU
    assert torch.nn.functional.linear(unknown, torch.ones(4, 3)).shape == (2, 4)
    unknown[:, :2] += torch.ones(2, 2)
    assert is_unknown({"a": [unknown]})


def test_what_is_made_where_the_unknown_lies_is_real():
    unknown = Unknown(torch.empty(2, 3, device="meta"), CPU)
    ids = torch.arange(unknown.shape[1], device=unknown.device)
    assert not is_unknown(ids)
    assert ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["flux", "chroma_radiance", "wan_vace_two"])
def test_all_parts_lie_where_the_inputs_are(name: str, monkeypatch: pytest.MonkeyPatch):
    """On the meta device, which like a GPU refuses weights that lie elsewhere. Of the latter two, parts that looked
    like units run several times."""
    room = 1 << 40
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda _=None, torch_too=False: (room, room) if torch_too else room
    )
    family, inputs = families.FAMILIES[name], []
    model = families.load(family).clone()

    def look(executor: Any, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.append((x, timestep, args, kwargs))
        return executor(x, timestep, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
    families.sample(model, family, steps=1)
    x, timestep, args, kwargs = inputs[0]
    given = [one for one in args if not (isinstance(one, dict) and "sigmas" in one)]
    tree = ((x, timestep, *given), {**kwargs, "transformer_options": {}})
    seen = trace(recipe_of(model), tree, torch.device("meta"), [], 1, {})
    assert len(seen.units) > 3
