"""A function in a thread of its own that runs only while it is given the turn, so that nobody else need know."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NoReturn

import torch

IDLE = "leapfrog idle"
"""The name of a thread that waits for another coroutine."""
_current: contextvars.ContextVar[Coroutine | None] = contextvars.ContextVar("leapfrog_coroutine", default=None)


class Dropped(BaseException):
    """Unwinds a coroutine that nobody waits for any more."""


class Coroutine:
    """``work`` has run until it first paused, or ended, when this returns.

    It sees torch's grad and inference modes, CUDA stream and context variables of the thread that made it.
    """

    def __init__(self, work: Callable[[], Any], name: str):
        self.pending: Any = None
        self.pauses = 0
        self.ended = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._dropped = False
        # held by whoever waits for it; a Semaphore would cost several times as much
        self._turn = threading.Lock()
        self._back = threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        context, state = contextvars.copy_context(), _TorchState()
        self._thread = _idle_thread()
        self._thread.begin(lambda: context.run(self._run, work, state), name)
        self.resume()

    def resume(self) -> None:
        """Give it its turn; returns when it pauses or ends.

        Raises at once what is no Exception, such as a Cancel that it was the one to notice: nobody may ask for its
        result.
        """
        self.pending = None
        self._turn.release()
        self._back.acquire()
        if not self._dropped and self._error is not None and not isinstance(self._error, Exception):
            self._raise()

    def pause(self, pending: Any) -> None:
        """Called by ``work``: give the turn back until ``pending`` is ready."""
        self.pending = pending
        self.pauses += 1
        self._back.release()
        self._turn.acquire()
        if self._dropped:
            raise Dropped

    def result(self) -> Any:
        """What ``work`` returned; raises what it raised, once. It has to have ended."""
        if self._error is not None:
            self._raise()
        return self._result

    def _raise(self) -> NoReturn:
        assert self._error is not None
        try:
            raise self._error
        finally:
            self._error = None  # whose traceback has this coroutine: neither would go before Python's collector comes

    def drop(self) -> None:
        """End it; whatever it still does is thrown away."""
        self._dropped = True
        while not self.ended:
            self.resume()
        # what was unwound, with all its tensors, hangs on the error, which hangs on this
        self._error = self._result = None

    def _run(self, work: Callable[[], Any], state: _TorchState) -> None:
        self._turn.acquire()
        _current.set(self)
        try:
            with state.entered():
                self._result = work()
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._thread.rest()
            self._back.release()


class _Thread:
    """Does one job after another. A new thread for each would start torch's own threads anew, and the C library would
    keep freed memory for more and more of them."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=IDLE, daemon=True)
        self._thread.start()

    def begin(self, job: Callable[[], Any], name: str) -> None:
        """``job`` calls rest() as its last act."""
        self._thread.name = name
        self._jobs.put(job)

    def rest(self) -> None:
        self._thread.name = IDLE
        _idle.append(self)

    def _serve(self) -> None:
        while True:
            self._jobs.get()()


_idle: list[_Thread] = []


def _idle_thread() -> _Thread:
    try:
        return _idle.pop()
    except IndexError:
        return _Thread()


class _TorchState:
    """What torch keeps per thread and a sampler's code counts on."""

    def __init__(self) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._grad):
            if self._stream is None:
                yield
            else:
                with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
                    yield


def current() -> Coroutine | None:
    """The coroutine whose work this is."""
    return _current.get()


def pause(pending: Any) -> None:
    """In a coroutine, wait for one's turn again; elsewhere, nothing."""
    coroutine = current()
    if coroutine is not None:
        coroutine.pause(pending)
