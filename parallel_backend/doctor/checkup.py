"""The doctor's command line and its sections in their order."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO, cast

from ..command_line import PACK, find_comfyui, own_and_flags
from ..devices import CPU, kind_of
from ..starting import ComfyHost
from .choice import choices, count, settings
from .comfyui import nodes_in_comfyui
from .machine import devices, versions
from .selftest import self_test
from .sheet import Sheet

TIMEOUT_S = 300.0
MODEL_TIMEOUT_S = 1200.0
GRACE_S = 15.0


def main(arguments: Sequence[str]) -> int:
    """Write the report to standard output; 0 if everything works, 1 if not, 2 for a command that means nothing."""
    own, flags = own_and_flags(arguments)
    asked = _parser().parse_args(own)
    out = cast(TextIO, sys.stdout)
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")  # type: ignore[attr-defined]
    sheet = Sheet(out)
    seconds = asked.timeout or (MODEL_TIMEOUT_S if asked.model else TIMEOUT_S)
    deadline = Deadline(sheet, seconds)
    try:
        _sections(sheet, asked, flags, deadline)
    except KeyboardInterrupt:
        sheet.problem(f"Interrupted during '{sheet.at}'.", "Run the doctor again.")
    except OutOfTime as error:
        sheet.problem(str(error), TOO_SLOW)
    return sheet.end()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parallel_backend --doctor",
        description="Check what Leapfrog needs on this machine. Paste the whole output into a bug report.",
        epilog="Flags behind -- are ComfyUI's own, such as: -- --base-directory FOLDER",
    )
    parser.add_argument("--comfyui", metavar="FOLDER", help="ComfyUI, where it is not around the pack")
    parser.add_argument(
        "--model", default="", metavar="FILE",
        help="a file in ComfyUI's folders for checkpoints or diffusion models: one evaluation cut in two parts, "
        "compared with ComfyUI alone; and what Leapfrog Adviser would say",
    )  # fmt: skip
    parser.add_argument("--devices", default="auto", help="as in the nodes: auto (default), 0,1 or cpu,cpu")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for all of it: 300, or 1200 with --model")
    return parser


def _sections(sheet: Sheet, asked: argparse.Namespace, flags: Sequence[str], deadline: Deadline) -> None:
    see_as_comfyui(flags)
    comfyui = find_comfyui(asked.comfyui)
    if comfyui:
        sheet.hiding.hide(comfyui, "<comfyui>")
    sheet.hiding.hide(PACK, "<leapfrog>")
    if sys.prefix != sys.base_prefix:
        sheet.hiding.hide(Path(sys.prefix), "<python>")
    sheet.line(f"Leapfrog doctor, {datetime.now():%Y-%m-%d %H:%M}. Please paste all of it into a bug report.")
    sheet.section("versions")
    versions(sheet, comfyui, asked.comfyui)
    sheet.section("devices")
    devices(sheet)
    sheet.section("what the nodes would choose as they come")
    chosen = choices(sheet, asked.devices)
    sheet.section("environment variables")
    sound = settings(sheet)
    tested = chosen if len(chosen) > 1 else (chosen or (CPU,)) * 2
    sheet.section(f"self-test on {count(tested)}")
    if len(chosen) == 1:
        sheet.row("", f"There is one device, {chosen[0]}: two ranks share it for this test only.")
        sheet.remark(f"but with one device ({chosen[0]}) the nodes make nothing faster")
    if comfyui is None:
        sheet.row("", "left out: ranks need ComfyUI")
        return
    if not sound:
        sheet.row("", "left out: ranks read these variables")
        return
    self_test(sheet, tested, ComfyHost(str(comfyui)), deadline.tick)
    sheet.section("the nodes in ComfyUI")
    if all(kind_of(device) == CPU for device in tested) and "--cpu" not in flags:
        flags = [*flags, "--cpu"]
    nodes_in_comfyui(sheet, comfyui, flags, tested, asked.model, deadline.left)
    if not asked.model:
        sheet.row("a model", "not tried; --model FILE compares an evaluation with ComfyUI alone")


def see_as_comfyui(flags: Sequence[str]) -> None:
    """Number GPUs as ComfyUI would with these flags of its command line; before anybody asks torch for them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cuda-device")
    parser.add_argument("--default-device", type=int)
    given, _ = parser.parse_known_args(list(flags))
    visible = given.cuda_device
    if visible is None and given.default_device is not None:
        first = given.default_device
        visible = ",".join(map(str, [first, *(other for other in range(32) if other != first)]))
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = visible


TOO_SLOW = "Run the doctor again when the machine is not busy, or with a longer --timeout."


class OutOfTime(Exception):
    """No OSError, unlike TimeoutError, which a socket might have raised."""


class Deadline:
    """The end of the doctor's time. What does not look at it, a driver that hangs say, ends with the process."""

    def __init__(self, sheet: Sheet, seconds: float):
        self._sheet = sheet
        self._seconds = seconds
        self._at = time.monotonic() + seconds
        watch = threading.Timer(seconds + GRACE_S, self._give_up)
        watch.daemon = True
        watch.start()

    @property
    def left(self) -> float:
        return max(1.0, self._at - time.monotonic())

    def tick(self) -> None:
        """Raises OutOfTime when the time is over."""
        if time.monotonic() > self._at:
            raise OutOfTime(self._text())

    def _text(self) -> str:
        return f"'{self._sheet.at}' was not done when the {self._seconds:.0f} s were over."

    def _give_up(self) -> None:
        self._sheet.problem(self._text(), TOO_SLOW)
        self._sheet.end()
        os._exit(1)  # closes the death pipes of all ranks
