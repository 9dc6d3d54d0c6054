"""Watching a denoiser run: in which order its units compute, what each reads and returns, and how long it takes.

Weights are neither read nor resident meanwhile: on a CPU they are untouched memory, on a GPU one unit at a time. But
where the rank holds the whole denoiser that one can be watched, with times that include what weights cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...protocol import Recipe, Traced, UnitTrace
from ...tensors import DTYPE_NAMES, flatten
from ...units import Flow, Output, find_units
from .denoiser import HeldDenoiser
from .inputs import forward_inputs
from .loader import build, weight_bytes
from .taps import forget_calls

SMALL = 1 << 16
MARK = "leapfrog_reads"


# Inference tensors do not tell whether they were changed in place.
@torch.inference_mode(False)
@torch.no_grad()
def trace(
    recipe: Recipe, tree: tuple[Any, Any], device: torch.device, units: Sequence[str], repeats: int,
    shapes: Mapping[str, Sequence[int]], held: HeldDenoiser | None = None,
) -> Traced:  # fmt: skip
    """The flow of the recipe's denoiser for these inputs, and unit times, the best of ``repeats`` (of one, on a GPU
    that does not hold the denoiser).

    ``units`` are the units that a cut was made of; where empty they are found, and those that do not run are left out.
    In the order in which they run; those that run several times are always left out. ``shapes`` are those of weights
    that patches will widen. ``held`` is the whole denoiser, to be watched in place of an empty one.
    """
    patcher = held.patcher if held else _empty(recipe)
    denoiser: torch.nn.Module = patcher.model.diffusion_model
    names = list(units) or find_units(denoiser)
    if not held:
        _make_light(denoiser, names, device, shapes)

    def run(watch: Watch) -> Any:
        args, kwargs = forward_inputs(tree, device, patcher.model.get_dtype_inference())
        forget_calls(denoiser)
        with watch:
            return denoiser(*args, **kwargs)

    first = Watch(denoiser, names, device, marking=True, moving=not held)
    result = run(first)
    able = [name for name, calls in zip(names, first.calls, strict=True) if calls == 1 or (units and calls == 0)]
    if able != names:
        names = able
        if not held:
            _keep_small_parts_on(denoiser, names, device)  # which those that are no units any more are among now
        first = Watch(denoiser, names, device, marking=True, moving=not held)
        result = run(first)
    order = list(range(len(names))) if units else first.order
    if first.moves:  # each time all weights travel to the GPU, where a kernel's first run is over by now
        repeats = min(repeats, 1)
    timed = [Watch(denoiser, names, device, marking=False, moving=not held) for _ in range(repeats)]
    for watch in timed:
        run(watch)
    place = {unit: at for at, unit in enumerate(order)}

    def placed(read: Iterable[int]) -> list[int]:
        return sorted(place[u] for u in read)

    best = [min((w.seconds[u] for w in timed), default=0.0) for u in order]
    return Traced(
        units=[
            UnitTrace(names[u], seconds, weight_bytes(denoiser.get_submodule(names[u])))
            for u, seconds in zip(order, best, strict=True)
        ],
        flow=Flow(
            reads=[placed(first.reads[u]) for u in order],
            head=placed(marks_of(result)),
            outputs=[first.outputs[u] for u in order],
        ),
        stem=min((w.stem for w in timed), default=0.0),
        head=min((w.head for w in timed), default=0.0),
        shared=weight_bytes(denoiser) - sum(weight_bytes(denoiser.get_submodule(name)) for name in names),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )


def _empty(recipe: Recipe) -> Any:
    """The recipe's model without weights."""
    patcher = build(recipe, _nothing_absent, read_weights=False)
    modules = patcher.model.diffusion_model.modules()
    if any(hasattr(module, "in_features") and not hasattr(module, "weight") for module in modules):
        # a quantised layer has no weights before they are read; they stay in the file, mapped into memory
        return build(recipe, _nothing_absent)
    return patcher


def _make_light(
    denoiser: torch.nn.Module, names: Sequence[str], device: torch.device, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Weights of the shapes that patches will give them, quick to compute with; small parts on the device."""
    for name, parameter in denoiser.named_parameters():
        if wider := shapes.get(f"diffusion_model.{name}"):
            parameter.data = parameter.data.new_empty(wider)
        if parameter.numel() <= SMALL:
            parameter.data.zero_()  # recycled memory may hold numbers that are slow to compute with; large one is fresh
    _keep_small_parts_on(denoiser, names, device)


def _nothing_absent(_denoiser: torch.nn.Module) -> list[str]:
    return []


def _keep_small_parts_on(denoiser: torch.nn.Module, names: Sequence[str], device: torch.device) -> None:
    if device.type == "cpu":
        return
    inside = {part for name in names for part in denoiser.get_submodule(name).modules()}
    for module in denoiser.modules():
        parts = set(module.modules())
        if not parts & inside:
            module.to(device)  # a quantised layer has a way of its own
        elif module not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


class Stash:
    """A module's tensors, to put back after a visit to another device. A copy back would fill memory that they, not
    read or mapped from the file, do not take."""

    def __init__(self, module: torch.nn.Module):
        self._held = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
        parameters = [parameter for _, some, _ in self._held for parameter in some.values() if parameter is not None]
        self._data = [(parameter, parameter.data) for parameter in parameters]

    def put_back(self) -> None:
        for part, parameters, buffers in self._held:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        for parameter, data in self._data:
            if (parameter.device, parameter.dtype) != (data.device, data.dtype):
                parameter.data = data


class Watch(TorchFunctionMode):
    """Watches one forward. With ``marking``, a tensor made outside the units carries the units that it came from.

    ``moving``: units come to a GPU for their turn only; where there is none, nothing ``moves``.
    """

    def __init__(
        self, denoiser: torch.nn.Module, names: Sequence[str], device: torch.device, marking: bool, moving: bool = True
    ):
        super().__init__()
        self.calls = [0] * len(names)
        self.order: list[int] = []
        self.reads: list[set[int]] = [set() for _ in names]
        self.outputs: list[Output | None] = [None] * len(names)
        self.seconds = [0.0] * len(names)
        self.stem = self.head = 0.0
        self._denoiser = denoiser
        self._names = names
        self._device = device
        self._marking = marking
        self.moves = moving and device.type != "cpu"
        self._inside = False
        self._visiting: Stash | None = None
        self._since = 0.0
        self._begin = 0.0
        self._before = 0.0

    def __enter__(self) -> Any:
        self._hooks = []
        for index, name in enumerate(self._names):
            module = self._denoiser.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(self._started(index), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._done(index)))
        self._since = self._now()
        return super().__enter__() if self._marking else self

    def __exit__(self, *error: Any) -> None:
        if self._marking:
            super().__exit__(*error)
        self.head = self._now() - self._since
        for hook in self._hooks:
            hook.remove()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _started(self, index: int):
        def started(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            self._before = self._now() - self._since
            if not self.order:
                self.stem, self._before = self._before, 0.0
            self.calls[index] += 1
            self.order.append(index)
            if self._marking:
                self.reads[index] |= marks_of((args, kwargs)) - {index}
                self._inside = True
            if self.moves:
                self._visiting = Stash(module)
                module.to(self._device)
            self._begin = self._now()

        return started

    def _done(self, index: int):
        def done(module: torch.nn.Module, _args: Any, output: Any) -> None:
            self.seconds[index] += self._now() - self._begin + self._before
            if self._marking:
                self._inside = False
                self.outputs[index] = describe(output, self._names[index])
                for tensor in tensors_of(output):
                    setattr(tensor, MARK, frozenset((index,)))
            if self._visiting:
                self._visiting.put_back()
            self._since = self._now()

        return done

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        given = list(tensors_of((args, kwargs)))
        marks = marks_of(given)
        versions = [_version(t) for t in given] if marks else []
        result = func(*args, **(kwargs or {}))
        if marks:
            changed = [t for t, version in zip(given, versions, strict=True) if _version(t) != version]
            for tensor in (*tensors_of(result), *changed):
                _mark(tensor, marks)
        return result


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _mark(tensor: torch.Tensor, marks: frozenset[int]) -> None:
    setattr(tensor, MARK, getattr(tensor, MARK, frozenset()) | marks)
    if tensor._base is not None:
        setattr(tensor._base, MARK, getattr(tensor._base, MARK, frozenset()) | marks)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a tree, and in plain objects in it: ComfyUI hands modulations over in such."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | type) and not callable(value):
        yield from tensors_of(vars(value))
    elif hasattr(type(value), "__slots__"):
        yield from tensors_of([getattr(value, name, None) for name in getattr(type(value), "__slots__", ())])


def marks_of(value: Any) -> frozenset[int]:
    return frozenset(mark for tensor in tensors_of(value) for mark in getattr(tensor, MARK, ()))


def describe(output: Any, name: str) -> Output:
    spec, tensors = flatten(output, f"the output of {name}")
    return Output(spec, [(DTYPE_NAMES[t.dtype], tuple(t.shape)) for t in tensors], [_order(t) for t in tensors])


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
