"""Functions inside the denoiser: those of ComfyUI's own nodes do the same after their journey, others are refused."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.gligen
import comfy.ldm.modules.attention
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import save_file

import seeded
import tiny_models
from generation import Request, generate, noise, prompt
from leapfrog.nodes import inside_patches
from leapfrog.nodes.inside_patches import ENTRIES, describe
from leapfrog.parallel_backend import LeapfrogError
from leapfrog.parallel_backend.tensors import flatten, unflatten
from leapfrog.parallel_backend.worker.models.inside_patches import forget, rebuild
from pack import comfyui_dir

REQUESTS = {"unet": Request(family="unet", steps=2), "flux": Request(steps=2)}


@pytest.fixture(autouse=True)
def new_run() -> None:
    forget()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load_as_comfyui_does(path: Path) -> ModuleType:
    """ComfyUI's node loader names a module by its path."""
    name = str(path.with_suffix(""))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def node(file: str, name: str) -> Any:
    return getattr(load_as_comfyui_does(comfyui_dir().resolve() / "comfy_extras" / f"nodes_{file}.py"), name)


@cache
def loaded(family: str) -> Any:
    if family == "flux":
        return comfy.sd.load_diffusion_model(str(tiny_models.tiny_flux()))
    return comfy.sd.load_diffusion_model(str(seeded.cached("unet-middle", unet_with_attention_in_the_middle)))


def unet_with_attention_in_the_middle() -> tiny_models.Weights:
    depth: Any = [1]
    model = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1], channel_mult=[1],
        transformer_depth=depth, transformer_depth_output=[0, 0], transformer_depth_middle=1, num_heads=8,
        context_dim=tiny_models.CONTEXT, use_spatial_transformer=True, use_linear_in_transformer=False, legacy=False,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    return seeded.seeded(model, 4)


@pytest.fixture
def unet(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = loaded("unet")
    # FreeU acts on blocks of two and four times this width
    monkeypatch.setitem(model.model.model_config.unet_config, "model_channels", 160)
    return model.clone()


@pytest.fixture
def flux() -> Any:
    return loaded("flux").clone()


def travelled(options: Mapping[str, Any]) -> dict[str, Any]:
    """The functions of a call's options as a rank has them."""
    spec, tensors = flatten(describe(options))
    return rebuild(unflatten(spec, [t.clone() for t in tensors]))


def sampled(model: Any, request: Request, rebuilt: bool = False, **conditions: Any) -> torch.Tensor:
    """The latent of a MODEL; ``rebuilt``: with every function inside the denoiser replaced by its travelled twin."""

    def replace(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def own(value: Any) -> Any:
            if not isinstance(value, dict) or "cond_or_uncond" not in value:
                return value
            return {**{k: v for k, v in value.items() if k not in ENTRIES}, **travelled(value)}

        return executor(*map(own, args), **{key: own(value) for key, value in kwargs.items()})

    if rebuilt:
        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "travel", replace)
    torch.manual_seed(3)  # HyperTile and ToMe draw from the global generator
    return generate(model, request, **conditions)


@cache
def unpatched(family: str) -> torch.Tensor:
    return sampled(loaded(family), REQUESTS[family])


NODES = {
    "FreeU": ("unet", "freelunch", "FreeU", (1.1, 1.2, 0.9, 0.2)),
    "FreeU_V2": ("unet", "freelunch", "FreeU_V2", (1.3, 1.4, 0.9, 0.2)),
    "HyperTile": ("unet", "hypertile", "HyperTile", (32, 2, 0, False)),
    "ToMe": ("unet", "tomesd", "TomePatchModel", (0.5,)),
    "NAG U-Net": ("unet", "nag", "NAGuidance", (5.0, 0.5, 1.5)),
    "NAG Flux": ("flux", "nag", "NAGuidance", (5.0, 0.5, 1.5)),
    "DeepShrink": ("unet", "model_downscale", "PatchModelAddDownscale", (1, 2.0, 0, 0.35, True, "bicubic", "bicubic")),
    "DeepShrink before the skip": (
        "unet", "model_downscale", "PatchModelAddDownscale", (1, 2.0, 0.0, 1.0, False, "bislerp", "area"),
    ),
    "PAG": ("unet", "pag", "PerturbedAttentionGuidance", (3.0,)),
    "SLG DiT": ("flux", "slg", "SkipLayerGuidanceDiT", (3.0, 0.0, 1.0, "1", "1, 2")),
    "SLG simple": ("flux", "slg", "SkipLayerGuidanceDiTSimple", (0.0, 1.0, "1", "1, 2")),
    "SLG SD3": ("flux", "sd3", "SkipLayerGuidanceSD3", ("0", 3.0, 0.0, 1.0)),
}  # fmt: skip


def applied(model: Any, file: str, name: str, arguments: tuple) -> Any:
    result = node(file, name).execute(model, *arguments)
    return result[0] if isinstance(result, tuple) else result.args[0]


@pytest.mark.parametrize("name", NODES)
def test_functions_that_travelled_do_the_same(name: str, request: pytest.FixtureRequest):
    family, *how = NODES[name]
    model = request.getfixturevalue(family)
    own = sampled(applied(model, *how), REQUESTS[family])
    assert torch.equal(sampled(applied(model, *how), REQUESTS[family], rebuilt=True), own)
    assert not torch.allclose(own, unpatched(family), rtol=0.01)


def test_several_nodes_at_once(unet: Any):
    def patched() -> Any:
        model = unet
        for name in ("FreeU", "ToMe", "PAG"):
            model = applied(model, *NODES[name][1:])
        return model

    own = sampled(patched(), REQUESTS["unet"])
    assert torch.equal(sampled(patched(), REQUESTS["unet"], rebuilt=True), own)


def test_an_object_that_remembers_earlier_calls(flux: Any):
    def patched() -> Any:
        model = applied(flux, "flux", "FluxKVCache", ())
        model.object_patches.clear()  # the other half of the node is not a function
        return model

    positive = prompt(1, reference_latents=[noise((1, 16, 8, 8), 21)])
    request = Request(steps=3, cfg=1.0)
    own = sampled(patched(), request, positive=positive)
    assert not torch.allclose(own, sampled(flux, request, positive=positive), rtol=0.01)
    assert torch.equal(sampled(patched(), request, rebuilt=True, positive=positive), own)


def inside(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.model_options["transformer_options"].items() if k in ENTRIES}


def variables(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))


def test_what_one_function_sets_another_one_reads(unet: Any):
    options = inside(applied(unet, *NODES["ToMe"][1:]))
    made = travelled(options)["patches"]
    merge, unmerge = made["attn1_patch"][0], made["attn1_output_patch"][0]
    assert variables(merge)["u"] is variables(unmerge)["u"]
    assert variables(merge)["u"] is not variables(options["patches"]["attn1_patch"][0])["u"]
    tokens = noise((1, 64, 320), 1)
    merged, _, _ = merge(tokens, tokens, tokens, {"original_shape": [1, 4, 8, 8]})
    assert merged.shape == (1, 32, 320)
    assert unmerge(merged, {}).shape == tokens.shape
    again = travelled(options)["patches"]
    assert again["attn1_patch"][0] is merge and again["attn1_output_patch"][0] is unmerge
    forget()
    assert travelled(options)["patches"]["attn1_patch"][0] is not merge


def test_a_function_that_has_run_here_travels_with_what_it_remembers(unet: Any):
    options = inside(applied(unet, *NODES["ToMe"][1:]))
    tokens = noise((1, 64, 320), 1)
    merge, unmerge = (options["patches"][name][0] for name in ("attn1_patch", "attn1_output_patch"))
    merged, _, _ = merge(tokens, tokens, tokens, {"original_shape": [1, 4, 8, 8]})
    twin = travelled(options)["patches"]["attn1_output_patch"][0]
    assert torch.equal(twin(merged, {}), unmerge(merged, {}))


def test_one_description_while_nothing_changes(unet: Any):
    model = applied(unet, *NODES["ToMe"][1:])
    first = describe(inside(model))
    copied = {entry: {name: list(held) for name, held in content.items()} for entry, content in inside(model).items()}
    assert describe(copied) is first
    assert describe(inside(applied(model, *NODES["FreeU"][1:]))) is not first
    assert describe({"patches": {"attn1_patch": []}, "patches_replace": {}}) == {}
    assert rebuild({}) == {}


def test_a_function_in_two_descriptions_is_one_function(unet: Any, flux: Any):
    freeu = applied(unet, *NODES["FreeU"][1:])
    both = applied(freeu, *NODES["HyperTile"][1:])
    one, other = (travelled(inside(model))["patches"]["output_block_patch"][0] for model in (freeu, both))
    assert one is other
    second = travelled(inside(applied(unet, *NODES["FreeU"][1:])))["patches"]["output_block_patch"][0]
    assert second is not one


def test_a_patch_added_to_the_same_dict(unet: Any):
    model = applied(unet, *NODES["FreeU"][1:])
    assert list(travelled(inside(model))["patches"]) == ["output_block_patch"]
    model.set_model_attn1_patch(
        applied(unet, *NODES["HyperTile"][1:]).model_options["transformer_options"]["patches"]["attn1_output_patch"][0]
    )
    assert list(travelled(inside(model))["patches"]) == ["output_block_patch", "attn1_patch"]


def test_what_the_functions_read_is_known(unet: Any):
    reads = {name: describe(inside(applied(unet, *NODES[name][1:])))["reads"] for name in ("NAG U-Net", "DeepShrink")}
    assert "cond_or_uncond" in reads["NAG U-Net"] and "sigmas" not in reads["NAG U-Net"]
    assert "sigmas" in reads["DeepShrink"] and "cond_or_uncond" not in reads["DeepShrink"]


def test_a_function_with_a_name(flux: Any):
    attention = comfy.ldm.modules.attention.attention_basic
    assert travelled({"optimized_attention_override": attention}) == {"optimized_attention_override": attention}


@pytest.fixture
def freeu(unet: Any) -> Any:
    """FreeU's function, whose variables may be given other values."""
    return inside(applied(unet, *NODES["FreeU"][1:]))["patches"]["output_block_patch"][0]


def rebuilt_variable(function: Any, value: Any) -> Any:
    variables(function)["scale_dict"].cell_contents = value
    (made,) = travelled({"patches": {"output_block_patch": [function]}})["patches"]["output_block_patch"]
    return variables(made)["scale_dict"].cell_contents


def test_values_of_every_kind(freeu: Any):
    value = {
        (1, "a"): [1.5, math.inf, None, True, 10**30],
        "shape": torch.zeros(2, 3).shape,
        "sets": ({1, 2}, frozenset({"x"})),
        "torch": (torch.float8_e5m2, torch.device("cpu"), torch.gather),
        "named": (comfy.ldm.modules.attention.CrossAttention, comfy.ldm.modules.attention.exists),
    }
    assert rebuilt_variable(freeu, value) == value


def test_tensors_are_copies_and_stay_shared(freeu: Any):
    tensor = noise((3, 2), 1).to(torch.bfloat16).T
    variables(freeu)["scale_dict"].cell_contents = [tensor, {"again": tensor}]
    spec, tensors = flatten(describe({"patches": {"output_block_patch": [freeu]}}))
    shared_memory = [t.clone() for t in tensors]
    (made,) = rebuild(unflatten(spec, shared_memory))["patches"]["output_block_patch"]
    shared_memory[0].zero_()  # the next call's tensors come to lie there
    first, second = variables(made)["scale_dict"].cell_contents
    assert first is second["again"] and len(tensors) == 1
    assert torch.equal(first, tensor) and first.dtype == tensor.dtype


def test_values_that_hold_themselves(freeu: Any):
    value: list[Any] = [freeu]
    value.append(value)
    made = rebuilt_variable(freeu, value)
    assert made[1] is made
    assert variables(made[0])["scale_dict"].cell_contents is made


def test_a_variable_without_a_value(freeu: Any):
    del variables(freeu)["scale_dict"].cell_contents
    (made,) = travelled({"patches": {"output_block_patch": [freeu]}})["patches"]["output_block_patch"]
    with pytest.raises(ValueError, match="empty"):
        _ = variables(made)["scale_dict"].cell_contents


def refusal(function: Any, entry: str = "attn1_patch") -> str:
    with pytest.raises(LeapfrogError) as caught:
        describe({"patches": {entry: [function]}})
    assert caught.value.report.code == "unsupported_patch"
    assert f"patches: {entry}" in caught.value.report.message
    return caught.value.report.message


def test_a_function_of_another_module_is_refused():
    message = refusal(lambda q, k, v, _extra: (q, k, v))
    assert "test_a_function_of_another_module_is_refused.<locals>.<lambda>" in message
    assert f"of {__file__}, which is not ComfyUI's own code" in message


SHARPEN = """
def make(strength):
    def sharpen(h, hsp, _options):
        return h * strength, hsp
    return sharpen
"""


@pytest.mark.parametrize(("root", "folder"), [("comfyui", "comfy_extras"), (".", "custom_nodes/pack/comfy")])
def test_a_function_of_a_custom_pack_is_refused(
    root: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inside_patches, "_root", (tmp_path / root).resolve())
    file = tmp_path / folder / "sharpen.py"
    file.parent.mkdir(parents=True)
    file.write_text(SHARPEN)
    message = refusal(load_as_comfyui_does(file).make(2.0), "output_block_patch")
    assert "make.<locals>.sharpen" in message and f"of {file}, which is not ComfyUI's own code" in message


def test_a_custom_packs_function_in_a_variable_is_refused(freeu: Any):
    variables(freeu)["scale_dict"].cell_contents = {640: print_nothing}
    message = refusal(freeu)
    assert (
        "the variable 'scale_dict' of comfy_extras.nodes_freelunch.FreeU.execute.<locals>.output_block_patch[640] is"
        in message
    )
    assert "print_nothing" in message and __file__ in message


def print_nothing() -> None:
    pass


def test_all_functions_that_cannot_travel_are_named(freeu: Any):
    with pytest.raises(LeapfrogError) as caught:
        describe(
            {
                "patches": {"output_block_patch": [freeu, print_nothing]},
                "patches_replace": {"dit": {("double_block", 3): lambda args, _extra: args}},
            }
        )
    message = caught.value.report.message
    assert "patches: output_block_patch 1: " in message and "print_nothing" in message
    assert "patches_replace: dit ('double_block', 3): " in message and "<lambda>" in message
    assert "freelunch" not in message


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math, "is a builtins.module"),
        (torch.nn.Linear(1, 1), "is a torch.nn.modules.linear.Linear"),
        (comfy.ops.manual_cast.Linear(1, 1), "is a comfy.ops.manual_cast.Linear"),
        (torch.zeros(1, device="meta"), "is a tensor without content"),
        (len, "is a builtins.builtin_function_or_method"),
        (Request, "no top-level class generation.Request"),
        (Request(), "is a generation.Request"),
    ],
)
def test_values_that_cannot_travel_are_named(freeu: Any, value: Any, said: str):
    variables(freeu)["scale_dict"].cell_contents = [0, value]
    message = refusal(freeu)
    assert "the variable 'scale_dict' of comfy_extras.nodes_freelunch.FreeU.execute" in message and said in message


def test_a_model_patch_is_refused(flux: Any):
    patch = node("model_patch", "DiffSynthCnetPatch").__new__(node("model_patch", "DiffSynthCnetPatch"))
    patch.strength, patch.model_patch = 1.0, flux
    message = refusal(patch, "double_block")
    assert (
        "comfy_extras.nodes_model_patch.DiffSynthCnetPatch.model_patch is a comfy.model_patcher.ModelPatcher" in message
    )


def test_a_module_with_weights_is_refused():
    assert "torch.nn.modules.linear.Linear is not made of plain data" in refusal(torch.nn.Linear(1, 1))


def test_gligen_is_refused():
    gligen = comfy.gligen.Gligen([], lambda *_: torch.zeros(1, 30, 8), 8)
    message = refusal(gligen.set_empty((1, 4, 8, 8), torch.device("cpu")), "middle_patch")
    assert "the variable 'self' of comfy.gligen.Gligen._set_position.<locals>.func is a comfy.gligen.Gligen" in message


def test_a_hypernetwork_is_refused(tmp_path: Path):
    # ComfyUI's own loader makes the patch, of a class that exists inside a function only
    file = tmp_path / "empty.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    message = refusal(node("hypernetwork", "load_hypernetwork_patch")(str(file), 1.0))
    assert "load_hypernetwork_patch.<locals>.hypernetwork_patch" in message


def test_a_result_for_code_outside_the_denoiser_is_refused(unet: Any):
    model = applied(unet, "sag", "SelfAttentionGuidance", (0.5, 2.0))
    with pytest.raises(LeapfrogError, match=r"'attn_scores' of .*attn_and_record is set inside .* and read outside"):
        describe(inside(model))


def test_a_node_that_another_pack_has_replaced_is_refused(freeu: Any, monkeypatch: pytest.MonkeyPatch):
    other = node("freelunch", "FreeU_V2").__dict__["execute"]
    monkeypatch.setattr(node("freelunch", "FreeU"), "execute", other)
    assert "nodes_freelunch.py does not define" in refusal(freeu)


@pytest.mark.parametrize(
    ("form", "error", "said"),
    [
        (["named", "os", "system"], TypeError, "os is not one of ComfyUI's own modules"),
        (["named", "torch", "load"], TypeError, "torch.load"),
        (["named", "torch", "ops.load_library"], TypeError, "torch.ops.load_library"),
        (["named", "comfy.utils", "torch.load"], ValueError, "no comfy.utils.torch.load"),
        (["named", "comfy.utils", "gone"], ValueError, "no comfy.utils.gone"),
        (["function", "shutil", "rmtree.<locals>.f", 1, {}, [None], [None], [None]], TypeError, "shutil"),
        (
            ["function", "comfy_extras.nodes_pag", "PerturbedAttentionGuidance.execute.<locals>.post_cfg_function", 1,
             {}, [None], [None], [None]], LeapfrogError, "at line 1",
        ),
        (["pickle", "gASV"], ValueError, "unknown kind 'pickle'"),
    ],
)  # fmt: skip
def test_a_rank_names_nothing_but_comfyuis_own(form: list[Any], error: type[Exception], said: str):
    text = json.dumps({"objects": {"1": form}, "patches": {"attn1_patch": [1]}})
    with pytest.raises(error, match=said):
        rebuild({"id": 1, "text": text, "tensors": []})
