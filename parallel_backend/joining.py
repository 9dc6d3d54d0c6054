"""The joiner: runs on another machine and lends one of its devices to ComfyUI's, as often as a pool wants it.

    python custom_nodes/leapfrog/parallel_backend --join FILE --machine b

It calls the host for ever, listens to nobody, and has at most one rank at a time, which ends with the line to the host.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from .channel import Channel
from .command_line import USAGE, find_comfyui, own_and_flags
from .devices import CPU, device_here, this_machine
from .errors import LeapfrogError
from .guests import BEAT_S, LISTEN_S, SILENCE_S
from .handshake import prove
from .launcher import RankProcess
from .machines import Machines, versions
from .protocol import Beat, Gone, LaunchSpec, Offer, Orders, Said, ToJoiner

log = logging.getLogger("leapfrog")
PAUSE_S = 1.0
DIAL_S = 5.0
GRACE_S = 2.0
LINES = 1000


def main(arguments: Sequence[str]) -> int:
    """Lend a device until the process is ended; 2 for a command or a file that means nothing."""
    own, flags = own_and_flags(arguments)
    asked = _parser().parse_args(own)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    comfyui = find_comfyui(asked.comfyui)
    try:
        machines = Machines.read(Path(asked.join))
    except LeapfrogError as error:
        log.error("%s", error)
        return USAGE
    if asked.machine not in machines.machines:
        log.error("%s names the machines %s, not %s", asked.join, ", ".join(machines.machines), asked.machine)
        return USAGE
    if comfyui is None:
        log.error("ComfyUI was not found; name its folder with --comfyui")
        return USAGE
    # torchrun starts a process for each device and numbers them
    here, local = this_machine(), os.environ.get("LOCAL_RANK", "0")
    try:
        device = device_here(asked.device or (local if here.cuda else CPU), here, "--device")
    except LeapfrogError as error:
        log.error("%s", error.report.message)  # its hint is about the nodes
        return USAGE
    threads = max(1, here.cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if device == CPU else 0
    joiner = Joiner(machines, Offer(asked.machine, device, versions(str(comfyui))), str(comfyui), flags, threads)
    with contextlib.suppress(KeyboardInterrupt):
        joiner.run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parallel_backend",
        description="Lend a device of this machine to ComfyUI on another one (docs/machines.md).",
        epilog="Flags behind -- are ComfyUI's own, such as: -- --base-directory FOLDER",
    )
    parser.add_argument("--join", metavar="FILE", required=True, help="the file that LEAPFROG_MACHINES names there")
    parser.add_argument("--machine", metavar="NAME", required=True, help="this machine's name in the file")
    parser.add_argument("--device", metavar="DEVICE", help="cuda:0, cuda:1 ... or cpu; without it the first GPU")
    parser.add_argument("--comfyui", metavar="FOLDER", help="ComfyUI, where it is not around the pack")
    return parser


class Child(RankProcess):
    """The joiner's rank. What it prints is kept until it is passed on."""

    def __init__(self, spec: LaunchSpec):
        self.lines: deque[Said] = deque(maxlen=LINES)
        super().__init__(spec)

    def _said(self, level: int, text: str) -> None:
        self._tail.append(text)
        self.lines.append(Said(level, text))


class Joiner:
    """Calls the host of ``machines`` again and again with the same offer."""

    def __init__(self, machines: Machines, offer: Offer, comfy_root: str, flags: Sequence[str], threads: int):
        self._machines = machines
        self._offer = offer
        self._comfy_root = comfy_root
        self._flags = list(flags)
        self._threads = threads

    def run(self) -> None:
        """For ever."""
        told = ""
        while True:
            try:
                line = self._dial()
            except ConnectionAbortedError:
                now = "was turned away: the pool has started without it, or its file has another secret"
            except OSError:
                now = "waits for a prompt that wants it"
            else:
                now = "has worked for a pool" if self._serve(line) else "is not wanted by this pool"
            if now != told:
                told = now
                where = f"{self._machines.listen}:{self._machines.port}"
                log.info("Leapfrog: %s/%s %s (%s)", self._offer.machine, self._offer.device, now, where)
            time.sleep(PAUSE_S)

    def _dial(self) -> Channel[ToJoiner]:
        sock = socket.create_connection((self._machines.listen, self._machines.port), DIAL_S)
        try:
            prove(sock, 0, self._machines.secret)
        except OSError:
            sock.close()
            raise
        return Channel(sock, ToJoiner, SILENCE_S)

    def _serve(self, line: Channel[ToJoiner]) -> bool:
        """Offer, and have a rank from the orders until it ends or the host is gone; whether there was one."""
        child: Child | None = None
        heard, beat = time.monotonic(), 0.0
        with contextlib.suppress(EOFError, OSError, msgspec.MsgspecError):
            line.send(self._offer)
            while time.monotonic() - heard < SILENCE_S:
                if child and child.exit_code is not None:
                    break
                if child:
                    _pass_on(child, line)
                if time.monotonic() - beat > BEAT_S:
                    beat = time.monotonic()
                    line.send(Beat(halted=child.stopped if child else False))
                try:
                    message = line.receive(LISTEN_S)
                except TimeoutError:
                    continue
                heard = time.monotonic()
                if isinstance(message, Orders) and child is None:
                    log.info("Leapfrog: rank %d starts on %s", message.spec.rank, self._offer.device)
                    try:
                        child = Child(self._own(message.spec))
                    except OSError as error:
                        line.send(Gone(1, f"could not be started: {error}"))
        if child:
            with contextlib.suppress(subprocess.TimeoutExpired):  # not even by SIGKILL, as where a driver hangs
                child.end(GRACE_S)
            how = child.how_it_ended or "does not end"
            log.info("Leapfrog: the rank %s", how)
            with contextlib.suppress(OSError):
                _pass_on(child, line)
                line.send(Gone(child.exit_code or 0, how))
        line.close()
        return child is not None

    def _own(self, spec: LaunchSpec) -> LaunchSpec:
        """The orders, for this machine."""
        return msgspec.structs.replace(
            spec, secret=self._machines.pool_secret(spec.secret), comfy_root=self._comfy_root,
            comfy_args=[*spec.comfy_args, *self._flags], threads=self._threads,
        )  # fmt: skip


def _pass_on(child: Child, line: Channel[ToJoiner]) -> None:
    while child.lines:
        line.send(child.lines.popleft())
