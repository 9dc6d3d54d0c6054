"""Ranks of other machines, as the host has them: a line to each joiner, which stands for the rank's process."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from .channel import Channel
from .courier import HostCourier
from .devices import kind_of, machine_of
from .errors import LeapfrogError
from .handshake import Door
from .launcher import RankLog
from .machines import Machines, versions
from .protocol import Beat, FromJoiner, Gone, LaunchSpec, Offer, Orders, Said
from .tensors import Arena

log = logging.getLogger("leapfrog")
BEAT_S = 2.0
SILENCE_S = 8.0
LISTEN_S = 0.2
ADMIT_S = 0.02
NEWS_S = LISTEN_S + 0.3
LOST = -1


class RemoteProcess(RankLog):
    """One rank on another machine. It has the face of a :class:`RankProcess`, for whoever waits for it or ends it.

    ``offer`` is what the joiner has, None until it has said so; ``address`` is where other ranks reach its machine.
    """

    pid = None
    news_s = NEWS_S

    def __init__(self, sock: socket.socket):
        super().__init__(-1)
        self.offer: Offer | None = None
        self.address: str = sock.getpeername()[0]
        self.stopped = False
        self._line: Channel[FromJoiner] = Channel(sock, FromJoiner, SILENCE_S)
        self._orders: Orders | None = None
        self._courier: HostCourier | None = None
        self._gone: Gone | None = None
        self._ending = False
        self._thread = threading.Thread(target=self._attend, name="leapfrog-guest", daemon=True)
        self._thread.start()

    def launch(self, spec: LaunchSpec) -> RemoteProcess:
        """Have the joiner start the rank."""
        self.rank = spec.rank
        self._orders = Orders(spec)
        return self

    def channel(self, sock: socket.socket, arenas: Mapping[str, Arena]) -> HostCourier:
        """The control channel over the socket that the rank came in with."""
        self._courier = HostCourier(sock, arenas)
        return self._courier

    @property
    def exit_code(self) -> int | None:
        return self._gone.exit_code if self._gone else None

    @property
    def how_it_ended(self) -> str:
        """As a RankProcess has it, with the machine; or that the machine is lost. "" while it lives."""
        return self._gone.how if self._gone else ""

    def let_go(self) -> None:
        """Have the joiner end the rank."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._line.connection.shutdown(socket.SHUT_WR)

    def end(self, grace_s: float) -> None:
        """Let go, and wait for the rank's end where its machine answers."""
        self.let_go()
        self._thread.join(2 * grace_s)
        with contextlib.suppress(OSError):
            self._line.connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(grace_s)

    def _attend(self) -> None:
        heard = beat = time.monotonic()
        try:
            while self._gone is None:
                if self._orders:
                    orders, self._orders = self._orders, None
                    self._line.send(orders)
                if not self._ending and time.monotonic() - beat > BEAT_S:
                    beat = time.monotonic()
                    self._line.send(Beat())
                with contextlib.suppress(TimeoutError):
                    self._hear(self._line.receive(LISTEN_S))
                    heard = time.monotonic()
                if time.monotonic() - heard > SILENCE_S:
                    self._gone = Gone(LOST, f"was lost: {self._where} does not answer any more")
        except (EOFError, OSError, msgspec.MsgspecError):
            self._gone = Gone(LOST, f"was lost: {self._where} broke the connection")
        self._line.close()
        if self._courier:
            self._courier.hang_up()

    def _hear(self, message: FromJoiner) -> None:
        if isinstance(message, Offer):
            self.offer = message
        elif isinstance(message, Said):
            self._said(message.level, message.text)
        elif isinstance(message, Beat):
            self.stopped = message.halted
        else:
            self._gone = Gone(message.exit_code, f"on {self._where} {message.how}")

    @property
    def _where(self) -> str:
        return f"machine {self.offer.machine if self.offer else self.address}"


def invite(
    devices: Sequence[str], machines: Machines, comfy_root: str, check: Callable[[Iterable[int], str], None]
) -> dict[int, RemoteProcess]:
    """The ranks whose devices are on other machines, with a joiner for each. The door is open only meanwhile.

    ``check`` gets the missing ranks and whom to blame in the end, and raises to give up. Raises LeapfrogError:
    bad_machines where nothing can listen there, no_machine where a joiner's versions are others than the host's.
    """
    wanted = {rank: device for rank, device in enumerate(devices) if machine_of(device)}
    log.info("Leapfrog: %s may join at %s:%d", ",".join(wanted.values()), machines.listen, machines.port)
    guests: dict[int, RemoteProcess] = {}
    waiting: list[RemoteProcess] = []
    offered: set[str] = set()
    try:
        with _gate(machines) as gate:
            while missing := [rank for rank in wanted if rank not in guests]:
                check(missing, _who_is_missing([wanted[rank] for rank in missing], offered, gate.refused))
                if caller := gate.admit(ADMIT_S):
                    with contextlib.suppress(OSError):  # gone again
                        waiting.append(RemoteProcess(caller[1]))
                for guest in [guest for guest in waiting if guest.offer or guest.exit_code is not None]:
                    waiting.remove(guest)
                    offered.update([_device_of(guest.offer)] if guest.offer else [])
                    rank = _place_of(guest, [rank for rank in missing if rank not in guests], wanted)
                    if rank is None:
                        guest.end(0)
                        continue
                    _same_versions(guest, versions(comfy_root))
                    guests[rank] = guest
                guests = {rank: guest for rank, guest in guests.items() if guest.exit_code is None}
    except BaseException:
        waiting += guests.values()
        raise
    finally:
        for guest in waiting:
            guest.end(0)
    return guests


def _gate(machines: Machines) -> Door:
    try:
        return Door(machines.secret, 1, machines.listen, machines.port, again=True)
    except OSError as error:
        where = f"{machines.listen}:{machines.port}"
        raise LeapfrogError.of("bad_machines", f"Other machines cannot be let in at {where}: {error}.") from None


def _place_of(guest: RemoteProcess, missing: Sequence[int], wanted: Mapping[int, str]) -> int | None:
    """The rank that a joiner's device is for; None if it has ended or nobody wants it."""
    if guest.offer is None or guest.exit_code is not None:
        return None
    device = _device_of(guest.offer)
    return next((rank for rank in missing if wanted[rank] == device), None)


def _device_of(offer: Offer) -> str:
    return f"{offer.machine}/{offer.device}"


def _same_versions(guest: RemoteProcess, ours: Mapping[str, str]) -> None:
    assert guest.offer
    for what, version in ours.items():
        if (theirs := guest.offer.versions.get(what, "unknown")) != version:
            guest.end(0)
            message = f"Machine {guest.offer.machine} has {what} {theirs}, this one has {version}."
            raise LeapfrogError.of("no_machine", message)


def _who_is_missing(devices: Sequence[str], offered: set[str], refused: set[str]) -> str:
    machine, kind = machine_of(devices[0]), kind_of(devices[0])
    has = sorted(kind_of(device) for device in offered - {devices[0]} if machine_of(device) == machine)
    instead = f" It offered {', '.join(has)}." if has else ""
    others = f" {', '.join(sorted(refused))} called with another secret." if refused else ""
    return (
        f"machine {machine} had not offered {kind}.{instead}{others} Start there: python custom_nodes/leapfrog/"
        f"parallel_backend --join FILE --machine {machine} --device {kind}"
    )
