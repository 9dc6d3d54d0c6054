"""Rebuilding the functions that nodes put inside the denoiser, from what nodes/inside_patches.py made of them.

Their code is this rank's own: it is found in the modules of the ComfyUI that the rank runs on, and nowhere else.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import comfy.model_management
import torch
from torch.overrides import get_overridable_functions

from ...errors import LeapfrogError
from ...own_code import OWN_PACKAGES, codes_named, thing_named

KEPT = 8

_root = Path(comfy.model_management.__file__).resolve().parents[1]
# The newest descriptions by id: their options, and all their objects by number.
_recent: OrderedDict[int, tuple[dict[str, Any], dict[int, Any]]] = OrderedDict()


def rebuild(description: Mapping[str, Any]) -> dict[str, Any]:
    """The options ``patches``, ``patches_replace`` and ``optimized_attention_override`` of a description.

    The same description gives the same functions, so that they keep what they remember; an object that two descriptions
    share is one object. Tensors are copied. Raises TypeError for a name outside ComfyUI's own modules, ValueError for a
    function that this ComfyUI does not have.
    """
    if not description:
        return {}
    number = description["id"]
    if number not in _recent:
        content = json.loads(description["text"])
        built = {n: thing for _, objects in _recent.values() for n, thing in objects.items()}
        builder = _Builder({int(n): form for n, form in content["objects"].items()}, description["tensors"], built)
        _recent[number] = builder.entries(content), builder.objects
        if len(_recent) > KEPT:
            _recent.popitem(last=False)
    _recent.move_to_end(number)
    return dict(_recent[number][0])


def forget() -> None:
    """Drop all functions and what they remember: the next run starts as its descriptions say."""
    _recent.clear()


class _Builder:
    """Builds the objects of one description. ``built`` has objects of others that live."""

    def __init__(self, forms: Mapping[int, list[Any]], tensors: list[torch.Tensor], built: Mapping[int, Any]):
        self._forms = forms
        self._tensors = tensors
        self.objects = {n: built[n] for n in forms if n in built}

    def entries(self, content: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if "patches" in content:
            made["patches"] = {name: [self.value(f) for f in held] for name, held in content["patches"].items()}
        if "patches_replace" in content:
            made["patches_replace"] = {
                name: {self.value(key): self.value(f) for key, f in held}
                for name, held in content["patches_replace"].items()
            }
        if "optimized_attention_override" in content:
            made["optimized_attention_override"] = self.value(content["optimized_attention_override"])
        return made

    def value(self, value: int | list[Any]) -> Any:
        if isinstance(value, list):
            return value[0]
        if value not in self.objects:
            kind, *parts = self._forms[value]
            build = getattr(self, f"_build_{kind}", None)
            if build is None:
                raise ValueError(f"unknown kind {kind!r} of object")
            build(value, *parts)
        return self.objects[value]

    # What can be part of a circle, such as a function in one of its own variables, takes its place before it is filled.

    def _build_list(self, number: int, items: list[Any]) -> None:
        made = self.objects[number] = []
        made.extend(map(self.value, items))

    def _build_dict(self, number: int, items: list[Any]) -> None:
        made = self.objects[number] = {}
        made.update((self.value(key), self.value(value)) for key, value in items)

    def _build_set(self, number: int, items: list[Any]) -> None:
        made = self.objects[number] = set()
        made.update(map(self.value, items))

    def _build_tuple(self, number: int, items: list[Any]) -> None:
        self.objects[number] = tuple(map(self.value, items))

    def _build_frozenset(self, number: int, items: list[Any]) -> None:
        self.objects[number] = frozenset(map(self.value, items))

    def _build_tensor(self, number: int, index: int, place: str) -> None:
        self.objects[number] = self._tensors[index].to(_device(place), copy=True)

    def _build_dtype(self, number: int, name: str) -> None:
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name!r} is no dtype")
        self.objects[number] = dtype

    def _build_device(self, number: int, place: str) -> None:
        self.objects[number] = _device(place)

    def _build_named(self, number: int, module: str, qualname: str) -> None:
        if module == "torch":
            thing: Any = getattr(torch, qualname, None)
            # those that compute with tensors; others open files or change how this process computes
            if not isinstance(thing, BuiltinFunctionType) or thing not in get_overridable_functions()[torch]:
                raise TypeError(f"torch.{qualname} is no function that a patch may name")
        else:
            own = _own_module(module)
            thing = thing_named(vars(own), qualname)
            if not isinstance(thing, FunctionType | type):
                raise ValueError(f"this ComfyUI has no {module}.{qualname}")
            if (thing.__module__ != module) if isinstance(thing, type) else (thing.__globals__ is not vars(own)):
                raise TypeError(f"{module} only imports {qualname}")
        self.objects[number] = thing

    def _build_function(
        self, number: int, module: str, qualname: str, line: int, cells: dict[str, int],
        defaults: Any, keyword_defaults: Any, attributes: Any,
    ) -> None:  # fmt: skip
        code = _code(_own_module(module), qualname, line)
        if set(code.co_freevars) != set(cells):
            raise ValueError(f"{module}.{qualname} has other variables in this rank")
        fresh = [n for n in cells.values() if n not in self.objects]
        self.objects.update({n: CellType() for n in fresh})
        closure = tuple(self.objects[cells[name]] for name in code.co_freevars)
        function = FunctionType(code, vars(_own_module(module)), code.co_name, None, closure)
        self.objects[number] = function
        for n in fresh:
            _kind, content = self._forms[n]
            for item in content:
                self.objects[n].cell_contents = self.value(item)
        function.__qualname__ = qualname
        function.__defaults__ = self.value(defaults)
        function.__kwdefaults__ = self.value(keyword_defaults)
        vars(function).update(self.value(attributes) or {})

    def _build_bound(self, number: int, receiver: Any, function: Any) -> None:
        own = self.value(function)
        if not isinstance(own, FunctionType):
            raise TypeError("only a function of ComfyUI's own can be bound")
        self.objects[number] = MethodType(own, self.value(receiver))

    def _build_instance(self, number: int, cls: Any, attributes: list[Any]) -> None:
        kind: Any = self.value(cls)
        if not isinstance(kind, type):
            raise TypeError("only a class has instances")
        made = self.objects[number] = object.__new__(kind)
        vars(made).update((name, self.value(value)) for name, value in attributes)


def _device(place: str) -> torch.device:
    return torch.device("cpu") if place == "cpu" else comfy.model_management.get_torch_device()


def _own_module(name: str) -> ModuleType:
    if name.split(".")[0] not in OWN_PACKAGES:
        raise TypeError(f"{name} is not one of ComfyUI's own modules")
    module = importlib.import_module(name)
    if not Path(module.__file__ or "/").resolve().is_relative_to(_root):
        raise TypeError(f"{name} is not ComfyUI's own: it is {module.__file__}")
    return module


def _code(module: ModuleType, qualname: str, line: int) -> CodeType:
    """The code of the function that starts at that line. Raises LeapfrogError comfyui_changed unless there is one."""
    codes = [code for code in codes_named(vars(module), qualname) if code.co_firstlineno == line]
    if len(codes) != 1:
        raise LeapfrogError.of("comfyui_changed", f"{module.__name__} has no {qualname} at line {line}.")
    return codes[0]
