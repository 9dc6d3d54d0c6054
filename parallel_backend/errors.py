"""What can go wrong, as values: a closed registry of codes, each with a hint that a user can act on.

A rank reports an :class:`ErrorReport`; the host raises it as :class:`LeapfrogError`. ``nodes/`` maps the codes that
ComfyUI knows (out of memory) to ComfyUI's own exceptions.
"""

from __future__ import annotations

import msgspec

HINTS = {
    "bad_devices": "Write 'auto', 'cpu,cpu' or CUDA indices such as '0,1'.",
    "bad_plan": "Lower the number, or name more devices.",
    "no_recipe": (
        "Leapfrog rebuilds the denoiser in its ranks from the file it came from. Use a stock loader "
        "(Load Diffusion Model, Load Checkpoint) in front of this node."
    ),
    "unsupported_model": "Use ParaStep Sampler, which does not cut the denoiser, or take the node out.",
    "unsupported_patch": "Remove the node that adds it, or take Leapfrog's node out of this workflow.",
    "unsupported_sampler": "Choose one that KSamplerSelect offers, or take Leapfrog's node out of this workflow.",
    "missing_file": "Put the file back, or choose another one in the loader.",
    "rank_start": "The log above holds what the rank printed; a free port on 127.0.0.1 and enough memory are needed.",
    "rank_died": "The next prompt starts a new pool. If it dies again, the rank's last lines say why.",
    "rank_timeout": "The next prompt starts a new pool. LEAPFROG_STEP_TIMEOUT (seconds) raises the limit.",
    "rank_oom": "Use a smaller size or batch, more components, or devices with more memory.",
    "rank_error": "The rank's traceback is in the log. Please report it with the workflow.",
}


class ErrorReport(msgspec.Struct, frozen=True):
    """One failure. ``step`` counts the rank's denoiser calls, -1 where there is none; ``rank`` is -1 for the host."""

    code: str
    message: str
    rank: int = -1
    step: int = -1
    traceback: str = ""

    def __post_init__(self) -> None:
        if self.code not in HINTS:
            raise ValueError("the code is not in the error registry")

    @property
    def hint(self) -> str:
        return HINTS[self.code]


class LeapfrogError(RuntimeError):
    """An :class:`ErrorReport` raised in the host; its text is what ComfyUI shows on the node."""

    def __init__(self, report: ErrorReport):
        self.report = report
        where = f" (rank {report.rank})" if report.rank >= 0 else ""
        super().__init__(f"{report.message}{where}\n{report.hint}")

    @classmethod
    def of(cls, code: str, message: str) -> LeapfrogError:
        """A failure found in the host; ``code`` must be in the registry."""
        if code not in HINTS:
            raise KeyError(f"{code} is not in the error registry")
        return cls(ErrorReport(code=code, message=message))


LeapfrogError.__module__ = "leapfrog"  # ComfyUI shows it in front of the message; the real one holds the install's path
