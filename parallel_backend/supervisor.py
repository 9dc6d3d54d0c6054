"""Who gets which pool, and when a pool has to go: one pool per set of devices, and none that shares a device."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Sequence

from .pool import Pool, State, Tick
from .settings import idle_s
from .starting import ComfyHost, start_ranks

log = logging.getLogger("leapfrog")
UNUSED_S = 60.0
REST_S = 5.0
SWEEP_S = 1.0

_pools: dict[tuple[str, ...], Pool] = {}
_table = threading.Lock()
_one_start = threading.Lock()
_sweeper: threading.Thread | None = None
_wake = threading.Event()


def acquire(devices: Sequence[str], host: ComfyHost, tick: Tick, user: object) -> Pool:
    """The living pool on exactly these devices, or a new one; pools that share a device with it are closed first.

    A pool of which a rank died while nobody waited for it is replaced, so that no prompt fails for it. ``user`` is who
    may come back for the pool. Raises as :func:`start_ranks`.
    """
    global _sweeper
    key = tuple(devices)
    with _one_start:
        with _table:
            for other in list(_pools):
                if why := _broken(_pools[other]):
                    _close(other, why, logging.WARNING)
                elif other != key and set(other) & set(key):
                    _close(other, f"{','.join(key)} is wanted")
            if key in _pools:
                pool = _pools[key]
                pool.users.add(user)
                pool.used_at = time.monotonic()
                return pool
            pool = _pools[key] = Pool(key)
            pool.users.add(user)
            if _sweeper is None:
                _sweeper = threading.Thread(target=_sweep_now_and_then, name="leapfrog-sweeper", daemon=True)
                _sweeper.start()
        start_ranks(pool, host, tick)  # outside of the table's lock: close_all can end it meanwhile
        return pool


def living(devices: Sequence[str]) -> Pool | None:
    """The pool that is on exactly these devices now."""
    return _pools.get(tuple(devices))


def close_all() -> None:
    """Close every pool of this process."""
    with _table:
        for key in list(_pools):
            _close(key, "")
        sweeper = _sweeper
    _wake.set()
    if sweeper:
        sweeper.join()


def _sweep_now_and_then() -> None:
    """Closes what nobody needs any more; ends with the last pool."""
    global _sweeper
    while True:
        _wake.wait(SWEEP_S)
        with _table:
            _wake.clear()
            _sweep()
            if not _pools:
                _sweeper = None
                return


def _sweep() -> None:
    now, idle = time.monotonic(), idle_s()
    for key, pool in list(_pools.items()):
        if pool.users:
            pool.had_users_at = now
        if not pool.lock.acquire(blocking=False):
            continue  # in the middle of a request
        try:
            if why := _broken(pool):
                _close(key, why, logging.WARNING)
            elif pool.state is not State.READY:
                continue
            elif now - pool.had_users_at > UNUSED_S:
                # ComfyUI drops a MODEL without telling anyone
                _close(key, "no MODEL refers to them any more")
            elif idle and now - pool.used_at > idle:
                _close(key, f"not used for {idle:g} s (LEAPFROG_IDLE_S)")
            elif now - pool.used_at > REST_S:
                pool.rest()
        finally:
            pool.lock.release()


def _broken(pool: Pool) -> str:
    """Why a pool is of no use any more; "" where it is, or where somebody waits for it and will find out."""
    if not pool.alive:
        return "they have ended"
    for process in pool.dead if pool.state is State.READY else ():
        return f"rank {process.rank} {process.how_it_ended} while nobody waited for it"
    return ""


def _close(key: tuple[str, ...], why: str, level: int = logging.INFO) -> None:
    pool = _pools.pop(key)
    if pool.alive:
        if why:
            log.log(level, "Leapfrog: the ranks on %s are ended: %s", ",".join(key), why)
        pool.close()


atexit.register(close_all)
