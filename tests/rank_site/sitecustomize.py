"""Brings tests/narrowed.py into every Python process that has this folder on its PYTHONPATH."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "proving"))
from narrowed import TARGET, narrow
from on_import import OnImport

del sys.path[-2:]
sys.meta_path.insert(0, OnImport(TARGET, narrow))
