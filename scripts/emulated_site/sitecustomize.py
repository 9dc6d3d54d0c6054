"""Emulates a device in every Python process that has this folder on its PYTHONPATH, and lets it load narrow models as
`tests/rank_site` does: Python runs one sitecustomize only."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "proving"))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from emulated_device import TARGET, emulate_all
from narrowed import TARGET as DETECTION
from narrowed import narrow
from on_import import OnImport

del sys.path[-3:]
sys.meta_path[:0] = [OnImport(DETECTION, narrow), OnImport(TARGET, emulate_all)]
