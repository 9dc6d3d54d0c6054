"""A rank's process and its log, with programs in the place of a rank's."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from full_disk import DEVICE, full_disk
from leapfrog.parallel_backend import launcher
from leapfrog.parallel_backend.launcher import RankProcess, rank_environment
from leapfrog.parallel_backend.protocol import LaunchSpec

READS_ORDERS = "import os, sys, time\nsys.stdin.readline()\n"
Launch = Callable[[str], RankProcess]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Starts a program as if it were a rank."""
    started: list[RankProcess] = []

    def start(program: str) -> RankProcess:
        script, ready = tmp_path / "program.py", tmp_path / f"ready {len(started)}"
        script.write_text(f"{READS_ORDERS}while not os.path.exists({str(ready)!r}): time.sleep(0.01)\n{program}")
        monkeypatch.setattr(launcher, "PACKAGE", script)
        spec = LaunchSpec(
            rank=1, world=2, device="cpu", backend="gloo", threads=1, port=0, secret="", comfy_root=str(tmp_path),
            comfy_args=[], timeout_s=1.0,
        )  # fmt: skip
        started.append(RankProcess(spec))
        started[-1].starting = False  # before it says anything
        ready.touch()
        return started[-1]

    yield start
    for process in started:
        process.end(5)
        assert not psutil.pid_exists(process.pid)


def finished(process: RankProcess) -> tuple[str, ...]:
    """All that it printed."""
    process._process.wait(30)
    process._pump.join(10)
    return process.last_lines(40)


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


SAYS = r"""
print("WARNING:two\nWARNING:lines\nERROR:worse\nno level: WARNING:")
"""


def test_lines_keep_their_level_and_say_whose_they_are(launch: Launch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "leapfrog")
    assert finished(launch(SAYS)) == ("two", "lines", "worse", "no level: WARNING:")
    assert logged(caplog) == [
        (logging.WARNING, "[Leapfrog rank 1] two"),
        (logging.WARNING, "[Leapfrog rank 1] lines"),
        (logging.ERROR, "[Leapfrog rank 1] worse"),
        (logging.DEBUG, "[Leapfrog rank 1] no level: WARNING:"),
    ]


def test_while_it_starts_only_errors_are_told(launch: Launch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    process = launch("sys.stdin.readline()" + SAYS)
    process.starting = True
    assert process._process.stdin
    process._process.stdin.write(b"\n")
    process._process.stdin.flush()
    finished(process)
    assert logged(caplog) == [(logging.ERROR, "[Leapfrog rank 1] worse")]


def test_a_line_without_end_takes_no_memory(launch: Launch):
    lines = finished(launch("sys.stdout.write('x' * 10_000_000)"))
    assert len(lines) == 40
    assert max(map(len, lines)) == launcher.MAX_LINE


class Raising(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("a handler of another pack")


@pytest.mark.parametrize("kind", ["full disk", "handler that raises"])
@pytest.mark.skipif(not DEVICE.exists(), reason="no full device here")
def test_a_log_that_cannot_be_written_does_not_stop_a_rank(launch: Launch, kind: str, monkeypatch: pytest.MonkeyPatch):
    with full_disk() as full:
        handler = logging.StreamHandler(full) if kind == "full disk" else Raising()
        monkeypatch.setattr(sys, "stderr", full)  # where logging tells of its own errors
        monkeypatch.setattr(logging.getLogger("leapfrog"), "handlers", [handler])
        # more than fits into a pipe
        process = launch("for i in range(1000): print('WARNING:line', i, 'x' * 200)\nprint('end')")
        assert finished(process)[-1] == "end"


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("sys.exit(7)", "ended with exit code 7"),
        ("os.abort()", "was ended by SIGABRT"),
        ("os.kill(os.getpid(), 9)", "was ended by SIGKILL, as the system does when memory runs out"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_how_it_ended(launch: Launch, program: str, how: str):
    process = launch("print('last words', flush=True)\n" + program)
    assert finished(process)[0] == "last words"
    assert process.how_it_ended == how


@pytest.mark.skipif(sys.platform != "linux", reason="told by /proc")
def test_a_halted_process_is_told_from_one_that_waits(launch: Launch):
    process = launch("print('here', flush=True)\ntime.sleep(60)")
    assert not process.stopped
    assert process.how_it_ended == ""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert process.stopped
    os.kill(process.pid, signal.SIGKILL)
    finished(process)
    assert not process.stopped


def test_a_rank_inherits_what_it_needs_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    """Neither the host's allocator settings nor what is nobody's business, such as a password."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "of the host")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    gpu, cpu = rank_environment("cuda:1", "nccl", 0), rank_environment("cpu", "gloo", 3)
    assert "of the host" not in {*gpu.values(), *cpu.values()}
    assert (gpu["NCCL_DEBUG"], gpu["CUDA_VISIBLE_DEVICES"], gpu["NCCL_RAS_ENABLE"]) == ("INFO", "5", "0")
    assert (cpu["OMP_NUM_THREADS"], cpu["CUDA_VISIBLE_DEVICES"]) == ("3", "")
    assert gpu["PATH"] == cpu["PATH"] == os.environ["PATH"]
