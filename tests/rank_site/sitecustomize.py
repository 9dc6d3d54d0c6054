"""Brings tests/narrowed.py into every Python process that has this folder on its PYTHONPATH."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("narrowed", Path(__file__).resolve().parent.parent / "narrowed.py")
assert _spec and _spec.loader
_narrowed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_narrowed)
sys.meta_path.insert(0, _narrowed.NarrowOnImport())
