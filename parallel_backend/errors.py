"""What can go wrong, as values: a closed registry of codes, each with a hint that a user can act on.

A rank reports an :class:`ErrorReport`; the host adds what only it knows and raises it as :class:`LeapfrogError`, or as
:class:`RankOutOfMemory`, which ComfyUI takes for its own out-of-memory error.
"""

from __future__ import annotations

import msgspec
import torch

HINTS = {
    "bad_devices": "Write 'auto', 'cpu,cpu' or CUDA indices such as '0,1'; 'b/0' is the first GPU of machine b.",
    "bad_machines": "docs/machines.md shows the file that LEAPFROG_MACHINES names. Every machine has a copy of it.",
    "no_machine": (
        "The joiner must run there, with the same file and the same versions of everything: docs/machines.md."
    ),
    "mixed_devices": (
        "Start ComfyUI with --bf16-unet or --fp16-unet, so that all devices compute alike, or name devices of one kind."
    ),
    "bad_plan": "Correct it on the node. If a number is too high, lower it or name more devices.",
    "no_fit": (
        "Name more devices and raise components, free memory on them (85 % of what is free is taken), or take a "
        "smaller file, for example in fp8."
    ),
    "no_recipe": (
        "Leapfrog rebuilds the denoiser in its ranks from the file it came from. Use a stock loader "
        "(Load Diffusion Model, Load Checkpoint) in front of this node, and a safetensors file in place of a GGUF one."
    ),
    "unsupported_model": "Use ParaStep Sampler, which does not cut the denoiser, or take the node out.",
    "unsupported_patch": "Remove the node that adds it, or take Leapfrog's node out of this workflow.",
    "unsupported_sampler": "Choose one that KSamplerSelect offers, or take Leapfrog's node out of this workflow.",
    "missing_file": "Put the file back, or choose another one in the loader.",
    "bad_file": (
        "The file is damaged, or was replaced while it was in use. Copy or download it again, then queue the prompt "
        "again."
    ),
    "unknown_folder": (
        "Put the file into one of ComfyUI's folders for models, such as models/diffusion_models, or name its folder in "
        "extra_model_paths.yaml."
    ),
    "rank_start": (
        "A free port on this machine's address (127.0.0.1 where there is only one machine) and enough memory are "
        "needed. LEAPFROG_START_TIMEOUT (seconds) gives slow disks more time."
    ),
    "rank_died": (
        "The next prompt starts a new pool. If it dies again, the rank's last lines say why. With LEAPFROG_CARRY_ON=1 "
        "a picture is finished on the devices that are left."
    ),
    "rank_timeout": (
        "The next prompt starts a new pool. The first evaluation of a size, loading and measuring may take "
        "LEAPFROG_STEP_TIMEOUT (600) seconds, later evaluations 20 times as long as the slowest before, and at least "
        "30 seconds. ComfyUI's log may say what hung; the doctor (README) tests the links between GPUs, and "
        "LEAPFROG_NCCL=0 does without NCCL."
    ),
    "device_fault": (
        "The device failed, or code on it read what is not there; the system's log (dmesg, Xid) may say more. The next "
        "prompt starts a new pool. With LEAPFROG_CARRY_ON=1 a picture is finished on the devices that are left."
    ),
    "no_shared_memory": (
        "Steps travel through /dev/shm. Start a container with --shm-size=8g, or remove what fills /dev/shm."
    ),
    "rank_oom": (
        "Use a smaller size or batch, more components (Async UNet Split), fewer lanes (ParaStep), or devices with more "
        "memory."
    ),
    "not_finite": (
        "If ComfyUI alone draws a black picture, too, the model needs another precision (--bf16-unet, --fp32-unet)."
    ),
    "comfyui_changed": "ComfyUI's own files have changed since it was started. Restart it.",
    "layout_changed": "Queue the prompt again: the denoiser will be looked at anew.",
    "rank_error": "Please report it with the workflow and the log.",
}


class ErrorReport(msgspec.Struct, frozen=True):
    """One failure. ``rank`` is -1 for the host. ``step`` counts the run's denoiser calls from 1; 0 where there is none.

    ``log`` are the last lines that the rank printed. The host fills in ``step`` and ``log``.
    """

    code: str
    message: str
    rank: int = -1
    step: int = 0
    traceback: str = ""
    log: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.code not in HINTS:
            raise ValueError(f"{self.code} is not in the error registry")

    @property
    def hint(self) -> str:
        return HINTS[self.code]

    @property
    def text(self) -> str:
        """All that a user should read."""
        where = f"rank {self.rank}" + (f", denoiser call {self.step}" if self.step else "")
        lines = [f"{self.message} ({where})" if self.rank >= 0 else self.message, self.hint]
        if self.log:
            lines += [f"The last lines of rank {self.rank}:", *(f"  {line}" for line in self.log)]
        return "\n".join(lines)


class UnreadableFile(ValueError):
    """A model's file that a rank cannot read."""


class LeapfrogError(RuntimeError):
    """An :class:`ErrorReport` raised in the host; its text is what ComfyUI shows on the node."""

    def __init__(self, report: ErrorReport):
        self.report = report
        super().__init__(report.text)

    @classmethod
    def of(cls, code: str, message: str) -> LeapfrogError:
        """A failure found in the host. Raises ValueError for a ``code`` that is not in the registry."""
        return cls(ErrorReport(code=code, message=message))


class RankOutOfMemory(LeapfrogError, torch.OutOfMemoryError):
    """A rank ran out of memory. ComfyUI recovers as from its own: it unloads all models, which ends the ranks."""


def error_of(report: ErrorReport) -> LeapfrogError:
    return (RankOutOfMemory if report.code == "rank_oom" else LeapfrogError)(report)


# ComfyUI shows it in front of the message; the real one holds the install's path
LeapfrogError.__module__ = RankOutOfMemory.__module__ = "leapfrog"
