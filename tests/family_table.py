"""docs/families.md: what the test run saw of each family, written where LEAPFROG_WRITE_DOCS=1 asks for it.

With it goes a picture for each, build/families/NAME MODE.png: ComfyUI alone on the left, ours on the right.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pack import BUILD, ROOT

TABLE = ROOT / "docs" / "families.md"
COMMAND = "make families"
HEAD = """# Families

Async UNet Split on these families of ComfyUI 0.30.0, against ComfyUI alone. *Exact* is the relative distance of the
final latent in exact mode, for 2, 3 and 4 components; *run* says which asynchronous modes were run besides.
Transformers are small denoisers with seeded random weights, built from ComfyUI's own classes and read by its own
loaders; U-Nets have full size. All in float32 on a CPU.

"""

_rows: dict[str, dict[str, Any]] = {}


def add(name: str, **facts: Any) -> None:
    """Remember facts about a family: ``units``, ``exact`` {ranks: distance}, ``tested`` [mode], ``refused``."""
    row = _rows.setdefault(name, {"exact": {}, "tested": []})
    for key, value in facts.items():
        if isinstance(value, dict):
            row[key].update(value)
        elif isinstance(value, list):
            row[key] += value
        else:
            row[key] = value


def write(path: Path = TABLE) -> None:
    """Write what was seen, where it is asked for. Families that this run did not see keep their lines."""
    if os.environ.get("LEAPFROG_WRITE_DOCS") != "1" or not _rows:
        return
    lines = {line.split("|")[1].strip(): line for line in _lines_of(path)}
    lines |= {name: _line(name, row) for name, row in _rows.items()}
    body = "\n".join(["| family | units | exact | run |", "|---|---|---|---|", *lines.values()])
    path.write_text(f"{HEAD}Written by `{COMMAND}` on {date.today().isoformat()}.\n\n{body}\n")


def picture(name: str, mode: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Draw two latents side by side, where it is asked for: three channels of a picture's or of a first frame."""
    if os.environ.get("LEAPFROG_WRITE_DOCS") != "1":
        return
    both = torch.cat([_drawn(theirs, theirs), _drawn(theirs, ours)], dim=1)
    scale = max(1, 128 // both.shape[0])
    image = Image.fromarray((both * 255).byte().numpy())
    folder = BUILD / "families"
    folder.mkdir(parents=True, exist_ok=True)
    image.resize((both.shape[1] * scale, both.shape[0] * scale), Image.Resampling.NEAREST).save(
        folder / f"{name} {mode}.png"
    )


def _drawn(reference: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """``[height, width, 3]`` in 0..1, scaled as the reference needs it; sound is drawn channels by time. The
    first 256 of each."""

    def flat(x: torch.Tensor) -> torch.Tensor:
        x = x[0].float()
        while x.ndim > 3:
            x = x[:, 0]
        if x.ndim < 3:
            x = x.reshape(1, -1, x.shape[-1])
        return x[[0, 1 % len(x), 2 % len(x)], :256, :256]

    scale = flat(reference).abs().max().clamp_min(1e-6)
    return (flat(latent) / scale / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)


def _lines_of(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines() if line.startswith("|")][2:]


def _line(name: str, row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| {name} | | refused: {row['refused']} | |"
    exact = ", ".join(f"{ranks}: {off:.0e}" if off else f"{ranks}: 0" for ranks, off in sorted(row["exact"].items()))
    return f"| {name} | {row.get('units', '')} | {exact} | {', '.join(dict.fromkeys(row['tested']))} |"
