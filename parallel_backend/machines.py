"""Several machines: the small file that each of them has a copy of, and what must be the same on all of them."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import msgspec

from .command_line import PACK
from .errors import LeapfrogError
from .protocol import Address, Secret
from .settings import machines_file

log = logging.getLogger("leapfrog")
SPOT = 1 << 16
SPOTS = 64
Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]


class Machines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where ComfyUI's machine is reached by the others, the secret that all share, and the names of the others."""

    listen: Address
    port: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
    secret: Secret
    machines: list[Name]

    @classmethod
    def read(cls, path: Path) -> Machines:
        """Raises LeapfrogError bad_machines, which says what is wrong with the file."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
            listen = ipaddress.IPv4Address(found.listen)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise LeapfrogError.of("bad_machines", f"The file {path} cannot be used: {error}.") from None
        if listen.is_unspecified or listen.is_multicast:
            message = f"The file {path} cannot be used: listen '{listen}' is not the address of one machine."
            raise LeapfrogError.of("bad_machines", message)
        _warn_of_readers(path)
        return found

    @classmethod
    def configured(cls) -> Machines:
        """What the user configured. Raises LeapfrogError bad_machines, also where nothing is."""
        path = machines_file()
        if path is None:
            raise LeapfrogError.of("bad_machines", "Another machine is wanted, but LEAPFROG_MACHINES is not set.")
        return cls.read(path)

    def pool_secret(self, once: str) -> str:
        """The secret of one pool's ranks, from a number that is used once; it crosses no network."""
        return hmac.digest(bytes.fromhex(self.secret), b"pool" + bytes.fromhex(once), "sha256").hex()


@lru_cache(maxsize=8)
def _warn_of_readers(path: Path) -> None:
    if os.name == "posix" and path.stat().st_mode & 0o077:
        log.warning("Leapfrog: %s holds a secret, and other users of this machine may read it (chmod 600)", path)


def versions(comfy_root: str) -> dict[str, str]:
    """Of what a rank computes with. They must be the same on all machines."""
    return {
        "PyTorch": version("torch").partition("+")[0],
        "ComfyUI": stated(Path(comfy_root, "comfyui_version.py"), "__version__") or "unknown",
        "Leapfrog": stated(PACK / "pyproject.toml", "version") or "unknown",
    }


def stated(path: Path, name: str) -> str:
    """The text that a file gives this name, on a line of its own; "" where it does not or cannot be read."""
    try:
        found = re.search(rf'^{name} = "([^"]{{1,100}})"', path.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


@lru_cache(maxsize=64)
def fingerprint(path: str, stamp: tuple[int, int]) -> str:
    """What tells a model file from others of the same layout: a digest of its size and of 64 places all over it.

    ``stamp`` is the file's, as in a Recipe. Raises OSError.
    """
    size = stamp[0]
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for at in range(SPOTS):
            file.seek(max(0, size - SPOT) * at // (SPOTS - 1))
            digest.update(file.read(SPOT))
    return digest.hexdigest()
