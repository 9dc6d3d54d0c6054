"""`make faults`: breaks things on purpose, at random moments, under a queue of prompts in a real headless ComfyUI.

Every prompt has to be answered in time, with the picture that its workflow drew before anything was broken or with an
error that says what happened, and the prompts behind it in the queue have to be right. The last line holds the figures.
What is done in which order follows from --seed; when exactly a prompt is hit depends on the machine.

What can be broken, and how, is in fault_kinds.py.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from campaign import (
    ALONE,
    EXACT,
    KSAMPLER,
    LANES,
    PATIENCE_S,
    RANKS,
    SHARED_MEMORY,
    WORKFLOWS,
    Workflow,
    campaign_base,
    ended,
    is_rank,
    pixels,
    ranks,
    segments,
    until_told_to_stop,
    wait_until,
)
from comfy_server import ComfyServer, PromptError, PromptInterrupted, ServerError
from fault_figures import Figures, print_details
from fault_kinds import (
    BEGINNING,
    ENDS_SERVER,
    IDLE,
    KILLS,
    KINDS,
    LOADING,
    LOST,
    QUEUED,
    SAMPLING,
    Breakable,
    Fault,
    schedule,
)
from where import choose

SAME_AS_ALONE = (EXACT, LANES, KSAMPLER)


class Campaign:
    """A server under attack, the pictures it drew before, and what has been found so far."""

    def __init__(
        self, base: Path, workflows: Sequence[Workflow], say: Callable[[str], None] = print, carry_on: bool = False
    ):
        self.figures = Figures()
        self.comfy = Breakable(base, carry_on)
        self.references: dict[str, np.ndarray] = {}
        self._workflows = workflows
        self._say = say
        self._numbers = iter(range(1, sys.maxsize))
        self._segments: set[str] = set()

    @property
    def server(self) -> ComfyServer:
        return self.comfy.server

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
        drawn, wanted = pixels(self.server, entry).astype(int), self.references[workflow.name].astype(int)
        same = np.abs(drawn - wanted).max() <= (1 if self.comfy.carry_on else 0)  # another device may round differently
        return ("right" if same else "wrong"), ""

    def _may(self, fault: Fault) -> tuple[str, ...]:
        return ("right",) if self.comfy.carry_on and fault.kind in LOST else KINDS[fault.kind].may

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
        self.comfy.victim = victim
        behind = [(self.queue(one), one) for one in followers] if victim and not kind.repair else []
        self._await(fault, victim, ahead)
        mapped = segments(self.server.pid)
        queued = bool(behind)
        struck = time.monotonic()
        if kind.strike(self.comfy, fault) is not False:
            self.figures.injected[fault.kind] += 1
        if fault.kind in ENDS_SERVER:
            self._replace_server(mapped)
            said = "server ended"
        else:
            said = self._judge(fault, victim or self.queue(fault.workflow, fault), struck, ahead)
        if kind.repair:
            kind.repair(self.comfy)
        began = time.monotonic()
        if not behind or said.startswith("hang"):  # the queue went with the server that hung
            behind = [(self.queue(one), one) for one in followers]
        over = (self.when(victim, "execution_success") or math.inf) < struck if victim else False
        # a rank that was killed behind its last step is first missed by the next prompt
        too_late = queued and (over or (said.startswith("right") and fault.kind in KILLS))
        for at, (prompt_id, workflow) in enumerate(behind):
            self._follow(fault, prompt_id, workflow, said, met=too_late and at == 0)
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
        elif what == "right" and fault.moment == QUEUED and (self.when(victim, "execution_start") or struck) < struck:
            pass  # it had begun before the fault came
        elif what not in self._may(fault) or (what == "failed" and not re.search(kind.says, words, re.DOTALL)):
            self.figures.unclear += 1
            self._complain(fault, f"{what}: {words}")
        if what == "failed" and fault.kind in KILLS and fault.moment != IDLE:
            told = self.when(victim, "execution_error")
            self.figures.noticed.append((told or time.monotonic()) - struck)
        if what == "cancelled":
            self._time_cancel(fault, victim, struck)
        return f"{what} {first:.160}".strip()

    def _follow(self, fault: Fault, prompt_id: str, workflow: Workflow, said: str, met: bool = False) -> None:
        """A prompt that nothing was done to, or that ``met`` the fault, which came too late for the one before."""
        what, words = self.answer(prompt_id, workflow)
        kind = KINDS[fault.kind]
        if met and what in self._may(fault) and what == "failed" and re.search(kind.says, words, re.DOTALL):
            return
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

    def _replace_server(self, mapped: set[str]) -> None:
        """After kill -9 of ComfyUI, which had these segments: nothing of it may be left. Another one starts."""
        self._segments |= mapped
        left = self.server.survivors(10)
        lost = [name for name in self._segments if (SHARED_MEMORY / name).exists()]
        if left or lost:
            self.figures.orphans += len(left) + len(lost)
            self._say(f"ORPHANS after kill -9 of ComfyUI: {left} {lost}")
        self._segments.clear()
        self.server.stop()
        self.comfy.start_again()

    def _restart(self) -> None:
        self._stop()
        self.comfy.start_again()

    def _stop(self) -> None:
        self.figures.finished += self.server.log.count("The run is finished on")
        try:
            self.server.stop()
        except ServerError as error:
            self.figures.orphans += 1
            self._say(f"ORPHANS: {error}")

    def close(self) -> None:
        """End the server and look once more for what is left of it."""
        self._segments |= segments(self.server.pid)
        self._stop()
        lost = [name for name in self._segments if (SHARED_MEMORY / name).exists()]
        names = [path.name for path in (self.comfy.base / "tmp").iterdir()]
        files = [name for name in names if not name.startswith("torchinductor_")]  # PyTorch's, of its own accord
        if lost or files:
            self.figures.orphans += len(lost) + len(files)
            self._say(f"ORPHANS at the end: {lost} {files}")


def run(
    count: int, seed: int, kinds: Sequence[str] = tuple(KINDS), workflows: Sequence[Workflow] = WORKFLOWS,
    say: Callable[[str], None] = print, carry_on: bool = False,
) -> Figures:  # fmt: skip
    """A campaign of ``count`` faults."""
    faults = schedule(count, seed, kinds, workflows)
    used = {one.name: one for fault in faults for one in (fault.workflow, *fault.followers)}
    with campaign_base() as base, until_told_to_stop() as stop:
        campaign = Campaign(base, list(used.values()), say, carry_on)
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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    what.add_argument(
        "--carry-on", action="store_true", help="break ranks only: with LEAPFROG_CARRY_ON no picture may be lost"
    )
    args = parser.parse_args()
    choose()
    print(f"seed {args.seed}, {args.count} faults", flush=True)
    began = time.monotonic()
    kinds, workflows = (LOST, SAME_AS_ALONE) if args.carry_on else (args.kinds.split(","), WORKFLOWS)
    figures = run(args.count, args.seed, kinds, workflows, lambda text: print(text, flush=True), args.carry_on)
    minutes = (time.monotonic() - began) / 60
    print_details(figures, minutes)
    for text in figures.late:
        print(f"too slow: {text}")
    print(figures.line())
    sys.exit(1 if figures.bad or figures.late else 0)


if __name__ == "__main__":
    main()
