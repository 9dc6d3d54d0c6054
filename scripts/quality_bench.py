"""What a worker process of scripts/quality.py does: it makes samples, and compares those that any worker made.

Arrays travel between processes, because torch would have tensors travel as shared memory and open files.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch

from pack import BASE, ROOT, add_comfyui, load_pack
from quality_report import Row, compared
from quality_ways import EXACT, ROUNDS, Made, Run, SplitWay

SEED = 100
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Subject:
    """A proving model, and what is the same for all samples that it makes.

    ``calibrate``: ParaStep's bounds are fitted to the model and sampler, in a run of so many steps; 0: they are not.
    ``cfg`` 0: what the model is meant for.
    """

    name: str
    samples: int
    sampler: str
    calibrate: int
    cfg: float


class Facts(NamedTuple):
    """What the tables say of a model."""

    title: str
    cfg: float
    scheduler: str
    sensitivities: dict[str, float]
    """All that this worker has found by now, by model and sampler."""


class Bench:
    """One proving model in this process, and prompts with a seed each."""

    def __init__(self, subject: Subject):
        from grounds import GROUNDS, Prompts

        self.subject = subject
        self.ground: Any = GROUNDS[subject.name]()
        self.cfg = subject.cfg or self.ground.settings.cfg
        prompts, count = Prompts(BASE / "models" / "text_encoders" / "shapes_clip.safetensors"), len(self.ground.asked)
        samples = range(subject.samples)
        self.asked = [self.ground.asked[i * count // min(len(samples), count) % count] for i in samples]
        self.positive, self.negative = [prompts(one.caption) for one in self.asked], prompts("")

    def sampled(
        self, model: Any, steps: int, name: str, part: range, through: Callable[[Any], Any] = lambda sampler: sampler
    ) -> torch.Tensor:
        """One latent for each sample, each in a run of its own. ``through`` makes a SAMPLER of that named ``name``."""
        import comfy.sample
        import comfy.samplers

        latent, scheduler, made = torch.zeros(1, *self.ground.latent), self.ground.settings.scheduler, []
        sigmas = comfy.samplers.KSampler(model, steps, "cpu", name, scheduler, 1.0, model.model_options).sigmas
        sampler = through(comfy.samplers.sampler_object(name))
        for at in part:
            noise = comfy.sample.prepare_noise(latent, SEED + at)
            with torch.inference_mode():
                made.append(
                    comfy.sample.sample_custom(
                        model, noise, self.cfg, sampler, sigmas, self.positive[at], self.negative, latent,
                        disable_pbar=True, seed=SEED + at,
                    )
                )  # fmt: skip
        return torch.cat(made)


def prepare(folder: str) -> None:
    """A worker's first act. ``folder`` is for all files that it makes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the main process, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    add_comfyui("--cpu")
    load_pack()
    sys.path.append(str(ROOT / "proving"))
    import folder_paths

    from comfy_setup import WEIGHTS
    from leapfrog.parallel_backend import starting
    from leapfrog.parallel_backend.devices import Machine

    for kind in ("diffusion_models", "checkpoints"):
        folder_paths.add_model_folder_path(kind, str(WEIGHTS))
    tempfile.tempdir = folder
    folder_paths.set_user_directory(tempfile.mkdtemp())
    starting.this_machine = lambda: Machine(cuda=0, cores=1)  # one thread for a rank: there are many workers


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _told(work: Callable[P, R]) -> Callable[P, R]:
    """Errors as text: the main process knows neither ComfyUI's nor our own."""

    @wraps(work)
    def done(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return work(*args, **kwargs)
        except Exception:
            raise RuntimeError(traceback.format_exc()) from None

    return done


@cache
def bench_of(subject: Subject) -> Bench:
    from leapfrog.parallel_backend.supervisor import close_all

    bench = Bench(subject)
    close_all()  # a rank that runs already would not know the class of the U-Net
    if subject.calibrate:  # by the first sample, in every worker
        replace(ROUNDS[0], degree=2).made(bench, subject.calibrate, range(1))
    return bench


@_told
def facts(subject: Subject) -> Facts:
    import folder_paths

    bench = bench_of(subject)
    known = Path(folder_paths.get_user_directory(), "leapfrog", "calibration.json")
    sensitivities = json.loads(known.read_text()) if subject.calibrate else {}
    return Facts(bench.ground.title, bench.cfg, bench.ground.settings.scheduler, sensitivities)


@_told
def find_cut(subject: Subject, degree: int) -> str | None:
    """Where the model is best cut into so many components, for the node; None if it cannot be.

    It is found by unit times, which differ from one measurement to the next, and the stale modes' pictures differ with
    it: all samples are to be of the same cut.
    """
    from leapfrog.parallel_backend.supervisor import close_all
    from leapfrog.parallel_backend.units import find_units

    bench = bench_of(subject)
    units = len(find_units(bench.ground.model.model.diffusion_model))
    if degree >= units:
        return None if degree > units else ",".join(map(str, range(1, degree)))
    _, traces = replace(EXACT, degree=degree).traced(bench, 1, range(1))
    close_all()
    held = [len(rank["units"]) for rank in traces[0]["otherData"]["ranks"]]
    return ",".join(map(str, accumulate(held[:-1])))


@_told
def make(subject: Subject, runs: Sequence[Run], part: range) -> list[Made]:
    """These of the samples, in each of the runs."""
    from leapfrog.parallel_backend.supervisor import close_all

    bench = bench_of(subject)
    made = [way.made(bench, steps, part) for way, steps in runs]
    if any(isinstance(way, SplitWay) for way, _ in runs):
        gc.collect()
        close_all()
    return made


@_told
def pictures(subject: Subject, latents: np.ndarray) -> np.ndarray:
    """To compare with."""
    ground = bench_of(subject).ground
    return ground.pictures(ground.decode(torch.from_numpy(latents))).numpy()


@_told
def compare(
    subject: Subject, title: str, degree: int | None, steps: int, of: int, speed: float, latents: np.ndarray,
    true: np.ndarray, true_pictures: np.ndarray, converged: np.ndarray,
) -> Row:  # fmt: skip
    """A line of the table: all samples of a way, which took ``steps``, against ``of`` steps of ComfyUI alone."""
    bench = bench_of(subject)
    made, decoded = torch.from_numpy(latents), bench.ground.decode(torch.from_numpy(latents))
    right = sum(a == b for a, b in zip(bench.asked, bench.ground.judge(decoded), strict=True))
    seen = bench.ground.pictures(decoded), torch.from_numpy(true_pictures), torch.from_numpy(converged)
    return compared(title, degree, steps, of, speed, made, torch.from_numpy(true), *seen, right)
