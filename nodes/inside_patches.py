"""Functions that nodes put inside the denoiser (FreeU, HyperTile, ToMe, ...), described for the ranks as plain data.

Such a function is a closure that a node of ComfyUI made. Its code is never sent: a rank has ComfyUI's files as well,
so the description names the module, the function around it and its line, and lists the values of its variables.

A description is ``{"id": int, "text": str, "tensors": [Tensor], "reads": [str]}``. ``text`` is JSON with the entries

    patches {name: [value, ...]}    patches_replace {name: [[key, value], ...]}    optimized_attention_override value

and ``objects {number: [kind, ...]}``, where a value is ``[scalar]`` or the number of an object. Objects are numbered
once per process, so what is one object here is one object in a rank, within a description (ToMe: what one function
leaves in a variable, another one reads) and across descriptions. Kinds:

    tuple | list | set | frozenset, [value, ...]          dict, [[key, value], ...]
    tensor, index, "cpu" | "here"                         dtype | device, name     ("here": the rank's own device)
    bound, self, function                                 instance, class, [[name, value], ...]
    cell, [value] or []                                   named, module, qualname
    function, module, qualname, line, {name: cell's number}, defaults, keyword defaults, attributes
"""

from __future__ import annotations

import dis
import itertools
import json
import sys
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch

from ..parallel_backend import OWN_PACKAGES, LeapfrogError, codes_named, thing_named, unwrapped

ENTRIES = ("patches", "patches_replace", "optimized_attention_override")
KEPT = 8
COMPILED = "_compiled_call_impl"  # torch's own, of Module.compile()
READS = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
WRITES = {"STORE_DEREF", "DELETE_DEREF"}

_root = Path(comfy.samplers.__file__).resolve().parents[1]
_numbers = itertools.count(1)
# The newest descriptions by the identities of the functions in them. Their objects are kept alive, so that an identity
# stays what it was.
_recent: OrderedDict[tuple, tuple[dict[str, Any], dict[int, tuple[int, Any]]]] = OrderedDict()


def describe(options: Mapping[str, Any]) -> dict[str, Any]:
    """What runs inside the denoiser, from a call's transformer options, in the form in which it travels; {} if nothing.

    While the functions stay the same objects, so does the description. ``reads`` holds the words in their code: a
    function that reads ``"cond_or_uncond"`` may mix rows, one that reads ``"sigmas"`` may act on some steps only.

    Raises LeapfrogError unsupported_patch with the name and the file of every function that cannot travel, and why.
    """
    inside = {name: options[name] for name in ENTRIES if options.get(name)}
    functions = list(_functions(inside))
    if not functions:
        return {}
    key = tuple((where, id(function)) for where, function in functions)
    if key not in _recent:
        known = {i: number for _, kept in _recent.values() for i, (number, _) in kept.items()}
        writer = _Writer(known)
        _refuse(functions, writer)
        _recent[key] = writer.description(inside), writer.kept
        if len(_recent) > KEPT:
            _recent.popitem(last=False)
    _recent.move_to_end(key)
    return _recent[key][0]


def refuse_replaced_methods(denoiser: torch.nn.Module, but: Container[str] = ()) -> None:
    """Raises LeapfrogError unsupported_patch for a method that somebody has replaced on the denoiser or in it, or for a
    hook on a module: ranks build theirs from ComfyUI's own classes. ``but`` are paths to leave out, such as "forward".
    """
    for path, module in denoiser.named_modules():
        found = [
            value
            for name, value in vars(module).items()
            if _is_replaced(module, name, value) and f"{path}.{name}".lstrip(".") not in but
        ]
        if found := [*found, *module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
            raise LeapfrogError.of(
                "unsupported_patch",
                f"Something has put {_label(found[0])} into this MODEL's {path or 'denoiser'}, which cannot travel to "
                "a rank. If no node does so any more, it was left there; ComfyUI's command 'Unload Models and "
                "Execution Cache' removes it.",
            )


def _is_replaced(module: torch.nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute hides a method of the module's class and is not that: ComfyUI assigns what it puts back."""
    own = getattr(type(module), name, None)
    return callable(value) and own is not None and name != COMPILED and getattr(value, "__func__", None) is not own


def _functions(inside: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``(place, function)`` of everything in the entries; a place is a text that differs from every other."""
    for entry, content in inside.items():
        if not isinstance(content, dict):
            yield entry, content
            continue
        for name, functions in content.items():
            numbered = functions.items() if isinstance(functions, dict) else enumerate(functions)
            yield from ((f"{entry}: {name} {number}", function) for number, function in numbered)


def _refuse(functions: list[tuple[str, Any]], writer: _Writer) -> None:
    problems: dict[str, str] = {}
    for where, function in functions:
        try:
            writer.value(function, _label(function))
        except TypeError as error:
            problems.setdefault(str(error), f"{where}: {error}")
    reasons = list(problems.values()) or writer.results()
    if reasons:
        raise LeapfrogError.of(
            "unsupported_patch",
            f"A node on this MODEL runs code inside the denoiser that cannot travel to a rank. {'; '.join(reasons)}.",
        )


class _Writer:
    """Collects the objects of one description. ``known`` has the numbers of objects in others, by identity."""

    def __init__(self, known: Mapping[int, int]):
        self.kept: dict[int, tuple[int, Any]] = {}
        self._known = known
        self._objects: dict[int, list[Any]] = {}
        self._tensors: list[torch.Tensor] = []
        self._words: set[str] = set()
        self._read: set[int] = set()
        self._written: dict[int, str] = {}

    def description(self, inside: Mapping[str, Any]) -> dict[str, Any]:
        """The description of entries whose functions have been through :meth:`value`."""
        # The entries are taken apart and not numbered: ComfyUI adds to them in place.
        content: dict[str, Any] = {"objects": self._objects}
        for entry, held in inside.items():
            if entry == "patches":
                content[entry] = {name: [self.value(f, entry) for f in functions] for name, functions in held.items()}
            elif entry == "patches_replace":
                content[entry] = {
                    name: [[self.value(key, entry), self.value(f, entry)] for key, f in functions.items()]
                    for name, functions in held.items()
                }
            else:
                content[entry] = self.value(held, entry)
        return {
            "id": next(_numbers),
            "text": json.dumps(content),
            "tensors": self._tensors,
            "reads": sorted(self._words),
        }

    def value(self, thing: Any, where: str) -> int | list[Any]:
        """The travelling form of a value. Raises TypeError naming ``where`` it was found if it cannot travel."""
        if thing is None or type(thing) in (bool, int, float, str):
            return [thing]
        if isinstance(thing, float):
            return [float(thing)]
        if id(thing) not in self.kept:
            number = self._known.get(id(thing)) or next(_numbers)
            self.kept[id(thing)] = (number, thing)
            try:
                self._objects[number] = self._object(thing, where)
            except TypeError:
                del self.kept[id(thing)]
                raise
        return self.kept[id(thing)][0]

    def results(self) -> list[str]:
        """What code outside the denoiser waits for: variables that a function sets and no travelling one reads."""
        return [
            f"{name} is set inside the denoiser and read outside of it"
            for cell, name in self._written.items()
            if cell not in self._read
        ]

    def _object(self, thing: Any, where: str) -> list[Any]:
        kind = type(thing)
        if kind in (tuple, list, set, frozenset, torch.Size):
            name = "tuple" if kind is torch.Size else kind.__name__
            return [name, [self.value(item, f"{where}[{i}]") for i, item in enumerate(thing)]]
        if kind is dict:
            return ["dict", [[self.value(k, where), self.value(v, f"{where}[{k!r}]")] for k, v in thing.items()]]
        if kind in (torch.Tensor, torch.nn.Parameter):
            if thing.is_meta:
                raise TypeError(f"{where} is a tensor without content")
            self._tensors.append(thing)
            return ["tensor", len(self._tensors) - 1, _place(thing.device)]
        if kind is CellType:
            return ["cell", [self.value(item, where) for item in _content(thing)]]
        if kind is torch.dtype:
            return ["dtype", str(thing).removeprefix("torch.")]
        if kind is torch.device:
            return ["device", _place(thing)]
        if kind is FunctionType:
            return self._function(thing, where)
        if kind is MethodType:
            receiver = self.value(thing.__self__, f"{where}.__self__")
            return ["bound", receiver, self.value(thing.__func__, _label(thing))]
        if kind is BuiltinFunctionType and getattr(torch, thing.__name__, None) is thing:
            return ["named", "torch", thing.__name__]
        if isinstance(thing, type):
            module = _own_module(_file_of(thing))
            if module and thing_named(vars(sys.modules[thing.__module__]), thing.__qualname__) is thing:
                return ["named", module, thing.__qualname__]
            raise TypeError(f"{where}: ComfyUI's own modules have no top-level class {_label(thing)}")
        return self._instance(thing, where)

    def _instance(self, thing: Any, where: str) -> list[Any]:
        holds_weights = isinstance(thing, torch.nn.Module | torch.Tensor | comfy.model_patcher.ModelPatcher)
        if holds_weights or not hasattr(thing, "__dict__") or _own_module(_file_of(type(thing))) is None:
            label = _label(type(thing))
            raise TypeError(f"{label} is not made of plain data" if where == label else f"{where} is a {label}")
        methods = [unwrapped(m) for m in vars(type(thing)).values()]
        self._words |= {word for m in methods if isinstance(m, FunctionType) for word in _words(m.__code__)}
        cls = self.value(type(thing), where)
        return ["instance", cls, [[k, self.value(v, f"{where}.{k}")] for k, v in vars(thing).items()]]

    def _function(self, function: FunctionType, where: str) -> list[Any]:
        label = _label(function)
        named = "" if where == label else f"{where} is "
        module = _own_module(_file_of(function))
        if module is None:
            raise TypeError(f"{named}{label} of {function.__code__.co_filename}, which is not ComfyUI's own code")
        self._words |= _words(function.__code__)
        if thing_named(function.__globals__, function.__qualname__) is function:
            return ["named", module, function.__qualname__]
        code = function.__code__
        alike = codes_named(function.__globals__, function.__qualname__)
        if [code] != [one for one in alike if one.co_firstlineno == code.co_firstlineno]:
            raise TypeError(f"{named}{label}, which {function.__globals__['__file__']} does not define")
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        reads, writes = variables(code)
        self._read |= {id(cells[name]) for name in reads}
        self._written |= {id(cells[name]): f"the variable '{name}' of {label}" for name in writes}
        return [
            "function", module, function.__qualname__, code.co_firstlineno,
            {name: self.value(cell, f"the variable '{name}' of {label}") for name, cell in cells.items()},
            self.value(function.__defaults__, f"a default of {label}"),
            self.value(function.__kwdefaults__, f"a default of {label}"),
            self.value(vars(function) or None, f"an attribute of {label}"),
        ]  # fmt: skip


def _content(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _place(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "here"


def _label(thing: Any) -> str:
    """A name for a message: ``module.qualname`` of a function or class, or of an object's class."""
    if not hasattr(thing, "__qualname__"):
        thing = type(thing)
    return f"{_own_module(_file_of(thing)) or thing.__module__}.{thing.__qualname__}"


def _file_of(thing: Any) -> str | None:
    """The file of the module of a function, a method or a class; None where there is none."""
    namespace = getattr(thing, "__globals__", None)
    return namespace.get("__file__") if namespace else getattr(sys.modules.get(thing.__module__), "__file__", None)


def _own_module(file: str | None) -> str | None:
    """The dotted name under which a file of ComfyUI's own can be imported; ComfyUI loads its extras under another."""
    path = Path(file).resolve() if file else None
    if path is None or not path.is_relative_to(_root):
        return None
    parts = path.relative_to(_root).with_suffix("").parts
    return ".".join(parts) if parts[0] in OWN_PACKAGES else None


def variables(code: CodeType) -> tuple[set[str], set[str]]:
    """The variables of functions around it that a function reads, and those that it sets."""
    reads, writes = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in READS:
            reads.add(step.argval)
        elif step.opname in WRITES:
            writes.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            inner_reads, inner_writes = variables(inner)
            reads |= inner_reads
            writes |= inner_writes
    free = set(code.co_freevars)
    return reads & free, writes & free


def _words(code: CodeType) -> set[str]:
    words = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    return words.union(*(_words(c) for c in code.co_consts if isinstance(c, CodeType)))
