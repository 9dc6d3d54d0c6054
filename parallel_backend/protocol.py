"""The messages between the host and a rank. Control only: tensors lie in shared memory, weights are file paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .errors import ErrorReport, LeapfrogError
from .tensors import Bytes, Shape, TensorHead, flatten
from .units import Flow

# Decoded, a message takes up to 72 times its length: msgpack writes an empty dict in a byte.
MAX_MESSAGE = 16 << 20
MAX_REPEATS = 1000
LOOPBACK = "127.0.0.1"
Port = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Loader = Literal["diffusion_model", "checkpoint"]
Secret = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Address = Annotated[str, msgspec.Meta(pattern=r"\A\d{1,3}(\.\d{1,3}){3}\Z")]
Word = Annotated[str, msgspec.Meta(max_length=200)]


class LaunchSpec(msgspec.Struct):
    """What a rank reads from its standard input before anything else. ``threads`` 0 leaves the CPU threads alone.

    The rank knocks at ``host``:``port``; other ranks reach it at ``address``.
    """

    rank: int
    world: int
    device: str
    backend: str
    threads: int
    port: Port
    secret: Secret
    comfy_root: str
    comfy_args: list[str]
    timeout_s: float
    host: Address = LOOPBACK
    address: Address = LOOPBACK


class Payload(msgspec.Struct):
    """A tree whose tensors lie in the arena called ``arena``."""

    arena: Annotated[str, msgspec.Meta(pattern=r"\A\w{1,64}\Z")]
    spec: Any
    heads: list[TensorHead]


class Recipe(msgspec.Struct, frozen=True, eq=False):
    """How to rebuild a denoiser: ComfyUI's loader ("diffusion_model" or "checkpoint"), the file, the loader's options.

    ``options`` is a tree spec without tensors. ``stamp`` is the file's (size in bytes, modification time in ns), so
    that a file that changed on disk is another recipe. ``fingerprint`` is for ranks on other machines, which look for
    the same file among their own by both its ``path``, which has no symbolic links, and the one it was ``named`` by.
    Recipes of one file are equal however it was named.
    """

    loader: Loader
    path: str
    options: str
    stamp: tuple[int, int]
    fingerprint: str = ""
    named: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._identity == other._identity

    def __ne__(self, other: object) -> bool:  # else that of msgspec's structs, which knows nothing of this __eq__
        return not self == other

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[object, ...]:
        return self.loader, self.path, self.options, self.stamp, self.fingerprint

    @classmethod
    def of(cls, loader: Loader, path: str, options: dict[str, Any]) -> Recipe:
        """Raises LeapfrogError: missing_file, or no_recipe where the options cannot be repeated in a rank."""
        file = Path(path)
        if not file.is_file():
            raise LeapfrogError.of("missing_file", f"The model file {file.name} is not in its folder any more.")
        try:
            spec, tensors = flatten(options, "options")
        except TypeError as error:
            raise LeapfrogError.of("no_recipe", f"The MODEL's loader got {error}.") from None
        if tensors:
            raise LeapfrogError.of("no_recipe", "The MODEL's loader got tensors among its options.")
        return cls(loader, str(file.resolve()), json.dumps(spec), stamp_of(file), named=str(file.absolute()))

    def renewed(self) -> Recipe:
        """The recipe of the file as it is now; this one where it is gone."""
        try:
            return msgspec.structs.replace(self, stamp=stamp_of(Path(self.path)))
        except OSError:
            return self


def stamp_of(file: Path) -> tuple[int, int]:
    """A file's stamp, as in a :class:`Recipe`. Raises OSError."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


class HostMessage(msgspec.Struct, tag_field="type", tag=str.lower):
    """Base of what the host sends. ``call`` numbers requests; a reply carries the number of its request."""

    call: int = 0


class Join(HostMessage):
    """Form the process group; the store listens on ``store_host``:``store_port``."""

    store_port: Port = 0
    store_host: Address = LOOPBACK


class Trace(HostMessage):
    """Watch the recipe's denoiser run on these inputs, on weights that are never read.

    ``units`` are those of the cut where there is one, else they are found. Times are the best of ``repeats``.
    ``shapes`` are those of weights that patches will widen. ``held``: on the weights of the whole denoiser, which the
    rank holds.
    """

    recipe: Recipe | None = None
    inputs: Payload | None = None
    units: list[str] = []
    repeats: Annotated[int, msgspec.Meta(ge=0, le=MAX_REPEATS)] = 0
    shapes: dict[str, Shape] = {}
    held: bool = False


class Cut(msgspec.Struct, frozen=True):
    """How a denoiser is cut: its units in the order of evaluation, and the bounds (first, last) of each component."""

    units: list[str]
    bounds: list[tuple[int, int]]


class Load(HostMessage):
    """Hold one component of the recipe's denoiser, or all of it where there is no ``cut``.

    ``peers`` are the ranks that hold the components of this pipeline, in order. ``patches`` is the tree that
    nodes/recipe.py writes.
    """

    recipe: Recipe | None = None
    cut: Cut | None = None
    peers: list[int] = []
    patches: Payload | None = None
    patches_id: str = ""


class Evaluate(HostMessage):
    """One call of the denoiser. ``inputs`` is a tree (args, kwargs); the result goes to byte ``out`` of the same arena.

    For a component: ``layout`` numbers the layout of the inputs, with its ``flow`` when it is new. ``run`` and
    ``stream`` name the stale state to use; ``exact`` asks for a synchronous pipeline, otherwise what the earlier
    components made of this stream's previous evaluation is used, ``extrapolate`` continued by one step. ``measure``
    asks how far that would have been from what was then used. ``time`` is a factor for the timestep.
    """

    inputs: Payload | None = None
    out: int = 0
    out_size: int = 0
    run: int = 0
    stream: int = 0
    layout: int = 0
    flow: Flow | None = None
    exact: bool = True
    extrapolate: bool = False
    measure: bool = False
    time: float = 1.0


class Echo(HostMessage):
    """Send the one tensor of ``inputs`` back: the cost of a round trip, and the doctor's first question."""

    inputs: Payload | None = None
    out: int = 0
    out_size: int = 0


class Probe(HostMessage):
    """Time the link between the ranks ``first`` and ``second``, which both get this message at the same time.

    ``first`` sends ``sizes[i]`` bytes to ``second`` and gets them back, ``repeats[i]`` times.
    """

    first: int = 0
    second: int = 0
    sizes: list[int] = []
    repeats: list[int] = []


class Room(HostMessage):
    """How much room is there on the device?"""


class Unload(HostMessage):
    """Drop the weights; stay ready."""


class Release(HostMessage):
    """Give back these arenas, which the host has removed, and with ``cache`` the device's memory that no tensor uses.

    There is no answer.
    """

    arenas: list[Word] = []
    cache: bool = False


class Stop(HostMessage):
    """End the process."""


class RankMessage(msgspec.Struct, tag_field="type", tag=str.lower):
    """Base of what a rank sends."""

    call: int = 0


class Hello(RankMessage):
    """First message. Rank 0 names the port of the store it opened; the others send 0."""

    store_port: Port = 0


class Ready(RankMessage):
    """The process group stands."""


class Vacancy(RankMessage):
    """Bytes that the device could give if this rank held nothing there, None where nobody counts."""

    free: Bytes | None = None


class UnitTrace(msgspec.Struct, frozen=True):
    """A unit's path, the seconds of one evaluation, the bytes of its weights."""

    path: str
    seconds: Seconds
    nbytes: Bytes


class Traced(RankMessage):
    """The units in the order of evaluation and the flow between them.

    ``stem`` and ``head`` are the seconds before the first unit and after the last one; ``shared`` the bytes of the
    weights outside the units.
    """

    units: list[UnitTrace] = []
    flow: Flow = Flow([], [], [])
    stem: Seconds = 0.0
    head: Seconds = 0.0
    shared: Bytes = 0
    device: str = ""

    def __post_init__(self) -> None:
        if len(self.units) != len(self.flow.reads):
            raise ValueError("as many units as the flow has")


class Loaded(RankMessage):
    """``nbytes`` of weights are held, of which ``shared`` belong to no unit."""

    nbytes: Bytes = 0
    shared: Bytes = 0
    units: list[str] = []


class Done(RankMessage):
    """An evaluation ended. ``output`` is a payload on the rank that has the result, else None.

    ``begin`` and ``end`` are perf_counter seconds (one clock for all processes of a machine), ``waited`` the seconds in
    between spent waiting for other ranks, ``sent`` the bytes sent to other ranks, ``drift`` the relative distance of
    what the previous evaluation would have offered from what was used, where that was asked for.
    """

    output: Payload | None = None
    begin: Seconds = 0.0
    end: Seconds = 0.0
    waited: Seconds = 0.0
    sent: Bytes = 0
    drift: float = 0.0


class Probed(RankMessage):
    """Median seconds of one way for each size that was asked for; whether what came back is what was sent."""

    seconds: list[float] = []
    intact: bool = True


class Failed(RankMessage):
    error: ErrorReport | None = None


class Ok(RankMessage):
    """Plain acknowledgement."""


FromHost = Join | Trace | Load | Evaluate | Echo | Probe | Room | Unload | Release | Stop
ANSWERS: dict[type[HostMessage], type[RankMessage]] = {
    Trace: Traced,
    Load: Loaded,
    Evaluate: Done,
    Echo: Done,
    Probe: Probed,
    Room: Vacancy,
    Unload: Ok,
}
"""What a rank answers, if it does not answer Failed."""

FromRank = Hello | Ready | Traced | Loaded | Done | Probed | Vacancy | Failed | Ok


class LineMessage(msgspec.Struct, tag_field="type", tag=str.lower):
    """Base of what the host and the joiner on another machine send each other (``joining.py``)."""


class Offer(LineMessage):
    """What a joiner has: a device of its machine, "cpu" or "cuda:0", and the versions of what a rank is made of."""

    machine: Word
    device: Word
    versions: dict[Word, Word]


class Orders(LineMessage):
    """Start a rank. In the place of the secret is a number used once, of which both sides derive it."""

    spec: LaunchSpec


class Beat(LineMessage):
    """Still there. ``halted``: the joiner's rank is halted."""

    halted: bool = False


class Said(LineMessage):
    """A line that the rank printed, with its level as in ``logging``."""

    level: Annotated[int, msgspec.Meta(ge=0, le=100)]
    text: Annotated[str, msgspec.Meta(max_length=1 << 14)]


class Gone(LineMessage):
    """The rank has ended, or could not be started; ``how`` in words."""

    exit_code: int
    how: Annotated[str, msgspec.Meta(max_length=1 << 14)]


FromJoiner = Offer | Beat | Said | Gone
ToJoiner = Orders | Beat
