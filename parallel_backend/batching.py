"""One denoiser call of several that are alike, and rows of a call: what of its inputs has rows and what has none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .protocol import Payload
from .tensors import TensorHead, flatten, slice_rows, unflatten

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

    Calls are put together where they differ in nothing but the values of tensors that have rows.
    """
    found: list[tuple[list[int], Rows, Any, list[torch.Tensor], list[bool]]] = []
    for number, call in enumerate(calls):
        spec, tensors = flatten(call.inputs, "denoiser input")
        spread = _spread(spec, [tuple(tensor.shape) for tensor in tensors], call)
        for members, first, its_spec, its_tensors, its_spread in found:
            like = spec == its_spec and spread == its_spread and (call.count, call.group) == (first.count, first.group)
            if like and not call.alone and all(map(_alike, tensors, its_tensors, spread)):
                members.append(number)
                break
        else:
            found.append(([number], call, spec, tensors, spread))
    return [(_together([calls[i] for i in members], spread), members) for members, *_, spread in found]


def _spread(spec: Any, shapes: Sequence[tuple[int, ...]], call: Rows) -> list[bool]:
    """Which tensors have rows, or a row for each group."""
    whole = set(_tensors_under(spec, WHOLE))
    counts = (call.count, call.count // call.group)
    return [bool(shape) and shape[0] in counts and i not in whole for i, shape in enumerate(shapes)]


def _alike(tensor: torch.Tensor, other: torch.Tensor, spread: bool) -> bool:
    same = (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
    return same and (spread or tensor is other or torch.equal(tensor, other))


def _together(calls: Sequence[Rows], spread: Sequence[bool]) -> Rows:
    first = calls[0]
    if len(calls) == 1:
        return first
    columns = zip(*(flatten(call.inputs)[1] for call in calls), strict=True)
    merged = [torch.cat(column) if has_rows else column[0] for column, has_rows in zip(columns, spread, strict=True)]
    inputs = with_chunks(unflatten(flatten(first.inputs)[0], merged), first.chunks * len(calls))
    return Rows(inputs, first.count * len(calls), first.group)


def rows_of(payload: Payload, inputs: Any, call: Rows, begin: int, end: int) -> Payload:
    """The payload of ``call`` with rows ``[begin, end)`` only, for ``inputs`` that have the same tensors."""
    spec, _ = flatten(inputs, "denoiser input")
    spread = _spread(spec, [head.shape for head in payload.heads], call)

    def cut(head: TensorHead) -> TensorHead:
        per = call.count // head.shape[0]
        return slice_rows(head, head.shape[0], begin // per, end // per)

    heads = [cut(head) if has_rows else head for head, has_rows in zip(payload.heads, spread, strict=True)]
    return Payload(payload.arena, spec, heads)


def with_chunks(inputs: Any, chunks: Sequence[int]) -> Any:
    """The inputs for some of the chunks: their tensors are cut elsewhere, this is what names the chunks."""
    args, kwargs = inputs
    options = kwargs.get("transformer_options")
    if not options or "cond_or_uncond" not in options:
        return inputs
    return args, {**kwargs, "transformer_options": {**options, "cond_or_uncond": list(chunks)}}


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
