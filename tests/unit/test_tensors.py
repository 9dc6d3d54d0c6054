"""What crosses to a rank: trees, heads, shared memory."""

from __future__ import annotations

import errno
import math
import os
import platform
import sys
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend import LeapfrogError
from leapfrog.parallel_backend.tensors import (
    ALIGN,
    DTYPES,
    Arena,
    TensorHead,
    flatten,
    place,
    slice_rows,
    trim_heap,
    unflatten,
)

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8)
)
KEYS = st.text(max_size=5) | st.integers(0, 99) | st.tuples(st.text(max_size=3), st.integers(0, 9))
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    return torch.arange(math.prod(shape := draw(SHAPES))).to(dtype).reshape(shape)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        some = st.lists(inner, max_size=3)
        return some | some.map(tuple) | st.dictionaries(KEYS, inner, max_size=3)

    return st.recursive(leaves, deeper, max_leaves=12)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(4096)
    yield made
    made.close()


@given(nested(SCALARS | st.sampled_from(list(DTYPES.values()))))
def test_a_tree_comes_back_as_it_was_sent(tree: Any):
    spec, found = flatten(tree)
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(spec))
    assert same(unflatten(travelled, found), tree)


@given(st.lists(tensors(), max_size=5))
def test_tensors_come_back_from_shared_memory(sent: list[torch.Tensor]):
    spec, found = flatten({"all": sent})
    heads, end = place(found, 128)
    arena = Arena.create(end)
    try:
        arena.write(found, heads)
        other = Arena.attach(arena.name)
        assert same(unflatten(spec, [other.view(head).clone() for head in heads]), {"all": sent})
        other.close()
    finally:
        arena.close()


@given(st.lists(tensors(), max_size=6), st.integers(0, 300))
def test_tensors_are_laid_out_aligned_and_apart(found: list[torch.Tensor], start: int):
    heads, end = place(found, start)
    at = start
    for head, tensor in zip(heads, found, strict=True):
        assert head.offset % ALIGN == 0
        assert head.offset >= at
        assert head.nbytes == tensor.numel() * tensor.element_size()
        at = head.offset + head.nbytes
    assert end >= at
    assert end % ALIGN == 0


@given(st.data(), st.integers(1, 6), SHAPES)
def test_rows_of_a_head_are_rows_of_the_tensor(data: st.DataObject, rows: int, rest: tuple[int, ...]):
    begin = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(begin, rows))
    tensor = torch.randn(rows, *rest)
    (head,), size = place([tensor])
    arena = Arena.create(size)
    try:
        arena.write([tensor], [head])
        assert torch.equal(arena.view(slice_rows(head, begin, end)), tensor[begin:end])
    finally:
        arena.close()


@pytest.mark.parametrize(
    "head",
    [
        TensorHead("float32", (1025,), 0),
        TensorHead("float32", (1,), 4093),
        TensorHead("float32", (1,), -4),
        TensorHead("float32", (-1, -1), 0),
        TensorHead("float32", (-4,), 4096),
        TensorHead("int64", (2**20, 2**20), 0),
        TensorHead("uint8", (0,), 4097),
    ],
)
def test_a_head_outside_the_arena_is_refused(arena: Arena, head: TensorHead):
    with pytest.raises(ValueError, match="outside the arena"):
        arena.view(head)


HUGE: Any = 2**40


@pytest.mark.parametrize(
    "head",
    [
        TensorHead("float32", (HUGE, HUGE), 0),
        TensorHead("float32", (0, HUGE, HUGE), 0),
        TensorHead("float32", (1,) * 17, 0),
        TensorHead("float32", (1,), 2),
        TensorHead("complex128", (1,), 0),  # type: ignore[arg-type]
    ],
    ids=["large", "large and empty", "dimensions", "across", "dtype"],
)
def test_a_head_of_no_tensor_is_refused(arena: Arena, head: TensorHead):
    with pytest.raises(ValueError, match="tensor"):
        arena.view(head)


def test_tensors_on_each_other_are_refused(arena: Arena):
    heads = [TensorHead("uint8", (1024,), 64)] * 5
    with pytest.raises(ValueError, match="on each other"):
        arena.tree(["l", [["t", i] for i in range(5)]], heads)


def test_a_copy_of_a_tree_stays_as_it_was(arena: Arena):
    head = TensorHead("uint8", (4,), 64)
    arena.view(head).fill_(1)
    in_place, copied = arena.tree(["t", 0], [head]), arena.tree(["t", 0], [head], copy=True)
    arena.view(head).fill_(2)
    assert (in_place.tolist(), copied.tolist()) == ([2] * 4, [1] * 4)


def test_an_arena_leaves_nothing_behind():
    arena = Arena.create(64)
    arena.close()
    with pytest.raises(FileNotFoundError):
        Arena.attach(arena.name)


def test_a_rank_that_lets_go_leaves_the_hosts_memory_alone(arena: Arena):
    Arena.attach(arena.name).close()
    Arena.attach(arena.name).close()


JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner))
NODES = st.lists(st.sampled_from(["t", "v", "l", "u", "d", "y", "x"]) | JSON | st.lists(JSON, max_size=3), max_size=3)


@given(JSON | NODES | st.lists(NODES, max_size=3))
def test_a_malformed_tree_raises_nothing_but_value_error(spec: Any):
    try:
        unflatten(spec, [torch.zeros(1)])
    except ValueError:
        pass


@pytest.mark.parametrize(
    "spec",
    [
        None, "t", [], ["t"], ["z", 1], ["t", 1], ["t", -1], ["t", "0"], ["t", False], ["l", 3], ["u", None], ["d", 3],
        ["d", [["v", 1]]], ["d", [[["l", []], ["v", 1]]]], ["y", "float128"], ["y", []], [["t"], 0],
        ["v", []], ["v", b""], ["l", "ab"], ["l", [["t", 0], ["t", 0]]],
    ],
)  # fmt: skip
def test_a_malformed_tree_is_refused(spec: Any):
    with pytest.raises(ValueError, match="tree"):
        unflatten(spec, [torch.zeros(1)])


def test_a_tree_that_nests_for_ever_is_refused():
    spec: Any = ["v", 1]
    for _ in range(200):
        spec = ["l", [spec]]
    with pytest.raises(ValueError, match="malformed"):
        unflatten(spec, [])


def test_what_nests_too_deeply_cannot_travel():
    inside_itself: list[Any] = []
    inside_itself.append(inside_itself)
    with pytest.raises(TypeError, match="options nests deeper than 16"):
        flatten(inside_itself, "options")


def test_what_cannot_travel_is_named_with_its_place():
    with pytest.raises(TypeError, match=r"options\['a'\]\[1\] is a builtins\.object"):
        flatten({"a": [1, object()]}, "options")
    with pytest.raises(TypeError, match=r"options\['a'\] is a torch\.dtype"):
        flatten({"a": torch.complex128}, "options")
    with pytest.raises(TypeError, match="complex128"):
        place([torch.zeros(1, dtype=torch.complex128)])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere shared memory is no file system that can be full")
def test_a_full_dev_shm_is_an_error_and_no_bus_error(monkeypatch: pytest.MonkeyPatch):
    segments = []

    def full(file: int, _offset: int, size: int) -> None:
        segments.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        raise OSError(errno.ENOSPC if size > 64 else errno.EOPNOTSUPP, "")

    monkeypatch.setattr(os, "posix_fallocate", full)
    Arena.create(64).close()
    with pytest.raises(LeapfrogError, match="shared memory cannot be had") as caught:
        Arena.create(1 << 20)
    assert caught.value.report.code == "no_shared_memory"
    assert [segment.exists() for segment in segments] == [False, False]


def test_a_segment_that_cannot_be_made_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch):
    def refused(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/psm_1")

    monkeypatch.setattr(shared_memory, "SharedMemory", refused)
    with pytest.raises(LeapfrogError) as caught:
        Arena.create(64)
    assert caught.value.report.code == "no_shared_memory"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs shared memory that is a file")
def test_a_segment_that_is_gone_is_closed_like_any_other():
    """Python removes it when a rank has no memory to map it, and the error of that rank is the one to be told."""
    arena = Arena.create(64)
    Path("/dev/shm", arena.name).unlink()
    arena.close()
    assert not Path("/dev/shm", arena.name).exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_goes_back_to_the_system():
    blocks = [torch.ones(16_000) for _ in range(4000)]  # small enough to come from the heap, not from a mapping
    kept = blocks[::40]  # which keep what is freed between them from going back by itself
    del blocks
    before = psutil.Process().memory_info().rss
    trim_heap()
    assert psutil.Process().memory_info().rss < before - 100_000_000
    assert len(kept) == 100
