"""Ranks started, asked and ended: what every generation needs, without a model."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Sequence

import torch

from ..devices import CPU, kind_of
from ..errors import LeapfrogError
from ..pool import Pool, Tick
from ..roundtrips import LARGE, link_between, round_trip
from ..starting import ComfyHost, backend_of
from ..supervisor import acquire, close_all
from .sheet import Sheet

LATENT = (1, 4, 64, 64)
ECHOES = 50
WARM = 5
LARGE_NCCL = 64 << 20
NO_DIRECT_ACCESS = (
    "Set the environment variable NCCL_P2P_DISABLE=1 and run the doctor again; if that helps, start ComfyUI with it. "
    "In a virtual machine or with IOMMU on, GPUs often cannot reach each other."
)


def self_test(sheet: Sheet, devices: Sequence[str], host: ComfyHost, tick: Tick) -> None:
    """Rows of a pool's life; problems for what does not work. The ranks are gone when this returns."""
    began = time.perf_counter()
    said = _Listener()
    with said:
        try:
            pool = acquire(devices, host, tick, sheet)
        except LeapfrogError as error:
            _failed(sheet, "start", error, said)
            return
        pids = pool.pids
        try:
            took = f"{time.perf_counter() - began:.1f} s"
            sheet.row(
                "start", f"ok, {len(devices)} ranks, talking {backend_of(devices)[0]}, in {took}{_free(pool, tick)}"
            )
            _echo(sheet, pool, tick)
            _links(sheet, pool, tick)
        except LeapfrogError as error:
            _failed(sheet, "answers", error, said)
            return
        finally:
            close_all()
        left = _alive(pids)
        if left:
            sheet.failed("end", f"{left} ranks did not end.", "End these processes by hand, and please report this.")
        else:
            sheet.row("end", "ok, no process left")


def _alive(pids: Sequence[int]) -> int:
    """How many of these processes are there."""
    try:
        import psutil
    except ImportError:  # said among the packages
        return 0
    return sum(psutil.pid_exists(pid) for pid in pids)


def _free(pool: Pool, tick: Tick) -> str:
    free = [f"{d} {f / 1e9:.1f} GB" for d, f in zip(pool.devices, pool.free(tick), strict=True) if f is not None]
    return f"; free memory: {', '.join(free)}" if free else ""


def _failed(sheet: Sheet, name: str, error: LeapfrogError, said: _Listener) -> None:
    rank = f" (rank {error.report.rank})" if error.report.rank >= 0 else ""
    sheet.failed(name, f"{error.report.message}{rank}", error.report.hint)
    sheet.last_words([*said.lines, *error.report.traceback.splitlines()])


def _echo(sheet: Sheet, pool: Pool, tick: Tick) -> None:
    """A small latent to each rank and back, as often as it takes to know how long."""
    latent = torch.rand(LATENT)
    told = []
    for rank in range(len(pool.devices)):
        trips = [round_trip(pool, latent, [rank], tick) for _ in range(WARM + ECHOES)]
        if not all(torch.equal(back[rank], latent) for _, back in trips):
            sheet.problem(
                f"Rank {rank} on {pool.devices[rank]} sends back something else than it was sent.",
                "Please report this with the whole text above; the machine's memory or that GPU may be broken.",
            )
        told.append(f"rank {rank} {1e3 * statistics.median(seconds for seconds, _ in trips[WARM:]):.2f} ms")
    sheet.row("round trip", f"{', '.join(told)} ({latent.nbytes >> 10} KiB there and back, median of {ECHOES})")


def _links(sheet: Sheet, pool: Pool, tick: Tick) -> None:
    """Every pair of ranks, one after another."""
    nccl = all(kind_of(device) != CPU for device in pool.devices)
    for first, second in itertools.combinations(range(len(pool.devices)), 2):
        name = f"rank {first} to {second}"
        try:
            link, intact = link_between(pool, first, second, tick, LARGE_NCCL if nccl else LARGE)
        except LeapfrogError as error:
            if nccl:
                where = f"{pool.devices[first]} and {pool.devices[second]}"
                sheet.failed(name, f"Nothing goes between {where}: {error.report.message}", NO_DIRECT_ACCESS)
                sheet.last_words(error.report.traceback.splitlines())
                return
            raise
        sheet.row(name, f"{link.bytes_per_second / 1e6:,.0f} MB/s, latency {link.latency * 1e6:,.0f} us")
        if not intact:
            where = f"{pool.devices[first]} and {pool.devices[second]}"
            sheet.problem(f"Data changes on its way between {where}.", NO_DIRECT_ACCESS)


class _Listener(logging.Handler):
    """Keeps what the backend logs, for the report of a failure; nothing goes to the terminal meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._logger = logging.getLogger("leapfrog")

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.extend(record.getMessage().splitlines())

    def __enter__(self) -> _Listener:
        self._logger.addHandler(self)
        self._propagates, self._logger.propagate = self._logger.propagate, False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagates
