"""The committed proving model draws what it is asked, in words that it was never trained on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pack import BASE, ROOT, comfyui_dir

CLIP = BASE / "models" / "text_encoders" / "shapes_clip.safetensors"


@pytest.mark.timeout(600)
def test_nine_of_ten_held_out_captions_are_drawn(tmp_path: Path):
    command = [
        sys.executable, ROOT / "proving" / "score.py", "flux", "--comfyui", comfyui_dir(), "--clip", CLIP,
        "--each", "1", "--steps", "12", "--sheet", tmp_path / "sheet.png",
    ]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500).stdout
    found = re.search(r"as asked: (\d+) of (\d+)", said)
    assert found, said
    right, asked = map(int, found.groups())
    assert asked == 24
    assert right >= 0.9 * asked, said
