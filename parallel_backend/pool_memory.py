"""What callers remember of a pool's ranks, for as long as the pool lives."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .cutting import Chosen
from .protocol import Cut, Loaded, Recipe


@dataclass(frozen=True)
class Held:
    """The weights in the ranks: a recipe's denoiser, how it is cut (None: each rank holds all of it), the ranks of each
    pipeline, the patches in it, and what each rank said to hold (which does not count when two are compared)."""

    recipe: Recipe
    cut: Cut | None
    pipelines: list[list[int]]
    patches_id: str
    parts: list[Loaded] = field(default_factory=list, compare=False)

    def same_but_for_patches(self, other: Held) -> bool:
        return (self.recipe, self.cut, self.pipelines) == (other.recipe, other.cut, other.pipelines)


@dataclass
class PoolMemory:
    """``held`` is None where ranks hold nothing.

    ``cut`` is the last one that was chosen, and what for; it outlives the weights. ``layouts`` numbers the layouts of
    inputs, and ``learnt`` says of which, as ``(layout, rank)``, a rank knows the flow between units.
    """

    held: Held | None = None
    cut: tuple[Hashable, Chosen | None] = (None, None)
    layouts: dict[Hashable, int] = field(default_factory=dict)
    learnt: set[tuple[int, int]] = field(default_factory=set)
