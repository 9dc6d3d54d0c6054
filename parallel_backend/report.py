"""What a run did: one line for the log, and a Chrome trace with one row per rank."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .protocol import Done, Loaded
from .settings import trace_dir


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
    """Collected by the host while a run goes on.

    ``calls`` are the denoiser calls, numbered as they were sent, with their kinds, and ``seconds`` the time from
    sending each to having its result; calls may overlap. ``ranks`` are those that are left, by the numbers that they
    had at the start; a pool numbers its own anew. ``notes`` are shown as they are. ``bad`` tells of the first output
    that was not finite.
    """

    title: str
    devices: Sequence[str]
    loaded: list[Loaded] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    calls: dict[int, str] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bad: str = ""
    began: float = field(default_factory=time.perf_counter)
    ended_at: float = 0.0

    def __post_init__(self) -> None:
        self.ranks = list(range(len(self.devices)))

    def holds(self, parts: Sequence[Loaded]) -> None:
        """What each rank holds by now."""
        self.loaded = [Loaded() for _ in self.devices]
        for rank, part in zip(self.ranks, parts, strict=False):
            self.loaded[rank] = part

    def sent(self, call: int, kind: str) -> None:
        if not self.calls:
            self.began = time.perf_counter()
        self.calls[call] = kind

    def replied(self, call: int, rank: int, reply: Done) -> None:
        span = Span(self.ranks[rank], call, self.calls.get(call, ""), reply.begin, reply.end, reply.waited, reply.sent)
        self.spans.append(span)

    def ended(self, call: int, seconds: float) -> None:
        self.seconds[call] = seconds
        self.ended_at = time.perf_counter()

    def summary(self) -> str:
        """The run in a line."""
        kinds = list(self.calls.values())
        counts = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        took = f"{self._wall:.2f} s on {len(self.devices)} ranks"
        return f"{self.title}: {len(kinds)} denoiser calls ({counts}) in {took}"

    @property
    def _wall(self) -> float:
        return max(self.ended_at - self.began, 1e-9)

    def lines(self) -> list[str]:
        """What the log shows at the end of a run."""
        lines, wall = [self.summary()], self._wall
        for rank, device in enumerate(self.devices):
            own = [s for s in self.spans if s.rank == rank]
            busy = sum(s.end - s.begin - s.waited for s in own)
            held = self.loaded[rank] if self.loaded else Loaded()
            sent = sum(s.sent for s in own) / max(1, len(own))
            span = f", {held.units[0]} to {held.units[-1]}" if held.units else ""
            lines.append(
                f"  rank {rank} on {device}{span}: {held.nbytes / 1e6:.1f} MB of weights, busy {busy / wall:.0%}, "
                f"{sent / 1e3:.0f} kB sent per call"
            )
        return lines + [f"  {note}" for note in (self.bad, *self.notes) if note]

    def save_trace(self) -> Path | None:
        """Write the run as Chrome trace JSON into the folder named by LEAPFROG_TRACE_DIR; None where it is not set."""
        folder = trace_dir()
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
        path = folder / f"run-{os.getpid()}-{time.time_ns()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        other = {"title": self.title, "ranks": weights, "call_s": list(self.seconds.values())}
        path.write_text(json.dumps({"traceEvents": events, "otherData": other}))
        return path
