"""Plans: which devices, how many components or lanes, which schedule. Frozen, validated before a process starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from .calibration import USUAL, Calibration, ShortRun
from .devices import choose_devices, this_machine
from .errors import LeapfrogError
from .protocol import Recipe
from .schedules.parastep import PREDICTORS, Guard, Predictor
from .schedules.simulate import Link, Mode, rounds_seconds, rounds_taken, run_seconds
from .units import find_units

SPLIT_MODES = ("lookahead", "asyncdiff", "extrapolated", "exact")
STALE_MODES = ("asyncdiff", "extrapolated")
CFG_LANES = ("auto", "on", "off")
BALANCES = ("speed", "memory")
MOST = 8
"""Components, or lanes, that the nodes offer at most."""
DRIFT_BOUND = 0.02
"""Of the split, where nothing else is said."""
WORTH = 1.2
"""Speed-ups below this are not worth the difference."""


@dataclass(frozen=True)
class SplitPlan:
    """Async UNet Split: pipelines of components, one component per device.

    ``degree`` is the number of components, 0 for what the devices and the conditionings suggest. ``warmup`` is the
    number of exact evaluations at the start, 0 for as many as it takes until the drift is within ``bound``. ``cut``
    names the first unit of each component but the first; empty for measured, so that the slowest component is as fast
    as possible, with ``balance`` "memory" among cuts that divide the weights evenly.
    """

    MODES: ClassVar = SPLIT_MODES
    CFG_LANES: ClassVar = CFG_LANES
    BALANCES: ClassVar = BALANCES
    MOST: ClassVar = MOST
    DRIFT_BOUND: ClassVar = DRIFT_BOUND

    devices: tuple[str, ...]
    degree: int = 0
    warmup: int = 0
    mode: str = "lookahead"
    stride: int = 1
    cfg_lanes: str = "auto"
    bound: float = DRIFT_BOUND
    time_shift: bool = False
    cut: str = ""
    balance: str = "speed"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("mode", self.mode, SPLIT_MODES), ("cfg_lanes", self.cfg_lanes, CFG_LANES),
            ("balance", self.balance, BALANCES),
        ):  # fmt: skip
            if value not in known:
                raise LeapfrogError.of("bad_plan", f"{what} '{value}' is not one of {', '.join(known)}.")
        if self.warmup < 0 or self.bound <= 0:
            raise LeapfrogError.of(
                "bad_plan",
                f"warmup_steps {self.warmup}, drift_bound {self.bound}: the first is 0 or more, the second above 0.",
            )
        if self.stride not in (1, 2) or (self.stride == 2 and self.mode != "asyncdiff"):
            raise LeapfrogError.of("bad_plan", f"stride {self.stride}: 1, or 2 with mode 'asyncdiff'.")
        if self.degree + self.stride - 1 > len(self.devices) or len(self.devices) < self.stride:
            raise LeapfrogError.of(
                "bad_plan",
                f"components {self.degree} with stride {self.stride} need {max(1, self.degree) + self.stride - 1} "
                f"devices, not {len(self.devices)}.",
            )
        if self.cfg_lanes == "on" and len(self.devices) % 2:
            raise LeapfrogError.of(
                "bad_plan", f"cfg_lanes 'on': two pipelines need an even number of devices, not {len(self.devices)}."
            )

    @classmethod
    def choose(
        cls, devices: str, components: int, cfg_lanes: str = "auto", stride: int = 1, own: str = "", **options: Any
    ) -> SplitPlan:
        """The plan for what a user wrote on the node; ``components`` 0 means as many as there are devices for.

        Of the devices named, or with "auto" of those there are, two pipelines of ``components`` are taken where they
        allow.
        A single device makes a plan of one, whatever was asked for. ``own`` as in :class:`devices.Machine`.
        """
        machine = replace(this_machine(), own=own)
        there = choose_devices(devices, 0, machine)
        if len(there) == 1:
            return cls(there)  # nothing to spread: shared workflows open everywhere
        options = {**options, "cfg_lanes": cfg_lanes, "stride": stride}
        if components == 0:
            return cls(there, 0, **options)
        each = components + stride - 1
        two = cfg_lanes == "on" or (cfg_lanes == "auto" and len(there) >= 2 * each)
        what = f"components {components}, stride {stride}, cfg_lanes '{cfg_lanes}'"
        return cls(choose_devices(devices, 2 * each if two else each, machine, what), components, **options)

    def without(self, lost: Container[int]) -> SplitPlan:
        """The plan on the devices that are left when those of some ranks are lost, and no more of them than it uses.

        Stride 2 goes before a component does, because a component has memory that the others may not have.
        """
        left = tuple(device for rank, device in enumerate(self.devices) if rank not in lost)
        stride = self.stride if len(left) >= max(2, self.degree) + self.stride - 1 else 1
        degree = min(self.degree, len(left) - stride + 1)
        lanes = "auto" if self.cfg_lanes == "on" and len(left) % 2 else self.cfg_lanes
        if degree:
            each = degree + stride - 1
            left = left[: each if lanes == "off" or len(left) < 2 * each else 2 * each]
        cut = self.cut if degree and degree == self.degree else ""
        return replace(self, devices=left, degree=degree, stride=stride, cfg_lanes=lanes, cut=cut)

    def components(self, pipeline: Sequence[int]) -> int:
        """How many components the ranks of a pipeline have."""
        return len(pipeline) - self.stride + 1

    def pipelines(self, guided: bool, whole_fits: bool) -> list[list[int]]:
        """The ranks of each pipeline, in the order of their components; with stride 2 the last component has two.

        Two pipelines (CFG lanes) where a call has two conditionings (``guided``) and the devices are even in number;
        one component per pipeline only if a device holds the whole denoiser (``whole_fits``).
        """
        devices = len(self.devices)
        two = self.cfg_lanes != "off" and guided and devices % 2 == 0
        if self.cfg_lanes == "auto" and devices == 2 and not self.degree and not whole_fits:
            two = False
        if devices < 2 * (max(1, self.degree) + self.stride - 1):
            two = False
        each = self.degree + self.stride - 1 if self.degree else devices // (2 if two else 1)
        return [list(range(at * each, (at + 1) * each)) for at in range(2 if two else 1)]

    @property
    def schedule(self) -> Mode:
        """What times of such a run are simulated by."""
        if self.mode in STALE_MODES:
            return "asyncdiff"
        return "lookahead" if self.mode == "lookahead" else "exact"

    def promise(self, steps: int, pipelines: int, components: int, slowest: float) -> str:
        """What may be expected of a run, in words for the user: so many ``pipelines`` of ``components``, the slowest of
        which takes this share of the time that the whole denoiser takes on one device."""
        if self.mode == "exact" or components == 1:
            return f"at most {pipelines:.2f}x, exact" if pipelines > 1 else "no faster than one device, exact"
        speed = pipelines * self.ideal_speedup(steps, components, slowest)
        of = f"{steps} steps, {components} components, the slowest takes {slowest:.0%} of a step"
        said = f"at most {speed:.2f}x ({of})"
        return said if speed >= WORTH else f"{said}: not worth it here"

    def ideal_speedup(self, steps: int, components: int, slowest: float) -> float:
        """Speed of one pipeline against one device, the slowest of the components as in :meth:`promise`, if nothing is
        rejected and links take no time."""
        parts = [slowest, *[(1 - slowest) / max(1, components - 1)] * (components - 1)]
        return steps / run_seconds(self.schedule, steps, parts, {}, Link(), warmup=self.warmup, stride=self.stride)

    def check(self, denoiser: Any) -> None:
        """Raises LeapfrogError: unsupported_model, or bad_plan for more components than the denoiser has units."""
        check_components(self.degree or len(self.devices), len(find_units(denoiser)))


def check_components(components: int, units: int) -> None:
    """Raises LeapfrogError bad_plan for more components than there are units."""
    if components > units:
        raise LeapfrogError.of(
            "bad_plan", f"components {components}: this denoiser can be cut into {units} units at most."
        )


@dataclass(frozen=True)
class LanesPlan:
    """ParaStep: up to ``lanes`` evaluations per round, spread over ``devices`` that each hold the whole denoiser.

    ``lanes`` 0: as many as are left for each when every conditioning of a call has a device of its own. The first
    ``warmup`` evaluations are single, and so is the last, unless all is as published (``predictor`` "paper", nothing
    rejected). ``bound`` is the relative drift of the latent up to which an evaluation is accepted, infinite: all are.
    ``eager``: all lanes are evaluated in every round, whatever was rejected before. ``calibrate``: the bound is for a
    model of usual sensitivity, see :meth:`calibrated`.
    """

    devices: tuple[str, ...]
    lanes: int = 0
    warmup: int = 0
    predictor: str = "linear"
    bound: float = math.inf
    eager: bool = False
    calibrate: bool = False

    MOST: ClassVar = MOST
    PREDICTORS: ClassVar = PREDICTORS
    FIDELITIES: ClassVar = {
        "exact": (1e-5, True),
        "faithful": (0.006, False),
        "balanced": (0.012, False),
        "fast": (0.03, False),
        "unguarded": (math.inf, False),
    }

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise LeapfrogError.of("bad_plan", f"predictor '{self.predictor}' is not one of {', '.join(PREDICTORS)}.")
        if self.lanes < 0 or self.warmup < 0 or not self.bound > 0:
            raise LeapfrogError.of(
                "bad_plan",
                f"lanes {self.lanes}, warmup_steps {self.warmup}, drift_bound {self.bound}: none may be negative.",
            )

    @classmethod
    def choose(
        cls, devices: str, lanes: int, warmup: int = 0, predictor: str = "linear", fidelity: str = "balanced",
        bound: float = 0.0, calibrate: bool = False, own: str = "",
    ) -> LanesPlan:  # fmt: skip
        """The plan for what a user wrote on the node; ``bound`` 0 means that of the ``fidelity``.

        ``own`` as in :class:`devices.Machine`.

        With "auto" no more devices are taken than two for each lane can use. A bound of the user's own is not
        calibrated, nor are those that no sensitivity would change.
        """
        if fidelity not in cls.FIDELITIES:
            raise LeapfrogError.of("bad_plan", f"fidelity '{fidelity}' is not one of {', '.join(cls.FIDELITIES)}.")
        named = choose_devices(devices, 0, replace(this_machine(), own=own))
        if devices.strip().lower() == "auto" and lanes:
            named = named[: 2 * lanes]
        of_fidelity, eager = cls.FIDELITIES[fidelity]
        calibrate = calibrate and not bound and not eager and of_fidelity < math.inf
        return cls(named, lanes, warmup, predictor, bound or of_fidelity, eager, calibrate)

    def calibrated(
        self, calibration: Path, recipe: Recipe, sampler: str, short: ShortRun, tell: Callable[[str], None]
    ) -> LanesPlan:
        """The plan with which this model comes as close to the true picture as one of usual sensitivity.

        Its bound is at most four times as strict, or as generous. Sensitivities are kept in the file ``calibration``;
        see ``calibration.py`` for the other arguments.
        """
        sensitivity = Calibration(calibration).sensitivity(recipe, sampler, short, tell)
        return replace(self, bound=self.bound * min(4.0, max(0.25, USUAL / sensitivity)), calibrate=False)

    def lanes_for(self, conditionings: int) -> int:
        """Lanes of a run whose calls have so many conditionings."""
        return self.lanes or max(1, len(self.devices) // conditionings)

    def schedule(self, conditionings: int) -> tuple[Guard, Predictor] | None:
        """The schedule of such a run, None where evaluations go one by one."""
        lanes = self.lanes_for(conditionings)
        if lanes == 1:
            return None
        guard = Guard(lanes, self.warmup, self.bound, self.eager, not self._as_published)
        return guard, Predictor(self.predictor, spacing=2 if lanes >= 4 else 1)

    @property
    def _as_published(self) -> bool:
        return self.predictor == "paper" and math.isinf(self.bound)

    def rounds(self, steps: int, conditionings: int) -> list[int]:
        """Evaluations of each round of such a run of so many steps, if nothing is rejected."""
        grows = not (math.isinf(self.bound) or self.eager)
        lanes = self.lanes_for(conditionings)
        return rounds_taken(steps, lanes, self.warmup, grows=grows, last_alone=not self._as_published)

    def ideal_speedup(self, steps: int, conditionings: int, batch: int = 1) -> float:
        """Speed against one device if nothing is rejected and a round takes as long as its device with most rows, of
        which an evaluation has one for each conditioning and each of so many pictures."""
        rows = conditionings * batch
        return steps * rows / rounds_seconds(self.rounds(steps, conditionings), rows, len(self.devices), float)

    def promise(self, steps: int, conditionings: int, batch: int = 1) -> str:
        """What may be expected of such a run with so many pictures at once, in words for the user."""
        lanes, devices = self.lanes_for(conditionings), len(self.devices)
        bound = self.ideal_speedup(steps, conditionings, batch)
        exact = replace(self, lanes=1).ideal_speedup(steps, conditionings, batch)
        where = f"{devices} devices" if devices > 1 else "one device"
        if lanes == 1 and exact == 1:
            return f"{steps} steps one by one, nothing to do for a second device; set lanes to 2 or more"
        if lanes == 1:
            spread = "the prompts" if conditionings > 1 else "the pictures"
            return f"at most {exact:.2f}x ({steps} steps one by one, {spread} on {where}), exact"
        if devices == 1:
            return f"{steps} steps, {lanes} as one batch on {where}; faster only where one leaves it partly idle"
        said = f"at most {bound:.2f}x ({steps} steps, {lanes} at once, {where})"
        if exact >= max(bound, WORTH):
            return f"{said}; lanes 1 gives {exact:.2f}x, exact"
        return said if bound >= WORTH else f"{said}: not worth it here"
