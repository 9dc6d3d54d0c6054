"""The messages between the host and a rank. Control only: tensors lie in shared memory, weights are file paths."""

from __future__ import annotations

from typing import Any

import msgspec

from .errors import ErrorReport
from .tensors import TensorHead

MAX_MESSAGE = 64 << 20


class LaunchSpec(msgspec.Struct):
    """What a rank reads from its standard input before anything else. ``threads`` 0 leaves the CPU threads alone."""

    rank: int
    world: int
    device: str
    backend: str
    threads: int
    port: int
    secret: str
    comfy_root: str
    comfy_args: list[str]
    timeout_s: float


class Payload(msgspec.Struct):
    """A tree whose tensors lie in the arena called ``arena``."""

    arena: str
    spec: Any
    heads: list[TensorHead]


class Recipe(msgspec.Struct, frozen=True):
    """How to rebuild a denoiser: ComfyUI's loader ("diffusion_model" or "checkpoint"), the file, the loader's options.

    ``options`` is a tree spec without tensors. ``stamp`` is the file's (size in bytes, modification time in ns), so
    that a file that changed on disk is another recipe.
    """

    loader: str
    path: str
    options: str
    stamp: tuple[int, int]


class HostMessage(msgspec.Struct, tag_field="type", tag=str.lower):
    """Base of what the host sends. ``call`` numbers requests; a reply carries the number of its request."""

    call: int = 0


class Join(HostMessage):
    """Form the process group; the store listens on 127.0.0.1:``store_port``."""

    store_port: int = 0


class Profile(HostMessage):
    """Time every unit on this device for these inputs, on weights that are never read."""

    recipe: Recipe | None = None
    inputs: Payload | None = None


class Load(HostMessage):
    """Hold units ``first`` to ``last`` of the recipe's denoiser, or all of it where ``bounds`` is empty.

    ``bounds`` are the components of all ranks. ``patches`` is a tree {key: [(strength, value, strength_model, offset)]}.
    """

    recipe: Recipe | None = None
    bounds: list[tuple[int, int]] = []
    patches: Payload | None = None
    patches_id: str = ""


class Evaluate(HostMessage):
    """One call of the denoiser. ``inputs`` is a tree (args, kwargs); the result goes to byte ``out`` of the same arena.

    For a split: ``run`` and ``stream`` name the stale state to use, ``shape`` the layout of the inputs (equal numbers,
    equal shapes), ``exact`` asks for a synchronous pipeline.
    """

    inputs: Payload | None = None
    out: int = 0
    out_size: int = 0
    run: int = 0
    stream: int = 0
    shape: int = 0
    exact: bool = True


class Unload(HostMessage):
    """Drop the weights; stay ready."""


class Stop(HostMessage):
    """End the process."""


class RankMessage(msgspec.Struct, tag_field="type", tag=str.lower):
    """Base of what a rank sends."""

    call: int = 0


class Hello(RankMessage):
    """First message. Rank 0 names the port of the store it opened on 127.0.0.1; the others send 0."""

    store_port: int = 0


class Ready(RankMessage):
    """The process group stands."""


class Profiled(RankMessage):
    """Seconds of one evaluation of each unit, in the order of evaluation, and the units' names."""

    seconds: list[float] = []
    names: list[str] = []


class Loaded(RankMessage):
    """``nbytes`` of weights are held, of which ``shared`` belong to no unit; ``seconds`` it took."""

    nbytes: int = 0
    shared: int = 0
    units: list[str] = []
    seconds: float = 0.0


class Done(RankMessage):
    """An evaluation ended. ``output`` is a payload on the rank that has the result, else None.

    ``begin`` and ``end`` are perf_counter seconds (one clock for all processes of a machine), ``waited`` the seconds in
    between spent waiting for other ranks, ``sent`` the bytes sent to other ranks.
    """

    output: Payload | None = None
    begin: float = 0.0
    end: float = 0.0
    waited: float = 0.0
    sent: int = 0


class Failed(RankMessage):
    error: ErrorReport | None = None


class Ok(RankMessage):
    """Plain acknowledgement."""


FromHost = Join | Profile | Load | Evaluate | Unload | Stop
FromRank = Hello | Ready | Profiled | Loaded | Done | Failed | Ok
