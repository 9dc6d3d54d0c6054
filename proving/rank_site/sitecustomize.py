"""Makes the class of the proving U-Net known in every Python process that has this folder on its PYTHONPATH."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from on_import import OnImport
from unet_config import register

sys.path.pop()
sys.meta_path.insert(0, OnImport("comfy.model_detection", lambda _: register()))
