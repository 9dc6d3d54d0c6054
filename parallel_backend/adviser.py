"""Which plan to take: every plan that the nodes allow, timed by arithmetic from what was measured, best first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .cutting import FOR_WEIGHTS, best_bounds
from .fidelity import SPLIT_WARMUP, expected
from .plan import BALANCES, MOST, WORTH, LanesPlan, SplitPlan
from .schedules.partition import component_seconds
from .schedules.simulate import Link, crossing, rounds_seconds, run_seconds

WISHES = ("balanced", "fastest", "faithful", "least memory")
ENOUGH = {"balanced": 50.0, "faithful": 65.0}
"""PSNR to ComfyUI alone, in dB, that a plan must be expected to reach."""
AS_FAST = 1.05
"""Plans within this factor of the fastest count as equally fast: predictions are no better."""
PRESETS = ("faithful", "balanced", "fast")


@dataclass(frozen=True)
class Unit:
    """A unit of a denoiser: ``seconds`` for one conditioning and for two, bytes of weights, bytes of its output for one
    conditioning, the earlier units whose outputs it reads."""

    seconds: tuple[float, float]
    nbytes: int
    output: float
    needs: tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """What is known of a denoiser at one size, and of devices that are alike. Pairs are for one conditioning and two.

    ``stem`` and ``head`` are the seconds before the first unit and behind the last; the whole takes the sum of all.
    These are times of a rank while no other computes; ``crowd`` is how many times as long it takes while all do.
    ``shared`` are the bytes of weights outside the units, ``host`` the seconds from the host to a rank and back,
    ``free`` the bytes of memory that each device can give, None where nobody counts. ``batch`` is how many pictures a
    conditioning has, which ParaStep may spread. ``sound``: it makes sound, for which fidelity is another.
    ``coupled``: the rows of an evaluation cannot be divided.
    """

    units: tuple[Unit, ...]
    stem: tuple[float, float]
    head: tuple[float, float]
    shared: int = 0
    link: Link = field(default_factory=Link)
    host: float = 0.0
    crowd: float = 1.0
    free: int | None = None
    batch: int = 1
    sound: bool = False
    coupled: bool = False

    def whole(self, conditionings: float) -> float:
        """Seconds of a whole evaluation of so many conditionings, on the line through those of one and of two."""
        one, two = (sum(unit.seconds[at] for unit in self.units) + self.stem[at] + self.head[at] for at in (0, 1))
        return max(one + (conditionings - 1) * (two - one), min(conditionings, 1.0) * one)

    def parts(self, conditionings: int) -> int:
        """What devices can share of an evaluation: its rows, or it as a whole."""
        return 1 if self.coupled else conditionings * self.batch

    def seconds(self, parts: int, conditionings: int) -> float:
        """A device's seconds for so many parts of evaluations of so many conditionings."""
        return parts * self.whole(conditionings) if self.coupled else self.whole(parts / self.batch)

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return self.shared + sum(unit.nbytes for unit in self.units)

    @property
    def room(self) -> int | None:
        """Bytes of weights that a device can hold."""
        return None if self.free is None else int(FOR_WEIGHTS * self.free)

    @lru_cache(maxsize=64)  # noqa: B019 - plans that differ in their mode are cut alike
    def bounds(self, components: int, conditionings: int, balance: str) -> list[tuple[int, int]]:
        """Where the pool would cut for calls of so many conditionings. Raises ValueError where nothing fits."""
        at = conditionings - 1
        costs = [[unit.seconds[at] for unit in self.units]] * components
        limit = None if self.room is None else self.room - self.shared
        sizes = [unit.nbytes for unit in self.units]
        return best_bounds(costs, sizes, self.shared, [limit] * components, self.stem[at], self.head[at], balance)


@dataclass(frozen=True)
class Advice:
    """A plan, None for ComfyUI alone, and what to expect of it.

    ``seconds`` are those of all evaluations of a run, ``speed`` is against one device, ``nbytes`` the weights on the
    device that holds most. ``decibels`` is PSNR to ComfyUI alone, infinite where the plan is exact, None where nothing
    like it was measured; ``fidelity`` is the preset of ParaStep's node.
    """

    plan: SplitPlan | LanesPlan | None
    seconds: float
    speed: float
    nbytes: int
    decibels: float | None
    fidelity: str = ""

    @property
    def exact(self) -> bool:
        return self.decibels == math.inf

    def suits(self, wish: str) -> bool:
        """Whether it is as close to ComfyUI alone as the wish asks for."""
        if wish == "fastest":
            return True
        return self.decibels is not None and self.decibels >= ENOUGH.get(wish, ENOUGH["balanced"])

    @property
    def closeness(self) -> str:
        """How close it is, in words."""
        if self.exact:
            return "exact"
        if self.decibels is None:
            return "fidelity not measured"
        return f"about {5 * int(self.decibels / 5)} dB on small models"

    @property
    def settings(self) -> str:
        """The node and what to set on it."""
        plan = self.plan
        if plan is None:
            return "one device, without Leapfrog"
        devices = ",".join(plan.devices)
        if isinstance(plan, LanesPlan):
            return f"ParaStep: lanes {plan.lanes}, fidelity {self.fidelity}, devices {devices}"
        said = [f"components {plan.degree}", f"mode {plan.mode}", f"warmup_steps {plan.warmup}"]
        said += [f"stride {plan.stride}"] if plan.stride > 1 else []
        said += [f"cfg_lanes {plan.cfg_lanes}"]
        said += [f"balance {plan.balance}"] if plan.balance != "speed" else []
        return f"Async UNet Split: {', '.join(said)}, devices {devices}"

    def line(self, steps: int) -> str:
        """All of it in a line."""
        return (
            f"{self.settings}: {self.speed:.2f}x, {self.seconds:.3g} s for {steps} steps, {self.closeness}, "
            f"{self.nbytes / 1e9:.2g} GB of weights on a device"
        )


def advise(facts: Facts, steps: int, conditionings: int, devices: Sequence[str], wish: str) -> list[Advice]:
    """All plans on the first one to all of these ``devices``, best first for the ``wish``, one of WISHES.

    * "fastest": whatever its fidelity. "balanced" and "faithful": the fastest of those that are exact or expected to
      reach ENOUGH. Where nothing of the kind is WORTH it, one device comes first; for what is too
      large for one, the fastest that suits the wish.
    * "least memory": the fewest weights on any device; among equals what reaches that of "balanced", then the fastest.

    ``conditionings`` are those of an evaluation: 2 with CFG above 1, else 1. What a device cannot hold is left out.
    Raises ValueError for an unknown wish, for other numbers than these, and where nothing fits.
    """
    if wish not in WISHES or steps < 1 or conditionings not in (1, 2) or not devices:
        raise ValueError(f"no advice for {wish=}, {steps=}, {conditionings=}, {devices=}")
    found = list(_plans(facts, steps, conditionings, tuple(devices)))
    if not found:
        raise ValueError(f"{len(devices)} devices do not hold {facts.nbytes / 1e9:.1f} GB of weights")
    if wish == "least memory":
        return sorted(found, key=lambda one: (one.nbytes, not one.suits(wish), one.seconds))
    found.sort(key=lambda one: (not _worth(one, wish), one.plan is not None, not one.suits(wish), one.seconds))
    able = [one for one in found if _worth(one, wish)]
    alike = [one for one in able if one.seconds <= AS_FAST * able[0].seconds]
    if alike:
        first = min(alike, key=lambda one: (-(one.decibels or 0.0), len(one.plan.devices if one.plan else ())))
        found.remove(first)
        found.insert(0, first)
    return found


def _worth(advice: Advice, wish: str) -> bool:
    return advice.plan is not None and advice.speed >= WORTH and advice.suits(wish)


def _plans(facts: Facts, steps: int, conditionings: int, devices: tuple[str, ...]) -> Iterator[Advice]:
    alone = steps * facts.whole(conditionings)
    if facts.room is None or facts.nbytes <= facts.room:
        yield Advice(None, alone, 1.0, facts.nbytes, math.inf)
        for count in range(1, len(devices) + 1):
            for plan, fidelity in _lanes_plans(devices[:count], facts.parts(conditionings)):
                known = expected(fidelity, plan.lanes, steps, conditionings > 1, facts.sound)
                seconds = lanes_seconds(facts, plan, steps, conditionings)
                seconds *= known.longer if known and plan.lanes > 1 else 1.0
                decibels = math.inf if plan.lanes == 1 else known.decibels if known else None
                yield Advice(plan, seconds, alone / seconds, facts.nbytes, decibels, fidelity)
    for plan in _split_plans(devices, 1 if facts.coupled else conditionings, len(facts.units)):
        try:
            seconds, nbytes = split_seconds(facts, plan, steps, conditionings)
        except ValueError:  # no cut fits the devices
            continue
        known = expected(plan.mode, plan.degree, steps, conditionings > 1, facts.sound) if plan.stride == 1 else None
        seconds *= known.longer if known else 1.0
        decibels = math.inf if plan.mode == "exact" else known.decibels if known else None
        yield Advice(plan, seconds, alone / seconds, nbytes, decibels)


def _lanes_plans(devices: tuple[str, ...], rows: int) -> Iterator[tuple[LanesPlan, str]]:
    """ParaStep's plans that use all of these devices for evaluations of so many rows, each with its preset."""
    if 1 < len(devices) <= rows:
        yield LanesPlan(devices, 1), "balanced"
    for lanes in range(2, MOST + 1):
        if lanes * rows >= len(devices):
            for preset in PRESETS:
                yield LanesPlan(devices, lanes, bound=LanesPlan.FIDELITIES[preset][0]), preset


def _split_plans(devices: tuple[str, ...], conditionings: int, units: int) -> Iterator[SplitPlan]:
    """The split's plans on the first two to all of these devices."""
    for components in range(1, min(MOST, len(devices), units) + 1):
        for pipelines, cfg_lanes in ((1, "off"), (2, "on"))[:conditionings]:
            ranks = pipelines * components
            if components == 1 and pipelines == 2 and ranks <= len(devices):
                yield SplitPlan(devices[:2], 1, mode="exact", cfg_lanes="on")
            if components == 1 or ranks > len(devices):
                continue
            for balance in BALANCES:
                for mode in ("exact", *SPLIT_WARMUP):
                    warmup = 0 if mode in ("exact", "lookahead") else SPLIT_WARMUP[mode]
                    yield SplitPlan(devices[:ranks], components, warmup, mode, cfg_lanes=cfg_lanes, balance=balance)
                if ranks + pipelines <= len(devices):
                    yield SplitPlan(
                        devices[: ranks + pipelines], components, SPLIT_WARMUP["asyncdiff"], "asyncdiff", 2, cfg_lanes,
                        balance=balance,
                    )  # fmt: skip


def lanes_seconds(facts: Facts, plan: LanesPlan, steps: int, conditionings: int) -> float:
    """Seconds of a run if nothing is rejected."""
    return rounds_seconds(
        plan.rounds(steps, 1 if facts.coupled else conditionings), facts.parts(conditionings), len(plan.devices),
        lambda parts: facts.seconds(parts, conditionings), host=facts.host, crowd=facts.crowd,
    )  # fmt: skip


def split_seconds(facts: Facts, plan: SplitPlan, steps: int, conditionings: int) -> tuple[float, int]:
    """Seconds of a run if nothing is rejected, and the bytes of weights on the device that holds most.

    Raises ValueError where no cut fits the devices.
    """
    pipelines = plan.pipelines(conditionings > 1, whole_fits=True)
    each = conditionings if len(pipelines) == 1 else 1  # conditionings in each pipeline
    stem, head = facts.stem[each - 1], facts.head[each - 1]
    bounds = facts.bounds(plan.components(pipelines[0]), each, plan.balance)
    costs = [unit.seconds[each - 1] for unit in facts.units]
    traffic = crossing([each * unit.output for unit in facts.units], [unit.needs for unit in facts.units], bounds)
    # two pipelines are always at work at once
    always = facts.crowd if len(pipelines) > 1 else 1.0
    seconds = run_seconds(
        plan.schedule, steps, component_seconds(costs, bounds, head=head), traffic, facts.link,
        stem=stem, warmup=plan.warmup, stride=plan.stride, host=facts.host, row_scale=always,
        crowd=facts.crowd / always,
    )  # fmt: skip
    held = max(sum(unit.nbytes for unit in facts.units[first : last + 1]) for first, last in bounds)
    return seconds, held + facts.shared
