"""ComfyUI's own code, found by name: the host asks whether a function is that, a rank takes it from its own files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any

OWN_PACKAGES = frozenset({"comfy", "comfy_extras"})
"""Top-level packages of ComfyUI whose functions may run inside a denoiser of a rank."""


def thing_named(namespace: Mapping[str, Any], qualname: str) -> Any:
    """The function or class of that ``__qualname__`` in a module's namespace, None if there is none."""
    for name in qualname.split("."):
        thing = unwrapped(namespace.get(name))
        namespace = vars(thing) if isinstance(thing, type) else {}
    return thing


def unwrapped(thing: Any) -> Any:
    """The function of a class method or static method."""
    return thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing


def codes_named(namespace: Mapping[str, Any], qualname: str) -> list[CodeType]:
    """The code of every function of that ``__qualname__`` that a function of a module's namespace defines inside."""
    outer, *inner = qualname.split(".<locals>.")
    around = inspect.unwrap(thing_named(namespace, outer))
    codes = [around.__code__] if isinstance(around, FunctionType) else []
    for name in ".".join(inner).split("."):
        codes = [c for code in codes for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
    return codes
