"""What a run did: one line for the log, and a Chrome trace with one row per rank."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .protocol import Done, Loaded

TRACE_DIR = "LEAPFROG_TRACE_DIR"


@dataclass
class Span:
    """One evaluation on one rank; times in seconds of one clock."""

    rank: int
    call: int
    kind: str
    begin: float
    end: float
    waited: float
    sent: int


@dataclass
class RunReport:
    """Collected by the host while a run goes on. ``round_trips`` are seconds per denoiser call, seen from the host."""

    title: str
    devices: Sequence[str]
    loaded: Sequence[Loaded] = ()
    spans: list[Span] = field(default_factory=list)
    round_trips: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def add(self, call: int, kind: str, seconds: float, done: dict[int, Done]) -> None:
        self.round_trips.append(seconds)
        for rank, reply in done.items():
            self.spans.append(Span(rank, call, kind, reply.begin, reply.end, reply.waited, reply.sent))

    def lines(self) -> list[str]:
        """What the log shows at the end of a run."""
        calls = len(self.round_trips)
        kinds = {span.call: span.kind for span in self.spans}.values()
        counts = ", ".join(f"{list(kinds).count(k)} {k}" for k in dict.fromkeys(kinds))
        wall = sum(self.round_trips)
        lines = [f"{self.title}: {calls} denoiser calls ({counts}) in {wall:.2f} s on {len(self.devices)} ranks"]
        for rank, device in enumerate(self.devices):
            own = [s for s in self.spans if s.rank == rank]
            busy = sum(s.end - s.begin - s.waited for s in own)
            held = self.loaded[rank] if rank < len(self.loaded) else Loaded()
            sent = sum(s.sent for s in own) / max(1, len(own))
            span = f", {held.units[0]} to {held.units[-1]}" if held.units else ""
            lines.append(
                f"  rank {rank} on {device}{span}: {held.nbytes / 1e6:.1f} MB of weights, busy {busy / wall:.0%}, "
                f"{sent / 1e3:.0f} kB sent per call"
            )
        return lines

    def save_trace(self) -> Path | None:
        """Write the run as Chrome trace JSON into the folder named by LEAPFROG_TRACE_DIR; None where it is not set."""
        folder = os.environ.get(TRACE_DIR)
        if not folder or not self.spans:
            return None
        events = []
        for rank, device in enumerate(self.devices):
            events.append(
                {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank} {device}"}}
            )
        for s in self.spans:
            args = {"call": s.call, "waited_ms": s.waited * 1e3, "sent_bytes": s.sent}
            start, length = (s.begin - self.began) * 1e6, (s.end - s.begin) * 1e6
            events.append(
                {"ph": "X", "pid": 0, "tid": s.rank, "name": s.kind, "ts": start, "dur": length, "args": args}
            )
        weights = [{"rank": r, "bytes": held.nbytes, "units": held.units} for r, held in enumerate(self.loaded)]
        path = Path(folder) / f"run-{os.getpid()}-{time.time_ns()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        other = {"title": self.title, "ranks": weights, "round_trip_s": self.round_trips}
        path.write_text(json.dumps({"traceEvents": events, "otherData": other}))
        return path
