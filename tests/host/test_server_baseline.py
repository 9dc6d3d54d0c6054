"""ComfyUI with the pack in custom_nodes: stock graphs run as ever, and the nodes are there with their documentation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comfy_server import ComfyServer, PromptError
from pack import ROOT

NODES = ["LeapfrogAsyncUNetSplit", "LeapfrogParaStepSampler", "LeapfrogParaStepKSampler", "LeapfrogAdviser"]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
GRAPHS = sorted((ROOT / "tests/graphs").glob("*.json"))
FRONTEND_ONLY = {"MarkdownNote", "Note", "PrimitiveNode", "Reroute"}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_stock_graphs_draw_the_same_picture(comfy_server: ComfyServer, graph):
    entries = [comfy_server.run(graph(name)) for name in ("stock_flux", "stock_flux_custom")]
    pictures = [pixels(comfy_server.outputs(entry)[0]) for entry in entries]
    assert pictures[0].shape == (128, 128, 3)
    assert pictures[0].std() > 10, "an empty picture"
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert comfy_server.seconds(entries[0]) > 0


def test_progress_and_previews_arrive(comfy_server: ComfyServer, graph):
    changed = graph("stock_flux")
    changed["sample"]["inputs"]["seed"] = 8
    prompt_id = comfy_server.queue(changed, preview="latent2rgb")
    comfy_server.wait(prompt_id)
    steps = [event.data["value"] for event in comfy_server.events(prompt_id, "progress")]
    assert steps[-1] == 20
    previews = comfy_server.events(prompt_id, "preview")
    assert previews
    assert previews[-1].image[:2] == b"\xff\xd8", "not a JPEG"


def test_a_graph_that_comfyui_refuses_says_why(comfy_server: ComfyServer, graph):
    wrong = graph("stock_flux")
    wrong["model"]["inputs"]["unet_name"] = "nowhere.safetensors"
    with pytest.raises(PromptError, match=r"node model \(UNETLoader\).*nowhere\.safetensors"):
        comfy_server.queue(wrong)


@pytest.mark.parametrize("node_id", NODES)
def test_every_socket_of_a_node_is_documented(comfy_server: ComfyServer, node_id: str):
    node = comfy_server.get(f"/object_info/{node_id}")[node_id]
    groups = [inputs for kind, inputs in node["input"].items() if kind != "hidden"]
    inputs = {name: spec for group in groups for name, spec in group.items()}
    assert inputs
    undocumented = [name for name, spec in inputs.items() if len(spec) < 2 or not spec[1].get("tooltip")]
    assert not undocumented
    assert len(node["output_tooltips"]) == len(node["output"])
    assert all(node["output_tooltips"])
    assert node["description"]


@pytest.mark.parametrize("node_id", NODES)
def test_a_node_has_a_help_page(comfy_server: ComfyServer, node_id: str):
    page = comfy_server.get(f"/extensions/leapfrog/docs/{node_id}.md").decode()
    assert page.startswith("# ")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_a_template_made_of_nodes_that_exist(comfy_server: ComfyServer, workflow: Path):
    assert workflow.stem in comfy_server.get("/workflow_templates")["leapfrog"]
    served = comfy_server.get(f"/api/workflow_templates/leapfrog/{workflow.name}")
    content = json.loads(workflow.read_text())
    assert served == content
    assert comfy_server.get(f"/api/workflow_templates/leapfrog/{workflow.stem}.jpg")[:2] == b"\xff\xd8"
    subgraphs = {one["id"]: one for one in content.get("definitions", {}).get("subgraphs", [])}
    used = {node["type"] for one in (content, *subgraphs.values()) for node in one["nodes"]}
    known = set(comfy_server.get("/object_info")) | FRONTEND_ONLY | set(subgraphs)
    assert used <= known


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_is_made_of_nodes_that_exist(comfy_server: ComfyServer, path: Path):
    used = {node["class_type"] for node in json.loads(path.read_text()).values()}
    assert used <= set(comfy_server.get("/object_info"))


def test_freeing_keeps_the_server_usable(comfy_server: ComfyServer, graph):
    comfy_server.free()
    again = graph("stock_flux")
    again["sample"]["inputs"]["seed"] = 9
    assert len(comfy_server.outputs(comfy_server.run(again))) == 1
