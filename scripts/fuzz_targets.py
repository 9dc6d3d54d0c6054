"""What `make fuzz` throws frames at: every listener and parser of the backend, and what counts as let in."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any, TypeVar

import msgspec
import torch
from torch.overrides import get_overridable_functions

from fuzz_messages import FROM_HOST, FROM_JOINER, FROM_RANK, ORDERS, RECIPE, SECRET, Accepted, in_order, require
from fuzz_mutator import Mutator
from leapfrog.parallel_backend import handshake, protocol
from leapfrog.parallel_backend.channel import Channel
from leapfrog.parallel_backend.courier import ARENAS, LARGEST, Courier, HostCourier, RankCourier
from leapfrog.parallel_backend.handshake import Door
from leapfrog.parallel_backend.tensors import Arena, TensorHead, flatten, place, unflatten
from leapfrog.parallel_backend.worker.models import inside_patches
from pack import comfyui_dir

TENSOR_FUNCTIONS = get_overridable_functions()[torch]
WORLD = 4
HARD = struct.pack("ii", 1, 0)  # hangs up without a good-bye
ROUND = 500  # frames between two proofs that the good are still let in
TENSOR = bytes(range(64))

# Throws a frame each time it is asked for the next: its length, and whether it was still well formed.
Frames = Generator[tuple[int, bool], None, None]
AnyCourier = TypeVar("AnyCourier", bound=Courier)


def at_the_door(mutator: Mutator) -> Frames:
    rng = mutator.rng
    while True:
        with Door(SECRET, WORLD) as door, ThreadPoolExecutor(1) as thread:
            let_in(door, 0, thread)
            silent: list[socket.socket] = []
            for _ in range(ROUND):
                stranger = socket.create_connection((handshake.LOOPBACK, door.port), 10)
                kind = rng.randrange(5)
                claim = rng.randbytes(32) + rng.randrange(WORLD).to_bytes(2, "big")
                said = claim + handshake._proof(SECRET, b"rank", rng.randbytes(32), claim)  # of another connection
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
                    said = claim + handshake._proof(SECRET, b"rank", nonce, claim)
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
                require(len(door._callers) <= handshake.MAX_WAITING)
                yield len(said), False
            let_in(door, WORLD - 1, thread)
            for sock in silent:
                sock.close()


def let_in(door: Door, rank: int, thread: ThreadPoolExecutor) -> None:
    """A rank that knocks comes in, and nobody else."""
    knocking = thread.submit(handshake.knock, door.port, rank, SECRET, 60.0)
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
                handshake.prove(rank, 1, SECRET)
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
        with handshake.listen() as listener:
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


def at_the_hosts_courier(mutator: Mutator) -> Frames:
    """A rank on another machine answers, its tensor behind the message. Only what it was asked for is written."""
    arena = Arena.create(8192)
    parts = [arena._memory.buf[at] for at in (slice(0, 4096), slice(4096, 4096 + len(TENSOR)), slice(4160, arena.size))]
    before, room, after = parts
    asked = protocol.Evaluate(4, protocol.Payload(arena.name, ["u", []], []), len(before), len(room))
    answer = protocol.Done(4, protocol.Payload(arena.name, ["t", 0], [TensorHead("float32", (16,), len(before))]))

    def end(sock: socket.socket) -> HostCourier:
        courier = HostCourier(sock, {arena.name: arena})
        courier.send(asked)
        return courier

    def check(_: HostCourier, intact: bool) -> None:
        require(not any(before) and not any(after))
        require(not intact or room == TENSOR)
        room[:] = bytes(len(room))

    try:
        yield from at_a_courier(mutator, end, answer, check)
    finally:
        for part in parts:
            part.release()
        arena.close()


def at_a_ranks_courier(mutator: Mutator) -> Frames:
    """The host asks a rank on another machine, a tensor behind the message."""
    asked = protocol.Evaluate(4, protocol.Payload("psm_1a2b", ["t", 0], [TensorHead("float32", (16,), 0)]), 64, 64)

    def check(courier: RankCourier, intact: bool) -> None:
        require(len(courier.arenas) <= ARENAS and all(arena.size <= LARGEST for arena in courier.arenas.values()))
        if intact:
            with courier.arenas["psm_1a2b"].raw(TensorHead("uint8", (len(TENSOR),), 0)) as raw:
                require(raw == TENSOR)

    yield from at_a_courier(mutator, lambda sock: RankCourier(sock, lambda: None), asked, check)


def at_a_courier(
    mutator: Mutator, end: Callable[[socket.socket], AnyCourier], message: Any,
    check: Callable[[AnyCourier, bool], None],
) -> Frames:  # fmt: skip
    """One connection for each frame, whose first thing that cannot be right ends it."""
    rng = mutator.rng
    body = msgspec.msgpack.encode(message)
    tree = msgspec.msgpack.decode(body)
    for number in count():
        said, tensor = body, TENSOR
        intact = number % ROUND == 0
        if not intact:
            said = mutator.bytes(body) if rng.random() < 0.3 else packed(mutator.value(tree))
            tensor = rng.randbytes(rng.choice((0, 1, 64, 64, 64, 5000)))
        with handshake.listen() as listener:
            other = socket.create_connection(listener.getsockname(), 10)
            courier = end(listener.accept()[0])
        came: list[Any] = []
        try:
            with other:
                other.sendall(len(said).to_bytes(4, "big") + said + tensor)
                other.shutdown(socket.SHUT_WR)
                while True:
                    came.append(courier.receive(60))
        except TimeoutError:
            raise
        except (EOFError, OSError):
            pass
        finally:
            courier.close()
        require(not intact or len(came) == 1)
        check(courier, intact)
        yield len(said) + len(tensor), bool(came) and not intact


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
                    found = [TensorHead(*map(hashed, one)) for one in made if numbers(one)]
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
    "host": (30, lambda mutator: at_a_channel(mutator, protocol.FromRank, FROM_RANK)),
    "rank": (30, lambda mutator: at_a_channel(mutator, protocol.FromHost, FROM_HOST)),
    "line": (4, lambda mutator: at_a_channel(mutator, protocol.FromJoiner, FROM_JOINER)),
    "host courier": (1, at_the_hosts_courier),
    "rank courier": (1, at_a_ranks_courier),
    "tree": (20, at_a_tree),
    "orders": (5, at_the_orders),
    "description": (5, at_a_description),
}
"""Target -> its share of the frames in per cent, and what throws them."""
