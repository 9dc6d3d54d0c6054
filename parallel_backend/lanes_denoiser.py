"""ParaStep's denoiser: each rank holds the whole of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from .batching import Rows, batched, rows_of, with_chunks
from .denoiser import Patches, RemoteDenoiser, first_tensor, joined, room_for_output
from .pool import Call, Pool, Tick
from .protocol import Evaluate, Loaded, Recipe
from .schedules.parastep import row_shares
from .starting import ComfyHost


@dataclass(eq=False)
class LaneEvaluation:
    """An evaluation of so many lanes; once it is sent, rows from ``begin`` of a batch."""

    x: Any
    rows: Rows
    lanes: int = 1
    batch: _Batch | None = None
    begin: int = 0

    @property
    def ranks(self) -> list[int]:
        """The ranks that have its rows, in order."""
        assert self.batch
        end = self.begin + self.rows.count
        return [rank for rank, share in self.batch.shares.items() if share[0] < end and self.begin < share[1]]


@dataclass(eq=False)
class _Batch:
    """A call with the rows of ``unread`` evaluations. ``shares`` are the rows ``[begin, end)`` of each rank. ``true``:
    the first of a round is among them, which is made where the sampler stands."""

    call: Call
    size: torch.Size
    sent_at: float
    shares: dict[int, tuple[int, int]]
    unread: int
    true: bool
    read: dict[int, Any]


class LanesDenoiser(RemoteDenoiser):
    """ParaStep: each rank holds the whole denoiser and evaluates its share of the rows of all lanes.

    Evaluations that were submitted travel together, when one of them is waited for or at :meth:`flush`: those that are
    alike as one batch, of which each rank computes its share at once.
    """

    title = "ParaStep Sampler"
    whole = True

    def __init__(self, devices: tuple[str, ...], recipe: Recipe, host: ComfyHost, nbytes: int = 0):
        super().__init__(devices, recipe, host, nbytes)
        self.conditionings = self.pictures = 1
        self._run = 0
        self._unsent: list[LaneEvaluation] = []
        self._patches = Patches()

    def begin_run(self) -> None:
        super().begin_run()
        self.conditionings = self.pictures = 1
        self._unsent.clear()
        self._run = time.monotonic_ns()

    def end_run(self) -> None:
        self._unsent.clear()
        self._patches = Patches()
        super().end_run()

    def submit(
        self, inputs: Any, x: Any, group: int, patches: Patches, tick: Tick, alone: bool = False, lanes: int = 1
    ) -> LaneEvaluation:
        """Take in an evaluation of the denoiser at ``x`` of ``[rows, ...]``; rows stay together in groups of ``group``.

        ``alone``: not in one batch with other evaluations. Each conditioning has the rows of so many ``lanes``.

        Tensors in ``inputs`` whose first dimension is the number of rows, or of groups, are spread with them; the rest
        goes to all. ``conditionings`` is how many the calls of the run have had that can be spread, at most, and
        ``pictures`` how many pictures each of them has.
        """
        if self._unsent and patches.id != self._patches.id:
            self.flush(tick)
        self._patches = patches
        rows = Rows(inputs, first_tensor(x).shape[0], group, alone)
        chunks = rows.chunks
        groups = rows.count // rows.group
        self.conditionings = max(self.conditionings, min(len(chunks), groups))
        self.pictures = max(self.pictures, groups // len(chunks))
        if lanes > 1:
            rows.inputs = with_chunks(inputs, [chunk for chunk in chunks for _ in range(lanes)])
        evaluation = LaneEvaluation(x, rows, lanes)
        self._unsent.append(evaluation)
        return evaluation

    def _load_whole(self, pool: Pool, patches: Patches, tick: Tick) -> list[Loaded]:
        return self._load(pool, None, [[rank] for rank in range(len(self.devices))], patches, tick)

    def flush(self, tick: Tick) -> None:
        """Send what has been submitted. Raises LeapfrogError."""
        if not self._unsent:
            return
        waiting, self._unsent = self._unsent, []
        pool = self._ready_pool(tick)
        with pool.lock:
            assert self.report
            self.report.holds(self._load_whole(pool, self._patches, tick))
            calls = batched([one.rows for one in waiting])
            shares = row_shares([(rows.count, rows.group) for rows, _ in calls], len(self.devices))
            for (rows, members), share in zip(calls, shares, strict=True):
                self._send(pool, rows, share, [waiting[number] for number in members], 0 in members, tick)

    def _send(
        self, pool: Pool, rows: Rows, shares: dict[int, tuple[int, int]], members: list[LaneEvaluation], true: bool,
        tick: Tick,
    ) -> None:  # fmt: skip
        sent_at = time.perf_counter()
        room = room_for_output(members[0].x) * len(members)
        payload, out = pool.payload(rows.inputs, tick, reserve=room * len(shares), where="denoiser input")
        payloads = zip(shares, rows_of(payload, rows, list(shares.values())), strict=True)
        messages = {
            rank: Evaluate(inputs=share, out=out + at * room, out_size=room, run=self._run)
            for at, (rank, share) in enumerate(payloads)
        }
        lanes = sum(member.lanes for member in members)
        call = self._submit(pool, messages, payload, f"round of {lanes}" if lanes > 1 else "single", tick)
        size = torch.Size((rows.count, *first_tensor(members[0].x).shape[1:]))
        batch = _Batch(call, size, sent_at, shares, len(members), true, {})
        for at, member in enumerate(members):
            member.batch, member.begin = batch, at * member.rows.count

    def wait(self, evaluation: LaneEvaluation, tick: Tick) -> None:
        """Until the rows of this evaluation are there. Raises LeapfrogError, or what ``tick`` raises."""
        self.flush(tick)
        assert evaluation.batch
        self._wait([evaluation.batch.call], evaluation.ranks, [evaluation.batch.size], tick)

    def result(self, evaluation: LaneEvaluation, tick: Tick) -> Any:
        """Wait for an evaluation and return its output, a CPU tensor (or a tree of them, as the model's output is)."""
        try:
            self.wait(evaluation, tick)
            batch, pool = evaluation.batch, self._pool
            assert batch and pool
            parts = []
            for rank in evaluation.ranks:
                if rank not in batch.read:
                    with pool.lock:
                        batch.read[rank] = pool.read(batch.call.replies[rank].output)
                begin, end = (
                    max(0, at - batch.shares[rank][0])
                    for at in (evaluation.begin, evaluation.begin + evaluation.rows.count)
                )
                parts.append(_cut(batch.read[rank], begin, end))
            if batch.unread == 1:
                with pool.lock:
                    self._took(batch.call, batch.size, batch.sent_at, batch.true)
        finally:
            self.drop(evaluation)
        return joined(parts)

    def drop(self, evaluation: LaneEvaluation) -> None:
        """Nobody will ask for this evaluation's output (again)."""
        if evaluation.batch is None:
            self._unsent = [one for one in self._unsent if one is not evaluation]
            return
        evaluation.batch.unread -= 1
        if evaluation.batch.unread == 0 and self._pool:
            self._pool.done(evaluation.batch.call)


def _cut(output: Any, begin: int, end: int) -> Any:
    """Rows ``[begin, end)`` of a denoiser's output."""
    if isinstance(output, torch.Tensor):
        return output[begin:end]
    return type(output)(_cut(part, begin, end) for part in output)
