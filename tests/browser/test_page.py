"""What a user meets in ComfyUI's page: the workflows in the template browser, the nodes in the search, their help."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from comfy_page import ComfyPage
from comfy_server import ComfyServer
from pack import BASE

WORKFLOWS = {
    "async_unet_split": "LeapfrogAsyncUNetSplit",
    "parastep_sampler": "LeapfrogParaStepSampler",
    "parastep_ksampler": "LeapfrogParaStepKSampler",
    "leapfrog_adviser": "LeapfrogAdviser",
}
NAMES = {"Async UNet Split", "ParaStep Sampler", "ParaStep KSampler", "Leapfrog Adviser"}
AS_KSAMPLER = {"sampler_name": "euler", "scheduler": "simple", "control_after_generate": "fixed", "seed": 7, "cfg": 3.0}
CHANGED = {
    "async_unet_split": {"components": 2},
    "parastep_sampler": {},
    "parastep_ksampler": AS_KSAMPLER,
    "leapfrog_adviser": {"cfg": 3},
}
"""Values of our node that a workflow sets to something else than the default."""
MODELS = (
    "diffusion_models/shapes_flux.safetensors",
    "vae/shapes_vae.safetensors",
    "text_encoders/shapes_clip.safetensors",
)

pairs = pytest.mark.parametrize(("workflow", "node_id"), WORKFLOWS.items(), ids=list(WORKFLOWS))


def test_the_template_browser_lists_the_workflows(page: ComfyPage):
    page.open_templates()
    for workflow in WORKFLOWS:
        card = page.tab.get_by_test_id(f"template-workflow-{workflow}")
        card.wait_for()
        thumbnail = card.locator("img").first
        thumbnail.wait_for()
        page.tab.wait_for_function("(image) => image.naturalWidth > 100", arg=thumbnail.element_handle())
    page.shoot("templates")


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "vue"])
@pairs
def test_a_workflow_opens_whole(
    page: ComfyPage, comfy_server: ComfyServer, workflow: str, node_id: str, vue_nodes: bool
):
    page.set("Comfy.VueNodes.Enabled", vue_nodes)
    try:
        page.open_template(workflow)
        page.shoot(f"{workflow}_vue" if vue_nodes else workflow)
        nodes = page.nodes()
    finally:
        page.set("Comfy.VueNodes.Enabled", False)
    assert [node["type"] for node in nodes if not node["known"]] == []
    schema = comfy_server.get(f"/object_info/{node_id}")[node_id]["input"]
    inputs = {**schema["required"], **schema.get("optional", {})}
    defaults = {name: spec[1]["default"] for name, spec in inputs.items() if "default" in spec[1]}
    assert [node["widgets"] for node in nodes if node["type"] == node_id] == [defaults | CHANGED.get(workflow, {})]
    for one, other in itertools.combinations(nodes, 2):
        assert are_apart(one["bounds"], other["bounds"]), f"{one['type']} and {other['type']} overlap"


def are_apart(one: Sequence[float], other: Sequence[float]) -> bool:
    x, y, width, height = one
    x2, y2, width2, height2 = other
    return x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y


def skip_without_models() -> None:
    missing = [name for name in MODELS if not (BASE / "models" / name).is_file()]
    if missing:
        pytest.skip(f"the demonstration model is not in place: {', '.join(missing)}")


@pytest.mark.parametrize("workflow", [name for name in WORKFLOWS if name != "leapfrog_adviser"])
def test_a_workflow_runs_from_the_page(page: ComfyPage, comfy_server: ComfyServer, workflow: str):
    skip_without_models()
    page.open_template(workflow)
    name = page.run(timeout=100)
    page.shoot(f"{workflow}_done")
    picture = np.asarray(Image.open(comfy_server.output / name))
    assert picture.shape == (128, 128, 3)
    assert picture.std() > 10, "an empty picture"


def test_the_adviser_shows_its_advice(page: ComfyPage):
    skip_without_models()
    page.open_template("leapfrog_adviser")
    page.tab.get_by_test_id("queue-button").click()
    shown = "() => app.graph.nodes.find((one) => one.type === 'PreviewAny').widgets.map((one) => one.value).join()"
    page.tab.wait_for_function(f"/balanced.*: /.test(({shown})())", timeout=100_000)
    page.shoot("leapfrog_adviser_done")


@pytest.mark.parametrize("workflow", ["parastep_sampler", "parastep_ksampler"])
def test_a_node_says_what_to_expect_and_then_what_it_took(page: ComfyPage, workflow: str):
    skip_without_models()
    page.open_template(workflow)
    page.change(seed=20, noise_seed=20, lanes=2)  # or ComfyUI would show the picture that it has
    page.listen()
    page.set("Comfy.Execution.PreviewMethod", "latent2rgb")  # without, ComfyUI announces ten steps a second at most
    try:
        page.run(timeout=100)
    finally:
        page.set("Comfy.Execution.PreviewMethod", "default")
    page.shoot(f"{workflow}_text")
    before, after = page.heard()["texts"]
    assert re.fullmatch(r"ParaStep: .*\b20 steps, 2 .*", before)
    assert re.fullmatch(r"ParaStep: 20 evaluations in \d+ rounds.*", after)
    assert page.text_on(WORKFLOWS[workflow]) == after
    assert [step for step in page.heard()["steps"] if step] == list(range(1, 21))


def test_async_unet_split_says_what_to_expect_and_what_a_run_took(page: ComfyPage):
    skip_without_models()
    page.open_template("async_unet_split")
    page.change(seed=22)
    page.listen()
    page.run(timeout=100)
    page.shoot("async_unet_split_text")
    before, _after = page.heard()["texts"]
    at_most = r"Async UNet Split: at most 1\.[0-7]\dx \(20 steps, 2 components, the slowest takes \d+% of a step\)"
    # little, where unit times were measured beside a busy browser; when that is said, test_promise.py knows
    assert re.fullmatch(rf"{at_most}(: not worth it here)?", before)
    assert re.fullmatch(
        r"Async UNet Split: 20 denoiser calls \(3 exact, 17 ahead\) in [\d.]+ s on 2 ranks",
        page.text_on(WORKFLOWS["async_unet_split"]) or "",
    )


def test_cancel_ends_a_run(page: ComfyPage, comfy_server: ComfyServer):
    skip_without_models()
    page.open_template("parastep_ksampler")
    page.change(seed=21, steps=2000)
    page.listen()
    page.tab.get_by_test_id("queue-button").click()
    page.tab.wait_for_function("window.heard.steps.length > 5", timeout=100_000)
    page.cancel()
    page.tab.wait_for_function("async () => !(await (await fetch('/queue')).json()).queue_running.length")
    assert max(page.heard()["steps"]) < 1000
    (entry,) = [one for one in comfy_server.get("/history").values() if was_cancelled(one)]
    assert not entry["outputs"]


def was_cancelled(entry: dict[str, Any]) -> bool:
    return any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])


@pairs
def test_the_help_page_documents_every_input(page: ComfyPage, comfy_server: ComfyServer, workflow: str, node_id: str):
    page.open_template(workflow)
    schema = comfy_server.get(f"/object_info/{node_id}")[node_id]
    said = page.help_of(node_id)
    page.shoot(f"{workflow}_help")
    assert said.startswith(schema["display_name"])
    documented = page.tab.locator(".node-help-content td:first-child").all_inner_texts()
    inputs = {cell.split()[0] for cell in documented if cell}
    assert {*schema["input"]["required"], *schema["input"].get("optional", {})} <= inputs


@pytest.mark.parametrize("query", ["leapfrog", *sorted(NAMES), "multi gpu"])
def test_the_node_search_finds(page: ComfyPage, query: str):
    found = page.search(query)
    page.shoot(f"search_{query.lower().replace(' ', '_')}")
    expected = {query} & NAMES or NAMES
    assert all(name in found for name in expected)
