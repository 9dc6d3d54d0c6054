"""One component of a split denoiser on its rank: runs ComfyUI's own forward, answers for the units it does not hold.

Every rank runs the whole forward. A unit of an earlier rank is absent here: its stand-in returns what arrived from
that rank, or an empty meta tensor where nobody will look. After the last own unit the forward is left, except on the
last rank, whose forward ends in the result. Small shared parts (embeddings, input and output layers) run on each
rank and are never stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from ..tensors import DTYPES
from ..units import Unit, needed_by, owner_of
from .links import Incoming, Links

# What a unit returns, flattened: whether it was a bare tensor, and the shape and dtype of each tensor.
Signature = tuple[bool, list[tuple[tuple[int, ...], str]]]


class ComponentDone(BaseException):
    """Leaves the forward after the last own unit. A BaseException, so that no handler inside the model takes it."""


@dataclass
class StreamState:
    """The newest outputs of earlier ranks for one stream, and those on their way, by source rank."""

    latest: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    coming: dict[int, Incoming] = field(default_factory=dict)


class Component:
    """Units ``bounds[rank]`` of a denoiser. ``forward`` is the denoiser's, units tapped and absences answered."""

    def __init__(
        self, forward: Callable[..., Any], units: Sequence[Unit], bounds: Sequence[tuple[int, int]], links: Links
    ):
        self._forward = forward
        self._bounds = list(bounds)
        self._links = links
        self._first, self._last = bounds[links.rank]
        self._final = links.rank == len(bounds) - 1
        mine = needed_by(units, bounds, links.rank)
        self._from: dict[int, list[int]] = {}
        for unit in mine:
            self._from.setdefault(owner_of(bounds, unit), []).append(unit)
        self._to: dict[int, list[int]] = {}
        for other in range(links.rank + 1, len(bounds)):
            wanted = [u for u in needed_by(units, bounds, other) if self._first <= u <= self._last]
            if wanted:
                self._to[other] = wanted
        self._signatures: dict[int, list[Signature]] = {}
        self._streams: dict[int, StreamState] = {}
        self._run = 0
        self._answers: list[Any] = []
        self._outputs: dict[int, Any] = {}

    def answer(self, unit: int) -> Any:
        """What the stand-in of an absent unit returns."""
        return self._answers[unit]

    def produced(self, unit: int, output: Any) -> None:
        """Called with every output of an own unit."""
        # a copy where it leaves this rank: the forward may add to a skip tensor in place (ControlNet) later on
        leaves = any(unit in wanted for wanted in self._to.values()) and unit != self._last
        self._outputs[unit] = _map(output, torch.clone) if leaves else output
        if unit == self._last and not self._final:
            raise ComponentDone

    def evaluate(self, args: Any, kwargs: Any, run: int, stream: int, shape: int, exact: bool) -> Any:
        """One evaluation. Returns the denoiser's output on the last rank, None on the others.

        ``shape`` numbers the layout of the inputs; the first evaluation with a new one must be exact.
        """
        if run != self._run:
            self._forget()
            self._run = run
        state = self._streams.setdefault(stream, StreamState())
        for source, incoming in state.coming.items():
            state.latest[source] = self._links.wait(incoming)
        state.coming.clear()
        first_time = shape not in self._signatures
        if first_time:
            self._learn(shape)
        coming = {s: self._links.receive(s, self._expected(shape, units)) for s, units in self._from.items()}
        if exact:
            state.latest = {source: self._links.wait(incoming) for source, incoming in coming.items()}
        else:
            state.coming = coming
        self._answers = self._answers_for(shape, state.latest)
        self._outputs = {}
        try:
            result = self._forward(*args, **kwargs)
        except ComponentDone:
            result = None
        if first_time:
            self._teach(shape)
        for other, wanted in self._to.items():
            self._links.send(other, [t for unit in wanted for t in _tensors(self._outputs[unit])])
        self._answers, self._outputs = [], {}
        return result

    def _forget(self) -> None:
        """Drop stale state. What is still on its way was sent for sure, so it is awaited, not cancelled."""
        for state in self._streams.values():
            for incoming in state.coming.values():
                self._links.wait(incoming)
        self._streams.clear()

    def _learn(self, shape: int) -> None:
        known: list[Signature] = []
        for rank in range(self._links.rank):
            known += msgspec.msgpack.decode(self._links.ask(f"shape/{shape}", rank), type=list[Signature])
        self._signatures[shape] = known

    def _teach(self, shape: int) -> None:
        own = [_signature(self._outputs[u]) for u in range(self._first, self._last + 1)]
        self._links.tell(f"shape/{shape}", msgspec.msgpack.encode(own))

    def _expected(self, shape: int, units: Sequence[int]) -> list[torch.Tensor]:
        return [t for u in units for t in _empty(self._signatures[shape][u])]

    def _answers_for(self, shape: int, latest: dict[int, list[torch.Tensor]]) -> list[Any]:
        signatures = self._signatures[shape]
        answers: list[Any] = [_pack(s, _empty(s)) for s in signatures]
        for source, units in self._from.items():
            tensors = iter(latest[source])
            for unit in units:
                answers[unit] = _pack(signatures[unit], [next(tensors) for _ in signatures[unit][1]])
        return answers


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


def _map(output: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return function(output) if isinstance(output, torch.Tensor) else tuple(function(t) for t in output)


_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _signature(output: Any) -> Signature:
    bare = isinstance(output, torch.Tensor)
    return bare, [(tuple(t.shape), _DTYPE_NAMES[t.dtype]) for t in _tensors(output)]


def _empty(signature: Signature) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=DTYPES[name], device="meta") for shape, name in signature[1]]


def _pack(signature: Signature, tensors: list[torch.Tensor]) -> Any:
    return tensors[0] if signature[0] else tuple(tensors)
