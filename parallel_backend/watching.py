"""What ranks have seen of a denoiser in a forward: its units, what flows between them, how long each takes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from .pool import Pool, Tick
from .protocol import Payload, Recipe, Trace, Traced
from .settings import step_timeout_s
from .tensors import Shape
from .units import Flow

log = logging.getLogger("leapfrog")
REPEATS = 3
"""How often a unit is timed, where no weights have to travel for that."""


class Watched:
    """A recipe's denoiser on some devices, seen in one layout of the inputs after another. Known to all that have the
    same recipe, and for longer than a pool lives."""

    _traces: ClassVar[dict[tuple[Recipe, tuple[str, ...], str], dict[int, Traced]]] = {}
    _units: ClassVar[dict[Recipe, list[str]]] = {}
    _timed: ClassVar[set[tuple[Recipe, tuple[str, ...], Shape]]] = set()

    def __init__(self, recipe: Recipe, devices: tuple[str, ...]):
        self._recipe = recipe
        self._devices = devices

    @property
    def units(self) -> list[str]:
        """The paths of the units that were last seen, in the order in which they run."""
        return self._units.get(self._recipe, [])

    def tells_times(self, payload: Payload) -> bool:
        """Whether these inputs are worth being timed, or were timed by every rank.

        Not with a latent of a size that was timed before, with a prompt of another length, say: that changes what
        flows, and next to nothing of the times.
        """
        before = (self._recipe, self._devices, payload.heads[0].shape) in self._timed
        return not before or len(self._traces.get(self._key(payload), ())) == len(self._devices)

    def look(
        self, pool: Pool, payload: Payload, shapes: Mapping[str, tuple[int, ...]], one: int | None, tick: Tick
    ) -> tuple[list[Traced], bool]:
        """What ranks saw with inputs of this layout, and whether they had to look now.

        Every rank measures unit times; where all that matters is the flow, ``one`` rank is asked for that.
        """
        known = self._traces.setdefault(self._key(payload), {})
        ranks = range(len(self._devices)) if one is None else [one]
        if all(rank in known for rank in ranks) or (known and one is not None):
            return [known[rank] for rank in sorted(known)], False
        before = self.units
        repeats = REPEATS if one is None else 0
        trace = Trace(recipe=self._recipe, inputs=payload, units=before, repeats=repeats, shapes=dict(shapes))
        began = time.monotonic()
        seen = pool.request(dict.fromkeys(ranks, trace), step_timeout_s(), tick, using=payload)
        first: Traced = next(iter(seen.values()))
        self._units[self._recipe] = [unit.path for unit in first.units]
        if before and before != self.units:
            # a unit runs several times in a call of this kind, so nobody can hold it alone: all is to be cut anew
            self.forget()
        self._traces.setdefault(self._key(payload), {}).update(seen)
        if one is None:
            self._timed.add((self._recipe, self._devices, payload.heads[0].shape))
        log.info("Leapfrog: watched %d units in %.1f s", len(first.units), time.monotonic() - began)
        return [seen[rank] for rank in ranks], True

    def layout(self, pool: Pool, payload: Payload) -> tuple[int, Flow]:
        """The number of these inputs' layout, and what flows between units in it."""
        key = self._key(payload)
        layouts = pool.memory.layouts
        return layouts.setdefault(key, len(layouts)), next(iter(self._traces[key].values())).flow

    def forget(self) -> None:
        """All layouts."""
        for key in [key for key in self._traces if key[0] == self._recipe]:
            del self._traces[key]
        self._timed.difference_update([key for key in self._timed if key[0] == self._recipe])

    def _key(self, payload: Payload) -> tuple[Recipe, tuple[str, ...], str]:
        return self._recipe, self._devices, _layout_of(payload)


def _layout_of(payload: Payload) -> str:
    """What decides the flow between units and the shapes in it: shapes, structure, code inside the denoiser.

    How many steps the run has does not.
    """

    def structure(node: Any) -> Any:
        kind, body = node
        if kind == "t":
            return payload.heads[body].dtype, payload.heads[body].shape
        if kind == "v":
            return type(body).__name__
        if kind in ("l", "u"):
            return [kind, *map(structure, body)]
        if kind == "d":
            known = [(key[1], value) for key, value in body if key[1] != "sample_sigmas"]
            return [[key, value if key == "id" else structure(value)] for key, value in known]
        return kind

    return json.dumps(structure(payload.spec), default=str)
