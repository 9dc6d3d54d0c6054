"""What the nodes refuse, each with a reason and before any rank starts, and what they let pass."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import MethodType
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.k_diffusion import sampling
from comfy.weight_adapter.bypass import BypassForwardHook
from comfy.weight_adapter.lora import LoRAAdapter
from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale
from comfy_extras.nodes_model_advanced import ModelComputeDtype
from comfy_extras.nodes_model_merging import ModelMergeSimple

import tiny_models
from generation import Request, generate, prompt
from leapfrog.nodes import AsyncUNetSplit
from leapfrog.nodes.inside_patches import refuse_replaced_methods
from leapfrog.nodes.parastep_sampler import plan_of
from leapfrog.nodes.recipe import recipe_of
from leapfrog.parallel_backend import LeapfrogError, supervisor
from ranks import load, parastep, split


@pytest.fixture(autouse=True)
def no_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a rank was about to start")

    monkeypatch.setattr(supervisor, "start_ranks", refuse)
    monkeypatch.setattr(supervisor, "_pools", {})


@pytest.fixture
def model() -> Any:
    return load("flux").clone()


class Refused:
    """``with Refused(code, text)``: a LeapfrogError of that code whose message holds the text, and a hint."""

    def __init__(self, code: str, said: str):
        self.code, self.said, self.text = code, said, ""

    def __enter__(self) -> Refused:
        return self

    def __exit__(self, kind: Any, error: Any, _where: Any) -> bool:
        assert isinstance(error, LeapfrogError), error
        assert error.report.code == self.code
        assert self.said in error.report.message
        assert error.report.hint in str(error)
        self.text = str(error)
        return True


@pytest.mark.parametrize(
    ("devices", "components", "code", "said"),
    [
        ("cuda:99", 0, "bad_devices", "there is no GPU 99"),
        ("gpu", 0, "bad_devices", "'gpu' is not a device"),
        ("cpu,cpu", 3, "bad_plan", "components 3, stride 1, cfg_lanes 'auto': 3 devices are needed, but"),
        (",".join(["cpu"] * 7), 0, "bad_plan", "6 units"),
    ],
)
def test_devices_and_components_that_cannot_be(model: Any, devices: str, components: int, code: str, said: str):
    with Refused(code, said):
        AsyncUNetSplit.execute(model, devices, components, 3, 1, "lookahead")


def test_devices_of_the_sampler_that_cannot_be():
    with Refused("bad_devices", "there is no GPU 99"):
        plan_of("balanced", 0, "cuda:99", 3, "linear", 0.0)


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        (lambda: comfy.samplers.KSAMPLER(sampling.sample_ar_video), "sample_ar_video cannot run in parallel"),
        (lambda: SamplerLCMUpscale.execute(1.5, 4, "bislerp").args[0], "sample_lcm_upscale cannot run in parallel"),
        (lambda: comfy.samplers.Sampler(), "Sampler cannot run in parallel"),
        (lambda: parastep(2), "runs in parallel already"),
    ],
)
def test_a_sampler_that_cannot_go_in_rounds(sampler: Any, said: str):
    with Refused("unsupported_sampler", said):
        parastep(2, base=sampler())


@pytest.fixture(params=["async_unet_split", "parastep"])
def run(request: pytest.FixtureRequest) -> Any:
    """Samples a MODEL through one of the nodes."""

    def sample(model: Any, **conditions: Any) -> None:
        through_split = request.param == "async_unet_split"
        generate(
            split(model) if through_split else model, Request(), "euler" if through_split else parastep(2), **conditions
        )

    return sample


def test_a_model_that_does_not_say_where_it_is_from(model: Any, run: Any):
    model.cached_patcher_init = None
    with Refused("no_recipe", "does not say which file"):
        run(model)


def test_a_model_that_another_loader_made(model: Any, run: Any):
    model.cached_patcher_init = (shutil.copyfile, ())
    with Refused("no_recipe", "shutil.copyfile"):
        run(model)


def test_a_model_loaded_with_options_that_cannot_travel(model: Any, run: Any):
    options = {"custom_operations": comfy.ops.manual_cast}
    model.cached_patcher_init = (comfy.sd.load_diffusion_model, (str(tiny_models.tiny_flux()), options))
    with Refused("no_recipe", "custom_operations"):
        run(model)


def test_a_file_that_is_gone(tmp_path: Path, run: Any):
    path = tmp_path / "gone.safetensors"
    shutil.copyfile(tiny_models.tiny_flux(), path)
    model = comfy.sd.load_diffusion_model(str(path))
    path.unlink()
    with Refused("missing_file", "gone.safetensors"):
        run(model)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder that ComfyUI knows."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"checkpoints": ([str(folder)], set())})
    return folder


def made_of(model: Any, path: Path) -> Any:
    """The MODEL as if a loader had read this file."""
    model.cached_patcher_init = (comfy.sd.load_diffusion_model, (str(path), {}))
    return model


def a_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_file_in_no_folder_of_comfyui(model: Any, run: Any, known: Path):
    with Refused("unknown_folder", "file elsewhere.safetensors is in none of the folders") as refused:
        run(made_of(model, a_file(known.with_name("models-of-mine") / "elsewhere.safetensors")))
    assert str(known.parent) not in refused.text


@pytest.mark.parametrize("way_out", ["../elsewhere", "linked/../elsewhere"])
def test_a_way_out_of_a_folder_of_comfyui(model: Any, known: Path, tmp_path: Path, way_out: str):
    (tmp_path / "elsewhere").mkdir()
    (known / "elsewhere").mkdir()
    (tmp_path / "target").mkdir()
    (known / "linked").symlink_to(tmp_path / "target", target_is_directory=True)
    a_file(tmp_path / "elsewhere" / "x.safetensors")
    with Refused("unknown_folder", "x.safetensors"):
        recipe_of(made_of(model, known / way_out / "x.safetensors"))


@pytest.mark.parametrize("named", ["x", "sub/x", "a_link/x", "sub/../x"])
def test_a_file_in_a_folder_of_comfyui(model: Any, known: Path, tmp_path: Path, named: str):
    (known / "a_link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (known / "sub").mkdir()
    a_file(tmp_path / "elsewhere" / "x")
    a_file(known / named)
    assert recipe_of(made_of(model, known / named)).path == str((known / named).resolve())


def test_a_file_of_comfyui_that_is_a_link(model: Any, known: Path, tmp_path: Path):
    real = a_file(tmp_path / "elsewhere" / "x")
    (known / "x").symlink_to(real)
    assert recipe_of(made_of(model, known / "x")).path == str(real.resolve())
    with Refused("unknown_folder", "x"):
        recipe_of(made_of(model, real))


def test_a_folder_of_comfyui_that_is_a_link(model: Any, known: Path, tmp_path: Path):
    known.rmdir()
    real = a_file(tmp_path / "elsewhere" / "x")
    known.symlink_to(real.parent, target_is_directory=True)
    for path in (known / "x", real):
        assert recipe_of(made_of(model, path)).path == str(real.resolve())


def test_a_merged_model(model: Any, run: Any):
    merged = ModelMergeSimple().merge(model, load("flux").clone(), 0.5)[0]
    with Refused("unsupported_patch", "ModelMerge"):
        run(merged)


def test_another_precision(model: Any, run: Any):
    with Refused("unsupported_patch", "ModelComputeDtype"):
        run(ModelComputeDtype().patch(model, "bf16")[0])


def test_a_patch_that_runs_a_function(model: Any, run: Any):
    model.patches["diffusion_model.img_in.weight"] = [
        (1.0, ("diff", (torch.zeros(()),)), 1.0, None, lambda weight: weight)
    ]
    with Refused("unsupported_patch", "diffusion_model.img_in.weight"):
        run(model)


def test_a_patch_of_numbers_that_cannot_travel(model: Any, run: Any):
    difference = torch.zeros((), dtype=torch.complex128)
    model.patches["diffusion_model.img_in.weight"] = [(1.0, ("diff", (difference,)), 1.0, None, None)]
    with Refused("unsupported_patch", "complex128"):
        run(model)


def test_injections(model: Any, run: Any):
    model.set_injections("bypass", [comfy.model_patcher.PatcherInjection(lambda _: None, lambda _: None)])
    with Refused("unsupported_patch", "injections"):
        run(model)


def test_a_part_of_the_denoiser_replaced(model: Any, run: Any):
    model.add_object_patch("diffusion_model.img_in", model.model.diffusion_model.img_in)
    with Refused("unsupported_patch", "'diffusion_model.img_in'"):
        run(model)


def test_code_inside_the_denoiser(model: Any, run: Any):
    model.set_model_patch_replace(lambda args, _extra: args, "dit", "double_block", 0)
    with Refused("unsupported_patch", "patches_replace: dit"):
        run(model)


def test_a_patch_inside_the_denoiser(model: Any, run: Any):
    model.set_model_attn1_patch(lambda q, k, v, _extra: (q, k, v))
    with Refused("unsupported_patch", "patches: attn1_patch"):
        run(model)


def test_another_attention(model: Any, run: Any):
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda *_: None
    with Refused("unsupported_patch", "optimized_attention_override"):
        run(model)


def its_forward_replaced(denoiser: torch.nn.Module) -> None:
    vars(denoiser)["forward_orig"] = MethodType(with_a_face, denoiser)


def a_part_replaced(denoiser: torch.nn.Module) -> None:
    denoiser.get_submodule("double_blocks.0.img_attn").forward = with_a_face


def a_hook(denoiser: torch.nn.Module) -> None:
    denoiser.get_submodule("single_blocks.0").register_forward_hook(with_a_face)


def with_a_face(*args: Any) -> None:
    raise AssertionError("ranks would not have called this")


@pytest.mark.parametrize("change", [its_forward_replaced, a_part_replaced, a_hook])
def test_code_put_on_the_denoiser_itself(change: Any, run: Any):
    model = comfy.sd.load_diffusion_model(str(tiny_models.tiny_flux()))  # its own, because it will be spoiled
    behind = split(model)
    change(model.model.diffusion_model)
    with Refused("unsupported_patch", "with_a_face into this MODEL's"):
        run(model)
    change(behind.model.diffusion_model)
    with Refused("unsupported_patch", "with_a_face into this MODEL's"):
        generate(behind, Request())


def begin_a_run(model: Any) -> None:
    behind = split(model)
    behind.pre_run()
    behind.cleanup()


def test_what_another_branch_has_put_on_the_same_denoiser_is_none_of_ours():
    model = comfy.sd.load_diffusion_model(str(tiny_models.tiny_flux()))
    denoiser = model.model.diffusion_model
    for replaced in ("forward", "img_attn.forward"):
        other = model.clone()
        other.add_object_patch(f"diffusion_model.double_blocks.0.{replaced}", with_a_face)
        other.patch_model(load_weights=False)
        begin_a_run(model)
        other.unpatch_model(unpatch_weights=False)  # puts the method back where there was none of the module's own
        begin_a_run(model)
        refuse_replaced_methods(denoiser)
    layer = denoiser.get_submodule("double_blocks.0.img_attn.qkv")
    assert "forward" in vars(denoiser.get_submodule("double_blocks.0"))
    bypass = BypassForwardHook(layer, LoRAAdapter(set(), ()), 1.0)
    bypass.inject()
    bypass.eject()
    refuse_replaced_methods(denoiser)


def test_weights_that_a_split_model_does_not_have(model: Any):
    behind = split(model)
    with Refused("unsupported_patch", "has no weights in ComfyUI"):
        ModelMergeSimple().merge(model, behind, 0.5)
    with Refused("unsupported_patch", "has no weights in ComfyUI"):
        behind.state_dict_for_saving()


def test_a_whole_model_as_a_hook(model: Any, run: Any):
    whole = comfy.hooks.get_patch_weights_from_model(load("flux"))
    hook = comfy.hooks.create_hook_model_as_lora(whole, None, 0.5, 0.0)
    with Refused("unsupported_patch", "Create Hook Model as LoRA"):
        run(model, positive=comfy.hooks.set_hooks_for_conditioning(prompt(1), hook))


def test_a_split_split_again(model: Any):
    with Refused("unsupported_patch", "split already"):
        split(split(model))


def test_both_blocks_at_once(model: Any):
    with Refused("unsupported_patch", "use one of them"):
        generate(split(model), Request(), parastep(2))


def test_a_single_device_lets_the_model_pass(model: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    assert split(model, ranks=1) is model
    assert [record.message for record in caplog.records] == [
        "Leapfrog: one device (cpu), so Async UNet Split passes the MODEL through."
    ]


def test_a_single_device_and_lane_is_the_base_sampler(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    assert type(parastep(0, ranks=1, base="ddim")) is comfy.samplers.KSAMPLER
    assert [record.message for record in caplog.records] == ["Leapfrog: one device (cpu), so ParaStep is plain euler."]
