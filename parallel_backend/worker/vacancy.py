"""How much room there is on a rank's device."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a GPU could give if this process held nothing there, as before it loads anew; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
