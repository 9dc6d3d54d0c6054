"""ComfyUI's model detection with one addition: a file may state its own widths.

ComfyUI reads the widths of most families off the weights and has those of the others in its code, where they are the
published model's. A tiny file of such a family carries a `narrowed` entry in its metadata, JSON of
`{"as": {...}, "widths": {...}}`. Detection runs as it is; `as` joins what it found before a class is picked, `widths`
replaces what the picked class would build.

Ranks get the same from `tests/rank_site`, a folder with a sitecustomize.py, on their PYTHONPATH.
"""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

KEY = "narrowed"
TARGET = "comfy.model_detection"


def narrow(detection: ModuleType) -> None:
    """Add it to the module comfy.model_detection. Files without the entry are read as before."""
    if hasattr(detection, KEY):
        return
    detect, select = detection.detect_unet_config, detection.model_config_from_unet_config

    def detect_unet_config(state_dict: Any, key_prefix: str, metadata: Any = None) -> Any:
        found = detect(state_dict, key_prefix, metadata=metadata)
        if found is not None and metadata and KEY in metadata:
            stated = json.loads(metadata[KEY])
            found |= {**stated["as"], KEY: stated["widths"]}
        return found

    def model_config_from_unet_config(unet_config: Any, *args: Any, **kwargs: Any) -> Any:
        widths = unet_config.pop(KEY, {})
        config = select(unet_config, *args, **kwargs)
        if config is not None:
            config.unet_config |= widths
        return config

    detection.detect_unet_config = detect_unet_config  # pyright: ignore[reportAttributeAccessIssue]
    detection.model_config_from_unet_config = model_config_from_unet_config  # pyright: ignore
    setattr(detection, KEY, True)
