"""Several machines: the file, the names of their devices, joiners."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bootstrap import COMFYUI_VERSION
from leapfrog.parallel_backend import LeapfrogError, channel, guests, handshake, joining
from leapfrog.parallel_backend.devices import Machine, choose_devices, kind_of, machine_of
from leapfrog.parallel_backend.launcher import interface_of, rank_environment
from leapfrog.parallel_backend.machines import Machines, versions
from leapfrog.parallel_backend.protocol import (
    Beat,
    FromJoiner,
    Gone,
    LaunchSpec,
    Offer,
    Orders,
)
from leapfrog.parallel_backend.starting import backend_of
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
        ("0,d/0", "machine 'd' is not in the file"), ("0,b/mps", "'mps' is not a device"),
        ("b/0,b/0", "names b/cuda:0 twice"), ("b/", "'' is not a device"), ("a/b/0", "machine 'a/b' is not in"),
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
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == interface_of(handshake.LOOPBACK)
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
    assert said.startswith("machine b had not offered cuda:0. It offered cpu, cuda:1. 10.0.0.9 called")
    assert guests._who_is_missing(["b/cpu"], {"c/cpu"}, set()).startswith("machine b had not offered cpu. Start")


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
    with handshake.listen() as listener:
        line = channel.Channel(socket.create_connection(listener.getsockname()), joining.ToJoiner, 5)
        host = channel.Channel(listener.accept()[0], FromJoiner, 5)
    host.send(Orders(spec))
    host.connection.shutdown(socket.SHUT_WR)
    assert joining.Joiner(Machines.configured(), Offer("b", "cpu", {}), "nowhere", [], 1)._serve(line)
    said = [host.receive(5) for _ in range(3)]
    assert [type(message) for message in said] == [Offer, Beat, Gone]
    assert said[-1] == Gone(0, "does not end")
    host.close()
