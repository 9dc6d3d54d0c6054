"""What `make fuzz` starts from, messages as they are in a run, and what a message may hold once it is decoded."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from leapfrog.parallel_backend import protocol
from leapfrog.parallel_backend.errors import HINTS, ErrorReport
from leapfrog.parallel_backend.tensors import DTYPES, TensorHead
from leapfrog.parallel_backend.units import Flow, Output

SECRET = "ab" * 32
PAYLOAD = protocol.Payload(
    "psm_1a2b",
    [
        "u",
        [
            ["u", [["t", 0], ["t", 1]]],
            ["d", [[["v", "context"], ["t", 2]], [["v", "n"], ["l", [["v", 1], ["y", "bool"]]]]]],
        ],
    ],
    [TensorHead("float32", (2, 4, 8, 8), 0), TensorHead("float32", (2,), 2048), TensorHead("bfloat16", (2, 77), 2112)],
)
RECIPE = protocol.Recipe("diffusion_model", "/m.safetensors", '["d", [[["v", "dtype"], ["y", "float16"]]]]', (5, 7))
FLOW = Flow([[], [0], [0, 1]], [2], [Output(["t", 0], [("float32", (2, 3))], [(1, 0)]), None, Output(["v", None], [])])

FROM_HOST = [
    protocol.Join(1, store_port=4),
    protocol.Trace(2, RECIPE, PAYLOAD, ["a", "b"], 3, {"img_in.weight": (4, 8)}, True),
    protocol.Load(3, RECIPE, protocol.Cut(["a", "b"], [(0, 0), (1, 1)]), [0, 1], PAYLOAD, "id"),
    protocol.Evaluate(4, PAYLOAD, 4096, 64, 9, 1, 2, FLOW, False, True, True),
    protocol.Echo(5, PAYLOAD, 1, 2), protocol.Unload(6), protocol.Stop(7),
    protocol.Release(8, ["psm_x", "psm_y"], True), protocol.Probe(9, 0, 1, [1024, 1 << 20], [50, 5]), protocol.Room(10),
]  # fmt: skip
FROM_RANK = [
    protocol.Hello(0, 3), protocol.Ready(1), protocol.Loaded(3, 9, 1, ["a"]), protocol.Ok(6),
    protocol.Traced(2, [protocol.UnitTrace(name, 0.5, 8) for name in "abc"], FLOW, 0.1, 0.2, 3, "cpu"),
    protocol.Done(4, PAYLOAD, 1.0, 2.0, 0.5, 7, 0.25),
    protocol.Failed(5, ErrorReport("rank_oom", "no", 1, 2, "here")), protocol.Probed(9, [1e-4, 2e-3], True),
    protocol.Vacancy(10, 11),
]  # fmt: skip
ORDERS = protocol.LaunchSpec(1, 2, "b/cpu", "gloo", 1, 4711, SECRET, "/comfy", ["--cpu"], 600.0, "10.0.0.1", "10.0.0.2")
FROM_JOINER = [
    protocol.Offer("b", "cuda:0", {"PyTorch": "2.11.0"}), protocol.Beat(True), protocol.Said(30, "a line"),
    protocol.Gone(-9, "was ended by SIGKILL"),
]  # fmt: skip


class Accepted(Exception):
    """A frame got what it must not."""


def require(truth: bool) -> None:
    if not truth:
        raise Accepted


def in_order(message: Any) -> None:
    """Raises Accepted for a decoded message that holds what the rest of the backend is not made for."""

    def walk(value: Any) -> None:
        if isinstance(value, TensorHead):
            require(value.dtype in DTYPES and value.offset >= 0 and len(value.shape) <= 16)
            require(all(0 <= size <= 2**48 for size in value.shape))
        elif isinstance(value, Flow):
            units = range(len(value.reads))
            require(len(value.outputs) == len(units))
            require(all(unit in units for read in (*value.reads, value.head) for unit in read))
        elif isinstance(value, ErrorReport):
            require(value.code in HINTS)
        elif isinstance(value, protocol.Payload):
            require(0 < len(value.arena) <= 64 and "/" not in value.arena)
        elif isinstance(value, protocol.UnitTrace | protocol.Done | protocol.Loaded):
            numbers = [getattr(value, n) for n in ("seconds", "begin", "end", "nbytes", "sent") if hasattr(value, n)]
            require(all(0 <= number < math.inf for number in numbers))
        elif isinstance(value, protocol.Said):
            require(0 <= value.level <= 100 and len(value.text) <= 1 << 14)
        if isinstance(value, msgspec.Struct):
            for name in value.__struct_fields__:
                walk(getattr(value, name))
        elif isinstance(value, list) and value and isinstance(value[0], msgspec.Struct):
            for one in value:
                walk(one)

    walk(message)
