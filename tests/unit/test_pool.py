"""Whom the pool blames, with ranks that are made up."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from leapfrog.parallel_backend import LeapfrogError
from leapfrog.parallel_backend.errors import ErrorReport
from leapfrog.parallel_backend.protocol import Failed
from leapfrog.parallel_backend.supervisor import Pool


class MadeUpRank:
    """Stands for a RankProcess and for its Channel."""

    def __init__(self, rank: int, exit_code: int | None, says: Any = None):
        self.rank, self.exit_code, self.says = rank, exit_code, says
        self.tail = deque(["importing", "Killed"])

    def receive(self, _timeout_s: float) -> Any:
        if self.says is None:
            raise EOFError
        return self.says

    def send(self, _message: Any) -> None:
        raise BrokenPipeError

    def end(self, _grace_s: float) -> None: ...

    def close(self) -> None: ...


def blamed(ranks: list[Any], heard: int) -> ErrorReport:
    pool = Pool(["cpu"] * len(ranks), ranks, ranks)
    with pytest.raises(LeapfrogError) as caught:
        pool._receive(heard)
    assert not pool.alive
    return caught.value.report


FAILURE = Failed(error=ErrorReport("rank_error", "RuntimeError: Connection closed by peer", 1))


def test_a_rank_that_died():
    report = blamed([MadeUpRank(0, -9), MadeUpRank(1, None)], heard=0)
    assert (report.code, report.rank) == ("rank_died", 0)
    assert "exit code -9" in report.message
    assert "importing | Killed" in report.message


def test_a_rank_that_failed_because_another_died():
    report = blamed([MadeUpRank(0, -9), MadeUpRank(1, None, FAILURE)], heard=1)
    assert (report.code, report.rank) == ("rank_died", 0)


def test_a_rank_that_failed_by_itself():
    report = blamed([MadeUpRank(0, None), MadeUpRank(1, None, FAILURE)], heard=1)
    assert report == FAILURE.error
