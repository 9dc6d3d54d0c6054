"""Malformed values and bytes for `make fuzz`, from a generator with a seed."""

from __future__ import annotations

import math
import random
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 16, 17, 255, 65535, 65536, 2**31, -(2**31), 2**32 - 1, 2**48, 2**63 - 1, -(2**63), 2**64 - 1)
WORDS = (
    "",
    "v",
    "t",
    "l",
    "u",
    "d",
    "y",
    "float32",
    "float128",
    "object",
    "rank_oom",
    "psm_1",
    "../x",
    "/etc/x",
    "é\n",
)
MODULES = ("os", "subprocess", "builtins", "torch", "torch.hub", "sys", "comfy.utils", "comfy.sd", "comfy..os", "comfy",
           "comfy_extras.nodes_freelunch", "custom_nodes.x", "comfy/../os", "folder_paths", "posix")  # fmt: skip
NAMES = ("system", "Popen", "eval", "exec", "load_torch_file", "os.system", "torch.load", "load", "from_file", "gather",
         "import_ir_module", "set_num_threads", "cat", "__builtins__", "FreeU.patch", "Fourier_filter", "save",
         "logging", "Path", "CallbacksMP", "ProgressBar")  # fmt: skip
OTHERS = (None, True, False, 0.5, math.nan, math.inf, -1.0, 1e300, b"", b"x" * 40)
SCALARS: tuple[Any, ...] = (*NUMBERS, *WORDS, *MODULES, *NAMES, *OTHERS)


class Mutator:
    """Malformed values and bytes from a seeded generator."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def junk(self) -> Any:
        """A value that does not belong there."""
        rng = self.rng
        kind = rng.randrange(12)
        if kind < 8:
            return rng.choice(SCALARS)
        if kind == 8:
            return [rng.choice(SCALARS)] * rng.choice((0, 1, 3, 17, 300))
        if kind == 9:
            return {rng.choice(WORDS): rng.choice(SCALARS) for _ in range(3)}
        if kind == 10:
            return rng.choice(WORDS) * rng.choice((1, 70, 2000))
        value: Any = rng.choice(SCALARS)
        for _ in range(rng.choice((2, 15, 17, 200))):
            value = [rng.choice("lu"), [value]] if rng.random() < 0.5 else [value]
        return value

    def value(self, value: Any) -> Any:
        """A copy of nested lists and dicts with one to three places changed."""
        copy = json_copy(value)
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            copy = self._change(copy)
        return copy

    def _change(self, value: Any) -> Any:
        rng = self.rng
        if not value or not isinstance(value, list | dict) or rng.random() < 0.15:
            return self.junk()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        how = rng.randrange(10)
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(value, list):
            value.insert(key, json_copy(rng.choice(value)))
        elif how == 2 and isinstance(value, dict):
            value[rng.choice(WORDS)] = self.junk()
        else:
            value[key] = self._change(value[key])
        return value

    def bytes(self, body: bytes) -> bytes:
        """A copy with bits, bytes or slices changed; or cut, doubled, or nothing like it."""
        rng = self.rng
        made = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            at = rng.randrange(len(made) + 1)
            how = rng.randrange(7)
            if how == 0 and at < len(made):
                made[at] ^= 1 << rng.randrange(8)
            elif how == 1 and at < len(made):
                made[at] = rng.choice(
                    (0x80, 0x8F, 0x90, 0x9F, 0xC0, 0xC1, 0xC6, 0xC9, 0xCF, 0xD3, 0xDB, 0xDD, 0xDF, 0xFF)
                )
            elif how == 2:
                del made[at : at + rng.randrange(1, 9)]
            elif how == 3:
                made[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif how == 4:
                made[at:at] = made[rng.randrange(len(made) + 1) :][:64]
            elif how == 5:
                del made[at:]
            else:
                made[at : at + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xdd\xff\xff\xff", b"\x00\x00")
                )
        return bytes(made)

    def garbage(self) -> bytes:
        rng = self.rng
        kind = rng.randrange(8)
        if kind == 0:
            return bytes([rng.choice((0x80, 0x90, 0x91, 0x92, 0xC0, 0xDD))]) * rng.choice((1, 40, 900, 20_000))
        if kind == 1:
            return rng.choice(
                (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-x\r\n", b"\x80\x04\x95.")
            )
        return rng.randbytes(rng.choice((0, 1, 2, 3, 4, 5, 8, 31, 66, 98, 300)))


def json_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_copy(one) for key, one in value.items()}
    return [json_copy(one) for one in value] if isinstance(value, list | tuple) else value
