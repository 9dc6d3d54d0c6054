"""ParaStep on a small denoiser of each kind of model that people wait for: pictures, video, audio, both at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import families
from families import FAMILIES, Family
from family import config
from generation import distance, noise
from leapfrog.parallel_backend import lanes_denoiser, supervisor
from ranks import EXACT, in_ranks, parastep, the_pool

UNET = config(
    image_size=32, out_channels=4, use_spatial_transformer=True, legacy=False, model_channels=64, num_res_blocks=[1, 1],
    channel_mult=[1, 1], transformer_depth=[1, 0], transformer_depth_output=[1, 0, 0, 0], transformer_depth_middle=1,
    context_dim=64, adm_in_channels=None, use_temporal_attention=False,
)  # fmt: skip
FRAMES = 4
STEPS = 8


def _first_frame(prompt: int) -> dict[str, Any]:
    """What SVD_img2vid_Conditioning puts into a prompt."""
    return {
        "motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0, "concat_latent_image": noise((1, 4, 8, 8), prompt)
    }  # fmt: skip


U_NETS = {
    "sd15": Family(
        "sd15", "SD15", config(UNET, in_channels=4, use_linear_in_transformer=False),
        latent=(4, 8, 8), context=64, lists=("input_blocks", "output_blocks"),
        narrowed=("transformer_depth_output",), detected=config(model_channels=320, context_dim=768),
    ),
    "sd21": Family(
        "sd21", "SD20", config(UNET, in_channels=4, use_linear_in_transformer=True),
        latent=(4, 8, 8), context=64, lists=("input_blocks", "output_blocks"),
        narrowed=("transformer_depth_output",), detected=config(model_channels=320, context_dim=1024),
    ),
    "sdxl": Family(
        "sdxl", "SDXL",
        config(
            UNET, in_channels=4, use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=2816
        ),
        latent=(4, 8, 8), context=64, pooled=1280, lists=("input_blocks", "output_blocks"),
        narrowed=("transformer_depth_output",),
        detected=config(model_channels=320, context_dim=2048, transformer_depth=[0, 0, 2, 2, 10, 10]),
    ),
    "svd": Family(
        "svd", "SVD_img2vid",
        config(
            UNET, in_channels=8, use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=768,
            use_temporal_resblock=True, use_temporal_attention=True, extra_ff_mix_layer=True, use_spatial_context=True,
            merge_strategy="learned_with_images", merge_factor=0.0, video_kernel_size=[3, 1, 1],
            disable_temporal_crossattention=False,
        ),
        latent=(4, 8, 8), context=64, tokens=1, lists=("input_blocks", "output_blocks"), entries=_first_frame,
        narrowed=("transformer_depth_output",), denoise=0.5,
        detected=config(model_channels=320, context_dim=1024, transformer_depth=[1] * 6 + [0] * 2),
    ),
}  # fmt: skip
# How close four lanes come in 8 steps on random weights: such models change direction more sharply than trained ones.
CLOSE = {
    "sd15": 0.02, "sd21": 0.05, "sdxl": 0.05, "svd": 0.02, "cogvideox": 0.1, "stable_audio": 0.3, "sd3": 0.3,
    "flux": 0.2, "wan21": 0.1, "ltxv": 0.05, "ltxav": 0.05, "hunyuan_video": 0.15, "meanflow": 0.15,
}  # fmt: skip
MEANFLOW = replace(
    FAMILIES["hunyuan_video15"], name="meanflow", config=config(FAMILIES["hunyuan_video15"].config, meanflow=True)
)
SERVED: dict[str, Family] = {name: {**FAMILIES, **U_NETS, "meanflow": MEANFLOW}[name] for name in CLOSE}
# Denoisers in which all rows of a call must have the same sigma.
OF_ONE_SIGMA = ("ltxav", "meanflow")


@pytest.fixture(scope="module", autouse=True)
def ranks_that_know_narrowed_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        supervisor.close_all()
        families.for_ranks(patch)
        yield
        supervisor.close_all()


@cache
def model_of(name: str) -> Any:
    return families.load(SERVED[name])


def sampled(name: str, sampler: Any, steps: int = STEPS, seed: int = 5) -> torch.Tensor:
    """The final latent of a batch of two, or of one video of SVD's, whose frames are the rows."""
    return families.sample(model_of(name), SERVED[name], steps, sampler, FRAMES if name == "svd" else 2, seed=seed)


@cache
def alone(name: str, steps: int = STEPS) -> torch.Tensor:
    """ComfyUI alone."""
    return sampled(name, "euler", steps)


@cache
def on_two_ranks(name: str, lanes: int) -> tuple[torch.Tensor, int]:
    """The final latent and the rounds that it took."""
    sampler = parastep(lanes)
    return sampled(name, sampler), sampler.last_run.count


@pytest.mark.parametrize("name", U_NETS)
def test_the_loader_takes_the_small_file_for_what_it_is(name: str):
    assert type(model_of(name).model.model_config).__name__ == SERVED[name].loaded_as


@pytest.mark.parametrize("name", SERVED)
def test_one_lane_is_comfyui(name: str):
    sampler = parastep(1)
    assert distance(sampled(name, sampler, steps=3), alone(name, 3)) < EXACT
    assert sampler.last_run.count == sampler.last_run.asked == 3
    assert all(rank.nbytes for rank in in_ranks().parts)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize(("lanes", "rounds"), [(2, 6), (4, 5)])
def test_lanes_come_close_in_fewer_rounds(lanes: int, rounds: int, name: str):
    ours, count = on_two_ranks(name, lanes)
    assert count == rounds
    assert EXACT < distance(ours, alone(name)) < CLOSE[name] * lanes / 4


@pytest.mark.parametrize("name", SERVED)
def test_exact_fidelity_is_comfyui(name: str):
    assert distance(sampled(name, parastep(2, fidelity="exact")), alone(name)) < 10 * EXACT


@pytest.mark.parametrize("name", SERVED)
def test_one_device_with_all_lanes_in_a_batch(name: str):
    """Two devices have two lanes each: rows must not depend on which others are in their batch."""
    ours = sampled(name, parastep(4, ranks=1))
    assert len(the_pool().pids) == 1
    assert distance(ours, on_two_ranks(name, 4)[0]) < EXACT


@pytest.mark.parametrize("name", OF_ONE_SIGMA)
def test_rows_of_one_sigma_only_where_the_denoiser_needs_that(name: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    original = lanes_denoiser.batched

    def record(calls: Any) -> Any:
        found = original(calls)
        seen.append(len(found))
        return found

    monkeypatch.setattr(lanes_denoiser, "batched", record)
    for other in (name, "ltxv"):
        sampled(other, parastep(4, ranks=1))
    half = len(seen) // 2
    assert seen[:half] == [1, 1, 4, 1, 1]
    assert seen[half:] == [1, 1, 1, 1, 1]
