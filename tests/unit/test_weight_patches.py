"""LoRA of real size on their way to a rank."""

from __future__ import annotations

import comfy.lora
import msgspec
import torch

from leapfrog.nodes.recipe import _plain_patch
from leapfrog.parallel_backend.protocol import MAX_MESSAGE, Load, Payload
from leapfrog.parallel_backend.tensors import laid_out
from leapfrog.parallel_backend.worker.models.loader import decode_patches

LAYERS = 800  # as many as a LoRA for SDXL or Flux has


def test_a_lora_of_many_layers_fits_a_message_and_arrives_whole():
    names = [f"lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_{i}" for i in range(LAYERS)]
    file = {}
    for i, name in enumerate(names):
        file |= {f"{name}.lora_up.weight": torch.full((2, 1), float(i)), f"{name}.lora_down.weight": torch.ones(1, 2)}
        file[f"{name}.alpha"] = torch.tensor(4.0)
    adapters = comfy.lora.load_lora(file, {name: f"diffusion_model.{i}.weight" for i, name in enumerate(names)})
    tree = {key: [_plain_patch(key, (0.5, adapter, 1.0, None, None))] for key, adapter in adapters.items()}
    spec, tensors, heads, _ = laid_out(tree, "weight patches")
    assert len(tensors) == 2 * LAYERS
    load = Load(patches=Payload("arena", spec, heads))
    assert len(msgspec.msgpack.encode(load)) < MAX_MESSAGE / 16
    arrived = decode_patches(tree)
    assert set(arrived) == set(adapters)
    for key, adapter in adapters.items():
        ((strength, ours, *_),) = arrived[key]
        assert (strength, type(ours)) == (0.5, type(adapter))
        assert all(a is b for a, b in zip(ours.weights, adapter.weights, strict=True))
