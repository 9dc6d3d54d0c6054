"""How a rank tells what went wrong, where only a GPU could have gone wrong like that."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from leapfrog.parallel_backend.errors import UnreadableFile
from leapfrog.parallel_backend.worker.rank import _report

CUBLAS = "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"


@pytest.mark.parametrize(
    ("error", "works", "code"),
    [
        (RuntimeError(CUBLAS), True, "rank_error"),
        (RuntimeError(CUBLAS), False, "device_fault"),
        (UnreadableFile("x.safetensors cannot be read"), True, "bad_file"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, "rank_oom"),
        (MemoryError(), False, "rank_oom"),
    ],
)
def test_what_a_rank_reports(error: Exception, works: bool, code: str, monkeypatch: pytest.MonkeyPatch):
    """On a GPU an error of one kernel is told by whoever asks next, in words of its own."""

    def query() -> bool:
        if not works:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return True

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(query=query))
    report = _report(error, 1)
    assert (report.code, report.rank) == (code, 1)
    assert str(error) in report.message
