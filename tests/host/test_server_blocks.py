"""All blocks in a real ComfyUI, queued as a browser would: pictures, progress, Cancel, freeing, what goes wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from campaign import is_rank, wait_until
from comfy_server import ComfyServer, PromptError, PromptInterrupted
from pack import BASE
from where import devices

BLOCKS = {"async_unet_split": "split", "parastep_sampler": "sampler", "parastep_ksampler": "sample"}
"""Graph -> the id of our node in it."""
Graph = dict[str, Any]
Graphs = Callable[..., Graph]


@pytest.fixture
def block_graph(graph: Callable[[str], Graph]) -> Graphs:
    """A graph of one of our nodes on two ranks; ``node`` are inputs of that, ``steps`` and ``seed`` the sampler's."""

    def make(name: str, steps: int = 20, seed: int = 7, **node: Any) -> Graph:
        made = graph(name)
        if name in BLOCKS:
            made[BLOCKS[name]]["inputs"] |= {"devices": devices(2), **node}
        for inputs in (one["inputs"] for one in made.values()):
            inputs |= {
                key: value for key, value in (("steps", steps), ("seed", seed), ("noise_seed", seed)) if key in inputs
            }
        return made

    return make


def picture(server: ComfyServer, graph: Graph) -> np.ndarray:
    (path,) = server.outputs(server.run(graph))
    return np.asarray(Image.open(path)).astype(float)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * math.log10(255 / max(1e-9, float(np.sqrt(((a - b) ** 2).mean()))))


def ranks(server: ComfyServer) -> list[psutil.Process]:
    return [one for one in server.processes() if is_rank(one)]


def in_the_middle(server: ComfyServer, graph: Graph) -> str:
    """Queue a long prompt and come back while it samples, with its id."""
    prompt_id = server.queue(graph)
    server.wait_event("progress", prompt_id, 90, lambda event: event.data["value"] >= 5)
    return prompt_id


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_draws_nearly_what_comfyui_draws(comfy_server: ComfyServer, block_graph: Graphs, name: str):
    ours, theirs = picture(comfy_server, block_graph(name)), picture(comfy_server, block_graph("stock_flux"))
    assert len(ranks(comfy_server)) == 2
    assert ours.shape == theirs.shape == (128, 128, 3)
    assert 15 < psnr(ours, theirs) < 99


@pytest.mark.parametrize(
    ("name", "node"),
    [("async_unet_split", {"mode": "exact"}), ("parastep_sampler", {"lanes": 1}), ("parastep_ksampler", {"lanes": 1})],
)
def test_a_block_without_approximation_draws_what_comfyui_draws(
    comfy_server: ComfyServer, block_graph: Graphs, name: str, node: dict[str, Any]
):
    ours, theirs = picture(comfy_server, block_graph(name, **node)), picture(comfy_server, block_graph("stock_flux"))
    assert np.abs(ours - theirs).max() <= 1


@pytest.fixture
def checkpoint() -> Iterator[str]:
    """The proving Flux as a file for Load Checkpoint."""
    path = BASE / "models" / "checkpoints" / "flux_as_checkpoint.safetensors"
    path.parent.mkdir(exist_ok=True)
    weights = load_file(BASE / "models" / "diffusion_models" / "shapes_flux.safetensors")
    save_file({f"model.diffusion_model.{key}": weight for key, weight in weights.items()}, path)
    yield path.name
    path.unlink()


@pytest.mark.parametrize(
    ("name", "node"), [("async_unet_split", {"mode": "exact"}), ("parastep_ksampler", {"lanes": 1})]
)
def test_a_model_of_load_checkpoint(
    comfy_server: ComfyServer, block_graph: Graphs, checkpoint: str, name: str, node: dict[str, Any]
):
    loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
    theirs = picture(comfy_server, block_graph("stock_flux"))
    ours = picture(comfy_server, {**block_graph(name, **node), "model": loader})
    assert np.abs(ours - theirs).max() <= 1
    assert len(ranks(comfy_server)) == 2


@pytest.mark.parametrize(
    "inputs",
    [{"sampler_name": "dpmpp_2m", "scheduler": "karras"}, {"sampler_name": "euler_ancestral"}, {"denoise": 0.6}],
    ids=["dpmpp_2m", "euler_ancestral", "img2img"],
)
def test_parastep_ksampler_takes_the_place_of_ksampler(
    comfy_server: ComfyServer, block_graph: Graphs, inputs: dict[str, Any]
):
    pictures = []
    for node in (None, {"lanes": 1}, {"lanes": 2}):
        made = block_graph("parastep_ksampler", **node) if node else block_graph("stock_flux")
        made["sample"]["inputs"] |= inputs
        if "denoise" in inputs:
            made["drawn"] = block_graph("stock_flux", seed=17)["sample"]
            made["sample"]["inputs"]["latent_image"] = ["drawn", 0]
        pictures.append(picture(comfy_server, made))
    theirs, exact, ours = pictures
    assert np.abs(exact - theirs).max() <= 1
    assert 20 < psnr(ours, theirs) < 99


def test_parastep_sampler_takes_a_sampler_with_settings_of_its_own(comfy_server: ComfyServer, block_graph: Graphs):
    own = {"class_type": "SamplerEulerAncestral", "inputs": {"eta": 0.5, "s_noise": 1.0}}
    stock = {**block_graph("stock_flux_custom"), "sampler": own}
    wrapped = {**block_graph("parastep_sampler", sampler=["own", 0], lanes=1), "own": own}
    assert np.abs(picture(comfy_server, stock) - picture(comfy_server, wrapped)).max() <= 1


def test_a_sampler_that_is_no_sequence_of_steps_is_refused_by_name(comfy_server: ComfyServer, block_graph: Graphs):
    graph = block_graph("parastep_sampler", sampler=["own", 0])
    graph["own"] = {"class_type": "SamplerARVideo", "inputs": {"num_frame_per_block": 1}}
    with pytest.raises(PromptError, match=r"node sampler .*sample_ar_video cannot run in parallel"):
        comfy_server.run(graph)


@pytest.mark.parametrize("name", BLOCKS)
def test_progress_and_previews_arrive_step_by_step(comfy_server: ComfyServer, block_graph: Graphs, name: str):
    prompt_id = comfy_server.queue(block_graph(name, seed=8), preview="latent2rgb")
    comfy_server.wait(prompt_id)
    steps = [event.data["value"] for event in comfy_server.events(prompt_id, "progress")]
    assert steps == sorted(steps)
    assert steps[-1] == 20
    previews = comfy_server.events(prompt_id, "preview")
    assert previews
    assert previews[-1].image[:2] == b"\xff\xd8", "not a JPEG"


@pytest.mark.parametrize("name", BLOCKS)
def test_cancel_ends_within_a_step_and_the_next_prompt_is_right(
    comfy_server: ComfyServer, block_graph: Graphs, name: str
):
    before = picture(comfy_server, block_graph(name))
    pids = {one.pid for one in ranks(comfy_server)}
    prompt_id = in_the_middle(comfy_server, block_graph(name, steps=2000, seed=9))
    comfy_server.interrupt(prompt_id)
    interrupted = time.monotonic()
    with pytest.raises(PromptInterrupted):
        comfy_server.wait(prompt_id, 20)
    assert time.monotonic() - interrupted < 3
    late = [event for event in comfy_server.events(prompt_id, "progress") if event.time > interrupted]
    assert len(late) <= 1
    changed = block_graph(name)
    changed["sample"]["inputs"]["cfg"] = 3.0000001  # or ComfyUI would show the picture that it has
    np.testing.assert_allclose(picture(comfy_server, changed), before, atol=1)
    assert {one.pid for one in ranks(comfy_server)} == pids


def test_freeing_ends_the_ranks_and_the_next_prompt_starts_them(comfy_server: ComfyServer, block_graph: Graphs):
    comfy_server.run(block_graph("async_unet_split", seed=10))
    assert len(ranks(comfy_server)) == 2
    comfy_server.free()
    assert wait_until(lambda: not ranks(comfy_server), 15)
    comfy_server.run(block_graph("async_unet_split", seed=11))
    assert len(ranks(comfy_server)) == 2


def test_a_rank_killed_in_a_prompt_fails_it_by_name_and_the_next_works(comfy_server: ComfyServer, block_graph: Graphs):
    prompt_id = in_the_middle(comfy_server, block_graph("parastep_sampler", steps=2000, seed=12))
    victim = ranks(comfy_server)[0]
    victim.suspend()  # so that an evaluation is under way when it dies
    time.sleep(0.5)
    victim.kill()
    said = r"node sample .*LeapfrogError: The process of a rank was ended by SIGKILL.*\(rank [01], denoiser call \d+\)"
    with pytest.raises(PromptError, match=said):
        comfy_server.wait(prompt_id, 20)
    assert len(comfy_server.outputs(comfy_server.run(block_graph("parastep_sampler", seed=13)))) == 1
    assert len(ranks(comfy_server)) == 2


@pytest.mark.parametrize(
    ("name", "node", "said"),
    [
        ("async_unet_split", {"devices": "cuda:99"}, "node split .*there is no GPU 99"),
        ("async_unet_split", {"components": 3}, "node split .*components 3.*: 3 devices are needed"),
        ("parastep_sampler", {"devices": "a GPU"}, "node sampler .*'a GPU' is not a device"),
        ("parastep_sampler", {"drift_bound": 2.0}, "node sampler .*bigger than max"),
        ("parastep_ksampler", {"devices": "cuda:99"}, "node sample .*there is no GPU 99"),
    ],
)
def test_a_mistake_is_explained_on_the_node_before_sampling(
    comfy_server: ComfyServer, block_graph: Graphs, name: str, node: dict[str, Any], said: str
):
    with pytest.raises(PromptError, match=f"(?s){said}"):
        comfy_server.run(block_graph(name, **node))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_single_device_is_comfyui_alone(comfy_server: ComfyServer, block_graph: Graphs, name: str):
    before = ranks(comfy_server)
    seed = 14 + len(name)  # a picture that nobody has drawn yet
    lanes = {} if name == "async_unet_split" else {"lanes": 0}
    ours = picture(comfy_server, block_graph(name, seed=seed, devices=devices(1), **lanes))
    np.testing.assert_array_equal(ours, picture(comfy_server, block_graph("stock_flux", seed=seed)))
    assert ranks(comfy_server) == before


def test_nothing_outlives_a_comfyui_that_is_killed(block_graph: Graphs, tmp_path: Path):
    with ComfyServer(output=tmp_path) as server:
        in_the_middle(server, block_graph("async_unet_split", steps=2000))
        assert len(ranks(server)) == 2
        server.kill9()
        assert server.survivors(10) == []
