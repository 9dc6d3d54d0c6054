"""Plans timed from made-up facts, and which of them is advised."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leapfrog.parallel_backend import LanesPlan, LeapfrogError, SplitPlan, adviser, fidelity
from leapfrog.parallel_backend.adviser import WISHES, Advice, Facts, Unit, advise, lanes_seconds, split_seconds
from leapfrog.parallel_backend.schedules.simulate import Link
from pack import ROOT
from quality_summary import read

GB = 1_000_000_000
CPUS = ("cpu",) * 8


def chain(units: int = 12, one: float = 0.6, two: float = 1.0, nbytes: int = GB, **more: object) -> Facts:
    """Equal units in a row; an evaluation takes ``one`` and ``two`` seconds for as many conditionings."""
    made = [Unit((one / units, two / units), nbytes // units, 1e6, (u - 1,) if u else ()) for u in range(units)]
    return replace(Facts(tuple(made), (0.0, 0.0), (0.0, 0.0)), **more)


PLENTY = {"link": Link(12e9, 30e-6), "host": 0.0005}


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    seconds = st.floats(1e-4, 1.0)

    def pair() -> tuple[float, float]:
        one = draw(seconds)
        return one, one * draw(st.floats(1.0, 2.0))

    count = draw(st.integers(2, 9))
    units = [
        Unit(pair(), draw(st.integers(0, GB)), draw(st.floats(0, 1e8)), tuple({u - 1, u // 2} - {u} if u else ()))
        for u in range(count)
    ]
    link = Link(draw(st.floats(1e8, 1e11)), draw(st.floats(0, 1e-3)))
    free = draw(st.none() | st.integers(GB, 20 * GB))
    host, crowd, batch = draw(st.floats(0, 0.1)), draw(st.floats(1.0, 2.0)), draw(st.integers(1, 5))
    return Facts(tuple(units), pair(), pair(), draw(st.integers(0, GB)), link, host, crowd, free, batch)


@given(facts(), st.integers(1, 60), st.sampled_from([1, 2]), st.integers(1, 8), st.sampled_from(WISHES))
def test_what_is_advised_can_be_done(facts: Facts, steps: int, conditionings: int, devices: int, wish: str):
    try:
        found = advise(facts, steps, conditionings, CPUS[:devices], wish)
    except ValueError:
        assert facts.room is not None and facts.room < facts.nbytes
        return
    for advice in found:
        plan = advice.plan
        assert facts.room is None or advice.nbytes <= facts.room
        assert advice.nbytes <= facts.nbytes
        assert 0 < advice.seconds < math.inf
        assert advice.speed == pytest.approx(steps * facts.whole(conditionings) / advice.seconds)
        assert plan is None or set(plan.devices) <= set(CPUS)
        if isinstance(plan, SplitPlan):
            lanes = plan.pipelines(conditionings > 1, whole_fits=True)
            assert sorted(rank for lane in lanes for rank in lane) == list(range(len(plan.devices)))
    first = found[0]
    if wish != "least memory":
        assert first.plan is None or first.speed >= 1.2 or facts.nbytes > (facts.room or math.inf)
        assert all(other.seconds >= first.seconds / 1.05 for other in found if adviser._worth(other, wish))
        assert first.suits(wish) or wish == "fastest"
    else:
        assert first.nbytes == min(one.nbytes for one in found)


@given(facts(), st.integers(2, 60), st.sampled_from([1, 2]), st.integers(2, 8))
def test_no_exact_plan_beats_its_devices(facts: Facts, steps: int, conditionings: int, devices: int):
    facts = replace(facts, free=None)
    for advice in advise(facts, steps, conditionings, CPUS[:devices], "fastest"):
        if advice.exact and advice.plan:
            assert advice.speed <= min(len(advice.plan.devices), conditionings * facts.batch) + 1e-9


def test_two_devices_and_two_prompts_get_one_each():
    best = advise(chain(one=0.52, **PLENTY), 20, 2, CPUS[:2], "balanced")[0]
    assert best.exact
    assert best.speed == pytest.approx(1 / 0.52, rel=0.01)


def test_a_batch_is_spread_over_the_devices():
    best = advise(chain(two=1.2, batch=4, **PLENTY), 20, 1, CPUS[:4], "faithful")[0]
    assert isinstance(best.plan, LanesPlan)
    assert (best.plan.lanes, len(best.plan.devices), best.exact) == (1, 4, True)
    assert best.speed == pytest.approx(4, rel=0.01)


def test_faithful_is_closer_and_not_faster_than_fastest():
    options = (chain(**PLENTY), 50, 1, CPUS[:4])
    fastest, balanced, faithful = (advise(*options, wish)[0] for wish in ("fastest", "balanced", "faithful"))
    assert fastest.speed >= balanced.speed >= faithful.speed >= 1.2
    assert faithful.suits("faithful")
    assert isinstance(faithful.plan, LanesPlan)
    assert (faithful.plan.lanes, faithful.closeness) == (2, "about 75 dB on small models")


def test_the_least_memory_is_the_deepest_cut():
    best = advise(chain(**PLENTY), 20, 1, CPUS[:4], "least memory")[0]
    assert isinstance(best.plan, SplitPlan)
    assert best.plan.degree == 4
    assert best.nbytes == pytest.approx(GB / 4, rel=0.01)


@pytest.mark.parametrize(
    ("facts", "steps"),
    [
        (chain(**PLENTY), 4),  # few steps
        (chain(one=0.001, two=0.001, host=0.002), 20),  # a tiny model
        (chain(units=2, one=0.01, two=0.02, link=Link(1e6, 0.5), crowd=1.9), 20),  # a slow link, a busy memory
    ],
)
def test_one_device_where_nothing_is_worth_it(facts: Facts, steps: int):
    best = advise(facts, steps, 1, CPUS[:2], "balanced")[0]
    assert best.plan is None
    assert best.settings == "one device, without Leapfrog"
    assert (best.speed, best.exact) == (1.0, True)


def test_what_no_device_holds_is_divided_or_refused():
    facts = chain(nbytes=12 * GB, free=8 * GB)
    found = advise(facts, 20, 1, CPUS[:2], "balanced")
    assert {type(one.plan) for one in found} == {SplitPlan}
    with pytest.raises(ValueError, match=r"2 devices do not hold 24\.0 GB"):
        advise(chain(nbytes=24 * GB, free=8 * GB), 20, 1, CPUS[:2], "balanced")


def test_a_plan_without_any_cost_is_as_fast_as_its_schedule():
    facts = chain(one=1.0, two=2.0)
    lanes = LanesPlan(CPUS[:2], 2)
    assert lanes_seconds(facts, lanes, 20, 1) == pytest.approx(1 + 9 + 1)
    split = SplitPlan(CPUS[:2], 2, mode="lookahead", cfg_lanes="off")
    seconds, nbytes = split_seconds(facts, split, 20, 1)
    assert seconds == pytest.approx(1 + 1 / 2 + 18 / 2 + 1)  # the pipeline fills once
    assert nbytes == GB // 12 * 6
    both = SplitPlan(CPUS[:4], 2, mode="exact", cfg_lanes="on")
    assert split_seconds(facts, both, 10, 2)[0] == pytest.approx(10)


def test_rejected_steps_are_paid_for_as_measured():
    eight = next(
        one
        for one in advise(chain(), 20, 1, CPUS, "fastest")
        if isinstance(one.plan, LanesPlan) and one.plan.lanes == 8 and one.fidelity == "balanced"
        and len(one.plan.devices) == 8
    )  # fmt: skip
    assert eight.speed == pytest.approx(fidelity.UNGUIDED["balanced", 8][20].pace, rel=0.01)
    assert eight.speed < 0.8 * LanesPlan(CPUS, 8).ideal_speedup(20, 1), "some are rejected"


PICTURES = ("flux", "unet", "wan")


@pytest.mark.parametrize(
    ("table", "runs"),
    [
        (fidelity.TABLE, [f"{model}-{by}.csv" for model in PICTURES for by in ("euler", "dpmpp_2m")]),
        (fidelity.UNGUIDED, [f"{model}-{by}-cfg1.csv" for model in PICTURES for by in ("euler", "dpmpp_2m")]),
        (fidelity.SOUND, ["audio-euler.csv"]),
    ],
)
def test_what_is_expected_is_what_was_measured_at_worst(table: fidelity.Table, runs: list[str]):
    titles = {"lookahead": "lookahead", "extrapolated": "AsyncDiff, states extrapolated",
              "asyncdiff": "AsyncDiff as published", "faithful": "ParaStep, faithful",
              "balanced": "ParaStep, balanced", "fast": "ParaStep, fast"}  # fmt: skip
    rows = [row for name in runs for row in read(ROOT / "docs/quality" / name)]
    for (kind, degree), by_steps in table.items():
        for steps, known in by_steps.items():
            found = [row for row in rows if (row.mode, row.degree, row.of) == (titles[kind], degree, steps)]
            assert len(found) == (len(runs) if steps > 8 else sum("euler" in name for name in runs))
            assert known.decibels == pytest.approx(min(row.psnr for row in found), abs=0.051)
            assert known.pace == pytest.approx(min(row.speed for row in found), abs=0.0051)


@pytest.mark.parametrize(
    ("sound", "conditionings", "table"),
    [(True, 1, fidelity.SOUND), (False, 2, fidelity.TABLE), (False, 1, fidelity.UNGUIDED)],
)
def test_what_counts_is_what_was_measured_of_such_a_model(sound: bool, conditionings: int, table: fidelity.Table):
    plans = advise(chain(sound=sound), 20, conditionings, CPUS[:2], "fastest")
    two = [one for one in plans if isinstance(one.plan, LanesPlan) and one.plan.lanes == 2]
    assert next(one.decibels for one in two if one.fidelity == "balanced") == table["balanced", 2][20].decibels


def test_without_cfg_eight_steps_are_worth_a_second_device():
    best, *_ = advise(chain(**PLENTY), 8, 1, CPUS[:2], "balanced")
    assert best.plan is not None
    assert best.speed > 1.2


def test_rows_that_cannot_be_divided_have_no_lanes_of_their_own():
    """ACE-Step 1.5: with CFG, too, one device evaluates both prompts."""
    found = advise(chain(one=1.0, two=2.0, coupled=True), 20, 2, CPUS[:2], "fastest")
    exact = [one for one in found if one.exact and one.plan]
    assert exact
    assert all(one.speed <= 1.001 for one in exact), "nothing exact is faster than one device"
    two = next(one for one in found if isinstance(one.plan, LanesPlan) and one.plan.lanes == 2)
    assert 1.2 < two.speed < 2


def test_where_nothing_was_rejected_a_run_takes_no_longer():
    for kind, degree, steps in (("lookahead", 2, 50), ("asyncdiff", 4, 30), ("balanced", 2, 50)):
        found = fidelity.expected(kind, degree, steps)
        assert found
        assert found.longer == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize(
    ("kind", "degree", "steps", "decibels"),
    [
        ("lookahead", 2, 20, fidelity.TABLE["lookahead", 2][20].decibels),
        ("lookahead", 2, 49, fidelity.TABLE["lookahead", 2][20].decibels),
        ("balanced", 3, 25, fidelity.TABLE["balanced", 4][20].decibels),
        ("lookahead", 9, 50, None),
        ("balanced", 2, 19, fidelity.TABLE["balanced", 2][20].decibels),
        ("faithful", 2, 10, fidelity.TABLE["faithful", 2][20].decibels),
        ("faithful", 4, 49, fidelity.TABLE["faithful", 4][50].decibels),
        ("faithful", 4, 60, fidelity.TABLE["faithful", 4][50].decibels),
        ("balanced", 2, 7, None),
        ("newest", 2, 20, None),
    ],
)
def test_what_was_not_measured_counts_as_the_harder_case_or_as_unknown(
    kind: str, degree: int, steps: int, decibels: float | None
):
    found = fidelity.expected(kind, degree, steps)
    assert (found and found.decibels) == decibels


def test_an_advice_says_what_to_set():
    told = {one.settings for one in advise(chain(**PLENTY), 20, 2, CPUS[:4], "balanced")}
    assert "ParaStep: lanes 2, fidelity balanced, devices cpu,cpu,cpu,cpu" in told
    assert (
        "Async UNet Split: components 2, mode lookahead, warmup_steps 0, cfg_lanes on, devices cpu,cpu,cpu,cpu" in told
    )
    line = Advice(None, 1.234, 1.0, GB, math.inf).line(20)
    assert line == "one device, without Leapfrog: 1.00x, 1.23 s for 20 steps, exact, 1 GB of weights on a device"
    assert re.search("fidelity not measured", Advice(None, 1.0, 1.0, GB, None).line(20))


@pytest.mark.parametrize("wrong", [("cheap", 20, 1), ("fastest", 0, 1), ("fastest", 20, 3)])
def test_a_question_that_means_nothing_is_refused(wrong: tuple[str, int, int]):
    wish, steps, conditionings = wrong
    with pytest.raises(ValueError, match="no advice"):
        advise(chain(), steps, conditionings, CPUS[:2], wish)


def test_plans_are_those_that_the_nodes_allow():
    for advice in advise(chain(), 20, 2, CPUS, "fastest"):
        plan = advice.plan
        if isinstance(plan, SplitPlan):
            assert plan == SplitPlan.choose(
                ",".join(plan.devices), plan.degree, plan.cfg_lanes, plan.stride, mode=plan.mode, warmup=plan.warmup,
                balance=plan.balance,
            )  # fmt: skip
        elif plan:
            try:
                assert plan.lanes == 1 or plan == LanesPlan.choose(
                    ",".join(plan.devices), plan.lanes, fidelity=advice.fidelity
                )
            except LeapfrogError as error:
                pytest.fail(str(error))
