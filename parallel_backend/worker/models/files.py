"""Model files of another machine among this one's."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths
import msgspec

from ...errors import LeapfrogError
from ...machines import fingerprint
from ...protocol import Recipe, stamp_of

FOLDERS = ("diffusion_models", "checkpoints")


def among_ours(recipe: Recipe) -> Recipe:
    """The recipe with the path that its file has on this machine: the same one, or the like in ComfyUI's folders.

    Raises LeapfrogError missing_file where there is none with the same content.
    """
    names = [_parts(name) for name in dict.fromkeys((recipe.named or recipe.path, recipe.path))]
    folders = [Path(folder) for name in FOLDERS for folder in folder_paths.get_folder_paths(name)]
    found = [path for parts in names for path in _likely(parts, folders) if path.is_file()]
    for path in found:
        stamp = stamp_of(path)
        if stamp[0] == recipe.stamp[0] and fingerprint(str(path), stamp) == recipe.fingerprint:
            return msgspec.structs.replace(recipe, path=str(path), stamp=stamp)
    what = f"has another content than ComfyUI's: {found[0]}" if found else f"is not in {', '.join(map(str, folders))}"
    raise LeapfrogError.of("missing_file", f"The model file {names[0][-1]} {what}.")


def _parts(path: str) -> tuple[str, ...]:
    """Of a path as the host's system writes it."""
    return (PureWindowsPath if "\\" in path else PurePosixPath)(path).parts


def _likely(parts: tuple[str, ...], folders: list[Path]) -> list[Path]:
    return [Path(*parts), *(folder.joinpath(*parts[at:]) for at in range(1, len(parts)) for folder in folders)]
