"""Writes the text encoder of the proving model: CLIP-L's architecture with seeded random weights, fp16, 247 MB.

The stock CLIPLoader (type stable_diffusion) reads the file. Nothing in it is trained: small random layers around the
identity keep each token recognisable in its hidden state, and the state that CLIP pools (end of text) mixes the prompt.
Every weight is a scaled uniform number of a Mersenne twister seeded by the weight's name, with no function whose
last bit may differ between machines. Usage: python proving/text_encoder.py OUT.safetensors
"""

from __future__ import annotations

import argparse
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "1"
WIDTH, INNER, LAYERS, VOCABULARY, POSITIONS = 768, 3072, 12, 49408, 77
TOKEN, POSITION = 1.0, 0.2  # standard deviation of the embeddings
END, END_SHARE = 49407, 0.125  # the end-of-text token starts small: what it pools is then mostly the prompt
QUERY_KEY, VALUE_OUT, MLP_IN, MLP_OUT = 1.0, 0.9, 1.0, 0.35  # gains; 1 keeps the variance


def uniform(name: str, shape: tuple[int, ...], deviation: float) -> Tensor:
    """fp16 weights of the given standard deviation, the same on every machine."""
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(shape, generator=rng).sub_(0.5).mul_(2 * 3**0.5 * deviation).half()


def weights() -> dict[str, Tensor]:
    """The whole state dict."""
    out: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int, gain: float) -> None:
        out[f"{name}.weight"] = uniform(f"{name}.weight", (rows, columns), gain * columns**-0.5)
        out[f"{name}.bias"] = torch.zeros(rows, dtype=torch.float16)

    def norm(name: str) -> None:
        out[f"{name}.weight"] = torch.ones(WIDTH, dtype=torch.float16)
        out[f"{name}.bias"] = torch.zeros(WIDTH, dtype=torch.float16)

    for kind, rows, deviation in (("token", VOCABULARY, TOKEN), ("position", POSITIONS, POSITION)):
        name = f"text_model.embeddings.{kind}_embedding.weight"
        out[name] = uniform(name, (rows, WIDTH), deviation)
    out["text_model.embeddings.token_embedding.weight"][END] *= END_SHARE
    for layer in range(LAYERS):
        prefix = f"text_model.encoder.layers.{layer}"
        norm(f"{prefix}.layer_norm1")
        for part, gain in (("q", QUERY_KEY), ("k", QUERY_KEY), ("v", VALUE_OUT**0.5), ("out", VALUE_OUT**0.5)):
            linear(f"{prefix}.self_attn.{part}_proj", WIDTH, WIDTH, gain)
        norm(f"{prefix}.layer_norm2")
        linear(f"{prefix}.mlp.fc1", INNER, WIDTH, MLP_IN)
        linear(f"{prefix}.mlp.fc2", WIDTH, INNER, MLP_OUT)
    norm("text_model.final_layer_norm")
    out["text_projection.weight"] = torch.eye(WIDTH, dtype=torch.float16)
    return out


def is_current(path: Path) -> bool:
    """Whether the file is there and of this version."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("proving_text_encoder") == VERSION
    except (OSError, SafetensorError):
        return False


def write(path: Path) -> bool:
    """Writes the file unless it is there; returns whether it wrote."""
    if is_current(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # One entry only: safetensors writes several in any order.
    save_file(weights(), part, metadata={"proving_text_encoder": VERSION})
    os.replace(part, path)
    return True


def main() -> None:
    """Writes the file named on the command line."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("out", type=Path)
    args = command.parse_args()
    print("wrote" if write(args.out) else "already there:", args.out)


if __name__ == "__main__":
    main()
