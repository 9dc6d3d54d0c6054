"""Every transformer family by name: a small denoiser of each, through ComfyUI's own loader.

    from families import QUICK, load, sample

    model = load(QUICK["wan21"])
    latent = sample(model, QUICK["wan21"])

`family.py` says what a family is and what can be done with it.
"""

from __future__ import annotations

from families_narrowed import LARGE, NARROWED
from families_plain import PLAIN
from family import Family, build, for_ranks, latent, load, path, prompt, published, sample

FAMILIES: dict[str, Family] = {family.name: family for family in (*PLAIN, *NARROWED, *LARGE)}
QUICK: dict[str, Family] = {name: family for name, family in FAMILIES.items() if not family.large}

__all__ = [
    "FAMILIES", "QUICK", "Family", "build", "for_ranks", "latent", "load", "path", "prompt", "published", "sample",
]  # fmt: skip
