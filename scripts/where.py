"""Where the ranks of tests and campaigns compute: on the CPU, or with TEST_ON_GPUS=1 on the machine's GPUs.

On the CPU, nothing sees a GPU at all. On GPUs, ranks share one where there are too few. Choose before CUDA is asked
for anything.
"""

from __future__ import annotations

import os

ON_GPUS = os.environ.get("TEST_ON_GPUS") == "1"
FLAGS = ("--force-fp32",) if ON_GPUS else ()
"""ComfyUI's, where pictures are compared: in half precision, one of a batch differs from the same alone."""


def choose() -> None:
    """For this process and all that it starts."""
    if ON_GPUS:
        os.environ.setdefault("LEAPFROG_SHARE_GPU", "1")
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 is meant
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def devices(ranks: int) -> str:
    """What a user writes on a node for so many ranks."""
    if not ON_GPUS:
        return ",".join(["cpu"] * ranks)
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise RuntimeError("TEST_ON_GPUS is 1, but PyTorch sees no GPU")
    return ",".join(str(rank % count) for rank in range(ranks))
