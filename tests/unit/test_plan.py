from __future__ import annotations

import pytest

from leapfrog.parallel_backend import LanesPlan, LeapfrogError, SplitPlan, plan
from leapfrog.parallel_backend.devices import Machine, choose_devices

NO_GPU, TWO_GPUS = Machine(cuda=0, cores=4), Machine(cuda=2, cores=16)


@pytest.mark.parametrize(
    ("text", "wanted", "machine", "devices"),
    [
        ("auto", 0, TWO_GPUS, ("cuda:0", "cuda:1")),
        (" Auto ", 1, TWO_GPUS, ("cuda:0",)),
        ("auto", 0, NO_GPU, ("cpu", "cpu")),
        ("auto", 4, NO_GPU, ("cpu",) * 4),
        ("auto", 0, Machine(cuda=0, cores=1), ("cpu",)),
        ("auto", 0, Machine(cuda=1, cores=8), ("cuda:0",)),
        ("1, 0", 0, TWO_GPUS, ("cuda:1", "cuda:0")),
        ("CUDA:1,cpu", 0, TWO_GPUS, ("cuda:1", "cpu")),
        ("0,1", 1, TWO_GPUS, ("cuda:0",)),
        ("cpu,cpu,cpu", 2, NO_GPU, ("cpu", "cpu")),
        ("cpu", 0, NO_GPU, ("cpu",)),
    ],
)
def test_devices_are_what_was_asked_for(text: str, wanted: int, machine: Machine, devices: tuple[str, ...]):
    assert choose_devices(text, wanted, machine) == devices


@pytest.mark.parametrize(
    ("own", "devices"),
    [("cuda", ("cuda:0", "cuda:1")), ("", ("cuda:0", "cuda:1")), ("cpu", ("cpu", "cpu")), ("mps", ("mps",))],
)
def test_auto_goes_by_where_comfyui_computes(own: str, devices: tuple[str, ...]):
    assert choose_devices("auto", 0, Machine(cuda=2, cores=4, own=own)) == devices


@pytest.mark.parametrize(
    ("text", "wanted", "machine", "code", "said"),
    [
        ("gpu0", 0, TWO_GPUS, "bad_devices", "devices 'gpu0': 'gpu0' is not a device."),
        ("0,,1", 0, TWO_GPUS, "bad_devices", "devices '0,,1': '' is not a device."),
        ("", 0, TWO_GPUS, "bad_devices", "'' is not a device."),
        ("-1", 0, TWO_GPUS, "bad_devices", "'-1' is not a device."),
        ("0,2", 0, TWO_GPUS, "bad_devices", "there is no GPU 2; this machine has GPUs 0 to 1."),
        ("0", 0, NO_GPU, "bad_devices", "there is no GPU 0; this machine has no CUDA GPU, only 'cpu'."),
        ("1,1", 0, TWO_GPUS, "bad_devices", "names cuda:1 twice; each rank needs its own GPU."),
        ("0,1", 3, TWO_GPUS, "bad_plan", "components 3: 3 devices are needed, but devices '0,1' names 2."),
        ("auto", 3, TWO_GPUS, "bad_plan", "components 3: 3 GPUs are needed, but this machine has 2."),
        (
            "auto",
            5,
            NO_GPU,
            "bad_plan",
            "a CPU of 4 cores would slow each other down; write devices 'cpu,cpu,cpu,cpu,cpu'",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(text: str, wanted: int, machine: Machine, code: str, said: str):
    with pytest.raises(LeapfrogError) as caught:
        choose_devices(text, wanted, machine, f"components {wanted}")
    assert caught.value.report.code == code
    assert said in str(caught.value)
    assert caught.value.report.hint in str(caught.value)


def test_one_gpu_serves_several_ranks_only_when_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEAPFROG_SHARE_GPU", "1")
    assert choose_devices("0,0", 0, TWO_GPUS) == ("cuda:0", "cuda:0")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SplitPlan(("cpu", "cpu"), warmup=-1), "warmup_steps -1"),
        (lambda: SplitPlan(("cpu", "cpu"), bound=0), "drift_bound 0"),
        (lambda: SplitPlan(("cpu", "cpu"), mode="sync"), "mode 'sync' is not one of lookahead, asyncdiff"),
        (lambda: SplitPlan(("cpu", "cpu"), cfg_lanes="maybe"), "cfg_lanes 'maybe' is not one of auto, on, off"),
        (lambda: SplitPlan(("cpu",) * 3, cfg_lanes="on"), "two pipelines need an even number of devices, not 3"),
        (lambda: LanesPlan(("cpu",), -1, 1), "lanes -1, warmup_steps 1"),
        (lambda: LanesPlan(("cpu",), 2, -1), "lanes 2, warmup_steps -1"),
        (lambda: LanesPlan(("cpu",), 2, 1, bound=0), "drift_bound 0"),
        (lambda: LanesPlan.choose("cpu", 2, fidelity="perfect"), "fidelity 'perfect' is not one of exact, faithful"),
        (lambda: LanesPlan(("cpu",), 2, 1, "cubic"), "predictor 'cubic' is not one of linear, newest, paper"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(make, said: str):
    with pytest.raises(LeapfrogError, match=said) as caught:
        make()
    assert caught.value.report.code == "bad_plan"


def test_lanes_take_no_more_devices_than_they_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "this_machine", lambda: Machine(cuda=8, cores=8))
    assert LanesPlan.choose("auto", 2).devices == tuple(f"cuda:{i}" for i in range(4)), "one for each conditioning"
    assert len(LanesPlan.choose("auto", 0).devices) == 8
    assert LanesPlan.choose("0,1", 4).devices == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("devices", "asked", "conditionings", "lanes"),
    [(2, 0, 1, 2), (2, 0, 2, 1), (4, 0, 2, 2), (8, 0, 2, 4), (1, 0, 2, 1), (2, 2, 2, 2), (1, 4, 2, 4)],
)
def test_conditionings_come_before_lanes(devices: int, asked: int, conditionings: int, lanes: int):
    chosen = LanesPlan(("cpu",) * devices, asked)
    assert chosen.lanes_for(conditionings) == lanes
    assert (chosen.schedule(conditionings) is None) == (lanes == 1)


def test_a_bound_of_ones_own_replaces_that_of_the_fidelity():
    assert LanesPlan.choose("cpu,cpu", 2, fidelity="fast", bound=0.005).bound == 0.005
    assert LanesPlan.choose("cpu,cpu", 2, fidelity="exact").eager


@pytest.mark.parametrize(
    ("components", "cfg_lanes", "guided", "fits", "lanes"),
    [
        (0, "auto", True, True, [[0, 1], [2, 3]]),
        (0, "auto", False, True, [[0, 1, 2, 3]]),
        (0, "off", True, True, [[0, 1, 2, 3]]),
        (2, "auto", True, False, [[0, 1], [2, 3]]),
        (2, "auto", False, True, [[0, 1]]),
        (2, "off", True, True, [[0, 1]]),
        (1, "auto", True, True, [[0], [1]]),
        (1, "auto", True, False, [[0], [1]]),
        (3, "auto", True, True, [[0, 1, 2]]),
        (4, "auto", True, True, [[0, 1, 2, 3]]),
        (2, "on", True, True, [[0, 1], [2, 3]]),
    ],
)
def test_conditionings_get_a_lane_each_before_the_pipeline_gets_deeper(
    components: int, cfg_lanes: str, guided: bool, fits: bool, lanes: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "this_machine", lambda: Machine(cuda=4, cores=8))
    assert SplitPlan.choose("auto", components, cfg_lanes).pipelines(guided, fits) == lanes


THREE, FOUR = ("cuda:0", "cuda:1", "cuda:2"), ("cuda:0", "cuda:1", "cuda:2", "cuda:3")


@pytest.mark.parametrize(
    ("plan", "lost", "left"),
    [
        (SplitPlan(THREE), {1}, SplitPlan(("cuda:0", "cuda:2"))),
        (SplitPlan(THREE, 3, cut="3,5"), {0}, SplitPlan(THREE[1:], 2)),
        (SplitPlan(FOUR, 2, cut="3"), {0}, SplitPlan(("cuda:1", "cuda:2"), 2, cut="3")),
        (SplitPlan(FOUR, 2, cut="3"), {0, 2}, SplitPlan(("cuda:1", "cuda:3"), 2, cut="3")),
        (SplitPlan(FOUR, 1), {3}, SplitPlan(THREE[:2], 1)),
        (SplitPlan(FOUR, cfg_lanes="on"), {3}, SplitPlan(THREE)),
        (SplitPlan(FOUR, 2, mode="asyncdiff", stride=2), {3}, SplitPlan(THREE, 2, mode="asyncdiff", stride=2)),
        (SplitPlan(THREE, 2, mode="asyncdiff", stride=2), {2}, SplitPlan(THREE[:2], 2, mode="asyncdiff")),
        (SplitPlan(THREE, mode="asyncdiff", stride=2), {2}, SplitPlan(THREE[:2], mode="asyncdiff")),
        (SplitPlan(THREE[:2], 1, mode="asyncdiff", stride=2), {0}, SplitPlan(THREE[1:2], 1, mode="asyncdiff")),
    ],
)
def test_the_plan_on_the_devices_that_are_left(plan: SplitPlan, lost: set[int], left: SplitPlan):
    assert plan.without(lost) == left


def test_a_single_device_is_a_plan_of_one():
    assert SplitPlan.choose("cpu", 0).devices == ("cpu",)
    assert SplitPlan.choose("cpu", 2, "on").devices == ("cpu",)
    assert SplitPlan.choose("cpu", 3, stride=2, mode="asyncdiff").devices == ("cpu",)


def test_a_denoiser_too_large_for_one_of_two_devices_is_cut():
    chosen = SplitPlan.choose("cpu,cpu", 0)
    assert chosen.pipelines(guided=True, whole_fits=True) == [[0], [1]]
    assert chosen.pipelines(guided=True, whole_fits=False) == [[0, 1]]
