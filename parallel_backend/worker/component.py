"""One component of a split denoiser on its rank: runs ComfyUI's own forward, answers for the units it does not hold.

Every rank runs the whole forward. A unit of an earlier rank is absent here: its stand-in returns what arrived from
that rank, or an unknown tensor where nobody will look (``unknown.py``). After the last own unit the forward is left,
except on the last rank, whose forward ends in the result. Small shared parts (embeddings, input and output layers) run
on each rank and are never stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import LeapfrogError
from ..tensors import DTYPES, flatten, unflatten
from ..units import Flow, Output, needed_by, owner_of
from .links import Incoming, Links
from .unknown import Unknown, is_unknown


class ComponentDone(BaseException):
    """Leaves the forward after the last own unit. A BaseException, so that no handler inside the model takes it."""


@dataclass
class StreamState:
    """What earlier ranks sent for one stream: the newest, the one before it, and what is on its way, by position."""

    latest: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    before: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    coming: dict[int, Incoming] = field(default_factory=dict)


class Layout:
    """What this rank receives and sends for one layout of the inputs; units by position of the component."""

    def __init__(self, flow: Flow, bounds: Sequence[tuple[int, int]], position: int):
        self.outputs = flow.outputs
        self.receives: dict[int, list[int]] = {}
        self.sender: dict[int, int] = {}
        for unit in needed_by(flow, bounds, position):
            self.sender[unit] = owner_of(bounds, unit)
            self.receives.setdefault(self.sender[unit], []).append(unit)
        first, last = bounds[position]
        self.sends: dict[int, list[int]] = {}
        for other in range(position + 1, len(bounds)):
            wanted = [u for u in needed_by(flow, bounds, other) if first <= u <= last]
            if wanted:
                self.sends[other] = wanted
        own = [u for u in range(first, last + 1) if flow.outputs[u] is not None]
        self.last = own[-1] if own else None


class Component:
    """Units ``bounds[position]`` of a denoiser. ``forward`` is the denoiser's, units tapped and absences answered.

    ``peers`` are the ranks of this pipeline.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        bounds: Sequence[tuple[int, int]],
        peers: Sequence[int],
        links: Links,
    ):
        self._forward = forward
        self._bounds = list(bounds)
        self._peers = list(peers)
        self._links = links
        self._position = self._peers.index(links.rank)
        self._final = bounds[self._position] == bounds[-1]
        self._layouts: dict[int, Layout] = {}
        self._streams: dict[int, StreamState] = {}
        self._run = 0
        self._layout: Layout | None = None
        self._arrival: Callable[[int], list[torch.Tensor]] | None = None
        self._answers: dict[int, Any] = {}
        self._made: dict[int, Any] = {}

    def answer(self, unit: int) -> Any:
        """What the stand-in of an absent unit returns. Waits for it where it is on its way."""
        if unit not in self._answers:
            assert self._layout and self._arrival
            sender = self._layout.sender.get(unit)
            if sender is None:
                output = _output(self._layout, unit)
                device = self._links.device
                self._answers[unit] = _tree(output, [Unknown(_meta(*tensor), device) for tensor in output.tensors])
            else:
                self._answers |= _answers(self._layout, sender, self._arrival(sender))
        return self._answers[unit]

    def produced(self, unit: int, output: Any) -> None:
        """Called with every output of an own unit.

        Raises RuntimeError where it is not what was seen when the layout was traced.
        """
        assert self._layout
        seen = self._layout.outputs[unit]
        tensors = flatten(output)[1]
        if is_unknown(tensors):
            message = f"Unit {unit} of the denoiser reads more than when it was looked at."
            raise LeapfrogError.of("layout_changed", message)
        if seen is None or [tuple(t.shape) for t in tensors] != [tuple(shape) for _, shape in seen.tensors]:
            message = f"Unit {unit} of the denoiser returns other shapes than when it was looked at."
            raise LeapfrogError.of("layout_changed", message)
        for tensor, (dtype, _) in zip(tensors, seen.tensors, strict=True):
            if tensor.dtype != DTYPES[dtype]:
                here = str(tensor.dtype).removeprefix("torch.")
                raise LeapfrogError.of(
                    "mixed_devices", f"A rank computes in {here} on its device, but another one in {dtype} on its own."
                )
        leaves = unit != self._layout.last
        if any(unit in wanted for wanted in self._layout.sends.values()):
            # a copy where the forward goes on: it may add to the output in place (ControlNet, VACE) before it is sent
            self._made[unit] = [t.clone() for t in tensors] if leaves else tensors
        if unit == self._layout.last and not self._final:
            raise ComponentDone

    def learn(self, number: int, flow: Flow) -> None:
        """What travels for the layout of inputs that bears this number."""
        self._layouts[number] = Layout(flow, self._bounds, self._position)

    def evaluate(
        self, args: Any, kwargs: Any, layout: int, run: int, stream: int, exact: bool, extrapolate: bool, measure: bool
    ) -> tuple[Any, float]:
        """One evaluation: the denoiser's output on the last rank, None on the others; and the drift (see Evaluate).

        No state is kept for a negative ``stream``.
        """
        if run != self._run:
            self.settle()
            self._run = run
        self._layout = now = self._layouts[layout]
        state = self._streams.setdefault(stream, StreamState()) if stream >= 0 else StreamState()
        due = dict(state.coming)
        coming = {
            position: self._links.receive(self._peers[position], [t for u in units for t in _expected(now, u)])
            for position, units in now.receives.items()
        }
        state.coming = {} if exact else coming

        def arrive(position: int) -> None:
            """Wait for what that rank has sent."""
            for awaited in (due, coming) if exact else (due,):
                if position in awaited:
                    self._arrived(state, position, self._links.wait(awaited.pop(position)))

        def arrival(position: int) -> list[torch.Tensor]:
            """What the forward is to go on with of that."""
            arrive(position)
            if exact:
                latest = state.latest[position]
                # the forward may change in place (ControlNet) what the next step needs as it came
                return [t.clone() for t in latest] if stream >= 0 else latest
            return _continued(state, position) if extrapolate else state.latest[position]

        # Only where the forward gets to an absent unit does it wait: what comes before needs no other rank. If it fails
        # before, what is on its way is not awaited: the pool ends.
        self._arrival, self._answers, self._made = arrival, {}, {}
        result = None
        if now.last is not None or self._final:
            try:
                result = self._forward(*args, **kwargs)
            except ComponentDone:
                pass
            if is_unknown(result):
                raise LeapfrogError.of("layout_changed", "The denoiser's result reads more than when it was looked at.")
        for unit in {unit for wanted in now.sends.values() for unit in wanted} - self._made.keys():
            raise LeapfrogError.of("layout_changed", f"Unit {unit} of the denoiser ran when it was looked at.")
        for other, wanted in now.sends.items():
            self._links.send(self._peers[other], [t for u in wanted for t in _as_in_memory(now, u, self._made[u])])
        self._arrival, self._answers, self._made = None, {}, {}
        for position in {*due, *(coming if exact else ())}:
            arrive(position)
        drift = 0.0
        if measure:
            drift = max((_drift(state.latest[p], state.before.get(p)) for p in now.receives), default=0.0)
        if not extrapolate and not measure:
            state.before.clear()
        return result, drift

    @staticmethod
    def _arrived(state: StreamState, position: int, tensors: list[torch.Tensor]) -> None:
        if position in state.latest:
            state.before[position] = state.latest[position]
        state.latest[position] = tensors

    def settle(self) -> None:
        """Drop stale state, at the end of a run at the latest.

        What is still on its way was sent for sure, so it is awaited: gloo delivers nothing more between two ranks once
        somebody has let go of what he had asked for.
        """
        for state in self._streams.values():
            for incoming in state.coming.values():
                self._links.wait(incoming)
        self._streams.clear()


def _output(layout: Layout, unit: int) -> Output:
    output = layout.outputs[unit]
    if output is None:
        raise LeapfrogError.of("layout_changed", f"Unit {unit} of the denoiser did not run when it was looked at.")
    return output


def _as_in_memory(layout: Layout, unit: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """A unit's output with its dimensions in the order in which they travel."""
    return [t.permute(order) for t, order in zip(tensors, _output(layout, unit).orders, strict=True)]


def _expected(layout: Layout, unit: int) -> list[torch.Tensor]:
    return _as_in_memory(layout, unit, [_meta(*tensor) for tensor in _output(layout, unit).tensors])


def _meta(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def _tree(output: Output, tensors: list[torch.Tensor]) -> Any:
    return unflatten(output.spec, tensors)


def _answers(layout: Layout, position: int, arrived: list[torch.Tensor]) -> dict[int, Any]:
    """What the units of that position gave."""
    answers: dict[int, Any] = {}
    tensors = iter(arrived)
    for unit in layout.receives[position]:
        output = _output(layout, unit)
        answers[unit] = _tree(output, [next(tensors).permute(_inverse(order)) for order in output.orders])
    return answers


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _continued(state: StreamState, position: int) -> list[torch.Tensor]:
    """Stale states one step on: linear in the number of the evaluation, where two are known."""
    latest = state.latest[position]
    return [
        2 * new - old if new.is_floating_point() else new
        for new, old in zip(latest, state.before.get(position, latest), strict=True)
    ]


def _drift(new: list[torch.Tensor], old: list[torch.Tensor] | None) -> float:
    """Relative distance of the old states from the new ones, the largest of all tensors; 1 where there are none."""
    if old is None:
        return 1.0
    pairs = [(a.float(), b.float()) for a, b in zip(new, old, strict=True) if a.is_floating_point()]
    return max((float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in pairs), default=0.0)
