"""What both nodes would choose here with the settings that they come with, and why; which settings are made outside."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LeapfrogError
from ..plan import LanesPlan, SplitPlan
from ..settings import SECONDS, seconds_in
from ..starting import backend_of
from .sheet import Sheet

STEPS = 20
GUIDED = 2
OTHERS = ("CUDA_", "NCCL_", "TORCH_NCCL_", "GLOO_", "PYTORCH_", "OMP_", "MKL_", "HIP_", "ROCR_", "HSA_")


@dataclass(frozen=True)
class Setting:
    """An environment variable of the pack: what it is without it, and what it may be."""

    default: str
    kind: str


SETTINGS: Mapping[str, Setting] = {
    **{name: Setting(f"{default:g}", "seconds") for name, default in SECONDS.items()},
    "LEAPFROG_CARRY_ON": Setting("0", "0 or 1"),
    "LEAPFROG_NCCL": Setting("1", "0 or 1"),
    "LEAPFROG_TRACE_DIR": Setting("no traces", "folder"),
    "LEAPFROG_MACHINES": Setting("this machine alone", "file"),
    "LEAPFROG_SHARE_GPU": Setting("0", "0 or 1"),
}
"""All that the pack reads; docs/settings.md says what they mean."""


def choices(sheet: Sheet, text: str) -> tuple[str, ...]:
    """Rows of what would be chosen for ``text`` in the nodes' field ``devices``; the devices."""
    try:
        split = SplitPlan.choose(text, 0)
        lanes = LanesPlan.choose(text, 0)
    except LeapfrogError as error:
        sheet.failed("devices", error.report.message, error.report.hint)
        return ()
    sheet.row("devices", f"'{text}' is {count(split.devices)}")
    if len(split.devices) > 1:
        sheet.row("backend", ", ".join(backend_of(split.devices)))
    else:
        sheet.row("backend", "none: a device alone talks to nobody")
    sheet.row("Async UNet Split", "\n".join(_split_text(split)))
    promised = [f"CFG above 1: {lanes.promise(STEPS, GUIDED)}", f"CFG 1: {lanes.promise(STEPS, 1)}"]
    sheet.row("ParaStep Sampler", "\n".join(promised))
    return split.devices


def count(devices: Sequence[str]) -> str:
    """Devices in words."""
    named = ", ".join(devices)
    return f"{len(devices)} devices: {named}" if len(devices) > 1 else f"one device: {named}"


def _split_text(plan: SplitPlan) -> list[str]:
    if len(plan.devices) == 1:
        return ["passes the MODEL through: there is no second device"]
    return [
        f"CFG above 1: {_pipelines(plan, True)}, if each device holds the whole model; else {_pipelines(plan, False)}"
        if len(plan.devices) == 2
        else f"CFG above 1: {_pipelines(plan, True)}",
        f"CFG 1: {_pipelines(plan, False)}, mode {plan.mode}",
    ]


def _pipelines(plan: SplitPlan, guided: bool) -> str:
    pipelines = plan.pipelines(guided, whole_fits=True)
    each = len(pipelines[0])
    parts = "the whole denoiser" if each == 1 else f"{each} components of it, a device each"
    return (
        f"prompt and negative prompt apart, each on {parts}" if len(pipelines) == 2 else f"one pipeline of {each} parts"
    )


def settings(sheet: Sheet) -> bool:
    """Rows of the environment variables that matter; problems for values that mean nothing, and False then."""
    sound = True
    own = {name: value for name, value in sorted(os.environ.items()) if name.startswith("LEAPFROG_")}
    for name, value in own.items():
        known = SETTINGS.get(name)
        meaning = f"without it: {known.default}" if known else "nothing here reads it"
        sheet.row("set", f"{name}={value} ({meaning})")
        if known and not _means_something(known, value):
            sound = False
            sheet.problem(f"{name} is '{value}', not {known.kind}.", f"Correct it, or unset it ({known.default}).")
    if not own:
        sheet.row("LEAPFROG_*", "none is set (docs/settings.md has them all)")
    others = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(OTHERS)]
    sheet.row("others", ", ".join(others) or "none of those that PyTorch and NCCL read")
    return sound


def _means_something(setting: Setting, value: str) -> bool:
    if setting.kind == "seconds":
        return seconds_in(value) is not None
    if setting.kind == "file":
        return Path(value).expanduser().is_file()
    return value in ("0", "1") if setting.kind == "0 or 1" else True
