"""Devices as users write them and ranks have them: "cuda:1", "cpu", "b/cuda:0" on machine b."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from .errors import LeapfrogError
from .machines import Machines
from .settings import shares_gpu

CPU = "cpu"


def machine_of(device: str) -> str:
    """The other machine whose device it is: "b" of "b/cuda:0", "" of "cuda:0"."""
    return device.rpartition("/")[0]


def kind_of(device: str) -> str:
    """What the device is on its own machine: "cuda:0" of "b/cuda:0", "cpu" of "cpu"."""
    return device.rpartition("/")[2]


@dataclass(frozen=True)
class Machine:
    """What this machine offers: CUDA device count and CPU cores.

    ``own`` is the kind of device that ComfyUI itself computes on: "cuda" (also ROCm), "cpu", "mps"; "" if unknown.
    """

    cuda: int
    cores: int
    own: str = ""


def this_machine() -> Machine:
    """The machine as torch and the operating system see it; starts no CUDA context."""
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Machine(cuda=cuda, cores=cores)


def choose_devices(text: str, wanted: int, machine: Machine, what: str = "") -> tuple[str, ...]:
    """The devices of a pool, one per rank, such as ``("cuda:0", "cuda:1")`` or ``("cpu", "cpu")``.

    ``text`` is what the user wrote: "auto", "0,1", "cuda:1", "cpu,cpu", "0,b/0" (of machine b). ``wanted`` is the
    number of ranks, 0 for "as many as there are devices", and ``what`` the user's words for them. "auto" takes this
    machine's CUDA devices if there are any and ComfyUI is not told to leave them alone, else two ranks on the CPU where
    it has two cores. One device comes back where there is no second to use, and where ComfyUI computes on one that is
    neither.

    Raises LeapfrogError: bad_devices for a name that means nothing here, bad_plan for more ranks than devices,
    bad_machines where the file of machines is needed and cannot be used.
    """
    if text.strip().lower() == "auto":
        return _auto_devices(wanted, machine, what)
    named = tuple(_device(part.strip(), text, machine) for part in text.split(","))
    repeated = sorted({d for d in named if kind_of(d) != CPU and named.count(d) > 1})
    if repeated and not shares_gpu():
        raise LeapfrogError.of(
            "bad_devices", f"devices '{text}' names {repeated[0]} twice; each rank needs its own GPU."
        )
    if wanted > len(named):
        raise LeapfrogError.of(
            "bad_plan", f"{what}: {wanted} devices are needed, but devices '{text}' names {len(named)}."
        )
    return named[:wanted] if wanted else named


def _auto_devices(wanted: int, machine: Machine, what: str) -> tuple[str, ...]:
    if machine.own not in ("", CPU, "cuda"):
        return (machine.own,)
    if machine.cuda and machine.own != CPU:
        if wanted > machine.cuda:
            raise LeapfrogError.of(
                "bad_plan", f"{what}: {wanted} GPUs are needed, but this machine has {machine.cuda}."
            )
        return tuple(f"cuda:{i}" for i in range(wanted or machine.cuda))
    if wanted > machine.cores:
        names = ",".join([CPU] * wanted)
        raise LeapfrogError.of(
            "bad_plan",
            f"{what}: {wanted} ranks on a CPU of {machine.cores} cores would slow each other down; write devices "
            f"'{names}' if that is what you want.",
        )
    return (CPU,) * (wanted or min(2, machine.cores))


def _device(name: str, text: str, machine: Machine) -> str:
    if elsewhere := machine_of(name):
        return _elsewhere(elsewhere, kind_of(name), text)
    return device_here(name, machine, f"devices '{text}'")


def device_here(name: str, machine: Machine, where: str) -> str:
    """This machine's device that a user wrote: "cuda:1" for "1" or "CUDA:1", "cpu" for "CPU".

    Raises LeapfrogError bad_devices, which says ``where`` it was written.
    """
    if name.lower() == CPU:
        return CPU
    match = re.fullmatch(r"(?:cuda:)?(\d{1,3})", name.lower())
    if not match:
        raise LeapfrogError.of("bad_devices", f"{where}: '{name}' is not a device.")
    index = int(match[1])
    if index >= machine.cuda:
        have = f"GPUs 0 to {machine.cuda - 1}" if machine.cuda else "no CUDA GPU, only 'cpu'"
        raise LeapfrogError.of("bad_devices", f"{where}: there is no GPU {index}; this machine has {have}.")
    return f"cuda:{index}"


def _elsewhere(machine: str, kind: str, text: str) -> str:
    """A device of another machine; whether it is there is found out when the joiner offers it."""
    others = Machines.configured()
    if machine not in others.machines:
        known = ", ".join(others.machines) or "none"
        message = (
            f"devices '{text}': machine '{machine}' is not in the file that LEAPFROG_MACHINES names (it has {known})."
        )
        raise LeapfrogError.of("bad_devices", message)
    match = re.fullmatch(r"cpu|(?:cuda:)?(\d{1,3})", kind.lower())
    if not match:
        raise LeapfrogError.of("bad_devices", f"devices '{text}': '{kind}' is not a device.")
    return f"{machine}/{CPU}" if match[1] is None else f"{machine}/cuda:{int(match[1])}"
