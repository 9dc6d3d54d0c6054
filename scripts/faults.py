"""`make faults`: breaks things on purpose, at random moments, under a queue of prompts in a real headless ComfyUI.

Every prompt has to be answered in time, with the picture that its workflow drew before anything was broken or with an
error that says what happened, and the prompts behind it in the queue have to be right. The last line holds the figures.
What is done in which order follows from --seed; when exactly a prompt is hit depends on the machine.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from campaign import (
    ALONE,
    DENOISER,
    EXACT,
    KSAMPLER,
    LANES,
    RANKS,
    SHARED_MEMORY,
    STEPS,
    WORKFLOWS,
    Graph,
    Workflow,
    campaign_base,
    campaign_server,
    ended,
    is_rank,
    pixels,
    ranks,
    segments,
    until_told_to_stop,
    wait_until,
)
from comfy_server import ComfyServer, PromptError, PromptInterrupted, ServerError

PATIENCE_S = 120.0
"""A prompt without an answer after this long hangs."""
STEP_TIMEOUT_S = 8.0
"""LEAPFROG_STEP_TIMEOUT of the server: how long a rank may be silent."""
LARGE = EXACT.sized(256, 256)
"""Needs memory that the ranks do not hold yet."""
SAME_AS_ALONE = (EXACT, LANES, KSAMPLER)
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

    strike: Callable[[Campaign, Fault], bool | None]
    moments: tuple[str, ...]
    may: tuple[str, ...] = ("right", "failed")
    says: str = NAMES_A_RANK
    repair: Callable[[Campaign], None] | None = None
    change: Callable[[Graph, Fault], None] | None = None
    workflow: Workflow | None = None
    weight: float = 1.0


@dataclass
class Figures:
    """What the campaign found."""

    injected: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    hangs: int = 0
    orphans: int = 0
    wrong: int = 0
    unclear: int = 0
    later: int = 0
    later_not_right: int = 0
    noticed: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    cancelled: list[float] = field(default_factory=list)
    cancelled_loading: list[float] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return self.hangs + self.orphans + self.wrong + self.unclear + self.later_not_right

    def line(self) -> str:
        """Everything in one line."""
        parts = [
            f"{self.injected.total()} injected of {len(self.injected)} kinds",
            f"{self.hangs} hangs, {self.orphans} orphans, {self.wrong} wrong pictures, {self.unclear} unclear errors",
            f"{self.later - self.later_not_right} of {self.later} later prompts right",
        ]
        if self.noticed:
            parts.append(f"killed rank reported after {statistics.median(self.noticed):.2f} s (median)")
        if self.again and self.cold:
            cold = statistics.median(self.cold)
            parts.append(f"pool back after {statistics.median(self.again):.1f} s (cold start {cold:.1f} s)")
        if self.cancelled:
            parts.append(f"cancel: one evaluation + {percentile(self.cancelled, 95) * 1000:.0f} ms (95th percentile)")
        return "faults: " + ", ".join(parts)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


class Campaign:
    """A server under attack, the pictures it drew before, and what has been found so far."""

    def __init__(self, base: Path, workflows: Sequence[Workflow], say: Callable[[str], None] = print):
        self.base = base
        self.figures = Figures()
        self.server = self._start()
        self.references: dict[str, np.ndarray] = {}
        self._workflows = workflows
        self._say = say
        self._numbers = iter(range(1, sys.maxsize))
        self._segments: set[str] = set()
        self._victim: str | None = None
        self._limited: list[psutil.Process] = []
        self._held: list[socket.socket] = []

    def _start(self) -> ComfyServer:
        return campaign_server(self.base, LEAPFROG_STEP_TIMEOUT=str(STEP_TIMEOUT_S)).start()

    # -- prompts ------------------------------------------------------------------------------------------------------

    def queue(self, workflow: Workflow, fault: Fault | None = None) -> str:
        """Queue a workflow, changed as the fault that is to hit it wants it."""
        graph = workflow.prompt(next(self._numbers))
        change = fault and KINDS[fault.kind].change
        if fault and change:
            change(graph, fault)
        return self.server.queue(graph)

    def make_references(self) -> None:
        """What each workflow draws while nothing is broken; those without approximation draw what ComfyUI draws."""
        for workflow in (ALONE, *self._workflows):
            self.references[workflow.name] = pixels(self.server, ended(self.server, self.queue(workflow), PATIENCE_S))
        theirs = self.references[ALONE.name].astype(int)
        for workflow in (one for one in SAME_AS_ALONE if one.name in self.references):
            if np.abs(self.references[workflow.name].astype(int) - theirs).max() > 1:
                raise AssertionError(f"{workflow.name} does not draw what ComfyUI draws")

    def answer(self, prompt_id: str, workflow: Workflow) -> tuple[str, str]:
        """What became of a prompt: right, wrong, failed, cancelled or hang, and the words of its error."""
        try:
            entry = ended(self.server, prompt_id, PATIENCE_S)
        except PromptInterrupted:
            return "cancelled", ""
        except PromptError as error:
            return "failed", str(error)
        except ServerError as error:
            return "hang", str(error)
        same = np.array_equal(pixels(self.server, entry), self.references[workflow.name])
        return ("right" if same else "wrong"), ""

    def when(self, prompt_id: str, kind: str) -> float | None:
        """The time of the first event of that kind."""
        events = self.server.events(prompt_id, kind)
        return events[0].time if events else None

    # -- one fault ----------------------------------------------------------------------------------------------------

    def inject(self, fault: Fault) -> None:
        kind = KINDS[fault.kind]
        self.server.forget_events()
        if fault.moment == LOADING:
            self.server.post("/free", {"unload_models": True})
            wait_until(lambda: not ranks(self.server), 20)
        ahead = self.queue(fault.followers[0]) if fault.moment == QUEUED else None
        victim = None if fault.moment == IDLE else self.queue(fault.workflow, fault)
        followers = fault.followers if ahead is None else fault.followers[1:]
        self._victim = victim
        behind = [(self.queue(one), one) for one in followers] if victim and not kind.repair else []
        self._await(fault, victim, ahead)
        struck = time.monotonic()
        if kind.strike(self, fault) is not False:
            self.figures.injected[fault.kind] += 1
        if fault.kind in ENDS_SERVER:
            said = "server ended"
        else:
            said = self._judge(fault, victim or self.queue(fault.workflow, fault), struck, ahead)
        if kind.repair:
            kind.repair(self)
        began = time.monotonic()
        if not behind or said.startswith("hang"):  # the queue went with the server that hung
            behind = [(self.queue(one), one) for one in followers]
        for at, (prompt_id, workflow) in enumerate(behind):
            self._follow(fault, prompt_id, workflow, said)
            if at == 0:
                self._time_pool(fault, prompt_id, struck, said)
        self._look_for_orphans()
        self.figures.open_files.append(psutil.Process(self.server.pid).num_fds())
        self._say(f"{fault}: {said} ({began - struck:.1f} s), then {time.monotonic() - began:.1f} s")

    def _await(self, fault: Fault, victim: str | None, ahead: str | None) -> None:
        """Until the moment has come."""
        if fault.moment == LOADING:
            wait_until(lambda: len(ranks(self.server)) == RANKS, 20)
            first = min(self.figures.cold, default=5.0)  # later than that it would not be loading any more
            wait_until(lambda: bool(self.server.events(victim, "progress")), fault.dice * first)
        elif fault.moment != IDLE:
            hit = ahead or victim
            try:
                begun = self.server.wait_event(
                    "executing", hit, PATIENCE_S, lambda event: event.data["node"] == "sample"
                )
                if fault.moment == BEGINNING:
                    time.sleep(max(0.0, begun.time + fault.dice * 0.3 - time.monotonic()))
                    return
                self.server.wait_event("progress", hit, 20, lambda event: event.data["value"] >= fault.step)
                time.sleep(fault.dice * 0.05)
            except ServerError:
                return  # it does not come that far: then it is hit now

    def _judge(self, fault: Fault, victim: str, struck: float, ahead: str | None) -> str:
        kind = KINDS[fault.kind]
        if ahead:
            self._follow(fault, ahead, fault.followers[0], "")
        what, words = self.answer(victim, fault.workflow)
        self.figures.answers[what] += 1
        first = words.splitlines()[0] if words else ""
        if what == "hang":
            self.figures.hangs += 1
            self._complain(fault, words)
            self._restart()
        elif what == "wrong":
            self.figures.wrong += 1
            self._complain(fault, "the prompt that was hit drew a wrong picture")
        elif what not in kind.may or (what == "failed" and not re.search(kind.says, words, re.DOTALL)):
            self.figures.unclear += 1
            self._complain(fault, f"{what}: {words}")
        if what == "failed" and fault.kind in KILLS and fault.moment != IDLE:
            told = self.when(victim, "execution_error")
            self.figures.noticed.append((told or time.monotonic()) - struck)
        if what == "cancelled":
            self._time_cancel(fault, victim, struck)
        return f"{what} {first:.160}".strip()

    def _follow(self, fault: Fault, prompt_id: str, workflow: Workflow, said: str) -> None:
        """A prompt that nothing was done to."""
        what, words = self.answer(prompt_id, workflow)
        self.figures.later += 1
        if what == "right":
            return
        self.figures.later_not_right += 1
        self.figures.wrong += what == "wrong"
        self.figures.hangs += what == "hang"
        self._complain(fault, f"after '{said}' the next prompt, {workflow.name}, was {what}: {words}")
        if what == "hang":
            self._restart()

    def _time_pool(self, fault: Fault, prompt_id: str, struck: float, said: str) -> None:
        began, stepped = self.when(prompt_id, "execution_start"), self.when(prompt_id, "progress")
        if began is None or stepped is None:
            return
        if fault.kind in KILLS and said.startswith("failed") and fault.moment != IDLE:
            self.figures.again.append(stepped - struck)
        if fault.kind == "free" and fault.moment != IDLE:
            self.figures.cold.append(stepped - began)

    def _time_cancel(self, fault: Fault, victim: str, struck: float) -> None:
        told = self.when(victim, "execution_interrupted")
        steps = [event for event in self.server.events(victim, "progress") if event.time <= struck]
        if told is None:
            return
        if fault.moment == LOADING:
            self.figures.cancelled_loading.append(told - struck)
        elif fault.moment == SAMPLING and len(steps) > 1 and steps[-1].data["value"] > steps[0].data["value"]:
            done = steps[-1].data["value"] - steps[0].data["value"]
            self.figures.cancelled.append(max(0.0, told - struck - (steps[-1].time - steps[0].time) / done))

    # -- what is left -------------------------------------------------------------------------------------------------

    def _look_for_orphans(self) -> None:
        """Ranks that are not the server's own two, and shared memory that nobody has mapped any more."""
        own = {one.pid for one in ranks(self.server)}
        mapped = segments(self.server.pid)
        stray = [one for one in self.server.processes() if is_rank(one) and one.pid not in own]
        lost = [name for name in self._segments - mapped if (SHARED_MEMORY / name).exists()]
        self._segments |= mapped
        if stray or lost or len(own) > RANKS:
            self.figures.orphans += len(stray) + len(lost) + max(0, len(own) - RANKS)
            self._say(f"ORPHANS: {stray} {lost} {own}")
            self._segments -= set(lost)

    def _complain(self, fault: Fault, what: str) -> None:
        self._say(f"BAD {fault}: {what}")

    def kill_server(self) -> None:
        """kill -9 of ComfyUI; nothing of it may be left. Another one starts."""
        self._segments |= segments(self.server.pid)
        self.server.kill9()
        left = self.server.survivors(10)
        lost = [name for name in self._segments if (SHARED_MEMORY / name).exists()]
        if left or lost:
            self.figures.orphans += len(left) + len(lost)
            self._say(f"ORPHANS after kill -9 of ComfyUI: {left} {lost}")
        self._segments.clear()
        self.server.stop()
        self.server = self._start()

    def _restart(self) -> None:
        try:
            self.server.stop()
        except ServerError as error:
            self.figures.orphans += 1
            self._say(f"ORPHANS: {error}")
        self.server = self._start()

    def close(self) -> None:
        """End the server and look once more for what is left of it."""
        self._segments |= segments(self.server.pid)
        try:
            self.server.stop()
        except ServerError as error:
            self.figures.orphans += 1
            self._say(f"ORPHANS: {error}")
        lost = [name for name in self._segments if (SHARED_MEMORY / name).exists()]
        # PyTorch makes that folder, of its own accord
        files = [path.name for path in (self.base / "tmp").iterdir() if not path.name.startswith("torchinductor_")]
        if lost or files:
            self.figures.orphans += len(lost) + len(files)
            self._say(f"ORPHANS at the end: {lost} {files}")

    # -- ways to break things -----------------------------------------------------------------------------------------

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
        self.server.interrupt(self._victim)

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


def _signal(what: signal.Signals) -> Callable[[Campaign, Fault], bool]:
    return lambda campaign, fault: campaign.signal(fault, what)


KINDS: dict[str, Kind] = {
    "kill -9": Kind(_signal(signal.SIGKILL), (LOADING, BEGINNING, SAMPLING, SAMPLING, IDLE), weight=3),
    "SIGTERM": Kind(_signal(signal.SIGTERM), (LOADING, BEGINNING, SAMPLING, IDLE), weight=1.5),
    "hang": Kind(_signal(signal.SIGSTOP), (LOADING, BEGINNING, SAMPLING, IDLE), weight=1),
    "pause": Kind(Campaign.pause, (LOADING, BEGINNING, SAMPLING, IDLE), may=("right",), weight=3),
    "cancel": Kind(
        lambda campaign, fault: campaign.cancel(), (LOADING, BEGINNING, SAMPLING, SAMPLING, SAMPLING),
        may=("right", "cancelled"), weight=6,
    ),
    "free": Kind(
        lambda campaign, fault: campaign.server.post("/free", {"unload_models": True, "free_memory": fault.dice < 0.3}),
        (LOADING, SAMPLING, IDLE), may=("right",), weight=1.5,
    ),
    "missing file": Kind(
        Campaign.hide_file, (QUEUED,), may=("failed",), says=rf"(?s)FileNotFound|no longer there|{DENOISER}",
        repair=Campaign.restore_file,
    ),
    "torn file": Kind(
        Campaign.tear_file, (QUEUED,), may=("failed",), says=rf"(?s){DENOISER}|{NAMES_A_RANK}|SafetensorError|header",
        repair=Campaign.restore_file,
    ),
    "no memory": Kind(
        Campaign.starve, (BEGINNING, SAMPLING, IDLE), says=NAMES_A_RANK, repair=Campaign.feed, workflow=LARGE,
    ),
    "exception": Kind(lambda campaign, fault: None, (SAMPLING,), change=spoil, may=("failed",)),
    "garbage": Kind(
        Campaign.garbage, (LOADING, BEGINNING, SAMPLING, IDLE), may=("right",), repair=Campaign.hang_up, weight=3,
    ),
    "kill -9 of ComfyUI": Kind(
        lambda campaign, fault: campaign.kill_server(), (LOADING, BEGINNING, SAMPLING, IDLE),
        repair=lambda campaign: None, weight=0.7,
    ),
}  # fmt: skip
KILLS = ("kill -9", "SIGTERM")
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


def run(
    count: int, seed: int, kinds: Sequence[str] = tuple(KINDS), workflows: Sequence[Workflow] = WORKFLOWS,
    say: Callable[[str], None] = print,
) -> Figures:  # fmt: skip
    """A campaign of ``count`` faults."""
    faults = schedule(count, seed, kinds, workflows)
    used = {one.name: one for fault in faults for one in (fault.workflow, *fault.followers)}
    with campaign_base() as base, until_told_to_stop() as stop:
        campaign = Campaign(base, list(used.values()), say)
        try:
            campaign.make_references()
            for fault in faults:
                if stop.is_set():
                    break
                campaign.inject(fault)
        finally:
            campaign.close()
    return campaign.figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="faults to inject")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.count} faults", flush=True)
    began = time.monotonic()
    figures = run(args.count, args.seed, args.kinds.split(","), say=lambda text: print(text, flush=True))
    minutes = (time.monotonic() - began) / 60
    print_details(figures, minutes)
    print(figures.line())
    sys.exit(1 if figures.bad else 0)


def print_details(figures: Figures, minutes: float) -> None:
    """Every figure by itself."""
    print(f"\n{minutes:.0f} minutes; " + ", ".join(f"{count} {kind}" for kind, count in figures.injected.items()))
    print("prompts that were hit: " + ", ".join(f"{count} {what}" for what, count in figures.answers.items()))
    rows: dict[str, list[Any]] = {
        "killed rank reported, s": figures.noticed,
        "cold start to the first step, s": figures.cold,
        "kill to the first step of the next prompt, s": figures.again,
        "cancel beyond one evaluation, s": figures.cancelled,
        "cancel while loading, s": figures.cancelled_loading,
    }
    for title, values in rows.items():
        if values:
            print(
                f"{title}: median {statistics.median(values):.2f}, 95th percentile {percentile(values, 95):.2f}, "
                f"largest {max(values):.2f} of {len(values)}"
            )
    if figures.open_files:
        print(f"open files of ComfyUI: {figures.open_files[0]} at first, {figures.open_files[-1]} at the end")


if __name__ == "__main__":
    main()
