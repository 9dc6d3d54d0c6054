"""A rank's main loop: one message in, one reply out, errors as values."""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import torch

from ..channel import Channel
from ..courier import RankCourier
from ..devices import kind_of, machine_of
from ..errors import ErrorReport, LeapfrogError, UnreadableFile
from ..handshake import knock
from ..protocol import (
    Done,
    Echo,
    Evaluate,
    Failed,
    FromHost,
    Hello,
    HostMessage,
    Join,
    LaunchSpec,
    Load,
    Loaded,
    Ok,
    Payload,
    Probe,
    Probed,
    RankMessage,
    Ready,
    Recipe,
    Release,
    Room,
    Stop,
    Trace,
    Traced,
    Unload,
    Vacancy,
)  # fmt: skip
from ..tensors import Arena, flatten, place
from .links import Links, join_store, open_store
from .probe import probe
from .vacancy import free_bytes

CONNECT_TIMEOUT_S = 30.0
MAPPED_ARENAS = 16
HostLine = Channel[FromHost] | RankCourier
DEVICE_FAULT = getattr(torch, "AcceleratorError", ())  # since torch 2.8
OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "_status_alloc_failed")


def run_rank(orders: bytes, host_gone: Callable[[], None]) -> None:
    """Serve one host until it says stop or goes away, which is ``host_gone`` if it is on another machine."""
    spec = msgspec.json.decode(orders, type=LaunchSpec)
    log_with_levels()
    sock = knock(spec.port, spec.rank, spec.secret, CONNECT_TIMEOUT_S, spec.host)
    channel = RankCourier(sock, host_gone) if machine_of(spec.device) else Channel(sock, FromHost)
    try:
        rank = _start(spec, channel)
    except Exception as error:
        channel.send(Failed(error=_report(error, spec.rank)))
        raise
    rank.serve()


def _start(spec: LaunchSpec, channel: HostLine) -> Rank:
    store, port = open_store(spec.world, spec.address) if spec.rank == 0 else (None, 0)
    if kind_of(spec.device).startswith("cuda") and not torch.cuda.is_available():
        raise LeapfrogError.of("device_fault", f"{spec.device} cannot be used (any more).")
    from .models.boot import boot_comfy

    device = boot_comfy(spec.comfy_args)
    importlib.import_module(".models.denoiser", __package__)  # slow, so before the rank counts as ready
    gc.freeze()  # what was imported stays, and a collection that looked at it would take some 0.3 s
    gc.enable()
    channel.send(Hello(store_port=port))
    join = channel.receive(None)
    assert isinstance(join, Join)
    if store is None:
        store = join_store(spec.world, join.store_host, join.store_port)
    links = Links(store, spec.rank, spec.world, spec.backend, device, spec.timeout_s)
    if spec.threads:
        torch.set_num_threads(spec.threads)
    channel.send(Ready())
    return Rank(spec, channel, links, device)


class Rank:
    """What one rank holds between messages: arenas, at most one denoiser."""

    def __init__(self, spec: LaunchSpec, channel: HostLine, links: Links, device: torch.device):
        self._spec = spec
        self._channel = channel
        self._links = links
        self._device = device
        self._arenas = channel.arenas if isinstance(channel, RankCourier) else Attached()
        self._held: Any = None
        self._step = 0
        self._run = 0
        self._handlers: dict[type, Callable[[Any], RankMessage]] = {
            Trace: self._trace,
            Load: self._load,
            Evaluate: self._evaluate,
            Echo: self._echo,
            Probe: self._probe,
            Room: self._room,
            Unload: self._unload,
        }

    def serve(self) -> None:
        while True:
            try:
                message: HostMessage = self._channel.receive(None)
            except (EOFError, OSError):
                return
            if isinstance(message, Stop):
                # the process group's threads may still wait for ranks that are gone
                sys.stdout.flush()
                os._exit(0)
            if isinstance(message, Release):
                self._release(message)
                continue
            try:
                with torch.inference_mode():
                    reply = self._handlers[type(message)](message)
            except Exception as error:
                reply = Failed(error=_report(error, self._spec.rank))
            reply.call = message.call
            self._channel.send(reply)

    def _release(self, message: Release) -> None:
        if isinstance(self._arenas, Attached):
            self._arenas.detach(message.arenas)
        if message.cache and self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _tree(self, payload: Payload) -> Any:
        return self._arenas[payload.arena].tree(payload.spec, payload.heads)

    def _trace(self, message: Trace) -> Traced:
        from .models.trace import trace

        assert message.recipe and message.inputs
        recipe, held = _own(message.recipe), self._held if message.held else None
        if message.held and not (held and held.recipe == recipe and held.cut is None):
            raise ValueError("this rank does not hold the whole denoiser")
        tree = self._tree(message.inputs)
        return trace(recipe, tree, self._device, message.units, message.repeats, message.shapes, held)

    def _load(self, message: Load) -> Loaded:
        from .models.denoiser import HeldDenoiser

        assert message.recipe and message.patches
        held, recipe = self._held, _own(message.recipe)
        if held is None or (held.recipe, held.cut, held.peers) != (recipe, message.cut, message.peers):
            held = None  # or its weights would stay while others come
            self._drop()
            held = HeldDenoiser(recipe, message.cut, message.peers, self._links, self._device)
        held.patch(message.patches_id, self._tree(message.patches))
        self._held = held
        return Loaded(nbytes=held.nbytes, shared=held.shared_bytes, units=held.unit_names)

    def _room(self, _message: Room) -> Vacancy:
        return Vacancy(free=free_bytes(self._device))

    def _unload(self, _message: Unload) -> Ok:
        self._drop()
        return Ok()

    def _drop(self) -> None:
        if self._held and self._held.component:
            self._held.component.settle()
        self._held = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _evaluate(self, message: Evaluate) -> Done:
        assert message.inputs and self._held
        begin = time.perf_counter()
        if message.run != self._run:
            self._begin_run(message.run)
        # what nodes put inside the denoiser may draw random numbers (ToMe): the same ones in every run
        torch.manual_seed(self._step)
        self._links.begin()
        args, kwargs = self._held.inputs(self._tree(message.inputs), message.time)
        component, drift = self._held.component, 0.0
        if component:
            if message.flow:
                component.learn(message.layout, message.flow)
            result, drift = component.evaluate(
                args, kwargs, message.layout, message.run, message.stream, message.exact, message.extrapolate,
                message.measure,
            )  # fmt: skip
        else:
            result = self._held.denoiser(*args, **kwargs)
        self._step += 1
        output = self._put(result, message) if result is not None else None
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # or errors would come, and the clock stop, too late
        return Done(
            output=output, begin=begin, end=time.perf_counter(), waited=self._links.waited, sent=self._links.sent,
            drift=drift,
        )  # fmt: skip

    def _begin_run(self, run: int) -> None:
        from .models.inside_patches import forget

        forget()
        self._run, self._step = run, 0

    def _echo(self, message: Echo) -> Done:
        assert message.inputs
        begin = time.perf_counter()
        output = self._put(self._tree(message.inputs).to(self._device, copy=True), message)
        return Done(output=output, begin=begin, end=time.perf_counter())

    def _probe(self, message: Probe) -> Probed:
        return probe(self._links, message)

    def _put(self, result: Any, message: Evaluate | Echo) -> Payload:
        assert message.inputs
        arena = self._arenas[message.inputs.arena]
        spec, tensors = flatten(result, "denoiser output")
        heads, end = place(tensors, message.out)
        if end > message.out + message.out_size:
            raise ValueError(f"the denoiser's output of {end - message.out} bytes is larger than expected")
        arena.write(tensors, heads)
        return Payload(arena.name, spec, heads)


class Attached(dict[str, Arena]):
    """The host's arenas by name, attached when they are asked for."""

    def __missing__(self, name: str) -> Arena:
        while len(self) >= MAPPED_ARENAS:
            self.pop(next(iter(self))).close()
        self[name] = Arena.attach(name)
        return self[name]

    def detach(self, names: Iterable[str]) -> None:
        for name in names:
            if arena := self.pop(name, None):
                arena.close()  # nobody looks at it: what a rank works on are copies


def _own(recipe: Recipe) -> Recipe:
    """The recipe with this machine's path of its file."""
    from .models.files import among_ours

    return among_ours(recipe) if recipe.fingerprint else recipe


def _report(error: Exception, rank: int) -> ErrorReport:
    if isinstance(error, LeapfrogError):
        return msgspec.structs.replace(error.report, rank=rank)
    return ErrorReport(
        code="rank_oom" if _is_oom(error)
        else "device_fault" if isinstance(error, DEVICE_FAULT) or _device_is_lost()
        else "bad_file" if isinstance(error, UnreadableFile)
        else "rank_error",
        message=str(error) if isinstance(error, UnreadableFile) else f"{type(error).__name__}: {error}",
        rank=rank,
        traceback=traceback.format_exc(),
    )  # fmt: skip


def _device_is_lost() -> bool:
    """Whether this process cannot use its GPU any more. CUDA's errors of that kind stay; whoever meets one first may
    be cuBLAS, cuDNN or NCCL, which tell it in their own words."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.current_stream().query()
    except RuntimeError:
        return True
    return False


def _is_oom(error: BaseException | None) -> bool:
    """Whether memory ran out, as any library says it; also behind an error that was raised in its place."""
    if error is None:
        return False
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    known = known or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return known or any(said in str(error).lower() for said in OUT_OF_MEMORY) or _is_oom(error.__cause__)


class LinesWithLevel(logging.Formatter):
    """Every line with its level in front, which ``launcher.py`` reads off again."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"{record.levelname}:{line}" for line in super().format(record).splitlines())


def log_with_levels() -> None:
    """Send this process's log, and Python's warnings, to the host."""
    handler = logging.StreamHandler()
    handler.setFormatter(LinesWithLevel())
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
