"""What `make faults` can break: a server, its ranks and its model file, in kinds of faults, and in which order."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from campaign import DENOISER, EXACT, RANKS, STEPS, Graph, Workflow, campaign_server, ranks
from comfy_server import ComfyServer

STEP_TIMEOUT_S = 8.0
"""LEAPFROG_STEP_TIMEOUT of the server: how long a rank may be silent."""
LARGE = EXACT.sized(256, 256)
"""Needs memory that the ranks do not hold yet."""
NAMES_A_RANK = r"\(rank [01]\b"
LOADING, BEGINNING, SAMPLING, IDLE, QUEUED = "loading", "beginning", "sampling", "idle", "queued"


@dataclass(frozen=True)
class Fault:
    """One thing to break: what, when, in which workflow, and dice for the rest."""

    number: int
    kind: str
    moment: str
    workflow: Workflow
    followers: tuple[Workflow, ...]
    rank: int
    step: int
    dice: float

    def __str__(self) -> str:
        return f"{self.number:3} {self.kind} of rank {self.rank}, {self.moment}, {self.workflow.name}"


@dataclass(frozen=True)
class Kind:
    """``strike`` breaks it and returns, False if there was nothing to break; ``repair`` makes good what would break the
    next prompts too.

    ``may``: what may become of the prompt that is hit. ``says``: what its error has to say. ``weight``: how often.
    """

    strike: Callable[[Breakable, Fault], bool | None]
    moments: tuple[str, ...]
    may: tuple[str, ...] = ("right", "failed")
    says: str = NAMES_A_RANK
    repair: Callable[[Breakable], None] | None = None
    change: Callable[[Graph, Fault], None] | None = None
    workflow: Workflow | None = None
    weight: float = 1.0


class Breakable:
    """A ComfyUI that is there to be broken, and the ways to break it. ``victim`` is the prompt that is to be hit.

    ``carry_on``: it finishes pictures on the devices that are left.
    """

    def __init__(self, base: Path, carry_on: bool = False):
        self.base = base
        self.carry_on = carry_on
        self.server = self._started()
        self.victim: str | None = None
        self._limited: list[psutil.Process] = []
        self._held: list[socket.socket] = []

    def _started(self) -> ComfyServer:
        env = {"LEAPFROG_STEP_TIMEOUT": str(STEP_TIMEOUT_S), "LEAPFROG_CARRY_ON": str(int(self.carry_on))}
        return campaign_server(self.base, **env).start()

    def start_again(self) -> None:
        """Another server in place of one that has been stopped."""
        self.server = self._started()

    @property
    def denoiser(self) -> Path:
        return self.base / "models/diffusion_models" / DENOISER

    def signal(self, fault: Fault, *signals: signal.Signals, pause_s: float = 0.0) -> bool:
        """Send signals to the fault's rank, with a pause after each; False if there is no such rank now."""
        alive = ranks(self.server)
        if fault.rank >= len(alive):
            return False
        for what in signals:
            os.kill(alive[fault.rank].pid, what)
            time.sleep(pause_s)
        return True

    def cancel(self) -> None:
        """Cancel the prompt that is to be hit, unless it has ended."""
        self.server.interrupt(self.victim)

    def pause(self, fault: Fault) -> bool:
        """Stop a rank for less than the deadline."""
        for_s = 0.1 + 0.2 * STEP_TIMEOUT_S * fault.dice
        return self.signal(fault, signal.SIGSTOP, signal.SIGCONT, pause_s=for_s)

    def starve(self, fault: Fault) -> bool:
        """No more address space for a rank than it has now."""
        alive = ranks(self.server)[fault.rank :][:1]
        for process in alive:
            process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + (1 << 20), psutil.RLIM_INFINITY))
        self._limited += alive
        return bool(alive)

    def feed(self) -> None:
        """Lift what `starve` has set."""
        for process in self._limited:
            if process.is_running():
                process.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        self._limited.clear()

    def garbage(self, fault: Fault) -> None:
        """Nonsense at every port that the server or a rank listens on, ComfyUI's own left out."""
        dice = random.Random(fault.number)
        ports = {
            connection.laddr.port
            for process in (psutil.Process(self.server.pid), *ranks(self.server))
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        for port in sorted(ports - {self.server.port}):
            for said in (dice.randbytes(4096), b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 64, b""):
                try:
                    caller = socket.create_connection(("127.0.0.1", port), timeout=1)
                    self._held.append(caller)  # an open line that says no more is part of it
                    caller.sendall(said)
                except OSError:
                    continue

    def hang_up(self) -> None:
        """Close what `garbage` has opened."""
        for caller in self._held:
            caller.close()
        self._held.clear()

    def hide_file(self, fault: Fault) -> None:
        """The checkpoint is gone and the ranks have to read it again, ComfyUI itself too or not."""
        self.denoiser.rename(self.base / "hidden")
        self.server.post("/free", {"unload_models": True, "free_memory": fault.dice < 0.5})

    def tear_file(self, fault: Fault) -> None:
        """The same with the first half of the file left."""
        self.denoiser.rename(self.base / "hidden")
        content = (self.base / "hidden").read_bytes()
        self.denoiser.write_bytes(content[: len(content) // 2])
        self.server.post("/free", {"unload_models": True, "free_memory": fault.dice < 0.5})

    def restore_file(self) -> None:
        (self.base / "hidden").rename(self.denoiser)


def spoil(graph: Graph, fault: Fault) -> None:
    """An option that no rank can compute with, from some evaluation on."""
    source = graph["sample"]["inputs"]["model"]
    graph["sample"]["inputs"]["model"] = ["spoil", 0]
    graph["spoil"] = {"class_type": "CampaignSpoil", "inputs": {"model": source, "at": fault.step}}


def _signal(what: signal.Signals) -> Callable[[Breakable, Fault], bool]:
    return lambda comfy, fault: comfy.signal(fault, what)


KINDS: dict[str, Kind] = {
    "kill -9": Kind(_signal(signal.SIGKILL), (LOADING, BEGINNING, SAMPLING, SAMPLING, IDLE), weight=3),
    "SIGTERM": Kind(_signal(signal.SIGTERM), (LOADING, BEGINNING, SAMPLING, IDLE), weight=1.5),
    "hang": Kind(_signal(signal.SIGSTOP), (LOADING, BEGINNING, SAMPLING, IDLE), weight=1),
    "pause": Kind(Breakable.pause, (LOADING, BEGINNING, SAMPLING, IDLE), may=("right",), weight=3),
    "cancel": Kind(
        lambda comfy, fault: comfy.cancel(), (LOADING, BEGINNING, SAMPLING, SAMPLING, SAMPLING),
        may=("right", "cancelled"), weight=6,
    ),
    "free": Kind(
        lambda comfy, fault: comfy.server.post("/free", {"unload_models": True, "free_memory": fault.dice < 0.3}),
        (LOADING, SAMPLING, IDLE), may=("right",), weight=1.5,
    ),
    "missing file": Kind(
        Breakable.hide_file, (QUEUED,), may=("failed",), says=rf"FileNotFound|{DENOISER}",
        repair=Breakable.restore_file,
    ),
    "torn file": Kind(
        Breakable.tear_file, (QUEUED,), may=("failed",), says=rf"{DENOISER}|{NAMES_A_RANK}|SafetensorError|header",
        repair=Breakable.restore_file,
    ),
    "no memory": Kind(
        Breakable.starve, (BEGINNING, SAMPLING, IDLE), says=NAMES_A_RANK, repair=Breakable.feed, workflow=LARGE,
    ),
    "exception": Kind(lambda comfy, fault: None, (SAMPLING,), change=spoil, may=("failed",)),
    "garbage": Kind(
        Breakable.garbage, (LOADING, BEGINNING, SAMPLING, IDLE), may=("right",), repair=Breakable.hang_up, weight=3,
    ),
    "kill -9 of ComfyUI": Kind(
        lambda comfy, fault: comfy.server.kill9(), (LOADING, BEGINNING, SAMPLING, IDLE),
        repair=lambda comfy: None, weight=0.7,
    ),
}  # fmt: skip
KILLS = ("kill -9", "SIGTERM")
LOST = (*KILLS, "hang")
"""What a picture survives with LEAPFROG_CARRY_ON."""
ENDS_SERVER = ("kill -9 of ComfyUI",)


def schedule(count: int, seed: int, kinds: Sequence[str], workflows: Sequence[Workflow]) -> list[Fault]:
    """The faults of a campaign: every kind as often as its weight asks, in an order that follows from the seed."""
    dice = random.Random(seed)
    total = sum(KINDS[kind].weight for kind in kinds)
    named = [kind for kind in kinds for _ in range(max(1, math.floor(KINDS[kind].weight * count / total)))]
    named += dice.choices(kinds, [KINDS[kind].weight for kind in kinds], k=max(0, count - len(named)))
    dice.shuffle(named)
    turns = Counter({kind: dice.randrange(len(KINDS[kind].moments)) for kind in kinds})
    faults = []
    for number, kind in enumerate(named[:count], 1):
        moments = KINDS[kind].moments
        moment = moments[turns[kind] % len(moments)]
        turns[kind] += 1
        workflow, *followers = dice.choices(workflows, k=2 + (moment == QUEUED) + (dice.random() < 0.25))
        faults.append(
            Fault(
                number, kind, moment, KINDS[kind].workflow or workflow, tuple(followers), dice.randrange(RANKS),
                dice.randint(2, STEPS - 2), dice.random(),
            )
        )  # fmt: skip
    return faults
