"""Trees of plain values and tensors, and the shared memory that carries the tensors of a step from process to process.

A tree is a tensor, a plain scalar, or a list, tuple or dict of trees. It travels as a *spec* (plain lists, fit for
msgpack) plus one :class:`TensorHead` per tensor; the bytes lie in an :class:`Arena` that every rank has mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from multiprocessing import resource_tracker, shared_memory
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args

import msgspec
import torch

from .errors import LeapfrogError

ALIGN = 64
MAX_DEPTH = 16
MAX_DIMS = 16
MAX_ELEMENTS = 1 << 48
DtypeName = Literal[
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint8", "bool", "complex64",
]  # fmt: skip
Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_ELEMENTS)]
Shape = Annotated[tuple[Bytes, ...], msgspec.Meta(max_length=MAX_DIMS)]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(DtypeName)}
DTYPE_NAMES: dict[torch.dtype, Any] = {dtype: name for name, dtype in DTYPES.items()}


class TensorHead(msgspec.Struct, frozen=True, array_like=True):
    """Where a contiguous tensor lies in an arena: dtype name, shape, offset in bytes."""

    dtype: DtypeName
    shape: Shape
    offset: Bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def flatten(tree: Any, where: str = "value") -> tuple[Any, list[torch.Tensor]]:
    """``(spec, tensors)`` of a tree. Raises TypeError naming the place of a value that cannot travel."""
    tensors: list[torch.Tensor] = []

    def walk(value: Any, path: str, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise TypeError(f"{where} nests deeper than {MAX_DEPTH} levels, so it cannot travel to a rank")
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return ["t", len(tensors) - 1]
        if value is None or isinstance(value, bool | int | float | str):
            return ["v", value]
        if isinstance(value, list | tuple):
            kind = "l" if isinstance(value, list) else "u"
            return [kind, [walk(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]]
        if isinstance(value, dict):
            return ["d", [[walk(k, path, depth + 1), walk(v, f"{path}[{k!r}]", depth + 1)] for k, v in value.items()]]
        if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
            return ["y", DTYPE_NAMES[value]]
        raise TypeError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which cannot travel to a rank"
        )

    return walk(tree, where), tensors


def unflatten(spec: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The tree of a spec. Raises ValueError for a malformed spec."""
    rest = iter(range(len(tensors)))

    def walk(node: Any, depth: int) -> Any:
        if depth > MAX_DEPTH or not isinstance(node, list | tuple) or len(node) != 2:
            raise ValueError("malformed tree")
        kind, body = node
        if kind == "v" and (body is None or isinstance(body, bool | int | float | str)):
            return body
        if kind == "y":
            return DTYPES[body]
        if kind in ("l", "u") and isinstance(body, list | tuple):
            items = [walk(item, depth + 1) for item in body]
            return items if kind == "l" else tuple(items)
        if kind == "d":
            return {walk(k, depth + 1): walk(v, depth + 1) for k, v in body}
        # each tensor once, in turn, as flatten numbers them: what is made of a tree is no larger than its tensors
        if kind == "t" and type(body) is int and body == next(rest, None):
            return tensors[body]
        raise ValueError("malformed tree")

    try:
        return walk(spec, 0)
    except (KeyError, TypeError):
        raise ValueError("malformed tree") from None


def place(tensors: Iterable[torch.Tensor], start: int = 0) -> tuple[list[TensorHead], int]:
    """Heads that lay the tensors out one after another from ``start``, and the first free byte after them."""
    heads, at = [], start
    for tensor in tensors:
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"a {tensor.dtype} tensor cannot travel to a rank")
        at = -(-at // ALIGN) * ALIGN
        heads.append(TensorHead(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), at))
        at += tensor.numel() * tensor.element_size()
    return heads, -(-at // ALIGN) * ALIGN


def laid_out(tree: Any, where: str) -> tuple[Any, list[torch.Tensor], list[TensorHead], int]:
    """A tree as it is sent to a rank: its spec, tensors, their heads from byte 0, and the first free byte after them.

    Raises LeapfrogError unsupported_patch, with the place in the tree, for a value that cannot travel.
    """
    try:
        spec, tensors = flatten(tree, where)
        return spec, tensors, *place(tensors)
    except TypeError as error:
        raise LeapfrogError.of("unsupported_patch", f"{error}.") from None


def slice_rows(head: TensorHead, begin: int, end: int) -> TensorHead:
    """The head of a tensor's rows ``[begin, end)``."""
    row_bytes = head.nbytes // max(1, head.shape[0])
    return TensorHead(head.dtype, (end - begin, *head.shape[1:]), head.offset + begin * row_bytes)


def _claim(memory: shared_memory.SharedMemory) -> None:
    """Take a segment's memory now: where there is none left, the first write to it would end the process (SIGBUS)."""
    if sys.platform != "linux":
        return
    try:
        os.posix_fallocate(memory._fd, 0, memory.size)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise


def trim_heap() -> None:
    """Give freed memory that the C library keeps back to the system: each thread of a run leaves some. glibc only."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


class Arena:
    """A shared memory segment. The host creates it and removes it; ranks attach by name."""

    def __init__(self, memory: Any, owner: bool):
        self._memory = memory
        self._owner = owner
        self.name = memory.name
        self.size = memory.size

    @classmethod
    def create(cls, size: int) -> Arena:
        """A new segment. Raises LeapfrogError no_shared_memory where less than that is left to have."""
        made = None
        try:
            made = cls(shared_memory.SharedMemory(create=True, size=max(size, ALIGN)), owner=True)
            _claim(made._memory)
        except OSError:
            if made:
                made.close()
            raise LeapfrogError.of("no_shared_memory", f"{size / 1e6:.0f} MB of shared memory cannot be had.") from None
        return made

    @classmethod
    def attach(cls, name: str) -> Arena:
        # A rank's resource tracker must not adopt the segment: it would remove the host's memory when the rank ends.
        register, resource_tracker.register = resource_tracker.register, lambda *_: None
        try:
            return cls(shared_memory.SharedMemory(name=name), owner=False)
        finally:
            resource_tracker.register = register

    @classmethod
    def alone(cls, name: str, size: int) -> Arena:
        """One that no other process has. What nobody writes to takes no memory; all goes with the last view."""
        buffer = memoryview(mmap.mmap(-1, max(size, ALIGN)))
        memory = SimpleNamespace(name=name, size=len(buffer), buf=buffer, close=lambda: None)
        return cls(memory, owner=False)

    def raw(self, head: TensorHead) -> memoryview:
        """A tensor's bytes in place. Release it before :meth:`close`. Errors as in :meth:`view`."""
        self.view(head)
        return self._memory.buf[head.offset : head.offset + head.nbytes]

    def view(self, head: TensorHead) -> torch.Tensor:
        """The tensor in place, not copied. Drop it before :meth:`close`. Raises ValueError outside the segment."""
        dtype = DTYPES.get(head.dtype)
        if dtype is None or len(head.shape) > MAX_DIMS or math.prod(max(1, size) for size in head.shape) > MAX_ELEMENTS:
            raise ValueError("no tensor can be like that")
        if head.offset < 0 or min(head.shape, default=0) < 0 or head.offset + head.nbytes > self.size:
            raise ValueError("tensor lies outside the arena")
        if head.offset % dtype.itemsize:
            raise ValueError("tensor lies across its elements")
        if head.nbytes == 0:
            return torch.empty(head.shape, dtype=dtype)
        count = math.prod(head.shape)
        return torch.frombuffer(self._memory.buf, dtype=dtype, count=count, offset=head.offset).view(head.shape)

    def tree(self, spec: Any, heads: Sequence[TensorHead], copy: bool = False) -> Any:
        """The tree of a spec, its tensors in place as in :meth:`view`, or copies of them.

        Raises ValueError where either is malformed, or where the tensors together are larger than the segment.
        """
        views = [self.view(head) for head in heads]
        if sum(head.nbytes for head in heads) > self.size:
            raise ValueError("tensors lie on each other")
        return unflatten(spec, [view.clone() for view in views] if copy else views)

    def write(self, tensors: Sequence[torch.Tensor], heads: Sequence[TensorHead]) -> None:
        for tensor, head in zip(tensors, heads, strict=True):
            self.view(head).copy_(tensor)

    def close(self) -> None:
        try:
            self._memory.close()
        finally:
            if self._owner:
                self._remove()

    def _remove(self) -> None:
        try:
            self._memory.unlink()
        except FileNotFoundError:
            # Python removes a segment that a process could not map, which happens to a rank without memory
            resource_tracker.unregister(f"/{self.name}", "shared_memory")
