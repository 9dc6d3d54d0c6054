"""Plans: which devices, how many components or lanes, which schedule. Frozen, validated before a process starts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from .errors import LeapfrogError
from .units import find_units

CPU = "cpu"
SPLIT_MODES = ("async", "exact")
PREDICTORS = ("linear", "newest", "paper")


@dataclass(frozen=True)
class Machine:
    """What this machine offers: CUDA device count and CPU cores."""

    cuda: int
    cores: int


def this_machine() -> Machine:
    """The machine as torch and the operating system see it; starts no CUDA context."""
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Machine(cuda=cuda, cores=cores)


def choose_devices(text: str, wanted: int, machine: Machine) -> tuple[str, ...]:
    """The devices of a pool, one per rank, such as ``("cuda:0", "cuda:1")`` or ``("cpu", "cpu")``.

    ``text`` is what the user wrote: "auto", "0,1", "cuda:1", "cpu,cpu". ``wanted`` is the number of ranks, 0 for "as
    many as there are devices". "auto" takes CUDA devices if there are any, else two ranks on the CPU where it has two
    cores. One device comes back where there is no second to use.

    Raises LeapfrogError: bad_devices for a name that means nothing here, bad_plan for more ranks than devices.
    """
    if text.strip().lower() == "auto":
        return _auto_devices(wanted, machine)
    named = tuple(_device(part.strip(), text, machine) for part in text.split(","))
    repeated = sorted({d for d in named if d != CPU and named.count(d) > 1})
    if repeated and os.environ.get("LEAPFROG_SHARE_GPU") != "1":
        raise LeapfrogError.of(
            "bad_devices", f"devices '{text}' names {repeated[0]} twice; each rank needs its own GPU."
        )
    if wanted > len(named):
        raise LeapfrogError.of(
            "bad_plan", f"{wanted} ranks need {wanted} devices, but devices '{text}' names {len(named)}."
        )
    return named[:wanted] if wanted else named


def _auto_devices(wanted: int, machine: Machine) -> tuple[str, ...]:
    if machine.cuda:
        if wanted > machine.cuda:
            raise LeapfrogError.of(
                "bad_plan", f"{wanted} ranks need {wanted} GPUs, but this machine has {machine.cuda}."
            )
        return tuple(f"cuda:{i}" for i in range(wanted or machine.cuda))
    if wanted > machine.cores:
        names = ",".join([CPU] * wanted)
        raise LeapfrogError.of(
            "bad_plan",
            f"{wanted} ranks on a CPU of {machine.cores} cores would slow each other down; write devices '{names}' "
            "if that is what you want.",
        )
    return (CPU,) * (wanted or min(2, machine.cores))


def _device(name: str, text: str, machine: Machine) -> str:
    if name.lower() == CPU:
        return CPU
    match = re.fullmatch(r"(?:cuda:)?(\d{1,3})", name.lower())
    if not match:
        raise LeapfrogError.of("bad_devices", f"devices '{text}': '{name}' is not a device.")
    index = int(match[1])
    if index >= machine.cuda:
        have = f"GPUs 0 to {machine.cuda - 1}" if machine.cuda else "no CUDA GPU, only 'cpu'"
        raise LeapfrogError.of("bad_devices", f"devices '{text}': there is no GPU {index}; this machine has {have}.")
    return f"cuda:{index}"


@dataclass(frozen=True)
class SplitPlan:
    """Async UNet Split: one component per device, ``warmup`` exact evaluations, then ``mode``."""

    devices: tuple[str, ...]
    warmup: int
    mode: str = "async"

    def __post_init__(self) -> None:
        if self.mode not in SPLIT_MODES:
            raise LeapfrogError.of("bad_plan", f"mode '{self.mode}' is not one of {', '.join(SPLIT_MODES)}.")
        if self.warmup < 1:
            raise LeapfrogError.of(
                "bad_plan", f"warm-up {self.warmup}: the first step has no older state to use, so at least 1."
            )

    @classmethod
    def choose(cls, devices: str, components: int, warmup: int, mode: str) -> SplitPlan:
        """The plan for what a user wrote on the node; ``components`` 0 means one per device."""
        return cls(choose_devices(devices, components, this_machine()), warmup, mode)

    @property
    def components(self) -> int:
        return len(self.devices)

    def check(self, denoiser: Any) -> None:
        """Raises LeapfrogError: unsupported_model, or bad_plan for more components than the denoiser has units."""
        units = len(find_units(denoiser))
        if self.components > units:
            raise LeapfrogError.of(
                "bad_plan", f"components {self.components}: this denoiser can be cut into {units} units at most."
            )


@dataclass(frozen=True)
class LanesPlan:
    """ParaStep Sampler: ``lanes`` evaluations per round, spread over ``devices`` that each hold the whole denoiser."""

    devices: tuple[str, ...]
    lanes: int
    warmup: int
    predictor: str = "linear"

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise LeapfrogError.of("bad_plan", f"predictor '{self.predictor}' is not one of {', '.join(PREDICTORS)}.")
        if self.lanes < 1 or self.warmup < 1:
            raise LeapfrogError.of("bad_plan", f"lanes {self.lanes}, warm-up {self.warmup}: both are at least 1.")

    @classmethod
    def choose(cls, devices: str, lanes: int, warmup: int, predictor: str) -> LanesPlan:
        """The plan for what a user wrote on the node; ``lanes`` 0 means one per device.

        With "auto" no more devices than lanes are taken, nor more than there are.
        """
        machine = this_machine()
        named = choose_devices(devices, 0, machine)
        if devices.strip().lower() == "auto" and lanes:
            named = named[:lanes]
        return cls(named, lanes or len(named), warmup, predictor)
