"""Measuring a denoiser on the ranks that would run it, for the adviser."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, ClassVar

from .adviser import WISHES, Advice, Facts, Unit, advise
from .batching import Rows, batched
from .denoiser import Patches, first_tensor, room_for_output
from .errors import LeapfrogError
from .lanes_denoiser import LanesDenoiser
from .pool import Pool, Tick
from .protocol import Done, Evaluate, Trace, Traced
from .roundtrips import LARGE, link_between, round_trip
from .schedules.simulate import Link
from .settings import step_timeout_s
from .tensors import DTYPES
from .units import Output

log = logging.getLogger("leapfrog")
REPEATS = 3
ECHOES = 20


class Surveyed(Exception):
    """Leaves the run whose first call was measured; ``survey`` has the facts."""

    def __init__(self, survey: Survey):
        super().__init__("measured")
        self.survey = survey


class Survey(LanesDenoiser):
    """Measures a denoiser at the first call of a run, which :class:`Surveyed` then leaves. The call is taken for an
    evaluation of one conditioning."""

    title = "Leapfrog Adviser"
    WISHES: ClassVar = WISHES

    def __init__(self, *args: Any, sound: bool = False, coupled: bool = False, **options: Any):
        """``sound``, ``coupled``: see :class:`adviser.Facts`. The other arguments are those of a LanesDenoiser."""
        super().__init__(*args, **options)
        self.facts: Facts | None = None
        self._sound = sound
        self._coupled = coupled

    def advise(self, steps: int, conditionings: int, wish: str) -> list[Advice]:
        """What to take on these devices, best first; see :func:`adviser.advise`.

        Raises LeapfrogError bad_plan where they do not hold the denoiser, however it is cut.
        """
        assert self.facts
        try:
            return advise(self.facts, steps, conditionings, self.devices, wish)
        except ValueError as error:
            raise LeapfrogError.of("bad_plan", f"{error}.") from None

    @property
    def said(self) -> str:
        """What was measured, in a line."""
        facts = self.facts
        assert facts
        one, two = (f"{1e3 * facts.whole(conditionings):.3g} ms" for conditionings in (1, 2))
        link = f"{facts.link.bytes_per_second / 1e9:.2g} GB/s, {1e6 * facts.link.latency:.0f} us"
        others = f", {facts.crowd:.2f} times as long while all compute; a link {link}" if len(self.devices) > 1 else ""
        return (
            f"An evaluation of one prompt takes {one}, of two {two}{others}; a round trip {1e3 * facts.host:.1f} ms; "
            f"{len(facts.units)} units, {facts.nbytes / 1e9:.2g} GB."
        )

    def carry_on(self, error: LeapfrogError) -> bool:
        """Not without a device that was to be measured."""
        return False

    def submit(
        self, inputs: Any, x: Any, group: int, patches: Patches, tick: Tick, alone: bool = False, lanes: int = 1
    ) -> Any:
        """Raises Surveyed, or LeapfrogError."""
        began = time.monotonic()
        pool = self._ready_pool(tick)
        call = Rows(inputs, first_tensor(x).shape[0], group, alone)
        with pool.lock:
            self.facts = self._measure(pool, call, x, patches, tick)
        log.info("Leapfrog: measured in %.1f s: %s", time.monotonic() - began, self.said)
        raise Surveyed(self)

    def _measure(self, pool: Pool, call: Rows, x: Any, patches: Patches, tick: Tick) -> Facts:
        held = self._whole_fits(pool, tick)
        if held:
            self._load_whole(pool, patches, tick)
        first = self._trace(pool, call, [], patches, held, tick)
        units = [unit.path for unit in first[0].units]
        times, crowd = [], 1.0
        for calls in ([call], [rows for rows, _ in batched([call, call])]):  # of one conditioning, of two
            traces = [self._trace(pool, one, units, patches, held, tick) for one in calls]
            alone = 0.0
            if held:
                alone = sum(self._evaluate(pool, one, x, [0], tick) for one in calls)
                among_others = sum(self._evaluate(pool, one, x, range(len(self.devices)), tick) for one in calls)
                crowd = max(crowd, among_others / alone)
            times.append(_times(traces, alone))
        flow, (one, two) = first[0].flow, times
        needs = [set(read) for read in flow.reads]
        needs[-1] |= set(flow.head) - {len(needs) - 1}
        return Facts(
            units=tuple(
                Unit((one[1 + u], two[1 + u]), unit.nbytes, _nbytes(flow.outputs[u]), tuple(sorted(needs[u])))
                for u, unit in enumerate(first[0].units)
            ),
            stem=(one[0], two[0]),
            head=(one[-1], two[-1]),
            shared=first[0].shared,
            link=self._link(pool, tick),
            host=self._round_trip(pool, x, tick),
            crowd=crowd,
            free=min((free for free in pool.free(tick) if free is not None), default=None),
            batch=call.count // call.group,
            sound=self._sound,
            coupled=self._coupled,
        )

    def _trace(
        self, pool: Pool, call: Rows, units: list[str], patches: Patches, held: bool, tick: Tick
    ) -> list[Traced]:
        """What each rank sees of a call while all of them look."""
        payload, _ = pool.payload(call.inputs, tick, where="denoiser input")
        ask = Trace(recipe=self.recipe, inputs=payload, units=units, repeats=REPEATS, shapes=patches.shapes, held=held)
        replies = pool.request(dict.fromkeys(range(len(self.devices)), ask), step_timeout_s(), tick, using=payload)
        return [replies[rank] for rank in sorted(replies)]

    def _evaluate(self, pool: Pool, call: Rows, x: Any, ranks: Sequence[int], tick: Tick) -> float:
        """Seconds that the slowest of these ranks takes for a call while the others of them are at it, too."""
        times = []
        for _ in range(1 + REPEATS):
            room = 2 * room_for_output(x)
            payload, out = pool.payload(call.inputs, tick, reserve=room * len(ranks), where="denoiser input")
            asked = {
                rank: Evaluate(inputs=payload, out=out + at * room, out_size=room, run=self._run)
                for at, rank in enumerate(ranks)
            }
            replies: dict[int, Done] = pool.request(asked, step_timeout_s(), tick, using=payload)
            times.append(max(reply.end - reply.begin for reply in replies.values()))
        return median(times[1:])

    def _round_trip(self, pool: Pool, x: Any, tick: Tick) -> float:
        """Seconds that a latent takes to the ranks and back."""
        latent, ranks = first_tensor(x).cpu(), range(len(self.devices))
        return median(round_trip(pool, latent, ranks, tick)[0] for _ in range(ECHOES))

    def _link(self, pool: Pool, tick: Tick) -> Link:
        """The slowest link between ranks that would follow each other."""
        links = [link_between(pool, rank, rank + 1, tick)[0] for rank in range(len(self.devices) - 1)]
        return max(links, key=lambda link: link.seconds(LARGE), default=Link())


def _times(calls: Sequence[Sequence[Traced]], whole: float) -> list[float]:
    """Seconds of what comes before the units, of each unit, of what comes behind them; of several calls the sum.

    What each rank saw of a call is averaged. Taken as shares of the ``whole`` where that was measured: watching costs
    time, and so do weights that were not there.
    """
    seen = [[[trace.stem, *(unit.seconds for unit in trace.units), trace.head] for trace in ranks] for ranks in calls]
    total = [
        sum(times)
        for times in zip(*([median(part) for part in zip(*ranks, strict=True)] for ranks in seen), strict=True)
    ]
    scale = whole / sum(total) if whole else 1.0
    return [scale * seconds for seconds in total]


def _nbytes(output: Output | None) -> float:
    tensors = output.tensors if output else []
    return float(sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in tensors))
