"""A model file of one machine among those of another."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import msgspec
import pytest

from leapfrog.parallel_backend import LeapfrogError, Recipe
from leapfrog.parallel_backend.machines import fingerprint
from leapfrog.parallel_backend.worker.models.files import among_ours


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the host in a folder that this machine does not have; ComfyUI's folders here are empty."""
    for name in ("diffusion_models", "checkpoints"):
        (tmp_path / "ours" / name).mkdir(parents=True)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / "ours" / name)], set()))
    path = tmp_path / "theirs/flux/dev.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(range(256)) * 40_000)
    return path


def recipe_of(path: Path) -> Recipe:
    recipe = Recipe.of("diffusion_model", str(path), {})
    return msgspec.structs.replace(recipe, fingerprint=fingerprint(recipe.path, recipe.stamp))


def test_a_model_file_at_the_same_path(model: Path):
    recipe = recipe_of(model)
    assert among_ours(recipe) == recipe


@pytest.mark.parametrize("there", ["diffusion_models/flux/dev.safetensors", "checkpoints/dev.safetensors"])
def test_a_model_file_in_our_folders(model: Path, there: str, tmp_path: Path):
    recipe, ours = recipe_of(model), tmp_path / "ours" / there
    ours.parent.mkdir(exist_ok=True)
    model.rename(ours)
    assert among_ours(recipe).path == str(ours)
    assert among_ours(recipe).options == recipe.options


@pytest.mark.parametrize("at", [0, 5_000_000, -1])
def test_another_file_of_the_same_name_and_size_is_not_taken(model: Path, at: int, tmp_path: Path):
    recipe, ours = recipe_of(model), tmp_path / "ours/diffusion_models/dev.safetensors"
    content = bytearray(model.read_bytes())
    content[at : at + 200_000 if at >= 0 else None] = bytes(200_000 if at >= 0 else 1)
    ours.write_bytes(content)
    model.unlink()
    with pytest.raises(LeapfrogError, match="another content") as caught:
        among_ours(recipe)
    assert caught.value.report.code == "missing_file"
    assert str(ours) in str(caught.value)


@pytest.mark.parametrize("same", ["name", "target"])
def test_a_model_file_behind_a_link(model: Path, same: str, tmp_path: Path):
    """As the cache of Hugging Face has them: the file's own name is a digest."""
    named = model.with_name("named.safetensors")
    named.symlink_to(model)
    recipe, ours = recipe_of(named), tmp_path / "ours/checkpoints" / (named if same == "name" else model).name
    assert recipe == recipe_of(model)
    assert hash(recipe) == hash(recipe_of(model))
    named.unlink()
    model.rename(ours)
    assert among_ours(recipe).path == str(ours)


def test_a_model_file_that_was_replaced_here_alone(model: Path, tmp_path: Path):
    recipe, ours = recipe_of(model), tmp_path / "ours/checkpoints/dev.safetensors"
    model.rename(ours)
    assert among_ours(recipe).path == str(ours)
    ours.write_bytes(bytes(ours.stat().st_size))
    with pytest.raises(LeapfrogError, match="another content"):
        among_ours(recipe)


def test_a_model_file_that_is_not_there(model: Path, tmp_path: Path):
    recipe = recipe_of(model)
    model.unlink()
    with pytest.raises(LeapfrogError, match=r"dev\.safetensors is not in .*diffusion_models"):
        among_ours(recipe)
