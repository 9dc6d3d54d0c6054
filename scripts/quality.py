"""How close both nodes come to ComfyUI alone: every mode, preset and predictor, on models that really denoise.

For each model a table, a CSV file and a picture (fidelity against speed) go to docs/quality/. Every sample has a prompt
that training never saw and a seed of its own; it is compared with the one that ComfyUI alone makes in as many steps.
Closeness to one's own n steps flatters a parallel method, so each sample is also compared with a nearly converged one
and judged, and one device's ways to save the same time stand beside: fewer steps of Euler and DPM++ 2M, and ComfyUI's
EasyCache. Nothing is timed. Ideal speed counts, for the split, exact evaluations whole and others as 1/N; for ParaStep,
rounds, however many evaluations they have; for the cache, evaluations that are not skipped.

    python scripts/quality.py --samples 4 --out build/quality    # what `make quality` does
    python scripts/quality.py --samples 64                       # the long form
    python scripts/quality.py --only stride                      # only what is named so, into the tables that are there
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np

import quality_bench
from pack import ROOT
from quality_bench import Subject
from quality_report import Row, about_and_command, write
from quality_summary import read, write_summary
from quality_ways import EXACT, EXACT_ROUNDS, ROUNDS, SPLITS, Alone, CacheWay, Made, Run, Way

CONVERGED = ("dpmpp_2m", 125)
PEERS = {"euler": "Euler, fewer steps", "dpmpp_2m": "DPM++ 2M, fewer steps"}
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""EasyCache's reuse_threshold."""
TABLES_AT_ONCE = 3
"""More than one, so that no core waits at a table's end; not all, so that the first ones are there early."""


@dataclass(frozen=True)
class Batch:
    """All samples in each of the runs, under way: some of the samples in each of the parts."""

    runs: Sequence[Run]
    parts: Sequence[Future[list[Made]]]

    def made(self, run: Run) -> Made:
        at = self.runs.index(run)
        latents, counts = zip(*(part.result()[at] for part in self.parts), strict=True)
        return Made(np.concatenate(latents), [one for part in counts for one in part])


class Work:
    """What workers do for one model; nothing else is to be under way when an object is made."""

    def __init__(self, pool: ProcessPoolExecutor, subject: Subject, options: argparse.Namespace):
        self.name = subject.name
        self._pool, self._subject, self._options = pool, subject, options
        self._goes_on = bool(options.only.pattern) and (options.out / f"{page_of(self.name, options)}.md").is_file()
        self._splits: list[Batch] = []
        self._modes = [way for way in SPLITS if options.only.search(way.title)]
        few = min(options.degrees)
        rounds = [
            replace(EXACT_ROUNDS, degree=few),
            *(replace(way, degree=n) for n in options.degrees for way in ROUNDS),
        ]
        self._rounds = [way for way in rounds if options.only.search(way.title)]
        self.facts = pool.submit(quality_bench.facts, subject).result()
        self._cuts: dict[int, str] = {}
        for degree in options.degrees if self._modes else ():  # one after another: unit times are measured
            given = [cut for cut in options.cut if cut.count(",") == degree - 2]
            cut = given[0] if given else pool.submit(quality_bench.find_cut, subject, degree).result()
            if cut is not None:
                print(self.name, f"{degree} components, cut {cut}", flush=True)
                self._cuts[degree] = cut

    def start_splits(self) -> None:
        """For all numbers of steps at once, by the ranks of a way: they take seconds to start, and hold half a gigabyte
        each. All models' together have about two ranks of each degree on a core."""
        self._alone(*CONVERGED)  # once for all tables
        for degree, cut in self._cuts.items():
            modes = [EXACT, *self._modes] if degree == min(self._cuts) else self._modes
            ways = [replace(mode, degree=degree, cut=cut) for mode in modes]
            runs = [Run(way, n) for way in sorted(ways, key=lambda way: way.ranks) for n in self._options.steps]
            self._splits.append(self._start(runs, 2 * self._options.jobs // (degree * len(self._options.models))))

    def rows(self, steps: int) -> list[Row]:
        """All that is compared with so many steps of ComfyUI alone."""
        alone, _ = self._alone(self._subject.sampler, steps), self._alone(*CONVERGED)
        rounds = [self._start_one(way, steps) for way in self._rounds]
        caches = [CacheWay(threshold) for threshold in THRESHOLDS]
        caches = [self._start_one(way, steps) for way in caches if self._options.only.search(way.title)]
        references = [self._pictures(self._subject.sampler, steps), self._pictures(*CONVERGED)]
        against = alone.made(alone.runs[0]).latents, *(one.result() for one in references)
        found: list[Future[Row]] = []

        def compare(batch: Batch, run: Run, title: str = "") -> float:
            """Starts to; the ideal speed."""
            made = batch.made(run)
            speed = steps / run.steps * run.way.speed(made.counts, steps)
            if math.isfinite(speed):
                about = title or run.way.title, run.way.degree, run.steps, steps, speed, made.latents
                found.append(self._pool.submit(quality_bench.compare, self._subject, *about, *against))
            return speed

        compare(alone, alone.runs[0])
        ours = [(batch, run) for batch in [*self._splits, *rounds] for run in batch.runs if run.steps == steps]
        saved = {round(steps / compare(*one)) for one in ours}
        fewer = sorted(saved - {steps}, reverse=True)
        for batch, title in [(self._alone(name, n), title) for name, title in PEERS.items() for n in fewer]:
            compare(batch, batch.runs[0], title)
        for batch in caches:
            compare(batch, batch.runs[0])
        rows = []
        for row in found:
            print(self.name, row.result().text(), flush=True)
            rows.append(row.result())
        return rows

    def write(self, rows: Sequence[Row]) -> None:
        options, facts = self._options, self.facts
        about = (
            f"{options.samples} samples, {options.sampler}, CFG {facts.cfg:g}, scheduler {facts.scheduler}; "
            f"converged: {CONVERGED[1]} steps of {CONVERGED[0]}; cut at {' or '.join(self._cuts.values())}"
        )
        command = options.command if len(options.models) == 1 else f"{options.command} --models {self.name}"
        name = page_of(self.name, options)
        if self._goes_on:  # the tables' own words, too
            rows = merged(read(options.out / f"{name}.csv"), rows)
            about, command = about_and_command(options.out / f"{name}.md")
            since = f"; since then `{options.command}`"
            about = about.replace(since, "") + since  # this table may have been written before
        write(options.out, name, facts.title, about, command, sorted(rows, key=place))
        write_summary(options.out)

    def _start(self, runs: Sequence[Run], parts: int) -> Batch:
        samples = self._options.samples
        parts = min(samples, max(1, parts))
        ends = [samples * at // parts for at in range(parts + 1)]
        shares = [range(*share) for share in pairwise(ends)]
        return Batch(runs, [self._pool.submit(quality_bench.make, self._subject, runs, share) for share in shares])

    def _start_one(self, way: Way, steps: int) -> Batch:
        return self._start([Run(way, steps)], self._options.jobs)

    @cache  # noqa: B019  few objects for the whole script
    def _alone(self, sampler: str, steps: int) -> Batch:
        """What ComfyUI alone makes."""
        return self._start_one(Alone(sampler), steps)

    @cache  # noqa: B019
    def _pictures(self, sampler: str, steps: int) -> Future[np.ndarray]:
        alone = self._alone(sampler, steps)
        return self._pool.submit(quality_bench.pictures, self._subject, alone.made(alone.runs[0]).latents)


def page_of(model: str, options: argparse.Namespace) -> str:
    """The name of a table's files."""
    return f"{model}-{options.sampler}" + (f"-cfg{options.cfg:g}" if options.cfg else "")


def place(row: Row) -> tuple[int, int, int, int]:
    """Where a row stands in its table."""
    ways = [[way.title for way in group] for group in ((Alone(""), EXACT), SPLITS, (EXACT_ROUNDS, *ROUNDS))]
    group = next((at for at, titles in enumerate(ways) if row.mode in titles), len(ways))
    if group < len(ways):
        return row.of, group, row.degree or 0, ways[group].index(row.mode)
    peers = list(PEERS.values())
    return row.of, group, peers.index(row.mode) if row.mode in peers else len(peers), -row.steps


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows of two tables; of those that are in both the new ones."""

    def key(row: Row) -> tuple[str, int | None, int, int]:
        return row.mode, row.degree, row.steps, row.of

    return list(({key(row): row for row in old} | {key(row): row for row in new}).values())


def measure(options: argparse.Namespace, pool: ProcessPoolExecutor, threads: ThreadPoolExecutor) -> None:
    """All models. What a core does next does not depend on the model, so that none waits before the end."""
    calibrate = options.steps[0] if options.calibrate else 0
    subjects = [Subject(name, options.samples, options.sampler, calibrate, options.cfg) for name in options.models]
    works = [Work(pool, subject, options) for subject in subjects]
    for what, sensitivity in sorted({known for work in works for known in work.facts.sensitivities.items()}):
        print(f"sensitivity of {what}: {sensitivity:.3g}")
    for work in works:
        work.start_splits()
    tables = {threads.submit(work.rows, steps): work for work in works for steps in options.steps}
    for table in as_completed(tables):
        table.result()
        work = tables[table]
        work.write([row for one, of in tables.items() if of is work and one.done() for row in one.result()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["flux", "unet", "wan", "audio"])
    parser.add_argument("--steps", type=numbers, default=[20, 50, 8], help="such as 20,50")
    parser.add_argument("--degrees", type=numbers, default=[2, 4, 8], help="components and lanes")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sampler", default="euler", help="of all but the peers")
    parser.add_argument("--cfg", type=float, default=0.0, help="in place of what each model is meant for")
    parser.add_argument("--calibrate", action="store_true", help="ParaStep's bounds fitted to the model and sampler")
    parser.add_argument(
        "--only",
        type=re.compile,
        default=re.compile(""),
        help="ways that match this; where there is a table, its rows are replaced",
    )
    parser.add_argument("--cut", nargs="*", default=[], help="of the splits, such as 4 2,4,6, in place of the fastest")
    parser.add_argument("--jobs", type=int, default=cores(), help="worker processes, each with up to 5 GB of ranks")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality")
    options = parser.parse_args()
    options.command = shlex.join(["python", "scripts/quality.py", *sys.argv[1:]])
    for model in options.models if options.only.pattern else ():
        page = options.out / f"{page_of(model, options)}.md"
        about = about_and_command(page)[0] if page.is_file() else ""
        if about and not about.startswith(f"{options.samples} samples"):
            parser.error(f"the table of {model} is of {about.partition(',')[0]}")
    os.environ.setdefault("LEAPFROG_START_TIMEOUT", "1800")  # many ranks start at once on few cores
    os.environ["OMP_NUM_THREADS"] = "1"  # before workers load any library that reads it
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs, get_context("spawn"), quality_bench.prepare, (folder,)) as pool,
        ThreadPoolExecutor(TABLES_AT_ONCE) as threads,
    ):
        try:
            measure(options, pool, threads)
        except BaseException:
            for worker in active_children():  # whatever they are at; their ranks end with them
                worker.terminate()
            raise
    return 0


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numbers(text: str) -> Sequence[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
