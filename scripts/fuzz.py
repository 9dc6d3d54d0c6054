"""Malformed frames, thrown at every listener and parser of the backend: `make fuzz`.

    python scripts/fuzz.py --frames 1000000 --seed 1

Every frame is made by a generator with a seed, so the same command throws the same ones. What they hit:

    door         callers at the listener of a pool: garbage, parts of a proof, replays, wrong ranks, hang-ups, silence
    knock        answers to a rank that knocks: garbage, wrong proofs
    host, rank   a channel's two ends: announced lengths, msgpack garbage, mutated messages of every type
    line         the same at the host's end of the line to another machine's joiner
    tree         specs and heads of tensors in shared memory
    orders       the line that starts a rank, and the options of a recipe
    description  the functions inside the denoiser that a call names

A crash is an exception that the parser does not document, or a frame that keeps it for ever. Accepted is a frame that
gets what it must not: in without a proof, a message with a number out of its bounds, memory outside of the segment, a
function that is not ComfyUI's own. A mutated frame may still be well formed; those are counted apart. Allocation is
Python's own (tracemalloc), the peak of one frame; its bound is 256 KiB and 80 times the frame's length. For
what tracemalloc does not see, the process gets 2 GiB of address space over what it has at the start.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import math
import random
import socket
import struct
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import msgspec

from pack import add_comfyui, comfyui_dir, load_pack

add_comfyui()
load_pack()

import torch  # noqa: E402
from torch.overrides import get_overridable_functions  # noqa: E402

from leapfrog.parallel_backend import channel, protocol  # noqa: E402
from leapfrog.parallel_backend.channel import Channel, Door  # noqa: E402
from leapfrog.parallel_backend.errors import HINTS, ErrorReport  # noqa: E402
from leapfrog.parallel_backend.tensors import DTYPES, Arena, TensorHead, flatten, place, unflatten  # noqa: E402
from leapfrog.parallel_backend.units import Flow, Output  # noqa: E402
from leapfrog.parallel_backend.worker.models import inside_patches  # noqa: E402

SECRET = "ab" * 32
TENSOR_FUNCTIONS = get_overridable_functions()[torch]
WORLD = 4
HARD = struct.pack("ii", 1, 0)  # hangs up without a good-bye
ALLOWED = 256 << 10
PER_BYTE = 80
STUCK_S = 120.0
ADDRESS_SPACE = 2 << 30
ROUND = 500  # frames between two proofs that the good are still let in

NUMBERS = (0, 1, -1, 2, 7, 16, 17, 255, 65535, 65536, 2**31, -(2**31), 2**32 - 1, 2**48, 2**63 - 1, -(2**63), 2**64 - 1)
WORDS = (
    "",
    "v",
    "t",
    "l",
    "u",
    "d",
    "y",
    "float32",
    "float128",
    "object",
    "rank_oom",
    "psm_1",
    "../x",
    "/etc/x",
    "é\n",
)
MODULES = ("os", "subprocess", "builtins", "torch", "torch.hub", "sys", "comfy.utils", "comfy.sd", "comfy..os", "comfy",
           "comfy_extras.nodes_freelunch", "custom_nodes.x", "comfy/../os", "folder_paths", "posix")  # fmt: skip
NAMES = ("system", "Popen", "eval", "exec", "load_torch_file", "os.system", "torch.load", "load", "from_file", "gather",
         "import_ir_module", "set_num_threads", "cat", "__builtins__", "FreeU.patch", "Fourier_filter", "save",
         "logging", "Path", "CallbacksMP", "ProgressBar")  # fmt: skip
OTHERS = (None, True, False, 0.5, math.nan, math.inf, -1.0, 1e300, b"", b"x" * 40)
SCALARS: tuple[Any, ...] = (*NUMBERS, *WORDS, *MODULES, *NAMES, *OTHERS)


class Accepted(Exception):
    """A frame got what it must not."""


class Mutator:
    """Malformed values and bytes from a seeded generator."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def junk(self) -> Any:
        """A value that does not belong there."""
        rng = self.rng
        kind = rng.randrange(12)
        if kind < 8:
            return rng.choice(SCALARS)
        if kind == 8:
            return [rng.choice(SCALARS)] * rng.choice((0, 1, 3, 17, 300))
        if kind == 9:
            return {rng.choice(WORDS): rng.choice(SCALARS) for _ in range(3)}
        if kind == 10:
            return rng.choice(WORDS) * rng.choice((1, 70, 2000))
        value: Any = rng.choice(SCALARS)
        for _ in range(rng.choice((2, 15, 17, 200))):
            value = [rng.choice("lu"), [value]] if rng.random() < 0.5 else [value]
        return value

    def value(self, value: Any) -> Any:
        """A copy of nested lists and dicts with one to three places changed."""
        copy = json_copy(value)
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            copy = self._change(copy)
        return copy

    def _change(self, value: Any) -> Any:
        rng = self.rng
        if not value or not isinstance(value, list | dict) or rng.random() < 0.15:
            return self.junk()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        how = rng.randrange(10)
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(value, list):
            value.insert(key, json_copy(rng.choice(value)))
        elif how == 2 and isinstance(value, dict):
            value[rng.choice(WORDS)] = self.junk()
        else:
            value[key] = self._change(value[key])
        return value

    def bytes(self, body: bytes) -> bytes:
        """A copy with bits, bytes or slices changed; or cut, doubled, or nothing like it."""
        rng = self.rng
        made = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            at = rng.randrange(len(made) + 1)
            how = rng.randrange(7)
            if how == 0 and at < len(made):
                made[at] ^= 1 << rng.randrange(8)
            elif how == 1 and at < len(made):
                made[at] = rng.choice(
                    (0x80, 0x8F, 0x90, 0x9F, 0xC0, 0xC1, 0xC6, 0xC9, 0xCF, 0xD3, 0xDB, 0xDD, 0xDF, 0xFF)
                )
            elif how == 2:
                del made[at : at + rng.randrange(1, 9)]
            elif how == 3:
                made[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif how == 4:
                made[at:at] = made[rng.randrange(len(made) + 1) :][:64]
            elif how == 5:
                del made[at:]
            else:
                made[at : at + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xdd\xff\xff\xff", b"\x00\x00")
                )
        return bytes(made)

    def garbage(self) -> bytes:
        rng = self.rng
        kind = rng.randrange(8)
        if kind == 0:
            return bytes([rng.choice((0x80, 0x90, 0x91, 0x92, 0xC0, 0xDD))]) * rng.choice((1, 40, 900, 20_000))
        if kind == 1:
            return rng.choice(
                (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-x\r\n", b"\x80\x04\x95.")
            )
        return rng.randbytes(rng.choice((0, 1, 2, 3, 4, 5, 8, 31, 66, 98, 300)))


def json_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_copy(one) for key, one in value.items()}
    return [json_copy(one) for one in value] if isinstance(value, list | tuple) else value


# Messages as they are in a run, one of each type at least.

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
    protocol.Trace(2, RECIPE, PAYLOAD, ["a", "b"], 3, {"img_in.weight": (4, 8)}),
    protocol.Load(3, RECIPE, protocol.Cut(["a", "b"], [(0, 0), (1, 1)]), [0, 1], PAYLOAD, "id"),
    protocol.Evaluate(4, PAYLOAD, 4096, 64, 9, 1, 2, FLOW, False, True, True),
    protocol.Echo(5, PAYLOAD, 1, 2), protocol.Unload(6), protocol.Stop(7),
]  # fmt: skip
FROM_RANK = [
    protocol.Hello(0, 3), protocol.Ready(1, 5), protocol.Loaded(3, 9, 1, ["a"], 0.25), protocol.Ok(6),
    protocol.Traced(2, [protocol.UnitTrace(name, 0.5, 8) for name in "abc"], FLOW, 0.1, 0.2, 3, None, "cpu"),
    protocol.Done(4, PAYLOAD, 1.0, 2.0, 0.5, 7, 0.25),
    protocol.Failed(5, ErrorReport("rank_oom", "no", 1, 2, "here")),
]  # fmt: skip
ORDERS = protocol.LaunchSpec(1, 2, "b/cpu", "gloo", 1, 4711, SECRET, "/comfy", ["--cpu"], 600.0, "10.0.0.1", "10.0.0.2")
FROM_JOINER = [
    protocol.Offer("b", "cuda:0", {"PyTorch": "2.11.0"}), protocol.Beat(True), protocol.Said(30, "a line"),
    protocol.Gone(-9, "was ended by SIGKILL"),
]  # fmt: skip


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


def require(truth: bool) -> None:
    if not truth:
        raise Accepted


Throw = Callable[[], tuple[int, bool]]
"""Throws one frame; its length in bytes, and whether it was well formed after all."""


# Throws a frame each time it is asked for the next: its length, and whether it was still well formed.
Frames = Generator[tuple[int, bool], None, None]


def at_the_door(mutator: Mutator) -> Frames:
    rng = mutator.rng
    while True:
        with Door(SECRET, WORLD) as door, ThreadPoolExecutor(1) as thread:
            let_in(door, 0, thread)
            silent: list[socket.socket] = []
            for _ in range(ROUND):
                stranger = socket.create_connection((channel.LOOPBACK, door.port), 10)
                kind = rng.randrange(5)
                claim = rng.randbytes(32) + rng.randrange(WORLD).to_bytes(2, "big")
                said = claim + channel._proof(SECRET, b"rank", rng.randbytes(32), claim)  # of another connection
                if kind == 0:
                    said = mutator.garbage()
                elif kind == 1:
                    said = mutator.bytes(said)
                elif kind == 2:
                    said = claim + rng.randbytes(32)
                elif kind == 3:  # knows the secret, but is no rank of this pool, or is in already
                    while not (nonce := received(stranger)):
                        require(door.admit(0) is None)
                    claim = rng.randbytes(32) + rng.choice((0, WORLD, 65535)).to_bytes(2, "big")
                    said = claim + channel._proof(SECRET, b"rank", nonce, claim)
                if rng.random() < 0.2:
                    said = said[: rng.choice((1, 33, 65))]
                try:
                    stranger.sendall(said)
                except OSError:
                    pass
                if rng.random() < 0.1:
                    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, HARD)
                if rng.random() < 0.3:
                    silent.append(stranger)
                else:
                    stranger.close()
                require(door.admit(0) is None)
                require(len(door._callers) <= channel.MAX_WAITING)
                yield len(said), False
            let_in(door, WORLD - 1, thread)
            for sock in silent:
                sock.close()


def let_in(door: Door, rank: int, thread: ThreadPoolExecutor) -> None:
    """A rank that knocks comes in, and nobody else."""
    knocking = thread.submit(channel.knock, door.port, rank, SECRET, 60.0)
    while not (caller := door.admit(0.01)):
        pass
    require(caller[0] == rank)
    knocking.result().close()
    caller[1].close()


def received(sock: socket.socket) -> bytes:
    """What has come, nothing if nothing has."""
    sock.settimeout(0.001)
    try:
        return sock.recv(32)
    except TimeoutError:
        return b""


def at_a_rank_that_knocks(mutator: Mutator) -> Frames:
    while True:
        rank, listener = socket.socketpair()
        with rank, listener:
            rank.settimeout(10)
            said = mutator.garbage()[:80]
            if mutator.rng.random() < 0.5:
                said = mutator.rng.randbytes(64)
            listener.sendall(said)
            listener.shutdown(socket.SHUT_WR)
            try:
                channel.prove(rank, 1, SECRET)
            except OSError:
                yield len(said), False
            else:
                raise Accepted


def at_a_channel(mutator: Mutator, union: Any, messages: list[Any]) -> Frames:
    rng = mutator.rng
    bodies = [msgspec.msgpack.encode(message) for message in messages]
    trees = [msgspec.msgpack.decode(body) for body in bodies]
    other_way = [msgspec.msgpack.encode(m) for m in (FROM_RANK if messages is FROM_HOST else FROM_HOST)]
    while True:
        with channel.listen() as listener:
            other = socket.create_connection(listener.getsockname(), 10)
            end: Channel[Any] = Channel(listener.accept()[0], union)
        for _ in range(ROUND):
            kind = rng.randrange(16)
            ends = False
            if kind == 0:
                body, wrong = mutator.garbage(), False
            elif kind == 1:
                body, wrong = rng.choice(other_way), True
            elif kind < 7:
                body, wrong = mutator.bytes(rng.choice(bodies)), False
            else:
                body, wrong = packed(mutator.value(rng.choice(trees))), False
            frame = len(body).to_bytes(4, "big") + body
            if kind == 15 and rng.random() < 0.1:
                frame, ends = rng.choice((2**31, 2**32 - 1, 2**24 + 1)).to_bytes(4, "big") + body, True
            elif kind == 14 and rng.random() < 0.1:
                frame, ends = frame[: rng.randrange(len(frame))], True
            other.sendall(frame)
            if ends:
                other.shutdown(socket.SHUT_WR)
            good = False
            try:
                message = end.receive(60)
                require(not wrong and not ends)
                in_order(message)
                good = True
            except msgspec.MsgspecError:
                pass
            except (EOFError, OSError) as error:
                if not ends or isinstance(error, TimeoutError):
                    raise
            yield len(frame), good
            if ends:
                break
        else:
            other.sendall(len(bodies[0]).to_bytes(4, "big") + bodies[0])
            require(end.receive(60) == messages[0])
        other.close()
        end.close()


def packed(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, RecursionError):  # a number that no msgpack holds
        return b"\xcf\xff"


def at_a_tree(mutator: Mutator) -> Frames:
    rng = mutator.rng
    tensors = {
        "x": torch.ones(2, 4, 8, 8),
        "t": (torch.ones(2), torch.ones(3, dtype=torch.bfloat16)),
        "n": [1, "a", None],
    }
    spec, parts = flatten(tensors)
    heads, size = place(parts)
    arena = Arena.create(size)
    size = arena.size  # a system may round it up
    start = torch.frombuffer(arena._memory.buf, dtype=torch.uint8).data_ptr()
    plain = [[head.dtype, list(head.shape), head.offset] for head in heads]
    try:
        while True:
            made_spec = mutator.value(spec) if rng.random() < 0.7 else spec
            made = plain if made_spec is not spec and rng.random() < 0.5 else mutator.value(plain)
            made = made if isinstance(made, list) else [made]
            length = len(repr(made_spec)) + len(repr(made))
            good = False
            try:
                if rng.random() < 0.5:
                    found = msgspec.convert(made, list[TensorHead])
                else:  # past the decoder, as if there was none
                    found = (
                        [TensorHead(*map(hashed, one)) for one in made if numbers(one)]
                        if isinstance(made, list)
                        else []
                    )
                tree = arena.tree(made_spec, found)
                for tensor in flatten(tree)[1]:
                    if tensor.numel():
                        require(start <= tensor.data_ptr() <= start + size - tensor.numel() * tensor.element_size())
                good = True
            except (ValueError, msgspec.ValidationError):
                pass
            yield length, good
    finally:
        arena.close()


def hashed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def numbers(head: Any) -> bool:
    """Whether a head has the types of one, whatever its numbers say."""
    if not isinstance(head, list) or len(head) != 3:
        return False
    dtype, shape, offset = head
    return isinstance(dtype, str) and isinstance(shape, list) and all(type(n) is int for n in (*shape, offset))


def at_the_orders(mutator: Mutator) -> Frames:
    rng = mutator.rng
    line = msgspec.json.encode(ORDERS)
    while True:
        good = False
        if rng.random() < 0.5:
            text = mutator.bytes(line) if rng.random() < 0.5 else as_json(mutator.value(json.loads(line)))
            try:
                orders = msgspec.json.decode(text, type=protocol.LaunchSpec)
                require(len(bytes.fromhex(orders.secret)) == 32 and 0 <= orders.port < 65536)
                good = True
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                pass  # a rank that cannot read its orders ends
        else:
            options = RECIPE.options.encode()
            text = mutator.bytes(options) if rng.random() < 0.5 else as_json(mutator.value(json.loads(options)))
            try:
                require(not flatten(unflatten(json.loads(text), []))[1])
                good = True
            except (ValueError, RecursionError):
                pass
        yield len(text), good


def as_json(value: Any) -> bytes:
    return json.dumps(value, default=repr).encode()


def at_a_description(mutator: Mutator) -> Frames:
    rng = mutator.rng
    objects = {
        "1": ["named", "comfy_extras.nodes_freelunch", "Fourier_filter"], "2": ["named", "torch", "gather"],
        "3": ["tuple", [[1], 2]], "4": ["dict", [[["a"], 3]]], "5": ["list", [4, 6]], "6": ["tensor", 0, "cpu"],
        "7": ["dtype", "float16"], "8": ["device", "here"], "9": ["set", [["a"]]], "10": ["frozenset", [[1]]],
        "11": ["bound", 12, 1], "12": ["instance", 13, [["total", [3]], ["hook", [None]]]],
        "13": ["named", "comfy.utils", "ProgressBar"], "14": ["cell", [5]],
    }  # fmt: skip
    content = {"objects": objects, "patches": {"input_block_patch": [1, 11]}, "patches_replace": {"attn1": [[3, 2]]},
               "optimized_attention_override": 12}  # fmt: skip
    tensors = [torch.ones(2)]
    while True:
        made = mutator.value(content)
        text = as_json(made).decode()
        good = False
        try:
            entries = inside_patches.rebuild({"id": rng.randrange(10**9), "text": text, "tensors": tensors})
            for thing in reached(entries):
                own(thing)
            good = True
        except Accepted:
            raise
        except Exception:  # a rank reports whatever it is
            pass
        if rng.random() < 0.01:
            inside_patches.forget()
        yield len(text), good


def reached(thing: Any) -> Iterator[Any]:
    """All objects in what a description made."""
    waiting, seen = [thing], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, MethodType):
            waiting += [one.__self__, one.__func__]
        elif isinstance(one, CellType):
            waiting.append(one.cell_contents)
        elif not isinstance(one, FunctionType | BuiltinFunctionType | type | torch.Tensor):
            waiting += [type(one), *getattr(one, "__dict__", {}).values()]


def own(thing: Any) -> None:
    """Raises Accepted for code that is not ComfyUI's own."""
    if isinstance(thing, FunctionType):
        require(Path(thing.__code__.co_filename).resolve().is_relative_to(comfyui_dir().resolve()))
    elif isinstance(thing, BuiltinFunctionType):
        require(thing in TENSOR_FUNCTIONS)
    elif isinstance(thing, type):
        plain = thing.__module__ == "builtins" or thing in (torch.device, torch.dtype)
        require(plain or thing.__module__.split(".")[0] in ("comfy", "comfy_extras"))


TARGETS: dict[str, tuple[int, Callable[[Mutator], Frames]]] = {
    "door": (2, at_the_door),
    "knock": (2, at_a_rank_that_knocks),
    "host": (31, lambda mutator: at_a_channel(mutator, protocol.FromRank, FROM_RANK)),
    "rank": (31, lambda mutator: at_a_channel(mutator, protocol.FromHost, FROM_HOST)),
    "line": (4, lambda mutator: at_a_channel(mutator, protocol.FromJoiner, FROM_JOINER)),
    "tree": (20, at_a_tree),
    "orders": (5, at_the_orders),
    "description": (5, at_a_description),
}
"""Target -> its share of the frames in per cent, and what throws them."""


def campaign(frames: int, seed: int, say: Callable[[str], object] = print) -> dict[str, int]:
    """Throw ``frames`` frames. Returns the counts "frames", "crashes", "accepted", "over", "formed" and "peak" (bytes).

    What was found is said, with the target and the number of its frame.
    """
    counts = Counter(frames=0, crashes=0, accepted=0, over=0, formed=0, peak=0)
    for module in ("comfy.sd", "comfy.utils", "comfy_extras.nodes_freelunch"):  # so that no frame pays for them
        importlib.import_module(module)
    tracemalloc.start()
    try:
        for name, (share, target) in TARGETS.items():
            mutator = Mutator(random.Random(f"{name} {seed}"))
            thrower = target(mutator)
            for number in range(max(1, frames * share // 100)):
                if number % ROUND == 0:
                    faulthandler.dump_traceback_later(STUCK_S, exit=True)
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                counts["frames"] += 1
                try:
                    length, formed = next(thrower)
                except Accepted as error:
                    found: tuple[str, BaseException] | None = ("accepted", error)
                except Exception as error:
                    found = ("crashes", error)
                else:
                    found = None
                    counts["formed"] += formed
                    peak = tracemalloc.get_traced_memory()[1] - before
                    counts["peak"] = max(counts["peak"], peak)
                    if peak > ALLOWED + PER_BYTE * length:
                        counts["over"] += 1
                        say(f"{name} {number}: {peak} bytes for a frame of {length}")
                if found:
                    kind, error = found
                    counts[kind] += 1
                    say(f"{name} {number}: {kind}: {error!r}")
                    thrower = target(mutator)
            thrower.close()
    finally:
        tracemalloc.stop()
        faulthandler.cancel_dump_traceback_later()
    return dict(counts)


def bound_the_process() -> None:
    """Let no allocation take more than 2 GiB, seen by tracemalloc or not."""
    if sys.platform == "linux":
        import resource

        import psutil

        limit = psutil.Process().memory_info().vms + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def line(counts: dict[str, int]) -> str:
    return (
        f"fuzz: {counts['frames']} frames, {counts['crashes']} crashes, {counts['accepted']} accepted, "
        f"{counts['over']} over the bound, {counts['formed']} still well formed, "
        f"peak allocation {counts['peak'] / 2**20:.1f} MiB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bound_the_process()
    print(f"seed {options.seed}")
    counts = campaign(options.frames, options.seed)
    print(line(counts))
    return 1 if counts["crashes"] or counts["accepted"] or counts["over"] else 0


if __name__ == "__main__":
    sys.exit(main())
