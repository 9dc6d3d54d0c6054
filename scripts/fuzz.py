"""Malformed frames, thrown at every listener and parser of the backend: `make fuzz`.

    python scripts/fuzz.py --frames 1000000 --seed 1

Every frame is made by a generator with a seed, so the same command throws the same ones. What they hit:

    door         callers at the listener of a pool: garbage, parts of a proof, replays, wrong ranks, hang-ups, silence
    knock        answers to a rank that knocks: garbage, wrong proofs
    host, rank   a channel's two ends: announced lengths, msgpack garbage, mutated messages of every type
    line         the same at the host's end of the line to another machine's joiner
    host courier, rank courier
                 the two ends of the channel to a rank on another machine, which has tensors behind its messages
    tree         specs and heads of tensors in shared memory
    orders       the line that starts a rank, and the options of a recipe
    description  the functions inside the denoiser that a call names

A crash is an exception that the parser does not document, or a frame that keeps it for ever. Accepted is a frame that
gets what it must not: in without a proof, a message with a number out of its bounds, memory outside of the segment, a
function that is not ComfyUI's own. A mutated frame may still be well formed; those are counted apart. Allocation is
Python's own (tracemalloc), the peak of one frame; its bound is 256 KiB and 80 times the frame's length. For
what tracemalloc does not see, the process gets 2 GiB of address space over what it has at the start.

Malformed values and bytes come from fuzz_mutator.py, good messages to begin with from fuzz_messages.py. What is thrown
at each target, and how a frame that got too far is told, is in fuzz_targets.py.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import logging
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable

from pack import add_comfyui, load_pack

add_comfyui()
load_pack()

import torch  # noqa: E402

from fuzz_messages import Accepted  # noqa: E402
from fuzz_mutator import Mutator  # noqa: E402
from fuzz_targets import ROUND, TARGETS  # noqa: E402

ALLOWED = 256 << 10
PER_BYTE = 80
STUCK_S = 120.0
ADDRESS_SPACE = 2 << 30


def campaign(frames: int, seed: int, say: Callable[[str], object] = print) -> dict[str, int]:
    """Throw ``frames`` frames. Returns the counts "frames", "crashes", "accepted", "over", "formed" and "peak" (bytes).

    What was found is said, with the target and the number of its frame.
    """
    counts = Counter(frames=0, crashes=0, accepted=0, over=0, formed=0, peak=0)
    for module in ("comfy.sd", "comfy.utils", "comfy_extras.nodes_freelunch"):  # so that no frame pays for them
        importlib.import_module(module)
    tracemalloc.start()
    logging.disable(logging.ERROR)  # couriers tell what they refuse
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
        logging.disable(logging.NOTSET)
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
