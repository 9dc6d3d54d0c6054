"""ParaStep with what people attach to a MODEL, to a prompt, to a latent, and with guiders of all sorts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import (
    BasicScheduler,
    CFGOverride,
    DualCFGGuider,
    DualModelGuider,
    RandomNoise,
    SamplerCustom,
    SamplerCustomAdvanced,
    SplitSigmas,
)
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_freelunch import FreeU
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux, RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_perpneg import PerpNegGuider
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_tomesd import TomePatchModel
from comfy_extras.nodes_torch_compile import TorchCompileModel

import tiny_attachments
import tiny_models
import trained
from generation import Conditioning, Request, distance, generate, noise, prompt
from leapfrog.nodes import ahead, rounds_sampler
from leapfrog.parallel_backend import LanesPlan, LeapfrogError
from leapfrog.parallel_backend.pool import State
from ranks import EXACT, devices, load, parastep, reference, split, the_pool, with_lora
from where import ON_GPUS

stock: Any = import_module("nodes")  # ComfyUI's, which a type checker takes for ours
context_windows: Any = ContextWindowsManualNode.execute
Guided = Callable[[Any], Any]

VISIBLE = 1e-3
"""An attachment that changes the result by less proves nothing."""
STEPS = 8


def cfg_guider(model: Any, positive: Conditioning | None = None, negative: Conditioning | None = None) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or prompt(1), negative or prompt(100))
    guider.set_cfg(3.0)
    return guider


def sample(
    guider: Any, sampler: Any = "euler", latent: Any = None, steps: int = STEPS, denoise: float = 1.0
) -> torch.Tensor:
    """What SamplerCustomAdvanced makes of a guider; without a ``latent`` of an empty one of 8 x 8."""
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    model = guider.model_patcher
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", round(steps / denoise))[-steps - 1 :]
    latent = latent or {"samples": torch.zeros(1, model.model.latent_format.latent_channels, 8, 8)}
    with torch.inference_mode():
        made = SamplerCustomAdvanced.execute(RandomNoise.execute(5).args[0], guider, sampler, sigmas, latent)
    return made.args[0]["samples"]


def watched(
    make: Callable[[], Any], sampler: Any, patch: pytest.MonkeyPatch, alone: Callable[[], Any] | None = None, **how: Any
) -> tuple[torch.Tensor, list[float]]:
    """A run's latent, and how far each of its evaluations, predicted ones as well, is from that of ComfyUI alone at the
    same latent (with the guider that ``alone`` makes)."""
    seen: list[Any] = []

    def record(model: Any, behind: Any, question: Any) -> Any:
        lanes = ahead.lanes_in_call()
        own = zip(question.x.clone().chunk(lanes), question.sigma.chunk(lanes), strict=True)
        several = [list(one) for one in own]
        seen.extend(several)  # in the order in which they begin: nodes may keep state from one to the next
        outputs = original(model, behind, question)
        for one, output in zip(several, outputs[0].clone().chunk(lanes), strict=True):
            one.append(output)
        return outputs

    original = ahead.evaluated
    patch.setattr(ahead, "evaluated", record)
    made = sample(make(), sampler, **how)
    patch.setattr(ahead, "evaluated", original)
    exact: list[torch.Tensor] = []

    def again(denoise: Any, x: torch.Tensor, _sigmas: torch.Tensor, extra_args: Any, **_: Any) -> torch.Tensor:
        exact.extend(denoise(latent, sigma, **extra_args) for latent, sigma, _ in seen)
        return x

    sample((alone or make)(), comfy.samplers.KSAMPLER(again), **how)
    return made, [distance(ours, theirs) for (_, _, ours), theirs in zip(seen, exact, strict=True)]


@cache
def plain(family: str) -> torch.Tensor:
    """ComfyUI alone with nothing attached."""
    return sample(cfg_guider(load(family)))


def check(
    make: Callable[[], Any], without: torch.Tensor, patch: pytest.MonkeyPatch, near: float = 0.45, **how: Any
) -> None:
    """A guider whose attachments do something: the same in ComfyUI alone, exactly with one lane, closely with four."""
    theirs = sample(make(), **how)
    assert distance(theirs, without) > VISIBLE
    assert distance(sample(make(), parastep(1), **how), theirs) < EXACT
    sampler = parastep(4)  # two lanes in the batch of each rank
    four, errors = watched(make, sampler, patch, **how)
    assert max(errors) < EXACT, errors
    assert len(errors) == sampler.last_run.asked > sampler.last_run.count
    assert distance(four, theirs) < near


def windows(schedule: str) -> Callable[[Any], Any]:
    """Windows of four rows of the picture, two of them shared with the next."""
    return lambda model: context_windows(model, 4, 2, schedule, 1, False, "pyramid", 2, True).args[0]


NODES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "SkipLayerGuidance": ("flux", lambda m: SkipLayerGuidanceDiT.execute(m, 2.0, 0.1, 0.7, "1", "1, 2").args[0]),
    "SkipLayerGuidance simple": ("flux", lambda m: SkipLayerGuidanceDiTSimple.execute(m, 0.1, 0.7, "1", "2").args[0]),
    "RescaleCFG": ("unet", lambda m: RescaleCFG().patch(m, 0.7)[0]),
    "APG": ("flux", lambda m: APG.execute(m, 0.5, 5.0, -0.5).args[0]),
    "CFGOverride": ("flux", lambda m: CFGOverride.execute(m, 1.0, 0.3, 0.8).args[0]),
    "FreeU": ("unet", lambda m: FreeU.execute(m, 1.1, 1.2, 0.9, 0.2).args[0]),
    "HyperTile": ("unet", lambda m: HyperTile.execute(m, 32, 1, 0, False)[0]),
    "PatchModelAddDownscale": (
        "unet", lambda m: PatchModelAddDownscale.execute(m, 1, 2.0, 0.0, 0.5, True, "bicubic", "bicubic").args[0]
    ),
    "ModelSamplingFlux": ("flux", lambda m: ModelSamplingFlux().patch(m, 2.0, 0.5, 1024, 1024)[0]),
    "ModelSamplingDiscrete": ("unet", lambda m: ModelSamplingDiscrete().patch(m, "v_prediction", True)[0]),
    "context windows": ("flux", windows("standard_static")),
    "context windows that move": ("flux", windows("standard_uniform")),
    "LoRA": ("flux", lambda m: with_lora(m)),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_a_node(name: str, monkeypatch: pytest.MonkeyPatch):
    family, put_on = NODES[name]
    # FreeU acts on blocks of two and four times this width
    monkeypatch.setitem(load("unet").model.model_config.unet_config, "model_channels", 160)
    check(lambda: cfg_guider(put_on(load(family))), plain(family), monkeypatch)


def test_a_node_that_draws_random_numbers_in_the_denoiser():
    model = TomePatchModel.execute(load("unet"), 0.5).args[0]
    torch.manual_seed(3)
    theirs = sample(cfg_guider(model))
    assert distance(theirs, plain("unet")) > VISIBLE
    ours = sample(cfg_guider(model), parastep(2))
    assert distance(ours, plain("unet")) > VISIBLE
    assert distance(ours, theirs) < 0.1, "ComfyUI draws others than we do, and from run to run"
    again = sample(cfg_guider(model), parastep(2))
    assert distance(again, ours) <= (EXACT if ON_GPUS else 0), "a GPU adds up in another order each time"


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_easycache_goes_step_by_step(family: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")
    model = EasyCacheNode.execute(load(family), 0.9, 0.1, 0.9, False).args[0]
    theirs = sample(cfg_guider(model))
    assert distance(theirs, plain(family)) > VISIBLE
    sampler = parastep(4)
    assert distance(sample(cfg_guider(model), sampler), theirs) < EXACT
    assert sampler.last_run.count == sampler.last_run.asked == STEPS
    assert any("EasyCache" in record.getMessage() for record in caplog.records)


HALF = torch.zeros(1, 8, 8)
HALF[..., :4] = 1


def controlled(family: str, start: float, end: float, by: Any = None) -> tuple[Conditioning, Conditioning]:
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(12))
    return stock.ControlNetApplyAdvanced().apply_controlnet(
        prompt(1), prompt(100), by or tiny_attachments.controlnet(family), image, 0.8, start, end
    )


def changing() -> Conditioning:
    between = [(1, 0.0, 0.4), (2, 0.4, 0.7), (3, 0.7, 1.0)]
    parts = [stock.ConditioningSetTimestepRange().set_range(prompt(seed), *span)[0] for seed, *span in between]
    return [one for part in parts for one in part]


PROMPTS: dict[str, tuple[str, Callable[[], tuple[Conditioning, Conditioning]]]] = {
    "ControlNet": ("flux", lambda: controlled("flux", 0.0, 1.0)),
    "ControlNet in some steps": ("flux", lambda: controlled("flux", 0.2, 0.6)),
    "ControlNet of a U-Net in some steps": ("unet", lambda: controlled("unet", 0.2, 0.6)),
    "Control-LoRA": ("unet", lambda: controlled("unet", 0.0, 1.0, tiny_attachments.control_lora().copy())),
    "prompts that change": ("flux", lambda: (changing(), prompt(100))),
    "negative prompts that change": ("unet", lambda: (prompt(1), changing())),
    "area": ("flux", lambda: ([*prompt(1), *stock.ConditioningSetArea().append(prompt(2), 32, 64, 8, 0, 0.7)[0]], [])),
    "mask": (
        "unet",
        lambda: (
            [*prompt(1), *stock.ConditioningSetMask().append(prompt(2), HALF, "mask bounds", 1.5)[0]],
            prompt(100),
        ),
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_with_something_attached(name: str, monkeypatch: pytest.MonkeyPatch):
    family, make = PROMPTS[name]
    conditioning = make()
    check(lambda: cfg_guider(load(family), *conditioning), plain(family), monkeypatch, near=0.75)


def told_the_step(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> torch.Tensor:  # fmt: skip
    """Euler as another pack might write it, which puts things of its own among the options before each step."""
    options = extra_args["model_options"]["transformer_options"]
    options["ExtraOptions"] = options["model_sampling"] = object()
    for step, (sigma, after) in enumerate(pairwise(sigmas)):
        options["step"] = step
        slope = (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma
        x = x + slope * (after - sigma)
        if callback:
            callback({"x": x, "i": step, "sigma": sigma, "denoised": x})
    return x


@pytest.mark.parametrize("way", ["lookahead", "parastep"])
def test_a_sampler_that_writes_into_its_options(way: str):
    """Whatever copies of it are ahead, each evaluation has the options of its own step."""
    seen: list[tuple[int, float]] = []

    def look(apply_model: Any, call: dict[str, Any]) -> Any:
        options = call["c"]["transformer_options"]
        seen.append((options["step"], float(options["sigmas"][0])))
        return apply_model(call["input"], call["timestep"], **call["c"])

    model, base = load("flux").clone(), comfy.samplers.KSAMPLER(told_the_step)
    model.set_model_unet_function_wrapper(look)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    theirs = sample(cfg_guider(model), base)
    seen.clear()
    if way == "parastep":
        ours = sample(cfg_guider(model), parastep(3, base=base))
    else:
        ours = sample(cfg_guider(split(model, mode="lookahead")), base)
    assert distance(ours, theirs) < 0.2
    assert {step for step, _ in seen} == set(range(STEPS))
    assert all(sigma == pytest.approx(float(sigmas[step])) for step, sigma in seen)


def test_a_sampler_around_ours_that_changes_each_steps_sigma():
    """As Detail Daemon does: by the largest sigma of a call, for all of its rows."""
    seen: set[float] = set()

    def look(apply_model: Any, call: dict[str, Any]) -> Any:
        seen.update(call["c"]["transformer_options"]["sigmas"].tolist())
        return apply_model(call["input"], call["timestep"], **call["c"])

    def around(inner: Any) -> Any:
        def lowered(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **how: Any) -> torch.Tensor:
            def other(x: torch.Tensor, sigma: torch.Tensor, **args: Any) -> torch.Tensor:
                share = 0.1 * int((sigmas - sigma.max()).abs().argmin()) / STEPS
                return model(x, sigma * (1 - share), **args)

            vars(other).update(inner_model=model.inner_model, sigmas=model.sigmas)
            return inner.sampler_function(other, x, sigmas, **how, **inner.extra_options)

        return comfy.samplers.KSAMPLER(lowered)

    model = load("flux").clone()
    model.set_model_unet_function_wrapper(look)
    theirs = sample(cfg_guider(model), around(comfy.samplers.sampler_object("euler")))
    own = {round(sigma, 5) for sigma in seen}
    seen.clear()
    assert distance(sample(cfg_guider(model), around(parastep(3))), theirs) < 0.1
    assert {round(sigma, 5) for sigma in seen} == own


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_a_run_in_two_parts(family: str):
    """KSampler (Advanced) twice, first with leftover noise; for ParaStep SamplerCustom twice, behind SplitSigmas."""
    empty = {"samples": torch.zeros(1, load(family).model.latent_format.latent_channels, 8, 8)}

    def advanced(model: Any) -> torch.Tensor:
        node, same = stock.KSamplerAdvanced(), (5, STEPS, 3.0, "euler", "simple", prompt(1), prompt(100))
        (latent,) = node.sample(model, "enable", *same, empty, 0, 4, "enable")
        return node.sample(model, "disable", *same, latent, 4, 10000, "disable")[0]["samples"]

    def custom(sampler: Any) -> torch.Tensor:
        model, latent = load(family), empty
        sigmas = BasicScheduler.execute(model, "simple", STEPS, 1.0).args[0]
        for add_noise, part in zip((True, False), SplitSigmas.execute(sigmas, 4).args, strict=True):
            made = SamplerCustom.execute(model, add_noise, 5, 3.0, prompt(1), prompt(100), sampler, part, latent)
            latent = made.args[0]
        return latent["samples"]

    with torch.inference_mode():
        theirs = advanced(load(family))
        assert distance(theirs, plain(family)) < EXACT
        assert distance(advanced(split(load(family), mode="exact")), theirs) < EXACT
        assert distance(custom(parastep(1)), theirs) < EXACT
        assert distance(advanced(split(load(family), mode="lookahead", warmup=1)), theirs) < 0.1
        assert distance(custom(parastep(2, warmup=1)), theirs) < 0.1


def test_what_a_controlnet_gains_is_told_before():
    told: list[str] = []
    plan = LanesPlan.choose(devices(2), lanes=2)
    sampler = rounds_sampler.in_rounds(plan, comfy.samplers.sampler_object("euler"), told.append)
    sample(cfg_guider(load("flux"), *controlled("flux", 0.0, 1.0)), sampler)
    assert told[0].startswith("ParaStep: at most ")
    assert "ControlNets are no faster" in told[0]


@cache
def another_model() -> Any:
    """Of the same file with a LoRA, and with weights of its own."""
    return with_lora(comfy.sd.load_diffusion_model(str(tiny_models.tiny_flux())))


GUIDERS: dict[str, Guided] = {
    "DualCFGGuider": lambda m: DualCFGGuider.execute(m, prompt(1), prompt(2), prompt(100), 3.0, 2.0, "regular").args[0],
    "nested DualCFGGuider": lambda m: DualCFGGuider.execute(
        m, prompt(1), prompt(2), prompt(100), 3.0, 2.0, "nested"
    ).args[0],
    "PerpNegGuider": lambda m: PerpNegGuider.execute(m, prompt(1), prompt(100), prompt(50), 3.0, 1.0).args[0],
    "DualModelGuider": lambda m: DualModelGuider.execute(m, prompt(1), 3.0, another_model(), prompt(100)).args[0],
}


@pytest.mark.parametrize("name", GUIDERS)
def test_another_guider(name: str, monkeypatch: pytest.MonkeyPatch):
    check(lambda: GUIDERS[name](load("flux")), plain("flux"), monkeypatch, near=0.75)


@pytest.mark.parametrize("first", [True, False])
def test_a_split_model_of_a_guider_is_refused(first: bool):
    models = [load("flux"), split(another_model())]
    one, other = models[::-1] if first else models
    guider = DualModelGuider.execute(one, prompt(1), 3.0, other, prompt(100)).args[0]
    with pytest.raises(LeapfrogError, match="does not take a MODEL from Async UNet Split"):
        sample(guider, parastep(2))


def test_two_split_models_of_a_guider():
    def guider(*models: Any) -> Any:
        return DualModelGuider.execute(models[0], prompt(1), 3.0, models[1], prompt(100)).args[0]

    theirs = sample(guider(load("flux"), another_model()))
    mode = {"mode": "lookahead", "warmup": 1}
    assert distance(sample(guider(split(load("flux"), **mode), split(another_model(), **mode))), theirs) < 0.05


def test_two_split_models_that_share_ranks_are_refused():
    """At every step the ranks would read one's file in place of the other's."""
    models = split(load("flux")), split(load("unet"))
    guider = DualModelGuider.execute(models[0], prompt(1), 3.0, models[1], prompt(100)).args[0]
    with pytest.raises(LeapfrogError, match="models are both split and share devices"):
        sample(guider)


@pytest.mark.parametrize("together", [True, False])
def test_a_compiled_model_is_left_as_it_was(together: bool, monkeypatch: pytest.MonkeyPatch):
    if not together:
        monkeypatch.setattr(rounds_sampler, "can_be_one", lambda *_: False)
    torch._dynamo.utils.counters.clear()
    model = load("flux")
    denoiser, expected = model.model.diffusion_model, sample(cfg_guider(model), parastep(4))
    compiled = TorchCompileModel.execute(model, "inductor").args[0]
    assert distance(sample(cfg_guider(compiled), parastep(4)), expected) < EXACT
    assert compiled.model.diffusion_model is denoiser
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("at", [2, 5])
def test_memory_taken_away_in_the_middle_of_a_run(at: int, monkeypatch: pytest.MonkeyPatch):
    """While lanes of a round are under way, each in a call of its own."""
    monkeypatch.setattr(rounds_sampler, "can_be_one", lambda *_: False)
    sampler = parastep(4)
    expected = generate(load("flux"), Request(steps=8), sampler)

    def free(step: int, *_: Any) -> None:
        if step == at:
            sampler._memory.denoiser.release()

    assert torch.equal(generate(load("flux"), Request(steps=8), sampler, on_step=free), expected)
    assert the_pool().state is State.READY  # no call is left


PICTURE = noise((1, 16, 8, 8), 11)
LATENTS: dict[str, dict[str, Any]] = {
    "image to image": {"latent": {"samples": PICTURE}, "denoise": 0.5},
    "inpainting": {"latent": {"samples": PICTURE, "noise_mask": HALF[None]}},
    "inpainting a batch from half way": {
        "latent": {"samples": PICTURE.repeat(2, 1, 1, 1), "noise_mask": HALF[None]}, "denoise": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LATENTS)
def test_a_latent_that_is_not_empty(name: str, monkeypatch: pytest.MonkeyPatch):
    how = LATENTS[name]
    rows = how["latent"]["samples"].shape[0]
    empty = sample(cfg_guider(load("flux")), latent={"samples": torch.zeros(rows, 16, 8, 8)})
    check(lambda: cfg_guider(load("flux")), empty, monkeypatch, near=0.75, **how)


def put_all_on(family: str) -> Any:
    """A guider with much attached."""
    model, names = load(family), ["SkipLayerGuidance", "APG", "ModelSamplingFlux", "LoRA"]
    for name in names if family == "flux" else ["RescaleCFG", "HyperTile", "PatchModelAddDownscale"]:
        model = NODES[name][1](model)
    positive, negative = controlled(family, 0.2, 0.6)
    (early,) = stock.ConditioningSetTimestepRange().set_range(prompt(2), 0.0, 0.5)
    return cfg_guider(model, [*positive, *early], negative)


def test_momentum_counts_no_evaluation_that_is_rejected(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "leapfrog")

    def make() -> Any:
        return cfg_guider(APG.execute(load("flux"), 0.5, 5.0, -0.5).args[0])

    theirs = sample(make(), steps=8)
    sampler = parastep(3, fidelity="exact")
    assert distance(sample(make(), sampler, steps=8), theirs) < EXACT
    assert sampler.last_run.rejected == 0
    assert "steps are taken one by one: APG remembers the step before" in caplog.text


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_much_at_once(family: str, monkeypatch: pytest.MonkeyPatch):
    # four stretches between changes of conditioning, in each of which the first step goes alone
    check(lambda: put_all_on(family), plain(family), monkeypatch, near=0.75, steps=16)
    theirs = sample(put_all_on(family), steps=12)
    sampler = parastep(2, fidelity="faithful", warmup=0)
    assert distance(sample(put_all_on(family), sampler, steps=12), theirs) < 0.01
    if family == "unet":
        assert sampler.last_run.count < sampler.last_run.asked


# PSNR in dB to ComfyUI alone, at least. Fresh noise in every step is foreseen badly: no guard would let that pass.
SAMPLERS = {
    "euler": 60, "dpmpp_2m": 60, "heun": 65, "uni_pc": 60, "euler_ancestral": 55, "euler_cfg_pp": 60,
    "dpmpp_2m_sde": 22, "lcm": 15,
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_on_a_trained_model(name: str):
    fidelity = "unguarded" if name in ("lcm", "dpmpp_2m_sde") else "balanced"
    sampler = parastep(2, base=name, fidelity=fidelity, warmup=2 if fidelity == "unguarded" else 0)
    ours = trained.pictures(trained.load(), 20, sampler)
    assert sampler.last_run.count < sampler.last_run.asked
    assert trained.psnr(ours, trained.pictures(trained.load(), 20, name)) > SAMPLERS[name]


NAMES = ("leapfrog wave", "leapfrog scout")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in NAMES]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_run_that_is_cancelled_leaves_nothing_behind(at: int):
    busy = []

    def cancel(step: int, *_: Any) -> None:
        if step == at:
            busy.extend(threads())
            comfy.model_management.interrupt_current_processing()

    expected = generate(load("flux"), Request(steps=8), parastep(4))
    sampler = parastep(4)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        generate(load("flux"), Request(steps=8), sampler, on_step=cancel)
    assert busy
    assert not threads()
    pids = the_pool().pids
    assert torch.equal(generate(load("flux"), Request(steps=8), sampler), expected)
    assert distance(generate(load("flux"), Request(), parastep(1)), reference(Request())) < EXACT
    assert the_pool().pids == pids


class TestGrouping:
    """ComfyUI decides from free memory which conditionings go in one call: three rows in one, or each alone."""

    three = (*prompt(1), *prompt(2))
    scarce: ContextVar[bool] = ContextVar("scarce", default=False)

    def guider(self, family: str, rows: list[int] | None = None) -> Any:
        """``rows`` will hold the rows of each call; every second step has no free memory."""
        model = load(family).clone()

        def step(executor: Any, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            at = int((args[0]["transformer_options"]["sample_sigmas"] - sigma[0]).abs().argmin())
            before = self.scarce.set(at % 2 == 1)
            try:
                return executor(x, sigma, *args, **kwargs)
            finally:
                self.scarce.reset(before)

        def call(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            assert rows is not None
            rows.append(x.shape[0])
            return executor(x, *args, **kwargs)

        if rows is not None:
            model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "scarce", step)
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "scarce", call)
        return cfg_guider(model, list(self.three))

    @pytest.mark.parametrize("family", ["flux", "unet"])
    @pytest.mark.parametrize("lanes", [2, 4])
    def test_lanes_with_calls_of_different_rows(self, lanes: int, family: str, monkeypatch: pytest.MonkeyPatch):
        really_free = comfy.model_patcher.ModelPatcher.get_free_memory
        monkeypatch.setattr(
            comfy.model_patcher.ModelPatcher, "get_free_memory",
            lambda patcher, device: 0 if self.scarce.get() else really_free(patcher, device),
        )  # fmt: skip
        rows: list[int] = []
        ours, errors = watched(
            lambda: self.guider(family, rows), parastep(lanes), monkeypatch, lambda: self.guider(family)
        )
        assert sorted(rows) == [1] * 3 * (STEPS // 2) + [3] * (STEPS // 2)
        assert max(errors) < EXACT, errors
        assert distance(ours, sample(self.guider(family))) < 0.25


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_a_batch_of_two_on_three_ranks(family: str, monkeypatch: pytest.MonkeyPatch):
    """Four rows of one evaluation, or eight of two, for three devices. Another pool, so it comes last."""
    conditioning = controlled(family, 0.2, 0.6)
    shape = (2, load(family).model.latent_format.latent_channels, 8, 8)
    latent = {"samples": noise(shape, 11), "noise_mask": torch.stack([HALF, 1 - HALF])}

    def make() -> Any:
        return cfg_guider(load(family), *conditioning)

    theirs = sample(make(), latent=latent)
    assert distance(sample(make(), parastep(1, ranks=3), latent=latent), theirs) < EXACT
    ours, errors = watched(make, parastep(2, ranks=3), monkeypatch, latent=latent)
    assert len(the_pool().pids) == 3
    assert max(errors) < EXACT, errors
    assert distance(ours, theirs) < 0.15
