"""Published results: every table can be read, and says how to repeat it, when and on what it was measured."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pack import ROOT
from quality_report import Row
from quality_summary import ranges, read, span, write_summary

DOCS = [ROOT / "docs/results.md", *sorted((ROOT / "docs/quality").glob("*.md"))]
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
HARDWARE = re.compile(r"\bcores?\b|\bthreads?\b|\bGPU\b|H100|H200|A5000")


def sections(path: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of each section; of a page of one run what stands above the first holds for all."""
    above, *rest = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in rest:
        title, _, text = section.partition("\n")
        yield title, text if path.stem == "results" else above + text
    if not rest:
        yield path.stem, above


SECTIONS = [pytest.param(text, id=f"{path.stem}: {title}") for path in DOCS for title, text in sections(path)]


def tables(text: str) -> list[list[str]]:
    """The lines of each table."""
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)]


@pytest.mark.parametrize("text", [one for one in SECTIONS if tables(str(one.values[0]))])
def test_tables_name_their_command_date_and_hardware(text: str):
    for table in tables(text):
        assert re.fullmatch(r"\|(-+\|)+", table[1].replace(" ", ""))
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1, table[0]
        assert len(table) > 2
    assert DATE.search(text)
    assert HARDWARE.search(text)
    # one for each heading that has tables
    for part in re.split(r"^### ", text, flags=re.MULTILINE):
        if tables(part):
            commands = re.findall(r"^(?:python \S+|make).*$|`make [\w-]+`|`(?:python|pytest) \S+", part, re.MULTILINE)
            assert commands, f"no command repeats {part[:40]}"


@pytest.mark.parametrize("text", SECTIONS)
def test_commands_exist(text: str):
    for command in re.findall(r"^python (\S+.*)$", text, re.MULTILINE):
        for part in re.split(r"&& (?:python )?", command):
            script, *words = shlex.split(part)
            source = (ROOT / script).read_text(encoding="utf-8")
            for word in words:
                assert not word.startswith("--") or f'"{word}"' in source, f"{script} has no {word}"
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_fidelity_page_is_what_the_csv_files_say(tmp_path: Path):
    folder = ROOT / "docs/quality"
    for path in [*folder.glob("*.csv"), *folder.glob("*-*.md")]:
        shutil.copy(path, tmp_path)
    write_summary(tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()


PICTURES = [read(ROOT / "docs/quality" / f"{model}-euler.csv") for model in ("flux", "unet", "wan")]


def measured(way: str, lanes: int, steps: int, speeds: bool = True) -> str:
    """As the help page of ParaStep Sampler has it: PSNR of each of the three models, and the ideal speeds."""
    found = [row for rows in PICTURES for row in rows if (row.mode, row.degree, row.of) == (way, lanes, steps)]
    assert len(found) == len(PICTURES)
    decibels = ", ".join(f"{row.psnr:.0f}" for row in found)
    at = f" at {span([row.speed for row in found], 2, 'x')}"
    return f"{decibels} dB{at if speeds else ''}"


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("preset", ["faithful", "balanced", "fast", "unguarded"])
def test_the_help_page_says_what_was_measured(preset: str, lanes: int):
    lines = (ROOT / "web/docs/LeapfrogParaStepSampler.md").read_text().splitlines()
    two, four = (line for line in lines if line.startswith(f"| `{preset}` | "))
    line = two if lanes == 2 else four
    for steps in (20, 50):
        assert measured(f"ParaStep, {preset}", lanes, steps) in line
    if (preset, lanes) == ("unguarded", 2):
        paper = [measured("ParaStep as published", 2, steps, speeds=False) for steps in (20, 50)]
        assert f"the method as published: {' and '.join(paper)}" in line


@pytest.mark.parametrize("steps", [20, 50])
def test_the_ranges_are_those_of_the_csv_files(steps: int):
    paths = sorted((ROOT / "docs/quality").glob("*.csv"))
    runs = [read(path) for path in paths if not re.search("audio|cfg", path.stem)]
    assert "\n".join(ranges(runs, steps)) in (ROOT / "docs/results.md").read_text()


WITHOUT_CFG = [read(ROOT / "docs/quality" / f"{model}-euler-cfg1.csv") for model in ("flux", "unet", "wan")]
IN_THAT_TIME = {8: 6, 20: 12, 50: 27}
"""Steps that one device takes in the time of two lanes."""


def models_with(models: list[list[Row]], way: str, degree: int, steps: int) -> list[Row]:
    """The row of each model; of "fewer steps" the better solver's."""
    if way == "fewer steps":
        several = [[row for row in rows if row.mode.endswith(way)] for rows in models]
        fits = [[row for row in rows if (row.of, row.steps) == (steps, IN_THAT_TIME[steps])] for rows in several]
    else:
        fits = [[row for row in rows if (row.mode, row.degree, row.of) == (way, degree, steps)] for rows in models]
    return [max(rows, key=lambda row: row.psnr) for rows in fits]


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize(
    ("named", "way"),
    [
        ("ParaStep *balanced*", "ParaStep, balanced"),
        ("ParaStep as published", "ParaStep as published"),
        ("lookahead", "lookahead"),
        ("AsyncDiff as published", "AsyncDiff as published"),
        ("*fewer steps on one device*", "fewer steps"),
    ],
)
def test_the_readme_says_what_was_measured_with_two_devices(named: str, way: str, steps: int):
    found = models_with(PICTURES, way, 2, steps)
    said = f"{span([row.psnr for row in found], 0)} dB at {span([row.speed for row in found], 2, 'x')}"
    (line,) = re.findall(rf"^\| {re.escape(named)} \| .* dB at .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert line.split(" | ")[1 if steps == 20 else 2].removesuffix(" |") == said


@pytest.mark.parametrize(
    ("named", "way", "degree"),
    [
        ("ParaStep *faithful*, 2 lanes", "ParaStep, faithful", 2),
        ("ParaStep *faithful*, 4 lanes", "ParaStep, faithful", 4),
        ("ParaStep *balanced*, 2 lanes", "ParaStep, balanced", 2),
        ("ParaStep *balanced*, 4 lanes", "ParaStep, balanced", 4),
        ("ParaStep *balanced*, 8 lanes", "ParaStep, balanced", 8),
        ("ParaStep *fast*, 4 lanes", "ParaStep, fast", 4),
        ("ParaStep *fast*, 8 lanes", "ParaStep, fast", 8),
        ("ParaStep as published, 2 lanes", "ParaStep as published", 2),
        ("ParaStep as published, 4 lanes", "ParaStep as published", 4),
        ("ParaStep as published, 8 lanes", "ParaStep as published", 8),
        ("lookahead, 2 components", "lookahead", 2),
        ("lookahead, 4 components", "lookahead", 4),
        ("lookahead, 8 components", "lookahead", 8),
        ("AsyncDiff as published, 2 components", "AsyncDiff as published", 2),
        ("AsyncDiff as published, 4 components", "AsyncDiff as published", 4),
        ("AsyncDiff as published, 8 components", "AsyncDiff as published", 8),
        ("6, 12, 27 steps on one device", "fewer steps", 0),
    ],
)
def test_the_table_without_cfg_is_that_of_the_csv_files(named: str, way: str, degree: int):
    cells = []
    for steps in (8, 20, 50):
        found = models_with(WITHOUT_CFG, way, degree, steps)
        cells.append(f"{span([row.speed for row in found], 2, 'x')}, {span([row.psnr for row in found], 0)} dB")
    assert f"| {named} | {' | '.join(cells)} |" in (ROOT / "docs/results.md").read_text()
