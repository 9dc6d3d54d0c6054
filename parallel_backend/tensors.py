"""Trees of plain values and tensors, and the shared memory that carries the tensors of a step from process to process.

A tree is a tensor, a plain scalar, or a list, tuple or dict of trees. It travels as a *spec* (plain lists, fit for
msgpack) plus one :class:`TensorHead` per tensor; the bytes lie in an :class:`Arena` that every rank has mapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import msgspec
import torch

ALIGN = 64
MAX_DEPTH = 16
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool complex64".split()
    )
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorHead(msgspec.Struct, frozen=True, array_like=True):
    """Where a contiguous tensor lies in an arena: dtype name, shape, offset in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def flatten(tree: Any, where: str = "value") -> tuple[Any, list[torch.Tensor]]:
    """``(spec, tensors)`` of a tree. Raises TypeError naming the place of a value that cannot travel."""
    tensors: list[torch.Tensor] = []

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return ["t", len(tensors) - 1]
        if value is None or isinstance(value, bool | int | float | str):
            return ["v", value]
        if isinstance(value, list | tuple):
            kind = "l" if isinstance(value, list) else "u"
            return [kind, [walk(item, f"{path}[{i}]") for i, item in enumerate(value)]]
        if isinstance(value, dict):
            return ["d", [[walk(k, path), walk(v, f"{path}[{k!r}]")] for k, v in value.items()]]
        if isinstance(value, torch.dtype):
            return ["y", _NAMES[value]]
        raise TypeError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which cannot travel to a rank"
        )

    return walk(tree, where), tensors


def unflatten(spec: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The tree of a spec. Raises ValueError for a malformed spec."""

    def walk(node: Any, depth: int) -> Any:
        if depth > MAX_DEPTH or not isinstance(node, list | tuple) or len(node) != 2:
            raise ValueError("malformed tree")
        kind, body = node
        if kind == "v":
            return body
        if kind == "t":
            if type(body) is not int or body < 0:
                raise ValueError("malformed tree")
            return tensors[body]
        if kind == "y":
            return DTYPES[body]
        if kind in ("l", "u"):
            items = [walk(item, depth + 1) for item in body]
            return items if kind == "l" else tuple(items)
        if kind == "d":
            return {walk(k, depth + 1): walk(v, depth + 1) for k, v in body}
        raise ValueError(f"unknown kind {kind!r} in a tree")

    try:
        return walk(spec, 0)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"malformed tree: {error!r}") from None


def place(tensors: Iterable[torch.Tensor], start: int = 0) -> tuple[list[TensorHead], int]:
    """Heads that lay the tensors out one after another from ``start``, and the first free byte after them."""
    heads, at = [], start
    for tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise TypeError(f"a {tensor.dtype} tensor cannot travel to a rank")
        at = -(-at // ALIGN) * ALIGN
        heads.append(TensorHead(_NAMES[tensor.dtype], tuple(tensor.shape), at))
        at += tensor.numel() * tensor.element_size()
    return heads, -(-at // ALIGN) * ALIGN


def slice_rows(head: TensorHead, rows: int, begin: int, end: int) -> TensorHead:
    """The head of rows ``[begin, end)`` of a tensor of ``rows`` rows; of the whole if it has another number of them."""
    if not head.shape or head.shape[0] != rows:
        return head
    row_bytes = head.nbytes // rows if rows else 0
    return TensorHead(head.dtype, (end - begin, *head.shape[1:]), head.offset + begin * row_bytes)


class Arena:
    """A shared memory segment. The host creates it and removes it; ranks attach by name."""

    def __init__(self, memory: shared_memory.SharedMemory, owner: bool):
        self._memory = memory
        self._owner = owner
        self.name = memory.name
        self.size = memory.size

    @classmethod
    def create(cls, size: int) -> Arena:
        return cls(shared_memory.SharedMemory(create=True, size=max(size, ALIGN)), owner=True)

    @classmethod
    def attach(cls, name: str) -> Arena:
        # A rank's resource tracker must not adopt the segment: it would remove the host's memory when the rank ends.
        register, resource_tracker.register = resource_tracker.register, lambda *_: None
        try:
            return cls(shared_memory.SharedMemory(name=name), owner=False)
        finally:
            resource_tracker.register = register

    def view(self, head: TensorHead) -> torch.Tensor:
        """The tensor in place, not copied. Drop it before :meth:`close`. Raises ValueError outside the segment."""
        if head.offset < 0 or min(head.shape, default=0) < 0 or head.offset + head.nbytes > self.size:
            raise ValueError("tensor lies outside the arena")
        dtype = DTYPES[head.dtype]
        if head.nbytes == 0:
            return torch.empty(head.shape, dtype=dtype)
        count = math.prod(head.shape)
        return torch.frombuffer(self._memory.buf, dtype=dtype, count=count, offset=head.offset).view(head.shape)

    def write(self, tensors: Sequence[torch.Tensor], heads: Sequence[TensorHead]) -> None:
        for tensor, head in zip(tensors, heads, strict=True):
            self.view(head).copy_(tensor)

    def close(self) -> None:
        try:
            self._memory.close()
        finally:
            if self._owner:
                self._memory.unlink()
