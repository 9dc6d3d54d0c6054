"""Everything that attaches to a MODEL, or to a conditioning, through Async UNet Split: as ComfyUI alone, or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import comfy.controlnet
import comfy.sd
import pytest
import torch
import torch._dynamo
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_attention_multiply import UNetSelfAttentionMultiply
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import CFGOverride
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_eps import EpsilonScaling
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_lumina2 import RenormCFG
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import (
    ModelSamplingContinuousEDM,
    ModelSamplingDiscrete,
    ModelSamplingFlux,
    ModelSamplingSD3,
    RescaleCFG,
)
from comfy_extras.nodes_perpneg import PerpNeg
from comfy_extras.nodes_rope import ScaleROPE
from comfy_extras.nodes_tcfg import TCFG
from comfy_extras.nodes_torch_compile import TorchCompileModel

import tiny_attachments
import tiny_models
from generation import Conditioning, distance, noise, prompt
from leapfrog.parallel_backend import LeapfrogError
from ranks import EXACT, load, split, the_pool

stock: Any = import_module("nodes")  # ComfyUI's, which a type checker takes for ours
context_windows: Any = ContextWindowsManualNode.execute

VISIBLE = 1e-3
"""An attachment that changes the result by less proves nothing."""


def sample(
    model: Any,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    latent: Any = None,
    steps: int = 5,
    denoise: float = 1.0,
) -> torch.Tensor:
    """What KSampler makes of a MODEL; without a ``latent`` of an empty one of 8 x 8."""
    latent = latent or {"samples": torch.zeros(1, model.model.latent_format.latent_channels, 8, 8)}
    prompts = positive or prompt(1), negative or prompt(100)
    with torch.inference_mode():
        (made,) = stock.common_ksampler(model, 5, steps, 3.0, "euler", "simple", *prompts, latent, denoise=denoise)
    return made["samples"]


@cache
def plain(family: str, steps: int = 5) -> torch.Tensor:
    """ComfyUI alone with nothing attached."""
    return sample(load(family), steps=steps)


class Node(NamedTuple):
    """A node that takes a MODEL and gives one."""

    family: str
    put_on: Callable[[Any], Any]
    steps: int = 5


def windows(schedule: str) -> Callable[[Any], Any]:
    """Windows of four rows of the picture, two of them shared with the next."""
    return lambda model: context_windows(model, 4, 2, schedule, 1, False, "pyramid", 2, True).args[0]


NODES = {
    "ModelSamplingDiscrete lcm": Node("unet", lambda m: ModelSamplingDiscrete().patch(m, "lcm", False)[0], 8),
    "ModelSamplingDiscrete v": Node("unet", lambda m: ModelSamplingDiscrete().patch(m, "v_prediction", True)[0]),
    "ModelSamplingContinuousEDM": Node("unet", lambda m: ModelSamplingContinuousEDM().patch(m, "edm", 80.0, 0.02)[0]),
    "ModelSamplingFlux": Node("flux", lambda m: ModelSamplingFlux().patch(m, 2.0, 0.5, 1024, 1024)[0]),
    "ModelSamplingSD3": Node("flux", lambda m: ModelSamplingSD3().patch(m, 3.0)[0]),
    "RescaleCFG": Node("unet", lambda m: RescaleCFG().patch(m, 0.7)[0]),
    "CFGZeroStar": Node("flux", lambda m: CFGZeroStar.execute(m).args[0]),
    "CFGNorm after": Node("flux", lambda m: CFGNorm.execute(m, 1.0).args[0]),
    "CFGNorm before": Node("flux", lambda m: CFGNorm.execute(m, 1.0, True).args[0]),
    "APG": Node("flux", lambda m: APG.execute(m, 0.5, 5.0, -0.5).args[0]),
    "TCFG": Node("flux", lambda m: TCFG.execute(m).args[0]),
    "Mahiro": Node("flux", lambda m: Mahiro.execute(m).args[0]),
    "FreSca": Node("flux", lambda m: FreSca.execute(m, 1.0, 1.25, 2).args[0]),
    "RenormCFG": Node("flux", lambda m: RenormCFG.execute(m, 100.0, 1.0).args[0]),
    "PerpNeg": Node("flux", lambda m: PerpNeg.execute(m, prompt(50), 1.0).args[0]),
    "CFGOverride": Node("flux", lambda m: CFGOverride.execute(m, 1.0, 0.3, 0.8).args[0]),
    "EpsilonScaling": Node("flux", lambda m: EpsilonScaling.execute(m, 1.01).args[0]),
    "ScaleROPE": Node("flux", lambda m: ScaleROPE.execute(m, 2.0, 0.0, 2.0, 0.0, 1.0, 0.0).args[0]),
    "UNetSelfAttentionMultiply": Node(
        "unet", lambda m: UNetSelfAttentionMultiply.execute(m, 1.5, 1.0, 1.0, 1.0).args[0]
    ),
    "EasyCache": Node("flux", lambda m: EasyCacheNode.execute(m, 0.9, 0.1, 0.9, False).args[0], 8),
    "EasyCache on a U-Net": Node("unet", lambda m: EasyCacheNode.execute(m, 0.9, 0.1, 0.9, False).args[0], 8),
    "LazyCache": Node("flux", lambda m: LazyCacheNode.execute(m, 0.9, 0.1, 0.9, False).args[0], 8),
    "context windows": Node("flux", windows("standard_static")),
    "context windows that move": Node("flux", windows("standard_uniform")),
}


@pytest.mark.parametrize("name", NODES)
def test_a_node_before_the_split_or_behind_it(name: str):
    family, put_on, steps = NODES[name]
    theirs = sample(put_on(load(family)), steps=steps)
    assert distance(theirs, plain(family, steps)) > VISIBLE
    for model in (put_on(split(load(family), mode="exact")), split(put_on(load(family)), mode="exact")):
        assert distance(sample(model, steps=steps), theirs) < EXACT


def test_many_nodes_at_once():
    def put_on(model: Any) -> Any:
        for name in ("ModelSamplingSD3", "APG", "CFGZeroStar", "context windows", "ScaleROPE"):
            model = NODES[name].put_on(model)
        return model

    theirs = sample(put_on(load("flux")))
    assert distance(theirs, plain("flux")) > VISIBLE
    assert distance(sample(put_on(split(load("flux"), mode="exact"))), theirs) < EXACT


class TestConditioning:
    """Properties that ComfyUI's nodes put on a conditioning; its own sampling code reads them, in the host."""

    half = torch.zeros(1, 8, 8)
    half[..., :4] = 1

    def masked(self, bounds: str) -> Conditioning:
        return stock.ConditioningSetMask().append(prompt(2), self.half, bounds, 1.5)[0]

    def combined(self) -> Conditioning:
        (area,) = stock.ConditioningSetArea().append(prompt(2), 32, 64, 8, 0, 0.7)
        (share,) = stock.ConditioningSetAreaPercentage().append(prompt(3), 0.5, 0.5, 0.25, 0.25, 1.3)
        (early,) = stock.ConditioningSetTimestepRange().set_range(prompt(4), 0.0, 0.4)
        found = prompt(1)
        for other in (area, share, early, self.masked("mask bounds")):
            (found,) = stock.ConditioningCombine().combine(found, other)
        return found

    @pytest.mark.parametrize("family", ["flux", "unet"])
    def test_all_of_them_on_both_sides(self, family: str):
        (late,) = stock.ConditioningSetTimestepRange().set_range(prompt(5), 0.5, 1.0)
        positive, negative = self.combined(), [*prompt(100), *late, *self.masked("default")]
        theirs = sample(load(family), positive, negative, steps=3)
        assert distance(theirs, plain(family, 3)) > VISIBLE
        ours = sample(split(load(family), mode="exact"), positive, negative, steps=3)
        assert distance(ours, theirs) < EXACT

    @pytest.mark.parametrize(
        "positive",
        [
            lambda: [*prompt(1), *stock.ConditioningSetArea().append(prompt(2), 32, 64, 8, 0, 0.7)[0]],
            lambda: [*prompt(1), *TestConditioning().masked("default")],
            lambda: [*prompt(1), *TestConditioning().masked("mask bounds")],
            lambda: stock.ConditioningCombine().combine(prompt(1), prompt(2))[0],
            lambda: stock.ConditioningAverage().addWeighted(prompt(1), prompt(2), 0.5)[0],
            lambda: stock.ConditioningConcat().concat(prompt(1), prompt(2))[0],
            lambda: [
                *stock.ConditioningSetTimestepRange().set_range(prompt(1), 0.0, 0.5)[0],
                *stock.ConditioningSetTimestepRange().set_range(prompt(2), 0.5, 1.0)[0],
            ],
        ],
        ids=["area", "mask", "mask bounds", "combine", "average", "concat", "timestep range"],
    )  # fmt: skip
    def test_each(self, positive: Callable[[], Conditioning]):
        theirs = sample(load("flux"), positive())
        assert distance(theirs, plain("flux")) > VISIBLE
        assert distance(sample(split(load("flux"), mode="exact"), positive()), theirs) < EXACT


class TestControlNet:
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(12))

    def controlled(
        self, family: str, strength: float = 0.8, start: float = 0.0, end: float = 1.0
    ) -> tuple[Conditioning, Conditioning]:
        return stock.ControlNetApplyAdvanced().apply_controlnet(
            prompt(1), prompt(100), tiny_attachments.controlnet(family), self.image, strength, start, end
        )

    @pytest.mark.parametrize("family", ["unet", "flux"])
    @pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 0.6)])
    def test_on_both_sides(self, family: str, start: float, end: float):
        conditioning = self.controlled(family, start=start, end=end)
        theirs = sample(load(family), *conditioning)
        assert distance(theirs, plain(family)) > VISIBLE
        if end < 1:
            assert distance(theirs, sample(load(family), *self.controlled(family))) > VISIBLE
        assert distance(sample(split(load(family), mode="exact"), *conditioning), theirs) < EXACT

    @pytest.mark.parametrize("on", ["positive", "negative"])
    def test_on_one_side(self, on: str):
        both = self.controlled("unet")
        conditioning = (both[0], prompt(100)) if on == "positive" else (prompt(1), both[1])
        theirs = sample(load("unet"), *conditioning)
        assert distance(theirs, plain("unet")) > VISIBLE
        assert distance(theirs, sample(load("unet"), *both)) > VISIBLE
        assert distance(sample(split(load("unet"), mode="exact"), *conditioning), theirs) < EXACT

    def test_the_user_is_told_that_it_is_no_faster(self, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO, "leapfrog")
        sample(split(load("flux"), mode="lookahead"), *self.controlled("flux"))
        before = next(text for text in caplog.messages if "Async UNet Split: at most" in text)
        assert "ControlNets are no faster" in before
        caplog.clear()
        sample(split(load("flux"), mode="lookahead"))
        assert "ControlNets" not in caplog.text

    def test_two_of_them_and_a_lora_and_a_batch(self):
        conditioning = stock.ControlNetApplyAdvanced().apply_controlnet(
            *self.controlled("flux"), tiny_attachments.controlnet("flux"), 1 - self.image, 0.5, 0.3, 1.0
        )
        lora = dict(tiny_attachments.loras()["lora"])
        latent = {"samples": torch.zeros(2, 16, 8, 8)}
        alone, behind = (
            comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
            for model in (load("flux"), split(load("flux"), mode="exact"))
        )
        theirs = sample(alone, *conditioning, latent=latent)
        assert distance(sample(behind, *conditioning, latent=latent), theirs) < EXACT
        without = sample(split(load("flux"), mode="exact"), latent=latent)
        assert distance(theirs, without) > VISIBLE


class TestLatent:
    """Image to image, and inpainting in ComfyUI's three ways."""

    picture = noise((1, 16, 8, 8), 11)
    left = torch.zeros(1, 1, 64, 64)
    left[..., :32] = 1
    slope = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)

    def test_image_to_image(self):
        latent = {"samples": self.picture}
        theirs = sample(load("flux"), latent=latent, denoise=0.5)
        assert distance(theirs, sample(load("flux"), latent=latent)) > VISIBLE
        ours = sample(split(load("flux"), mode="exact"), latent=latent, denoise=0.5)
        assert distance(ours, theirs) < EXACT

    def test_a_noise_mask(self):
        (latent,) = stock.SetLatentNoiseMask().set_mask({"samples": self.picture}, self.left)
        theirs = sample(load("flux"), latent=latent)
        assert distance(theirs[..., 4:], self.picture[..., 4:]) < EXACT
        assert distance(theirs[..., :4], self.picture[..., :4]) > VISIBLE
        assert distance(sample(split(load("flux"), mode="exact"), latent=latent), theirs) < EXACT

    def test_differential_diffusion(self):
        def put_on(model: Any) -> Any:
            return DifferentialDiffusion.execute(model).args[0]

        (latent,) = stock.SetLatentNoiseMask().set_mask({"samples": self.picture}, self.slope)
        theirs = sample(put_on(load("flux")), latent=latent)
        assert distance(theirs, sample(load("flux"), latent=latent)) > VISIBLE
        for model in (put_on(split(load("flux"), mode="exact")), split(put_on(load("flux")), mode="exact")):
            assert distance(sample(model, latent=latent), theirs) < EXACT

    def test_a_model_for_inpainting(self):
        image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(13))
        model = comfy.sd.load_diffusion_model(str(tiny_attachments.tiny_inpainting_unet()))
        vae = tiny_attachments.vae_of_four_channels()

        def inpaint(model: Any, mask: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                encoded = stock.InpaintModelConditioning().encode(prompt(1), prompt(100), image, vae, mask, False)
            return sample(model, *encoded, steps=3)

        theirs = inpaint(model, self.left)
        assert distance(theirs, inpaint(model, 1 - self.left)) > VISIBLE
        assert distance(inpaint(split(model, mode="exact"), self.left), theirs) < EXACT


class TestWeightPatches:
    @pytest.mark.parametrize("kind", tiny_attachments.loras())
    def test_of_every_kind(self, kind: str):
        def put_on(model: Any) -> Any:
            return comfy.sd.load_lora_for_models(model, None, dict(tiny_attachments.loras()[kind]), 0.7, 0)[0]

        without = plain("flux")
        theirs = sample(put_on(load("flux")))
        assert distance(theirs, without) > VISIBLE
        unpatched = split(load("flux"), mode="exact")  # from a model that ComfyUI has just run with its weights patched
        for model in (put_on(unpatched), split(put_on(load("flux")), mode="exact")):
            assert distance(sample(model), theirs) < EXACT
            assert distance(sample(unpatched), without) < EXACT

    def test_several_on_both_sides(self):
        def put_on(model: Any, *kinds: str) -> Any:
            for kind in kinds:
                lora = dict(tiny_attachments.loras()[kind])
                model = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0)[0]
            return model

        kinds = ("lora", "dora", "difference", "lokr", "loha")
        theirs = sample(put_on(load("flux"), *kinds))
        for one_less in (kinds[1:], kinds[:-1]):
            assert distance(theirs, sample(put_on(load("flux"), *one_less))) > VISIBLE
        ours = sample(put_on(split(put_on(load("flux"), *kinds[:2]), mode="exact"), *kinds[2:]))
        assert distance(ours, theirs) < EXACT

    def test_a_lora_that_widens_the_first_layer_takes_its_picture(self):
        def put_on(model: Any) -> Any:
            lora = dict(tiny_attachments.loras()["wider first layer"])
            return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]

        positive = prompt(1, concat_latent_image=noise((1, 16, 8, 8), 77))
        theirs = sample(put_on(load("flux")), positive)
        assert distance(theirs, sample(put_on(load("flux")))) > VISIBLE
        assert distance(sample(put_on(split(load("flux"), mode="exact")), positive), theirs) < EXACT


@pytest.mark.parametrize("behind", [True, False])
def test_a_compiled_model_is_computed_by_the_ranks_and_nothing_is_traced_here(behind: bool):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = load("flux") if not behind else split(load("flux"), mode="exact")
    model = TorchCompileModel.execute(model, "inductor").args[0]
    model = model if behind else split(model, mode="exact")
    denoiser = model.model.diffusion_model
    assert distance(sample(model), plain("flux")) < EXACT
    assert model.model.diffusion_model is denoiser
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


class BorrowingControl(comfy.controlnet.ControlBase):
    """A pack's own ControlNet that reads a weight of the model it controls."""

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        self.borrowed = model.diffusion_model.state_dict()["out.2.weight"]

    def get_control(self, x_noisy: torch.Tensor, *_: Any) -> dict[str, Any]:
        strength = x_noisy.std() * self.borrowed.std().to(x_noisy.device)
        return {"input": [], "middle": [strength * x_noisy.new_ones(1, 320, 1, 1)], "output": []}


def behind_gligen() -> Conditioning:
    position = ("position", tiny_attachments.gligen(), [(noise((1, tiny_models.CONTEXT), 3), 4, 4, 1, 1)])
    return prompt(1, gligen=position)


def with_control(control: comfy.controlnet.ControlBase) -> Conditioning:
    control.set_cond_hint(TestControlNet.image.movedim(-1, 1))
    return prompt(1, control=control)


REFUSED = {
    "GLIGEN": (behind_gligen, "gligen"),
    "Control-LoRA": (lambda: with_control(tiny_attachments.control_lora().copy()), "a control-lora"),
    "a pack's own control": (lambda: with_control(BorrowingControl()), "computes with the denoiser's weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_denoiser_itself_is_named_and_the_ranks_go_on(name: str):
    positive, said = REFUSED[name]
    assert distance(sample(load("unet"), positive()), plain("unet")) > VISIBLE, "it does not work in ComfyUI alone"
    model = split(load("unet"), mode="exact")
    sample(model)
    pids = the_pool().pids
    with pytest.raises(LeapfrogError) as caught:
        sample(model, positive())
    assert caught.value.report.code == "unsupported_patch"
    assert said in str(caught.value).lower()
    assert distance(sample(model), plain("unet")) < EXACT
    assert the_pool().pids == pids


@pytest.mark.parametrize("kind", [comfy.controlnet.ControlNetSD35, comfy.controlnet.QwenFunControlNet])
def test_a_control_behind_another_is_found(kind: type[comfy.controlnet.ControlNet]):
    front, *_ = TestControlNet().controlled("flux")
    front[0][1]["control"].set_previous_controlnet(kind(None))
    with pytest.raises(LeapfrogError) as caught:
        sample(split(load("flux"), mode="exact"), front)
    assert "needs the denoiser's weights" in str(caught.value)
