"""What scripts/quality.py found, as a Markdown table, a CSV file and a picture of fidelity against speed."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

SAME = 120.0
"""PSNR in dB from which two pictures count as the same."""
HEAD = ("mode", "degree", "steps", "ideal speed", "PSNR", "SSIM", "relative L2", "judged right", "PSNR to converged")


@dataclass(frozen=True)
class Row:
    """A way to make the samples: mean and half-width of the 95 % confidence interval of what was found.

    ``of`` is how many steps of ComfyUI alone it is compared with, ``degree`` the number of components or lanes.
    """

    mode: str
    degree: int | None
    steps: int
    of: int
    speed: float
    psnr: float
    psnr_ci: float
    ssim: float
    ssim_ci: float
    l2: float
    right: int
    samples: int
    converged: float
    converged_ci: float

    def cells(self) -> tuple[str, ...]:
        same = self.psnr >= SAME
        return (
            self.mode, str(self.degree or "-"), str(self.steps), f"{self.speed:.2f}x",
            "same" if same else spread(self.psnr, self.psnr_ci), f"{self.ssim:.4f} ± {self.ssim_ci:.4f}",
            f"{self.l2:.1e}", f"{self.right} of {self.samples}", spread(self.converged, self.converged_ci),
        )  # fmt: skip

    def text(self) -> str:
        return line(self.cells())


def spread(value: float, half: float) -> str:
    return f"{value:.1f} ± {half:.1f}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def compared(
    mode: str, degree: int | None, steps: int, of: int, speed: float, latents: torch.Tensor, true: torch.Tensor,
    pictures: torch.Tensor, true_pictures: torch.Tensor, converged: torch.Tensor, right: int,
) -> Row:  # fmt: skip
    """The row of samples against the sequential and the converged ones; pictures ``[N, height, width, channels]``."""
    from skimage.metrics import structural_similarity

    ssim = [
        structural_similarity(a, b, channel_axis=2, data_range=1.0)
        for a, b in zip(true_pictures.numpy(), pictures.numpy(), strict=True)
    ]
    off = (latents - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
    return Row(
        mode, degree, steps, of, speed, *mean_ci(psnr(pictures, true_pictures)), *mean_ci(np.array(ssim)),
        float(off.mean()), right, len(latents), *mean_ci(psnr(pictures, converged)),
    )  # fmt: skip


def psnr(made: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """In dB, one for each picture, at most SAME."""
    error = (made.double() - reference.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(10 ** (-SAME / 10)).log10()).numpy()


def mean_ci(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half of the 95 % confidence interval of the mean (0 for a single value)."""
    from scipy.stats import t as student

    count = len(values)
    half = student.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5 if count > 1 else 0.0
    return float(values.mean()), float(half)


def write(folder: Path, name: str, title: str, about: str, command: str, rows: Sequence[Row]) -> None:
    """``name``.md, .csv and .png in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        table.writeheader()
        table.writerows({key: shown(value) for key, value in asdict(row).items()} for row in rows)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch').partition('+')[0]}"
    text = [
        f"# {title}", "", f"Measured on {datetime.date.today()} on {hardware}; {about}. Nothing is timed.", "",
        "```", command, "```", "", f"![Fidelity against speed]({name}.png)", "",
        line(HEAD), line(["---"] * len(HEAD)), *(row.text() for row in rows),
    ]  # fmt: skip
    (folder / f"{name}.md").write_text("\n".join(text) + "\n")
    draw(folder / f"{name}.png", title, rows)


def about_and_command(page: Path) -> tuple[str, str]:
    """What a page that :func:`write` wrote says of itself."""
    lines = page.read_text().splitlines()
    return lines[2].partition("; ")[2].removesuffix(". Nothing is timed."), lines[5]


def shown(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def way_of(row: Row) -> str:
    """The curve that the row belongs to."""
    return row.mode.partition(", threshold")[0]


# The colours, lines and markers of the curves of a family, which differ in shade and marker.
FAMILIES = {
    "Async UNet Split": ("autumn", "-", "osD^vP"),
    "ParaStep": ("winter", "-", "osD^vP"),
    "ParaStep without a guard": ("cool_r", "-", "osD^vP"),
    "one device": ("gist_gray", "--", "x+1"),
}


def family_of(row: Row) -> str:
    """The family of the row's curve."""
    if row.degree is None:
        return "one device"
    if not row.mode.startswith("ParaStep"):
        return "Async UNet Split"
    unguarded = "unguarded" in row.mode or row.mode.endswith("as published")
    return "ParaStep without a guard" if unguarded else "ParaStep"


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """PSNR against ideal speed: a curve for each way, a field for each number of steps. Without what is all but the
    same picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    counts = list(dict.fromkeys(row.of for row in rows))
    families: dict[str, list[str]] = {}
    for row in rows:
        if way_of(row) not in (names := families.setdefault(family_of(row), [])):
            names.append(way_of(row))
    figure, fields = pyplot.subplots(1, len(counts), figsize=(max(10, 6 * len(counts)), 5.5), squeeze=False)
    for field, of in zip(fields[0], counts, strict=True):
        ways: dict[str, list[Row]] = {}
        for row in rows:
            if row.of == of and row.speed > 1 and row.psnr < SAME - 1:
                ways.setdefault(way_of(row), []).append(row)
        for mode, points in ways.items():
            points.sort(key=lambda row: row.speed)
            family = family_of(points[0])
            shades, line_style, markers = FAMILIES[family]
            number, count = families[family].index(mode), len(families[family])
            field.errorbar(
                [row.speed for row in points], [row.psnr for row in points], [row.psnr_ci for row in points],
                label=mode, color=mpl.colormaps[shades](0.75 * number / max(1, count - 1)), linestyle=line_style,
                marker=markers[number % len(markers)], markersize=5, linewidth=1, capsize=2,
            )  # fmt: skip
        field.set(title=f"{of} steps", xlabel="ideal speed against one device", ylabel="PSNR to the same steps, dB")
        field.grid(alpha=0.3)
    handles = {
        label: handle for field in fields[0] for handle, label in zip(*field.get_legend_handles_labels(), strict=True)
    }
    drawn = [name for names in families.values() for name in names if name in handles]
    figure.legend([handles[name] for name in drawn], drawn, loc="center right", fontsize=8, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0, 1 - 2.3 / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
