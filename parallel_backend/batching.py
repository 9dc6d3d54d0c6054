"""One denoiser call of several that are alike, and rows of a call: what of its inputs has rows and what has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .protocol import Payload
from .tensors import TensorHead, laid_out, slice_rows, unflatten

# Options whose tensors have no rows, whatever their first dimension is.
WHOLE = frozenset(("inside_patches", "sample_sigmas"))


@dataclass
class Rows:
    """The tree (args, kwargs) of a denoiser call with ``count`` rows, which stay together in groups of ``group``.

    ``alone``: something in the denoiser looks at one row for all, so that rows of another call must not be among them.
    """

    inputs: Any
    count: int
    group: int = 1
    alone: bool = False

    @property
    def chunks(self) -> list[int]:
        """Which conditioning each equal share of the rows belongs to."""
        return self.inputs[1].get("transformer_options", {}).get("cond_or_uncond") or [0]


def batched(calls: Sequence[Rows]) -> list[tuple[Rows, list[int]]]:
    """These calls as few as can be, each with the numbers of the given ones whose rows it has, in order.

    Calls are put together where they differ in nothing but the values of tensors that have rows. Raises LeapfrogError
    unsupported_patch for inputs that cannot travel.
    """
    if len(calls) == 1:
        return [(calls[0], [0])]
    found: list[_Alike] = []
    for number, call in enumerate(calls):
        spec, tensors, heads, _ = laid_out(call.inputs, "denoiser input")
        new = _Alike(call, spec, _spread(spec, [head.shape for head in heads], call), [number], [tensors])
        there = None if call.alone else next((one for one in found if one.takes(new)), None)
        if there is None:
            found.append(new)
        else:
            there.members += new.members
            there.tensors += new.tensors
    return [(one.together(), one.members) for one in found]


@dataclass
class _Alike:
    """Calls that can be one: the ``first``, its spec and which of its tensors have rows; all members' tensors."""

    first: Rows
    spec: Any
    spread: list[bool]
    members: list[int]
    tensors: list[list[torch.Tensor]]

    def takes(self, other: _Alike) -> bool:
        sizes = (self.first.count, self.first.group), (other.first.count, other.first.group)
        like = self.spec == other.spec and self.spread == other.spread and sizes[0] == sizes[1]
        return like and all(map(_same_but_for_rows, self.tensors[0], other.tensors[0], self.spread))

    def together(self) -> Rows:
        calls = len(self.members)
        if calls == 1:
            return self.first
        columns = zip(zip(*self.tensors, strict=True), self.spread, strict=True)
        merged = [torch.cat(column) if has_rows else column[0] for column, has_rows in columns]
        inputs = with_chunks(unflatten(self.spec, merged), self.first.chunks * calls)
        return Rows(inputs, self.first.count * calls, self.first.group)


def _spread(spec: Any, shapes: Sequence[tuple[int, ...]], call: Rows) -> list[bool]:
    """Which tensors have rows, or a row for each group."""
    whole = set(_tensors_under(spec, WHOLE))
    counts = (call.count, call.count // call.group)
    return [bool(shape) and shape[0] in counts and i not in whole for i, shape in enumerate(shapes)]


def _same_but_for_rows(tensor: torch.Tensor, other: torch.Tensor, spread: bool) -> bool:
    same = (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
    return same and (spread or tensor is other or torch.equal(tensor, other))


def rows_of(payload: Payload, call: Rows, shares: Sequence[tuple[int, int]]) -> list[Payload]:
    """The payload of ``call``, for each share ``[begin, end)`` of the rows with those and their chunks only."""
    spread = _spread(payload.spec, [head.shape for head in payload.heads], call)
    chunks = call.chunks

    def of(begin: int, end: int) -> Payload:
        def cut(head: TensorHead) -> TensorHead:
            per = call.count // head.shape[0]
            return slice_rows(head, begin // per, end // per)

        heads = [cut(head) if has_rows else head for head, has_rows in zip(payload.heads, spread, strict=True)]
        own = chunks[begin * len(chunks) // call.count : -(-end * len(chunks) // call.count)]
        return Payload(payload.arena, _naming(payload.spec, own), heads)

    return [of(begin, end) for begin, end in shares]


def with_chunks(inputs: Any, chunks: Sequence[int]) -> Any:
    """The inputs with other chunks named; their tensors stay as they are."""
    args, kwargs = inputs
    options = kwargs.get("transformer_options")
    if not options or "cond_or_uncond" not in options:
        return inputs
    return args, {**kwargs, "transformer_options": {**options, "cond_or_uncond": list(chunks)}}


def _naming(spec: Any, chunks: Sequence[int]) -> Any:
    """As :func:`with_chunks`, for the spec of inputs, which is quicker than to make another one."""

    def changed(node: Any, key: str, change: Callable[[Any], Any]) -> Any:
        kind, body = node
        return [kind, [[k, change(value) if k == ["v", key] else value] for k, value in body]] if kind == "d" else node

    def renamed(options: Any) -> Any:
        return changed(options, "cond_or_uncond", lambda _: ["l", [["v", chunk] for chunk in chunks]])

    kind, (args, kwargs) = spec
    return [kind, [args, changed(kwargs, "transformer_options", renamed)]]


def _tensors_under(node: Any, keys: frozenset[str], inside: bool = False) -> Iterator[int]:
    """Numbers of a spec's tensors below dict entries with these keys."""
    kind, body = node
    if kind == "t" and inside:
        yield body
    elif kind in ("l", "u"):
        for item in body:
            yield from _tensors_under(item, keys, inside)
    elif kind == "d":
        for key, value in body:
            yield from _tensors_under(value, keys, inside or key[1] in keys)
