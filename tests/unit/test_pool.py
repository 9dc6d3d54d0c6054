"""The life of a pool, and whom it blames, with ranks that are made up."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend import LeapfrogError, supervisor
from leapfrog.parallel_backend.errors import ErrorReport
from leapfrog.parallel_backend.pool import NEXT, Call, Pool, State
from leapfrog.parallel_backend.protocol import Echo, Failed, Ok, RankMessage, Unload, Vacancy
from leapfrog.parallel_backend.starting import ComfyHost

HOST = ComfyHost("nowhere")


class MadeUpRank:
    """Stands for a RankProcess and for its Channel, whose messages really travel."""

    def __init__(self, rank: int, exit_code: int | None = None, stopped: bool = False):
        self.rank, self.exit_code, self.stopped = rank, exit_code, stopped
        self.pid = 1000 + rank
        self.news_s = 0.2
        self.starting = True
        self.ended = 0
        self.connection: Any
        self.connection, self._far_end = Pipe()

    @property
    def how_it_ended(self) -> str:
        return "" if self.exit_code is None else f"ended with exit code {self.exit_code}"

    def last_lines(self, count: int) -> tuple[str, ...]:
        return ("importing", "Killed")[-count:]

    def says(self, message: RankMessage) -> None:
        self._far_end.send(message)

    def hangs_up(self) -> None:
        self._far_end.close()

    def receive(self, _timeout_s: float) -> Any:
        return self.connection.recv()

    def send(self, message: Any) -> None:
        if isinstance(self.connection, socket.socket):
            raise OSError("closed")
        self.connection.send(message)

    def let_go(self) -> None:
        pass

    def end(self, _grace_s: float) -> None:
        self.ended += 1

    def close(self) -> None:
        self.connection.close()
        self.connection = socket.socket()  # a real channel has one, which knows that it is closed
        self.connection.close()


def filled(pool: Pool, *ranks: MadeUpRank) -> Pool:
    pool.processes[:] = ranks  # type: ignore[assignment]
    pool.channels.update({rank.rank: rank for rank in ranks})  # type: ignore[misc]
    pool.opened()
    return pool


def made_up(*ranks: MadeUpRank) -> Pool:
    return filled(Pool(["cpu"] * len(ranks)), *ranks)


def no_tick() -> None:
    pass


def ask(pool: Pool, *ranks: int, step: int = 0) -> Call:
    return pool.submit({rank: Unload() for rank in ranks}, no_tick, step=step)


class TestBlame:
    def blamed(self, pool: Pool, *calls: Call) -> ErrorReport:
        with pytest.raises(LeapfrogError) as caught:
            pool.wait(calls, range(len(pool.devices)), 0.0, no_tick)
        assert pool.state is State.FAILED
        assert all(rank.ended == 1 for rank in pool.processes)  # type: ignore[attr-defined]
        self.text = str(caught.value)
        return caught.value.report

    def test_a_rank_that_died(self):
        ranks = [MadeUpRank(0), MadeUpRank(1)]
        pool = made_up(*ranks)
        ask(pool, 0, 1, step=3)
        call = ask(pool, 0, 1, step=4)
        ranks[0].exit_code = -9
        ranks[0].hangs_up()
        report = self.blamed(pool, call)
        assert (report.code, report.rank, report.step) == ("rank_died", 0, 3)
        assert report.log == ("importing", "Killed")
        assert self.text == (
            "The process of a rank ended with exit code -9. (rank 0, denoiser call 3)\n"
            f"{report.hint}\nThe last lines of rank 0:\n  importing\n  Killed"
        )

    def test_a_rank_that_died_although_it_owes_nothing(self):
        pool = made_up(gone := MadeUpRank(0), MadeUpRank(1))
        call = ask(pool, 1)
        gone.exit_code = -6
        with pytest.raises(LeapfrogError) as caught:
            pool.wait([call], [1], 60, no_tick)
        assert (caught.value.report.code, caught.value.report.rank) == ("rank_died", 0)

    @pytest.mark.parametrize(("exit_code", "code", "rank"), [(-9, "rank_died", 0), (None, "rank_error", 1)])
    def test_a_rank_that_failed_by_itself_or_because_another_died(self, exit_code: int | None, code: str, rank: int):
        pool = made_up(MadeUpRank(0, exit_code), failing := MadeUpRank(1))
        call = ask(pool, 1, step=2)
        failing.says(Failed(call=1, error=ErrorReport("rank_error", "RuntimeError: Connection closed by peer", 1)))
        report = self.blamed(pool, call)
        assert (report.code, report.rank) == (code, rank)
        assert report.step == (2 if rank == 1 else 0)

    def test_memory_that_ran_out_is_comfyuis_own_error(self):
        pool = made_up(failing := MadeUpRank(0))
        failing.says(Failed(call=1, error=ErrorReport("rank_oom", "MemoryError", 0)))
        with pytest.raises(torch.OutOfMemoryError, match=r"MemoryError \(rank 0, denoiser call 7\)"):
            pool.wait([ask(pool, 0, step=7)], [0], 1.0, no_tick)

    def test_the_rank_that_owes_an_answer_for_longest(self):
        pool = made_up(MadeUpRank(0), quick := MadeUpRank(1))
        ask(pool, 0, 1)
        quick.says(Ok(call=1))
        assert (report := self.blamed(pool, ask(pool, 0, 1))).code == "rank_timeout"
        assert report.rank == 0

    def test_a_rank_that_is_halted_before_those_that_wait_for_it(self):
        pool = made_up(MadeUpRank(0), MadeUpRank(1), MadeUpRank(2, stopped=True))
        report = self.blamed(pool, ask(pool, 0, 1, 2))
        assert report.rank == 2
        assert "halted" in report.message

    def test_a_call_of_ranks_that_are_gone(self):
        pool = made_up(MadeUpRank(0))
        call = ask(pool, 0)
        pool.close()
        with pytest.raises(LeapfrogError, match="ended while they computed"):
            pool.wait([call], [0], 1.0, no_tick)

    def test_whoever_still_waits_hears_what_the_first_heard(self):
        pool = made_up(failing := MadeUpRank(0), MadeUpRank(1))
        calls = [ask(pool, 0, step=1), ask(pool, 1, step=2)]
        failing.says(Failed(call=1, error=ErrorReport("rank_error", "ValueError: wide", 0)))
        first = self.blamed(pool, calls[0])
        for wait in (lambda: pool.wait([calls[1]], [1], 1.0, no_tick), lambda: pool._died(1)):
            with pytest.raises(LeapfrogError) as caught:
                raise wait()  # type: ignore[misc]
            assert caught.value.report == first

    def test_a_channel_that_somebody_closed(self):
        pool = made_up(MadeUpRank(0), closed := MadeUpRank(1))
        call = ask(pool, 0, 1)
        closed.close()
        report = self.blamed(pool, call)
        assert (report.code, report.rank) == ("rank_died", 1)

    @pytest.mark.parametrize("full", [0, 1])
    def test_a_message_that_is_too_large(self, full: int, monkeypatch: pytest.MonkeyPatch):
        pool = made_up(*(ranks := [MadeUpRank(0), MadeUpRank(1)]))

        def send(message: Any) -> None:
            if isinstance(message, Echo):
                raise ValueError("a message of 99999999 bytes is over the bound")

        monkeypatch.setattr(ranks[full], "send", send)
        used, _ = pool.payload(torch.zeros(3), no_tick)
        with pytest.raises(LeapfrogError, match="over the bound") as caught:
            pool.submit({0: Echo(), 1: Echo()}, no_tick, using=used)
        assert caught.value.report.code == "unsupported_patch"
        if full == 1:  # the other one has been told already, and would wait for it
            assert pool.state is State.FAILED
            return
        assert pool.state is State.READY
        assert not pool.catching_up
        monkeypatch.undo()
        for rank in ranks:
            rank.says(Ok(call=2))
        assert set(pool.request({0: Unload(), 1: Unload()}, 5.0, no_tick)) == {0, 1}
        pool.rest()
        assert not pool.arenas


class TestState:
    @given(st.lists(st.sampled_from(["ask", "answer", "done", "die", "close"]), max_size=30))
    def test_is_what_happened_last(self, happenings: list[str]):
        rank = MadeUpRank(0)
        pool = Pool(["cpu"])
        assert pool.state is State.STARTING
        filled(pool, rank)
        wanted: list[Call] = []
        answered = 0
        for happening in happenings:
            before = pool.state
            if happening == "close":
                pool.close()
            elif before is State.READY or before is State.BUSY:
                if happening == "ask":
                    wanted.append(ask(pool, 0))
                elif happening == "answer" and answered < pool._number:
                    answered += 1
                    rank.says(Ok(call=answered))
                elif happening == "done" and wanted:
                    pool.done(wanted.pop())
                elif happening == "die" and wanted:
                    rank.exit_code = 1
                    rank.hangs_up()
                    with pytest.raises(LeapfrogError):
                        pool.request({0: Unload()}, 5, no_tick)
                    assert pool.state is State.FAILED
            assert pool.state is before or pool.state in NEXT[before]
            if pool.alive:
                assert pool.state is (State.BUSY if wanted else State.READY)
            assert rank.ended == (not pool.alive)
        pool.close()
        assert not pool.alive

    def test_nobody_is_asked_before_all_have_started(self):
        pool = Pool(["cpu"])
        with pytest.raises(RuntimeError, match="starting cannot become busy"):
            pool._become(State.BUSY)

    def test_an_end_starts_no_thread(self, monkeypatch: pytest.MonkeyPatch):
        pool = made_up(MadeUpRank(0), MadeUpRank(1))
        monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a Python that ends may start none"))
        pool.close()
        assert [rank.ended for rank in pool.processes] == [1, 1]  # type: ignore[attr-defined]

    def test_a_rank_that_cannot_be_killed_does_not_keep_the_rest(self, monkeypatch: pytest.MonkeyPatch):
        pool = made_up(held := MadeUpRank(0), MadeUpRank(1))
        pool.payload(torch.zeros(3), no_tick)

        def end(grace_s: float) -> None:
            raise subprocess.TimeoutExpired("rank", grace_s)

        monkeypatch.setattr(held, "end", end)
        pool.close()
        assert pool.processes[1].ended == 1  # type: ignore[union-attr]
        assert not pool.arenas
        pool.close()

    @pytest.mark.parametrize("how", ["close", "broken"])
    def test_an_end_is_final(self, how: str):
        pool = made_up(rank := MadeUpRank(0))
        if how == "close":
            pool.close()
        else:
            pool.broken(ErrorReport("rank_died", "It died.", 0))
        ended = pool.state
        assert ended is (State.STOPPED if how == "close" else State.FAILED)
        pool.close()
        pool.broken(ErrorReport("rank_died", "It died.", 0))
        assert pool.state is ended
        assert rank.ended == 1


class User:
    pass


class TestSupervisor:
    @pytest.fixture(autouse=True)
    def pools(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, ...], Pool]]:
        supervisor.close_all()

        def start(pool: Pool, *_: Any) -> None:
            filled(pool, *(MadeUpRank(rank) for rank in range(len(pool.devices))))

        monkeypatch.setattr(supervisor, "start_ranks", start)
        monkeypatch.setattr(supervisor, "SWEEP_S", 1e6)
        yield supervisor._pools
        supervisor.close_all()
        assert not supervisor._pools
        assert supervisor._sweeper is None

    def acquire(self, devices: str, user: object) -> Pool:
        return supervisor.acquire(devices.split(","), HOST, no_tick, user)

    def sweep(self) -> None:
        with supervisor._table:
            supervisor._sweep()

    def test_devices_that_overlap_and_that_do_not(self):
        user = User()
        first, second = self.acquire("cuda:0,cuda:1", user), self.acquire("cuda:2,cuda:3", user)
        assert self.acquire("cuda:0,cuda:1", User()) is first
        third = self.acquire("cuda:1,cuda:2", user)
        assert [pool.state for pool in (first, second, third)] == [State.STOPPED, State.STOPPED, State.READY]

    def test_a_rank_that_died_while_nobody_waited_costs_nothing(self, caplog: pytest.LogCaptureFixture):
        pool = self.acquire("cpu,cpu", user := User())
        pool.processes[1].exit_code = -9  # type: ignore[misc]
        other = self.acquire("cpu,cpu", user)
        assert (pool.state, other.state) == (State.STOPPED, State.READY)
        assert "rank 1 ended with exit code -9 while nobody waited for it" in caplog.text

    def test_a_rank_that_died_while_somebody_waits_is_left_to_him(self):
        pool = self.acquire("cpu", user := User())
        call = ask(pool, 0)
        pool.processes[0].exit_code = 1  # type: ignore[misc]
        self.sweep()
        assert self.acquire("cpu", user) is pool
        pool.done(call)
        assert self.acquire("cpu", user) is not pool

    def test_a_pool_that_is_not_used_ends_after_a_time_that_can_be_set(self, monkeypatch: pytest.MonkeyPatch):
        pool = self.acquire("cpu", user := User())
        call = ask(pool, 0)
        pool.used_at -= 100
        monkeypatch.setenv("LEAPFROG_IDLE_S", "60")
        self.sweep()
        assert pool.state is State.BUSY
        pool.done(call)
        self.sweep()
        assert pool.state is State.READY
        pool.used_at -= 100
        monkeypatch.setenv("LEAPFROG_IDLE_S", "0")
        self.sweep()
        assert pool.state is State.READY
        monkeypatch.delenv("LEAPFROG_IDLE_S")
        self.sweep()
        assert pool.state is State.READY
        monkeypatch.setenv("LEAPFROG_IDLE_S", "60")
        self.sweep()
        assert pool.state is State.STOPPED
        assert self.acquire("cpu", user) is not pool

    def test_a_pool_at_rest_has_the_shared_memory_of_calls_under_way_only(self):
        pool = self.acquire("cpu", user := User())
        busy, _ = pool.payload(torch.zeros(3), no_tick)
        pool.submit({0: Echo()}, no_tick, using=busy)
        free, _ = pool.payload(torch.zeros(3), no_tick)
        assert set(pool.arenas) == {busy.arena, free.arena}
        self.sweep()
        assert set(pool.arenas) == {busy.arena, free.arena}
        pool.rest()
        assert set(pool.arenas) == {busy.arena}
        (call,) = pool._calls.values()
        pool.done(call)
        pool._calls.clear()
        pool.used_at -= 100
        self.sweep()
        assert not pool.arenas
        _, *told = [pool.processes[0]._far_end.recv() for _ in range(3)]  # type: ignore[union-attr]
        assert [message.arenas for message in told] == [[free.arena], [busy.arena]]
        assert set(pool.users) == {user}

    def test_a_pool_ends_some_time_after_its_last_user(self):
        pool = self.acquire("cpu", user := User())
        pool.had_users_at -= 100
        self.sweep()
        assert pool.state is State.READY
        del user
        self.sweep()
        assert pool.state is State.READY
        pool.had_users_at -= 100
        self.sweep()
        assert pool.state is State.STOPPED

    @pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
    def test_no_number_of_seconds_is_an_hour(
        self, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.setenv("LEAPFROG_IDLE_S", text)
        assert supervisor.idle_s() == 3600
        assert f"LEAPFROG_IDLE_S={text} is not a valid number of seconds" in caplog.text

    def test_a_start_that_fails_leaves_the_place_free(self, monkeypatch: pytest.MonkeyPatch):
        good = supervisor.start_ranks

        def fail(pool: Pool, *_: Any) -> None:
            raise pool.broken(ErrorReport("rank_start", "No memory.", 0))

        monkeypatch.setattr(supervisor, "start_ranks", fail)
        with pytest.raises(LeapfrogError, match="No memory"):
            self.acquire("cpu", user := User())
        monkeypatch.setattr(supervisor, "start_ranks", good)
        assert self.acquire("cpu", user).state is State.READY

    def test_a_pool_that_starts_can_be_closed(self, monkeypatch: pytest.MonkeyPatch):
        """Ctrl+C does that; it must not wait until the ranks are ready."""
        begun, states = threading.Event(), []

        def start(pool: Pool, *_: Any) -> None:
            states.append(pool.state)
            begun.set()
            while pool.alive:
                time.sleep(0.001)
            states.append(pool.state)

        monkeypatch.setattr(supervisor, "start_ranks", start)
        thread = threading.Thread(target=self.acquire, args=("cpu", User()))
        thread.start()
        assert begun.wait(10)
        supervisor.close_all()
        thread.join(10)
        assert not thread.is_alive()
        assert states == [State.STARTING, State.STOPPED]


class TestCatchUp:
    def test_it_ends_when_all_have_answered(self):
        one, other = MadeUpRank(0), MadeUpRank(1)
        pool = made_up(one, other)
        for rank in (one, other):
            rank.says(Vacancy(call=1))
        assert pool.catch_up(5.0)
        assert pool.state is State.READY
        assert not pool.catching_up

    def test_it_ends_in_time_and_late_answers_do_no_harm(self):
        one, other = MadeUpRank(0), MadeUpRank(1)
        pool = made_up(one, other)
        one.says(Vacancy(call=1))
        assert not pool.catch_up(0.05)
        assert pool.catching_up
        assert pool.state is State.READY
        other.says(Vacancy(call=1))
        call = ask(pool, 0)
        one.says(Ok(call=call.number))
        pool.wait([call], [0], 5.0, no_tick)
        assert pool.alive
        pool.done(call)

    @pytest.mark.parametrize("answered", [False, True])
    def test_who_owes_no_more_than_its_word_is_not_waited_for_longer(self, answered: bool):
        """Whoever hangs there would otherwise be found out by the step timeout only."""
        one, other = MadeUpRank(0), MadeUpRank(1)
        pool = made_up(one, other)
        call = ask(pool, 0, 1, step=1)
        if answered:
            other.says(Ok(call=call.number))
            pool.wait([call], [1], 5.0, no_tick)
        pool.done(call)
        assert pool.catching_up == (not answered)
