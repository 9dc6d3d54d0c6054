"""`make soak`: hundreds of prompts through one real headless ComfyUI, and what it holds after the first and the last.

Blocks, LoRAs, picture sizes and cancelled prompts take turns. Half of the LoRA strengths are new each time. Every tenth
prompt is the same; what it draws has to stay the same, and memory is read after it. The last line holds the figures.
With --control ComfyUI alone serves the same queue: what grows there is not ours.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from campaign import (
    ALONE,
    EXACT,
    PATIENCE_S,
    RANKS,
    STEPS,
    WORKFLOWS,
    Workflow,
    campaign_base,
    campaign_server,
    ended,
    pixels,
    ranks,
    segments,
    until_told_to_stop,
)
from comfy_server import ComfyServer, PromptInterrupted
from where import ON_GPUS, choose

SIZES = ((128, 128), (128, 128), (160, 96), (96, 160), (192, 128))
COLLECTS_S = 11.0
"""ComfyUI collects garbage when the last collection is ten seconds old."""
BOUND = 0.02
MB = 1e6


@dataclass(frozen=True)
class Turn:
    """One prompt of the queue; ``cancel`` is the step at which it is cancelled."""

    workflow: Workflow
    cancel: int | None = None
    recurs: bool = True


@dataclass(frozen=True)
class Holdings:
    """What the processes hold: bytes that are their own (host first), the same of GPUs where ranks are on them, open
    files, shared memory segments, ranks."""

    prompts: int
    memory: tuple[int, ...]
    gpu_memory: tuple[int, ...]
    files: tuple[int, ...]
    segments: int
    pids: tuple[int, ...]

    @classmethod
    def of(cls, server: ComfyServer, prompts: int) -> Holdings:
        processes = [psutil.Process(server.pid), *ranks(server)]
        on_gpus = gpu_memory() if ON_GPUS else {}
        if ON_GPUS and (missing := {one.pid for one in processes} - on_gpus.keys()):
            raise RuntimeError(f"nvidia-smi does not list the processes {missing}; in a container it may not see them")
        return cls(
            prompts,
            tuple(one.memory_full_info().uss for one in processes),
            tuple(on_gpus[one.pid] for one in processes if ON_GPUS),
            tuple(one.num_fds() for one in processes),
            len(segments(server.pid)),
            tuple(one.pid for one in processes[1:]),
        )

    @property
    def everything(self) -> tuple[int, ...]:
        """Each process's memory, host first, and then each one's on GPUs."""
        return self.memory + self.gpu_memory

    def __str__(self) -> str:
        memory = ", ".join(f"{size / MB:.1f}" for size in self.memory)
        if self.gpu_memory:
            memory += " MB; on GPUs " + ", ".join(f"{size / MB:.1f}" for size in self.gpu_memory)
        return f"{self.prompts:4} prompts: {memory} MB; files {self.files}; segments {self.segments}"


def gpu_memory() -> dict[int, int]:
    """Bytes of GPUs by process, as the driver counts them."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    held: dict[int, int] = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        pid, mebibytes = (part.strip() for part in line.split(","))
        if mebibytes.isdigit():  # not where the driver does not say
            held[int(pid)] = held.get(int(pid), 0) + (int(mebibytes) << 20)
    return held


@dataclass
class Soak:
    """What came out. ``holdings`` were read after the first prompts, and then again and again up to the end."""

    prompts: int = 0
    cancelled: int = 0
    wrong: int = 0
    holdings: list[Holdings] = field(default_factory=list)

    @property
    def growth(self) -> list[float]:
        """Of everything that processes hold."""
        first, last = self.holdings[0], self.holdings[-1]
        return [end / begin - 1 for begin, end in zip(first.everything, last.everything, strict=True)]

    @property
    def more_files(self) -> int:
        return sum(self.holdings[-1].files) - sum(self.holdings[0].files)

    @property
    def more_segments(self) -> int:
        return self.holdings[-1].segments - self.holdings[0].segments

    @property
    def same_ranks(self) -> bool:
        return len({holding.pids for holding in self.holdings}) == 1

    def good(self, bound: float = BOUND, more_files: int = 0) -> bool:
        grown = max(self.growth) > bound or self.more_files > more_files or self.more_segments > 0
        return not grown and not self.wrong and self.same_ranks

    def line(self) -> str:
        """Everything in one line."""
        first, last = self.holdings[0], self.holdings[-1]
        names = ["host", *(f"rank {rank}" for rank in range(len(first.pids)))]
        names += [f"{name} on its GPU" for name in names if first.gpu_memory]
        memory = ", ".join(
            f"{name} {begin / MB:.0f} to {end / MB:.0f} MB ({growth:+.1%})"
            for name, begin, end, growth in zip(names, first.everything, last.everything, self.growth, strict=True)
        )
        return (
            f"soak: {self.prompts} prompts, {self.cancelled} of them cancelled, {self.wrong} wrong pictures, "
            f"memory from prompt {first.prompts} to {last.prompts}: {memory}, {self.more_files:+} open files, "
            f"{self.more_segments:+} segments, {'the same' if self.same_ranks else 'other'} ranks"
        )


def queue(count: int, seed: int, control: bool) -> list[Turn]:
    """The prompts in order. Every tenth is the one after which memory is read; one of ten is cancelled."""
    dice = random.Random(seed)
    turns = []
    for number in range(1, count + 1):
        if number % 10 == 0:
            turns.append(Turn(ALONE if control else EXACT))
            continue
        block = WORKFLOWS[number % len(WORKFLOWS)]
        workflow = (ALONE if control else block).sized(*dice.choice(SIZES))
        new = number % 4 == 1
        if number % 2:
            workflow = workflow.with_lora(0.2 + number / 1000 if new else dice.choice((0.4, 0.8)))
        turns.append(Turn(workflow, dice.randint(1, STEPS - 2) if number % 10 == 5 else None, not new))
    return turns


def run(
    count: int, seed: int = 7, every: int = 50, settle_s: float = COLLECTS_S, control: bool = False,
    say: Callable[[str], None] = print,
) -> Soak:  # fmt: skip
    """Queue ``count`` prompts one after another and read what is held after each ``every`` of them."""
    soak = Soak()
    drawn: dict[str, np.ndarray] = {}
    with campaign_base() as base, campaign_server(base) as server, until_told_to_stop() as stop:
        for number, turn in enumerate(queue(count, seed, control), 1):
            server.forget_events()
            picture = draw(server, turn, number)
            soak.prompts += 1
            soak.cancelled += picture is None
            if picture is not None and turn.recurs:
                soak.wrong += not np.array_equal(picture, drawn.setdefault(turn.workflow.name, picture))
            if number % every == 0:
                server.post("/history", {"clear": True})  # where ComfyUI keeps every prompt
                time.sleep(settle_s)
                soak.holdings.append(Holdings.of(server, number))
                say(f"{soak.holdings[-1]}; {soak.wrong} wrong")
            forget_pictures(base / "output")
            if stop.is_set():
                break
        if not control and len(soak.holdings[-1].pids) != RANKS:
            raise AssertionError(f"{len(soak.holdings[-1].pids)} ranks are alive instead of {RANKS}")
    return soak


def draw(server: ComfyServer, turn: Turn, number: int) -> np.ndarray | None:
    """The picture of a turn, None if it was cancelled in time."""
    prompt_id = server.queue(turn.workflow.prompt(number))
    try:
        if turn.cancel is not None:
            server.wait_event("progress", prompt_id, where=lambda event: event.data["value"] >= turn.cancel)
            server.interrupt(prompt_id)
        return pixels(server, ended(server, prompt_id, PATIENCE_S))
    except PromptInterrupted:
        return None


def forget_pictures(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--control", action="store_true", help="ComfyUI alone")
    args = parser.parse_args()
    choose()
    began = time.monotonic()
    soak = run(args.prompts, args.seed, control=args.control, say=lambda text: print(text, flush=True))
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    print(soak.line())
    sys.exit(0 if soak.good() else 1)


if __name__ == "__main__":
    main()
