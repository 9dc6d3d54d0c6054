"""Several machines: the file, the names of their devices, the channel that carries tensors, model files."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import msgspec
import pytest
import torch

from bootstrap import COMFYUI_VERSION
from leapfrog.parallel_backend import LeapfrogError, Recipe, channel, guests, joining
from leapfrog.parallel_backend.courier import READ_S, HostCourier, RankCourier
from leapfrog.parallel_backend.launcher import interface_of, rank_environment
from leapfrog.parallel_backend.machines import Machines, fingerprint, versions
from leapfrog.parallel_backend.plan import Machine, choose_devices, kind_of, machine_of
from leapfrog.parallel_backend.protocol import (
    Beat,
    Done,
    Evaluate,
    FromJoiner,
    Gone,
    LaunchSpec,
    Load,
    Offer,
    Orders,
    Payload,
)
from leapfrog.parallel_backend.starting import backend_of
from leapfrog.parallel_backend.tensors import Arena, TensorHead, flatten, place
from leapfrog.parallel_backend.worker.models.files import among_ours
from other_machine import within
from pack import ROOT, comfyui_dir

GOOD = {"listen": "10.0.0.1", "port": 29611, "secret": "ab" * 32, "machines": ["b", "c-2"]}
HERE = Machine(cuda=1, cores=4)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "leapfrog.json"
    path.touch(0o600)
    path.write_text(json.dumps(GOOD))
    monkeypatch.setenv("LEAPFROG_MACHINES", str(path))
    return path


def test_the_file(file: Path, caplog: pytest.LogCaptureFixture):
    assert msgspec.structs.asdict(Machines.configured()) == GOOD
    assert not caplog.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"listen": "localhost"}, "listen"), ({"listen": "10.0.0.256"}, "10.0.0.256"),
        ({"listen": "0.0.0.0"}, "0.0.0.0"), ({"listen": "224.0.0.1"}, "224.0.0.1"),
        ({"port": 0}, "port"), ({"port": 65536}, "port"), ({"port": "1"}, "port"),
        ({"secret": "short"}, "secret"), ({"secret": "AB" * 32}, "secret"), ({"machines": "b"}, "machines"),
        ({"machines": ["b/0"]}, "machines"), ({"machines": [""]}, "machines"), ({"sercet": ""}, "sercet"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used(file: Path, changed: dict[str, Any], said: str):
    file.write_text(json.dumps({**GOOD, **changed}))
    with pytest.raises(LeapfrogError, match=said) as caught:
        Machines.configured()
    assert caught.value.report.code == "bad_machines"
    assert str(file) in str(caught.value)
    assert "ab" * 32 not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\\xff"])
def test_a_file_that_is_none(file: Path, text: str):
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(LeapfrogError, match="cannot be used"):
        Machines.configured()
    file.unlink()
    with pytest.raises(LeapfrogError, match="cannot be used"):
        Machines.configured()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_secret_that_others_may_read(file: Path, caplog: pytest.LogCaptureFixture):
    file.chmod(0o644)
    Machines.configured()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "chmod 600" in caplog.text


def test_the_secret_of_a_pool_is_its_own(file: Path):
    found = Machines.configured()
    one, other = found.pool_secret("00" * 32), found.pool_secret("01" * 32)
    assert one != other
    assert len(bytes.fromhex(one)) == 32
    assert msgspec.structs.replace(found, secret="cd" * 32).pool_secret("00" * 32) != one


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("0,b/0", ("cuda:0", "b/cuda:0")), ("b/cuda:1, c-2/CPU", ("b/cuda:1", "c-2/cpu")),
        ("cpu,b/cpu,b/cpu", ("cpu", "b/cpu", "b/cpu")), ("auto", ("cuda:0",)),
    ],
)  # fmt: skip
def test_devices_of_other_machines(file: Path, text: str, devices: tuple[str, ...]):
    assert choose_devices(text, 0, HERE) == devices


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,d/0", "machine 'd' is not one of b, c-2"), ("0,b/mps", "'mps' is not a device"),
        ("b/0,b/0", "names b/cuda:0 twice"), ("b/", "'' is not a device"), ("a/b/0", "machine 'a/b' is not one of"),
    ],
)  # fmt: skip
def test_devices_that_no_machine_has(file: Path, text: str, said: str):
    with pytest.raises(LeapfrogError, match=said) as caught:
        choose_devices(text, 0, HERE)
    assert caught.value.report.code == "bad_devices"


def test_other_machines_without_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LEAPFROG_MACHINES", raising=False)
    with pytest.raises(LeapfrogError, match="LEAPFROG_MACHINES is not set") as caught:
        choose_devices("0,b/0", 0, HERE)
    assert caught.value.report.code == "bad_machines"


def test_whose_device_it_is_and_what():
    assert [(machine_of(device), kind_of(device)) for device in ("b/cuda:0", "cuda:1", "b/cpu", "cpu")] == [
        ("b", "cuda:0"), ("", "cuda:1"), ("b", "cpu"), ("", "cpu"),
    ]  # fmt: skip
    assert backend_of(("cuda:0", "b/cpu"))[0] == "gloo"


def test_a_rank_there_sees_its_gpu_and_talks_at_its_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    environment = rank_environment("b/cuda:1", "gloo", 0)
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == interface_of(channel.LOOPBACK)
    with pytest.raises(OSError, match=r"192\.0\.2\.77"):
        rank_environment("cpu", "gloo", 1, "192.0.2.77")


def test_versions_are_those_of_this_machine():
    found = versions(str(comfyui_dir()))
    assert found["PyTorch"] == torch.__version__.partition("+")[0]
    assert found["ComfyUI"] == COMFYUI_VERSION
    assert f"## [{found['Leapfrog']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert versions("nowhere")["ComfyUI"] == "unknown"


def joined(file: Path, *arguments: str) -> int:
    return joining.main(["--join", str(file), "--machine", "b", "--comfyui", str(comfyui_dir()), *arguments])


@pytest.mark.parametrize(
    ("written", "offered"),
    [(["--device", "CPU"], "cpu"), (["--device", "CUDA:1"], "cuda:1"), (["--device", "1"], "cuda:1"), ([], "cuda:0")],
)
def test_a_joiner_offers_a_device_by_its_usual_name(
    file: Path, monkeypatch: pytest.MonkeyPatch, written: list[str], offered: str
):
    offers: list[str] = []
    monkeypatch.setattr(joining, "this_machine", lambda: Machine(cuda=2, cores=2))
    monkeypatch.setattr(joining.Joiner, "run", lambda joiner: offers.append(joiner._offer.device))
    assert joined(file, *written) == 0
    assert offers == [offered]


@pytest.mark.parametrize("device", ["cuda", "gpu0", "b/0", "auto", "0,1", "cuda:-1", "2"])
def test_a_joiner_offers_no_device_that_is_not_there(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
):
    monkeypatch.setattr(joining, "this_machine", lambda: Machine(cuda=2, cores=2))
    assert joined(file, "--device", device) == joining.USAGE
    assert f"--device: '{device}' is not a device" in caplog.text or "there is no GPU 2" in caplog.text


def test_the_joiner_is_found_wherever_its_flag_stands(tmp_path: Path):
    command = [sys.executable, ROOT / "parallel_backend", "--machine", "b", f"--join={tmp_path}/none.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.wait(120) == joining.USAGE
            assert process.stderr and "none.json" in process.stderr.read()
        finally:
            process.kill()


def test_who_is_missing_and_what_came_instead():
    said = guests._who_is_missing(["b/cuda:0"], {"b/cpu", "b/cuda:1", "c/cuda:2", "b/cuda:0"}, {"10.0.0.9"})
    assert said.startswith("machine b has not come with cuda:0. It offered cpu, cuda:1. 10.0.0.9 called")
    assert guests._who_is_missing(["b/cpu"], {"c/cpu"}, set()).startswith("machine b has not come with cpu. Start")


class Unkillable:
    """A rank that a driver holds: not even SIGKILL ends it."""

    exit_code, how_it_ended, stopped = None, "", False

    def __init__(self, _spec: LaunchSpec):
        self.lines = deque()

    def end(self, grace_s: float) -> None:
        raise subprocess.TimeoutExpired("rank", grace_s)


def test_a_joiner_outlives_a_rank_that_does_not_end(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joining, "Child", Unkillable)
    spec = LaunchSpec(1, 2, "b/cpu", "gloo", 1, 1, "00" * 32, "nowhere", [], 1.0)
    with channel.listen() as listener:
        line = channel.Channel(socket.create_connection(listener.getsockname()), joining.ToJoiner, 5)
        host = channel.Channel(listener.accept()[0], FromJoiner, 5)
    host.send(Orders(spec))
    host.connection.shutdown(socket.SHUT_WR)
    assert joining.Joiner(Machines.configured(), Offer("b", "cpu", {}), "nowhere", [], 1)._serve(line)
    said = [host.receive(5) for _ in range(3)]
    assert [type(message) for message in said] == [Offer, Beat, Gone]
    assert said[-1] == Gone(0, "does not end")
    host.close()


Ends = tuple[HostCourier, RankCourier, Arena, list[str]]


@pytest.fixture
def couriers() -> Iterator[Ends]:
    """(the host's end, the rank's end, the host's arena, who has noticed that the connection is gone)"""
    with channel.listen() as listener:
        left = socket.create_connection(listener.getsockname())
        right = listener.accept()[0]
    arena, noticed = Arena.create(1 << 20), []
    host, rank = HostCourier(left, {arena.name: arena}), RankCourier(right, lambda: noticed.append("rank"))
    yield host, rank, arena, noticed
    host.close()
    rank.close()
    arena.close()


def written(arena: Arena, tree: Any, start: int = 0) -> tuple[Payload, int]:
    spec, tensors = flatten(tree)
    heads, end = place(tensors, start)
    arena.write(tensors, heads)
    return Payload(arena.name, spec, heads), end


def test_tensors_there_and_back(couriers: Ends):
    host, rank, arena, _ = couriers
    tree = (torch.arange(100_000, dtype=torch.float32), {"half": torch.ones(3, 5, dtype=torch.bfloat16)})
    payload, out = written(arena, tree)
    host.send(Evaluate(4, payload, out, 4096))
    asked = rank.receive(5)
    assert asked == Evaluate(4, payload, out, 4096)
    own = rank.arenas[arena.name]
    got = own.tree(payload.spec, payload.heads)
    assert torch.equal(got[0], tree[0])
    assert torch.equal(got[1]["half"], tree[1]["half"])
    own.view(payload.heads[0]).zero_()
    assert torch.equal(arena.view(payload.heads[0]), tree[0]), "no memory is shared"
    result, _ = written(own, torch.full((7,), 3.0), out)
    rank.send(Done(4, result, begin=1.0, end=2.0))
    now = time.perf_counter()
    done = host.receive(5)
    assert isinstance(done, Done)
    assert torch.equal(arena.view(result.heads[0]), torch.full((7,), 3.0))
    assert done.end - done.begin == pytest.approx(1.0)
    assert done.end == pytest.approx(now, abs=5.0)


def test_the_rank_has_room_for_whatever_the_host_has(couriers: Ends):
    host, rank, arena, _ = couriers
    for size in (10, 10_000, 100):
        payload, out = written(arena, torch.ones(size))
        host.send(Evaluate(1, payload, out, 4 * size))
        asked = rank.receive(5)
        assert isinstance(asked, Evaluate)
        result, _ = written(rank.arenas[arena.name], torch.full((size,), 2.0), asked.out)
        rank.send(Done(1, result))
        host.receive(5)
        assert torch.equal(arena.view(result.heads[0]), torch.full((size,), 2.0))


@pytest.mark.parametrize(
    ("heads", "call"),
    [
        ([TensorHead("float32", (16,), 0)], 4), ([TensorHead("float32", (17,), 1024)], 4),
        ([TensorHead("float32", (1,), 1 << 20)], 4), ([TensorHead("uint8", (2**40,), 1024)], 4),
        ([TensorHead("float32", (16,), 1024)] * 2, 4), ([TensorHead("float32", (16,), 1024)], 5),
    ],
    ids=["before the room", "past the room", "past the arena", "huge", "twice", "not asked for"],
)  # fmt: skip
def test_a_rank_writes_only_where_it_was_asked_to(couriers: Ends, heads: list[TensorHead], call: int):
    host, rank, arena, noticed = couriers
    payload, _ = written(arena, torch.ones(4))
    host.send(Evaluate(4, payload, 1024, 64))
    rank.receive(5)
    before = bytes(arena.raw(TensorHead("uint8", (2048,), 0)))
    rank._out.send(Done(call, Payload(arena.name, ["t", 0], heads)))
    with pytest.raises(OSError, match="not asked"):
        host.receive(5)
    with pytest.raises(OSError, match="not asked"):
        host.receive(5)
    assert bytes(arena.raw(TensorHead("uint8", (2048,), 0))) == before
    with pytest.raises((EOFError, OSError)):
        rank.receive(5)
    assert within(5, lambda: noticed == ["rank"])


def test_a_rank_takes_no_memory_beyond_reason(couriers: Ends):
    host, rank, _, noticed = couriers
    host._out.send(Load(1, patches=Payload("a", ["t", 0], [TensorHead("uint8", (2**39,), 0)])))
    with pytest.raises(OSError, match="no arena"):
        rank.receive(5)
    assert within(5, lambda: noticed == ["rank"])


def test_half_of_the_tensors_keep_nobody_waiting(couriers: Ends):
    host, rank, arena, _ = couriers
    payload, _ = written(arena, torch.arange(1000.0))
    raw = bytes(arena.raw(payload.heads[0]))
    host._out.send(Load(1, patches=payload))
    host._out.push(raw[:1999])
    with pytest.raises(TimeoutError):
        rank.receive(0.05)
    host._out.push(raw[1999:])
    assert rank.receive(5) == Load(1, patches=payload)
    assert torch.equal(rank.arenas[arena.name].view(payload.heads[0]), torch.arange(1000.0))


def test_a_rank_keeps_the_arenas_that_the_host_may_still_speak_of(couriers: Ends):
    host, rank, _, _ = couriers
    for number in range(40):
        host._out.send(Load(1, patches=Payload(f"arena_{number}", ["t", 0], [TensorHead("uint8", (0,), 0)])))
        rank.receive(5)
    assert list(rank.arenas) == [f"arena_{number}" for number in range(24, 40)]


def test_a_machine_that_takes_nothing_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEAPFROG_STEP_TIMEOUT", "0.3")
    with channel.listen() as listener:
        left = socket.create_connection(listener.getsockname())
        right = listener.accept()[0]
    arena = Arena.create(1 << 20)
    host = HostCourier(left, {arena.name: arena})
    payload, _ = written(arena, torch.ones(arena.size - 4096, dtype=torch.uint8))
    more_than_sockets_hold = Payload(payload.arena, payload.spec, payload.heads * 64)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        host.send(Load(1, patches=more_than_sockets_hold))
    assert time.monotonic() - began < 10
    with pytest.raises((EOFError, OSError)):
        host.receive(5)
    host.close()
    right.close()
    arena.close()


@pytest.mark.parametrize("how", ["forgotten", "closed"])
def test_arenas_that_another_thread_has_closed(couriers: Ends, how: str):
    host, _, arena, noticed = couriers
    payload, _ = written(arena, torch.ones(4))
    lost = Arena.create(64)
    lost.close()
    host.arenas = {} if how == "forgotten" else {arena.name: lost}
    with pytest.raises(OSError, match="closed meanwhile"):
        host.send(Load(1, patches=payload))
    assert within(5, lambda: noticed == ["rank"])


def test_tensors_are_waited_for_with_a_timeout_of_their_own(couriers: Ends):
    host, rank, arena, _ = couriers
    payload, _ = written(arena, torch.ones(1000))
    with arena.raw(payload.heads[0]) as raw:
        host._out.send(Load(1, patches=payload))
        assert within(5, lambda: rank._in.connection.gettimeout() == READ_S)
        host._out.push(raw)
    assert rank.receive(5) == Load(1, patches=payload)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the host in a folder that this machine does not have; ComfyUI's folders here are empty."""
    for name in ("diffusion_models", "checkpoints"):
        (tmp_path / "ours" / name).mkdir(parents=True)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / "ours" / name)], set()))
    path = tmp_path / "theirs/flux/dev.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(range(256)) * 40_000)
    return path


def recipe_of(path: Path) -> Recipe:
    recipe = Recipe.of("diffusion_model", str(path), {})
    return msgspec.structs.replace(recipe, fingerprint=fingerprint(recipe.path, recipe.stamp))


def test_a_model_file_at_the_same_path(model: Path):
    recipe = recipe_of(model)
    assert among_ours(recipe) == recipe


@pytest.mark.parametrize("there", ["diffusion_models/flux/dev.safetensors", "checkpoints/dev.safetensors"])
def test_a_model_file_in_our_folders(model: Path, there: str, tmp_path: Path):
    recipe, ours = recipe_of(model), tmp_path / "ours" / there
    ours.parent.mkdir(exist_ok=True)
    model.rename(ours)
    assert among_ours(recipe).path == str(ours)
    assert among_ours(recipe).options == recipe.options


@pytest.mark.parametrize("at", [0, 5_000_000, -1])
def test_another_file_of_the_same_name_and_size_is_not_taken(model: Path, at: int, tmp_path: Path):
    recipe, ours = recipe_of(model), tmp_path / "ours/diffusion_models/dev.safetensors"
    content = bytearray(model.read_bytes())
    content[at : at + 200_000 if at >= 0 else None] = bytes(200_000 if at >= 0 else 1)
    ours.write_bytes(content)
    model.unlink()
    with pytest.raises(LeapfrogError, match="another content") as caught:
        among_ours(recipe)
    assert caught.value.report.code == "missing_file"
    assert str(ours) in str(caught.value)


@pytest.mark.parametrize("same", ["name", "target"])
def test_a_model_file_behind_a_link(model: Path, same: str, tmp_path: Path):
    """As the cache of Hugging Face has them: the file's own name is a digest."""
    named = model.with_name("named.safetensors")
    named.symlink_to(model)
    recipe, ours = recipe_of(named), tmp_path / "ours/checkpoints" / (named if same == "name" else model).name
    assert recipe == recipe_of(model)
    assert hash(recipe) == hash(recipe_of(model))
    named.unlink()
    model.rename(ours)
    assert among_ours(recipe).path == str(ours)


def test_a_model_file_that_was_replaced_here_alone(model: Path, tmp_path: Path):
    recipe, ours = recipe_of(model), tmp_path / "ours/checkpoints/dev.safetensors"
    model.rename(ours)
    assert among_ours(recipe).path == str(ours)
    ours.write_bytes(bytes(ours.stat().st_size))
    with pytest.raises(LeapfrogError, match="another content"):
        among_ours(recipe)


def test_a_model_file_that_is_not_there(model: Path, tmp_path: Path):
    recipe = recipe_of(model)
    model.unlink()
    with pytest.raises(LeapfrogError, match=r"dev\.safetensors is not in .*diffusion_models"):
        among_ours(recipe)
