"""How the doctor writes: sections of rows within 100 columns, the problems at the end, no names of people or homes."""

from __future__ import annotations

import getpass
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

WIDTH = 100
NAME = 20
_HOMES = re.compile(r"(?<![\w.])(?:/home|/Users|[A-Za-z]:[\\/]+Users)[\\/]+[^\\/\s:;,'\"]+")
# names that are a service's rather than a person's, and words in many paths
_NOBODY = {"root", "user", "comfy", "comfyui", "ubuntu", "admin", "app"}


class Hiding:
    """Abbreviates places in texts: ``hide(folder, "<comfyui>")``; the home folder, as ``~``, from the start."""

    def __init__(self) -> None:
        self._places: list[tuple[re.Pattern[str], str]] = []
        try:
            self.hide(Path.home(), "~")
        except RuntimeError:  # this user has no home
            pass
        try:
            user = getpass.getuser()
        except (OSError, KeyError, ImportError):  # a container's user without a name
            user = ""
        somebody = user and user.lower() not in _NOBODY
        self._user = re.compile(rf"(?<=[\\/]){re.escape(user)}(?![\w.-])") if somebody else None

    def hide(self, folder: Path, short: str) -> None:
        """Write ``short`` for a folder, however its path was come by. Of nested folders the longest counts."""
        for text in {str(folder), os.path.abspath(folder), os.path.realpath(folder)}:
            if len(Path(text).parts) > 1:
                # either slash, doubled where a text quotes another
                path = r"[\\/]+".join(re.escape(part) for part in re.split(r"[\\/]+", text.rstrip("\\/")))
                whole = rf"(?<![\w.~>-]){path}(?![\w-]|\.\w)"
                self._places.append((re.compile(whole, re.IGNORECASE if os.name == "nt" else 0), short))
        self._places.sort(key=lambda place: -len(place[0].pattern))

    def __call__(self, text: str) -> str:
        for pattern, short in self._places:
            text = pattern.sub(short.replace("\\", r"\\"), text)
        text = _HOMES.sub("~", text)
        return self._user.sub("<user>", text) if self._user else text


class Sheet:
    """The report. Every line goes out at once, so that a user sees how far it has come."""

    def __init__(self, out: TextIO):
        self.hiding = Hiding()
        self.problems: list[tuple[str, str]] = []
        self.remarks: list[str] = []
        self.at = ""
        self._out = out

    def section(self, title: str) -> None:
        """Begin a section; ``at`` says which one the doctor is in."""
        self.at = title
        self.line(f"\n{title}")

    def row(self, name: str, text: str) -> None:
        """A name and what there is to say about it, which may take several lines."""
        self._wrapped(f"  {name:<{NAME - 3}} ", text, NAME)

    def last_words(self, lines: Iterable[str], most: int = 8) -> None:
        """The end of what a process printed."""
        for line in [line for line in lines if line.strip()][-most:]:
            self._wrapped("    | ", line.rstrip(), 6)

    def problem(self, text: str, todo: str) -> None:
        """Something does not work, and what the user can do about it; shown at the end."""
        if (text, todo) not in self.problems:
            self.problems.append((text, todo))

    def failed(self, name: str, text: str, todo: str) -> None:
        """A row that is a problem as well."""
        self.row(name, "FAILED, see the end")
        self.problem(text, todo)

    def remark(self, text: str) -> None:
        """Works, but the user will want to know; shown in the last line."""
        self.remarks.append(text)

    def end(self) -> int:
        """The problems and the last line; returns the exit code."""
        if not self.problems:
            self.line("")
            self._wrapped("", "; ".join(["doctor: everything works", *self.remarks]), 0)
            return 0
        self.section("problems")
        for number, (text, todo) in enumerate(self.problems, 1):
            self._wrapped(f"  {number}. ", text, 5)
            self._wrapped("     To do: ", todo, 12)
        count = len(self.problems)
        self.line(f"\ndoctor: {count} problem{'s' if count > 1 else ''}")
        return 1

    def line(self, text: str) -> None:
        self._out.write(self.hiding(text) + "\n")
        self._out.flush()

    def _wrapped(self, first: str, text: str, indent: int) -> None:
        paragraphs = self.hiding(text).splitlines() or [""]
        for at, paragraph in enumerate(paragraphs):
            lines = textwrap.wrap(
                paragraph, WIDTH, initial_indent=" " * indent if at else first, subsequent_indent=" " * indent,
                break_on_hyphens=False,
            )  # fmt: skip
            self.line("\n".join(lines) or first.rstrip())
