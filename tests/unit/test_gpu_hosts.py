"""What matters only where ComfyUI computes on a GPU, as far as it shows without one."""

from __future__ import annotations

import gc
import math
from types import SimpleNamespace
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrapperExecutor
from comfy_extras.nodes_model_advanced import ModelSamplingFlux

import tiny_models
from leapfrog.nodes import AsyncUNetSplit
from leapfrog.nodes.ranks_memory import LanesMemory
from leapfrog.nodes.recipe import COMPUTE_ARGS, compute_args, recipe_of, weight_bytes
from leapfrog.nodes.rounds_sampler import stepping_aside
from leapfrog.nodes.standin import make_room_elsewhere
from leapfrog.parallel_backend import plan
from leapfrog.parallel_backend.devices import Machine
from leapfrog.parallel_backend.worker.models.trace import Stash
from ranks import parastep

OPTIONS = {action.dest: action.option_strings for action in comfy.cli_args.parser._actions}
GPU = torch.device("cuda", 0)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A MODEL whose host has two GPUs and computes on the first."""
    monkeypatch.setattr(plan, "this_machine", lambda: Machine(cuda=2, cores=4))
    made = comfy.sd.load_diffusion_model(str(tiny_models.tiny_flux()))  # its own: what is known of it is kept
    made.load_device = GPU
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: 1e12)
    return made


@pytest.mark.parametrize("name", COMPUTE_ARGS)
def test_a_rank_parses_what_the_host_was_told(name: str):
    told = comfy.cli_args.parser.parse_args([OPTIONS[name][0]])
    again = comfy.cli_args.parser.parse_args(compute_args(told))
    assert getattr(again, name)
    assert vars(again) == vars(told)


@pytest.mark.parametrize("words", [["autotune"], ["fp16_accumulation", "autotune"]])
def test_a_rank_is_as_fast_as_the_host(words: list[str]):
    told = comfy.cli_args.parser.parse_args(["--fast", *words])
    again = comfy.cli_args.parser.parse_args(compute_args(told))
    assert set(again.fast) == set(told.fast) != set()
    assert compute_args(comfy.cli_args.parser.parse_args([])) == ()


class Handle:
    """Memory that must have one owner."""

    def __deepcopy__(self, _memo: Any) -> Handle:
        raise AssertionError("copied")


def test_what_the_memory_manager_hangs_on_a_denoiser_is_not_copied(model: Any):
    layer = next(part for part in model.model.diffusion_model.modules() if isinstance(part, torch.nn.Linear))
    hung = {"_v": (Handle(), 1), "_pin_state": {"weights": Handle()}, "_pins": {}, "_v_signature": layer.in_features,
            "weight_lowvram_function": Handle(), "bias_lowvram_function": None}  # fmt: skip
    vars(layer).update(hung)
    try:
        shell = AsyncUNetSplit.execute(model, "0,1", 2, 0, 1, "exact").args[0].model.diffusion_model
        assert {name: vars(layer)[name] for name in hung} == hung
    finally:
        for name in hung:
            delattr(layer, name)
    names = {name for part in shell.modules() for name in vars(part)}
    assert not names & set(hung)
    twin = next(part for part in shell.modules() if isinstance(part, torch.nn.Linear))
    assert (twin.in_features, twin.out_features) == (layer.in_features, layer.out_features)


@pytest.mark.parametrize(("devices", "components", "share"), [("0,1", 2, 0.5), ("1,0", 2, 0.5), ("0,1", 1, 1.0)])
def test_comfyui_is_asked_for_the_room_that_ranks_need(model: Any, devices: str, components: int, share: float):
    made = AsyncUNetSplit.execute(model, devices, components, 0, 1, "exact").args[0]
    whole = comfy.model_management.module_size(model.model.diffusion_model)
    assert made.model_size() == int(share * whole)
    made.load_device = torch.device("cuda", 2)
    assert made.model_size() == 0


def test_less_memory_than_the_whole_denoiser_needs_is_no_reason_to_unload(model: Any, monkeypatch: pytest.MonkeyPatch):
    made = AsyncUNetSplit.execute(model, "0,1", 2, 0, 1, "exact").args[0]
    monkeypatch.setattr(made.denoiser, "unload", lambda _ranks: pytest.fail("unloaded"))
    made.partially_load(GPU, extra_memory=-1e9)


@pytest.mark.parametrize(
    ("components", "host", "free", "fits"),
    [
        (2, GPU, 10.0, True), (2, GPU, 1.4, False), (0, GPU, 10.0, True), (0, GPU, 1.4, True), (0, GPU, 0.7, False),
        (2, torch.device("cpu"), 0.0, True), (2, torch.device("cuda", 2), 0.0, True),
    ],
)  # fmt: skip
def test_calls_are_divided_only_where_ranks_have_no_memory_for_them(
    model: Any, components: int, host: torch.device, free: float, fits: bool, monkeypatch: pytest.MonkeyPatch
):
    """``free`` is on the host's GPU beside the weights, as a multiple of what the call needs."""
    made = AsyncUNetSplit.execute(model, "0,1", components, 0, 1, "exact").args[0]
    made.load_device = host
    shape = [2, 16, 512, 512]
    needed = made.model.memory_required(shape)
    weights = made.denoiser.nbytes / max(1, components)
    assert needed > 10 * weights
    monkeypatch.setattr(made, "get_free_memory", lambda _: weights + free * needed)
    made.pre_run()
    assert made.model.memory_required(shape) == (0.0 if fits else math.inf)
    made.cleanup()
    assert made.model.memory_required(shape) == needed


@pytest.mark.parametrize("held", [0, 5])
def test_lanes_get_room_before_they_load_and_the_memory_manager_knows_of_them(
    model: Any, held: int, monkeypatch: pytest.MonkeyPatch
):
    manager, asked = comfy.model_management, list[tuple[float, torch.device]]()
    monkeypatch.setattr(manager, "current_loaded_models", [])
    monkeypatch.setattr(manager, "free_memory", lambda size, device, **_: asked.append((size, device)))
    monkeypatch.setattr(manager, "minimum_inference_memory", lambda: 100.0)
    unloaded: list[list[int]] = []
    lanes: Any = SimpleNamespace(
        devices=("cuda:1", "cuda:0"), loaded_bytes=lambda rank: held * rank, unload=unloaded.append,
        nbytes=weight_bytes(model.model.diffusion_model),
    )  # fmt: skip
    memory = LanesMemory(model, lanes)
    weights = 0.0 if held else 1.1 * lanes.nbytes
    for activations, least in ((7.0, 100.0), (700.0, 700.0)):
        memory.announce(model, activations=activations)
        assert asked.pop() == (weights + least, GPU)
        assert not asked, "no other GPU has a context of this process, so none is to get one"
    (known,) = manager.current_loaded_models
    assert (known.model, known.device) == (memory, GPU)
    assert memory.model_size() == (held or weight_bytes(model.model.diffusion_model))
    assert memory.loaded_size() == held
    if held:
        assert not known.model_unload(held - 1), (
            "asked for part of it, the ranks there give all of theirs back and stay"
        )
        assert unloaded == [[1]], "what is on another GPU makes no room on this one"


@pytest.mark.parametrize(("free", "moved"), [(1e12, []), (1e9, [int(100 + 1.1 * 5e9 - 1e9)])])
def test_the_hosts_own_copy_gives_no_more_room_than_is_short(
    model: Any, free: float, moved: list[int], monkeypatch: pytest.MonkeyPatch
):
    manager, asked = comfy.model_management, list[int]()
    monkeypatch.setattr(manager, "current_loaded_models", [])
    monkeypatch.setattr(manager, "free_memory", lambda *_, **__: None)
    monkeypatch.setattr(manager, "minimum_inference_memory", lambda: 100.0)
    monkeypatch.setattr(manager, "get_free_memory", lambda _: free)
    monkeypatch.setattr(model, "partially_unload", lambda _device, nbytes: asked.append(nbytes))
    lanes: Any = SimpleNamespace(devices=("cuda:1", "cuda:0"), loaded_bytes=lambda rank: 0, nbytes=int(5e9))
    LanesMemory(model, lanes).announce(model)
    assert asked == moved


def test_ranks_give_their_weights_back_after_the_host_has_moved_its_own(model: Any, monkeypatch: pytest.MonkeyPatch):
    manager, moved = comfy.model_management, list[str]()
    monkeypatch.setattr(manager, "current_loaded_models", [])
    nbytes = weight_bytes(model.model.diffusion_model)
    lanes: Any = SimpleNamespace(
        devices=("cuda:0",), loaded_bytes=lambda rank: nbytes, nbytes=nbytes, unload=lambda _: moved.append("ranks")
    )
    ranks = LanesMemory(model, lanes)
    ranks.be_known()
    monkeypatch.setattr(model, "loaded_size", lambda: nbytes)
    monkeypatch.setattr(model, "model_size", lambda: nbytes)
    monkeypatch.setattr(model, "partially_unload", lambda *_: moved.append("host") or nbytes)
    host = manager.LoadedModel(model)
    host.real_model = lambda: model.model
    manager.current_loaded_models.append(host)

    def free(_device: torch.device, torch_free_too: bool = False) -> Any:
        room = 1e9 if moved else 1e9 - 1000
        return (room, 0.0) if torch_free_too else room

    monkeypatch.setattr(manager, "get_free_memory", free)
    manager.free_memory(1e9, GPU)
    assert moved == ["host"]


def test_ranks_weights_do_not_make_room_for_the_hosts_own_copy_of_them(model: Any, monkeypatch: pytest.MonkeyPatch):
    manager = comfy.model_management
    monkeypatch.setattr(manager, "current_loaded_models", [])
    monkeypatch.setattr(manager, "free_memory", lambda *_, **__: None)
    sampler = parastep(1)
    memory = sampler.memory_for(model, recipe_of(model))
    other = LanesMemory(model, memory.denoiser)
    for one in (memory, other):
        one.announce(model)
    guider = SimpleNamespace(model_patcher=model)

    def known() -> list[Any]:
        return [loaded.model for loaded in manager.current_loaded_models]

    class Executor:
        class_obj = guider

        def __call__(self, *_: Any) -> None:
            self.seen = known()
            raise RuntimeError("no memory for the host's own copy")

    def known_while_it_runs(by: Any) -> list[Any]:
        executor = Executor()
        with pytest.raises(RuntimeError, match="no memory"):
            stepping_aside(executor, None, None, by)
        return executor.seen

    monkeypatch.setattr(memory.denoiser, "loaded_bytes", lambda _rank: 1)
    assert known_while_it_runs(sampler) == [other]
    assert set(known()) == {memory, other}, "they can be unloaded after a run that failed early, too"
    assert set(known_while_it_runs(sampler.base)) == {memory, other}


def test_what_the_run_uses_stays_where_it_is(model: Any, monkeypatch: pytest.MonkeyPatch):
    manager, kept = comfy.model_management, list[Any]()
    monkeypatch.setattr(manager, "current_loaded_models", [])
    monkeypatch.setattr(manager, "free_memory", lambda *_, keep_loaded, **__: kept.extend(keep_loaded))
    control, other = (comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), GPU, GPU) for _ in range(2))
    lanes: Any = SimpleNamespace(devices=("cuda:0", "cuda:1"), loaded_bytes=lambda rank: 0, nbytes=1)
    ranks = LanesMemory(model, lanes)
    loaded = [SimpleNamespace(model=one, device=GPU, real_model=lambda: True) for one in (model, control, ranks, other)]
    manager.current_loaded_models.extend(loaded)
    ranks.announce(model, [control, None])
    assert kept == loaded[:3]


def test_room_is_made_on_another_gpu_where_comfyui_has_put_a_model(model: Any, monkeypatch: pytest.MonkeyPatch):
    manager, asked = comfy.model_management, list[torch.device]()
    monkeypatch.setattr(manager, "current_loaded_models", [])
    monkeypatch.setattr(manager, "free_memory", lambda _, device, **__: asked.append(device))
    encoder = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), torch.device("cuda:1"), torch.device("cpu"))
    manager.current_loaded_models.append(
        SimpleNamespace(model=encoder, device=encoder.load_device, real_model=lambda: True)
    )
    lanes: Any = SimpleNamespace(devices=("cuda:0", "cuda:1", "b/cuda:0"), loaded_bytes=lambda rank: 0, nbytes=1)
    LanesMemory(model, lanes).announce(model)
    assert asked == [GPU, torch.device("cuda:1")]


def test_a_split_makes_room_where_comfyui_does_not(model: Any, monkeypatch: pytest.MonkeyPatch):
    manager, asked = comfy.model_management, list[tuple[float, torch.device]]()
    monkeypatch.setattr(manager, "current_loaded_models", [])
    monkeypatch.setattr(manager, "free_memory", lambda size, device, **_: asked.append((size, device)))
    monkeypatch.setattr(manager, "minimum_inference_memory", lambda: 100.0)
    made = AsyncUNetSplit.execute(model, "0,1", 2, 0, 1, "exact").args[0]
    guider = SimpleNamespace(model_patcher=made)
    sample = WrapperExecutor.new_class_executor(lambda: "sampled", guider, [make_room_elsewhere])
    assert sample.execute() == "sampled"
    assert not asked
    gpus = GPU, torch.device("cuda:1")
    others = [comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), gpu, gpu) for gpu in gpus]
    loaded = [SimpleNamespace(model=one, device=one.load_device, real_model=lambda: True) for one in others]
    manager.current_loaded_models.extend(loaded)
    sample.execute()
    assert asked == [(100.0 + 1.1 * made.largest_share, torch.device("cuda:1"))]


def test_disabling_smart_memory_does_not_end_the_ranks(model: Any, monkeypatch: pytest.MonkeyPatch):
    made, done = AsyncUNetSplit.execute(model, "0,1", 2, 0, 1, "exact").args[0], list[str]()
    for name in ("release", "close"):
        monkeypatch.setattr(made.denoiser, name, lambda *_, name=name: done.append(name))
    made.detach()
    monkeypatch.setattr(comfy.model_management, "DISABLE_SMART_MEMORY", True)
    made.detach()
    assert done == ["close", "release"]


def test_a_host_without_a_rank_on_its_own_gpu_leaves_the_others_alone(model: Any, monkeypatch: pytest.MonkeyPatch):
    made, done = AsyncUNetSplit.execute(model, "0,1", 2, 0, 1, "exact").args[0], list[str]()
    for name in ("unload", "release", "close"):
        monkeypatch.setattr(made.denoiser, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(comfy.model_management, "DISABLE_SMART_MEMORY", True)
    made.load_device = torch.device("cuda", 2)
    assert made.partially_unload(made.offload_device) == 0
    made.detach()
    assert not done
    monkeypatch.setattr(comfy.model_management, "DISABLE_SMART_MEMORY", False)
    made.detach()
    assert done == ["close"]


def test_weights_count_as_ranks_have_them(model: Any):
    layer = torch.nn.Linear(4, 2)
    assert weight_bytes(layer) == 40
    vars(layer)["weight_comfy_model_dtype"] = torch.float8_e4m3fn  # as a host with dynamic VRAM keeps a file's weights
    assert weight_bytes(layer) == 8 + 8


def test_a_split_has_the_loaders_own_settings_whatever_another_branch_has_set(model: Any):
    plain = model.get_model_object("model_sampling").shift
    other = ModelSamplingFlux().patch(model, 3.0, 0.5, 1024, 1024)[0]
    other.patch_model(load_weights=False)
    try:
        assert model.model.model_sampling.shift != plain
        made = AsyncUNetSplit.execute(model, "0,1", 2, 0, 1, "exact").args[0]
        assert made.get_model_object("model_sampling").shift == plain
    finally:
        other.unpatch_model(unpatch_weights=False)


def test_a_split_leaves_the_loaders_pinned_weights_and_lora_where_they_are(model: Any):
    model.pinned.add("diffusion_model.img_in.weight")
    layer = next(part for part in model.model.diffusion_model.modules() if isinstance(part, torch.nn.Linear))
    vars(layer)["weight_function"] = [Handle()]
    try:
        made = AsyncUNetSplit.execute(model, "0,1", 2, 0, 1, "exact").args[0]
        assert not next(part for part in made.model.modules() if isinstance(part, torch.nn.Linear)).weight_function
        del made
        gc.collect()
        assert model.pinned == {"diffusion_model.img_in.weight"}
    finally:
        del vars(layer)["weight_function"]
        model.pinned.clear()


def test_a_sampler_within_a_run_has_a_denoiser_of_its_own(model: Any):
    outer, inner = (parastep(1) for _ in range(2))
    denoiser = outer.memory_for(model, recipe_of(model)).denoiser
    assert inner.memory_for(model, recipe_of(model)).denoiser is denoiser
    denoiser.begin_run()
    assert inner.memory_for(model, recipe_of(model)).denoiser is not denoiser
    denoiser.end_run()
    assert inner.memory_for(model, recipe_of(model)).denoiser is denoiser


def test_a_unit_comes_back_from_a_gpu_as_it_was():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    stash = Stash(module)
    module.to(torch.float64)  # as another device, it gives every tensor other memory
    assert module[0].weight.dtype == torch.float64
    stash.put_back()
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before
    assert module[0].weight.dtype == module[1].running_mean.dtype == torch.float32
