"""All tables of docs/quality at a glance: what each number of devices gives, models side by side."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quality_report import SAME, Row, line

OURS = "ParaStep, balanced"
WAYS = ("lookahead", "AsyncDiff as published", OURS, "ParaStep as published")
PUBLISHED = {"lookahead": "AsyncDiff as published", "ParaStep": "ParaStep as published"}
RANGES = [
    ("ParaStep, balanced", 2), ("ParaStep, balanced", 4), ("ParaStep, balanced", 8), ("ParaStep, fast", 8),
    ("lookahead", 2), ("lookahead", 4),
]  # fmt: skip
ALONE = "*one device in that time*"
CACHE = "*EasyCache in that time*"
ABOUT = """\
# Fidelity at a glance

Ideal speed, and PSNR in dB to ComfyUI alone with the same seed, sampler and steps, as the mean over the samples. *One
device in that time*: the better of Euler and DPM++ 2M with as many steps as *ParaStep, balanced* leaves time for; a
dash where that is not a whole step less. *EasyCache in that time*: with the mildest of its thresholds that is as fast,
a dash where none is; it does not reach the audio model, and needs no second device. Elsewhere a dash is what was not
measured.

Nothing is timed. The ideal speed of a split takes its parts to be equally long and counts exact evaluations whole;
that of ParaStep counts rounds. A model whose parts are not equal is slower: of the small Flux here the longer of two
takes 57 % of a step, which leaves lookahead 1.58x of 1.74x at 20 steps; full-size U-Nets are cut nearly evenly
(results.md). PSNR of pictures that are the same counts as 120 dB. Warm-up is automatic with a guard and for
lookahead; 3 steps for AsyncDiff and, without a guard, 3 for two lanes and 5 for more. *As published* is the schedule:
warm-up and AsyncDiff's cuts are ours, ParaStep's own code takes 5 or 13 exact steps of 50, and AsyncDiff was published
for up to four components.

Steps are what is computed in parallel here, on as many devices as there are lanes or components, as the nodes do with
CFG 1. With CFG above 1 they first give each prompt a device, which is exact: two devices then draw the same picture,
ideally twice as fast; four do what stands here for two, ideally twice as fast as that. Where no CFG is named it is the
model's own, 3 to 4, with which more is rejected than with CFG 1.

`python scripts/quality.py` writes this page from the CSV files beside it; `make quality` writes a short one elsewhere,
of four samples with Euler, in 41 minutes on two cores.

Confidence intervals, SSIM, the judge's score, the distance to a nearly converged solution, the other presets and
predictors, EasyCache, a picture, and the command that repeats it, for each model and sampler:
"""


def read(path: Path) -> list[Row]:
    """The rows of a CSV file that quality_report.write() wrote."""
    read_as: dict[str, Callable[[str], Any]] = {"mode": str, "degree": lambda text: int(text) if text else None}
    read_as |= dict.fromkeys(("steps", "of", "right", "samples"), int)
    with path.open(newline="") as file:
        rows = [{key: read_as.get(key, float)(text) for key, text in row.items()} for row in csv.DictReader(file)]
    return [Row(**row) for row in rows]


def write_summary(folder: Path) -> None:
    """README.md of a folder of such CSV files, each with its page of the same name."""
    runs = {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}
    pages = {name: (folder / f"{name}.md").read_text().splitlines() for name in runs}
    titles = {name: page[0].removeprefix("# ") for name, page in pages.items()}
    measured = {
        name: page[2].partition("; since then")[0].removesuffix(". Nothing is timed.") for name, page in pages.items()
    }
    text = [ABOUT, *(f"* [{titles[name]}, {sampler_of(name)}]({name}.md): {measured[name]}." for name in runs)]
    for sampler in sorted({sampler_of(name) for name in runs}):
        models = {titles[name]: rows for name, rows in runs.items() if sampler_of(name) == sampler}
        text += ["", f"## {sampler}"]
        for of in sorted({row.of for rows in models.values() for row in rows}):
            text += ["", f"{of} steps:", "", line(["devices", "way", *models]), line(["---"] * (2 + len(models)))]
            here = [[row for row in rows if row.of == of] for rows in models.values()]
            for degree in sorted({row.degree for rows in here for row in rows if row.degree}):
                for way in WAYS:
                    text.append(line([str(degree), way, *(_ours(way, degree, rows) for rows in here)]))
                text.append(line([str(degree), ALONE, *(_one_device(degree, rows) for rows in here)]))
                text.append(line([str(degree), CACHE, *(_cache(degree, rows) for rows in here)]))
    (folder / "README.md").write_text("\n".join(text) + "\n")


def ranges(runs: Sequence[Sequence[Row]], of: int) -> list[str]:
    """A table with the least and the most of these runs, with so many steps."""
    heads = (
        "", "ideal speed", "PSNR to ComfyUI alone, dB", "above the published method, dB", "above fewer steps, dB",
        "further from converged than ComfyUI alone, dB", "fewer steps further, dB",
    )  # fmt: skip
    text = [line(heads), line(["---"] * len(heads))]
    for way, degree in RANGES:
        speeds, closeness, ahead, gained, lost, fewer_lost = [], [], [], [], [], []
        for run in runs:
            rows = [row for row in run if row.of == of]
            own, theirs = _find(way, degree, rows), _find(PUBLISHED[way.partition(",")[0]], degree, rows)
            alone = _find("ComfyUI alone", None, rows)
            assert own and theirs and alone
            speeds.append(own.speed)
            closeness.append(own.psnr)
            ahead.append(own.psnr - theirs.psnr)
            lost.append(alone.converged - own.converged)
            if fewer := _fewer(rows, own.speed):
                gained.append(own.psnr - max(row.psnr for row in fewer))
                fewer_lost.append(alone.converged - max(row.converged for row in fewer))
        name = f"{way.replace('ParaStep, ', 'ParaStep *')}*" if "," in way else way
        what = f"{degree} {'components' if way == 'lookahead' else 'lanes'}"
        others = (span(values) for values in (closeness, ahead, gained, lost, fewer_lost))
        text.append(line([f"{name}, {what}", span(speeds, 2, "x"), *others]))
    return text


def span(values: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """The least and the most of them."""
    least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return f"{least}{unit}" if least == most else f"{least} to {most}{unit}"


def _fewer(rows: Sequence[Row], speed: float) -> list[Row]:
    """Euler and DPM++ 2M with as many steps as a run of that speed leaves time for."""
    return [row for row in rows if row.mode.endswith("fewer steps") and row.steps == round(row.of / speed)]


def sampler_of(name: str) -> str:
    return name.partition("-")[2].replace("-cfg", ", CFG ")


def _find(way: str, degree: int | None, rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if (row.mode, row.degree) == (way, degree)), None)


def _ours(way: str, degree: int, rows: Sequence[Row]) -> str:
    found = _find(way, degree, rows)
    return _shown(found) if found else "-"


def _one_device(degree: int, rows: Sequence[Row]) -> str:
    pace = _find(OURS, degree, rows)
    fits = _fewer(rows, pace.speed) if pace else []
    if not fits:
        return "-"
    best = max(fits, key=lambda row: row.psnr)
    return f"{_shown(best)} ({best.steps} of {best.mode.partition(',')[0]})"


def _cache(degree: int, rows: Sequence[Row]) -> str:
    """The mildest threshold that is as fast."""
    pace = _find(OURS, degree, rows)
    fits = [row for row in rows if pace and row.mode.startswith("EasyCache") and row.speed >= pace.speed]
    return _shown(min(fits, key=lambda row: row.speed)) if fits else "-"


def _shown(row: Row) -> str:
    return f"{row.speed:.2f}x, " + ("same" if row.psnr >= SAME else f"{row.psnr:.1f}")
