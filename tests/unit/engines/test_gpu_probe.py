"""Asking the NVIDIA driver: what it answers, and every way in which it does not."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from std_rt.engines.gpu import probe as cuda_probe
from std_rt.engines.gpu.probe import Gpu, ask, parse, probe


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """What other tests were told, and what these are told, is forgotten."""
    probe.cache_clear()
    yield
    probe.cache_clear()


class FakeDriver:
    """Two GPUs, by the driver's C interface."""

    NAMES = ("NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3")
    CAPABILITY = ((8, 9), (9, 0))

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.code

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self.NAMES)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, buffer: Any, size: int, device: ctypes.c_int) -> int:
        assert size >= 100
        buffer.value = self.NAMES[device.value].encode()
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: ctypes.c_int) -> int:
        out._obj.value = self.CAPABILITY[device.value][{75: 0, 76: 1}[attribute]]
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: ctypes.c_int) -> int:
        out._obj.value = (device.value + 1) * 24 * 2**30
        return 0


def test_what_a_driver_says_reaches_the_report() -> None:
    report = parse(json.dumps(ask(FakeDriver())))  # type: ignore[arg-type]
    assert (report.problem, report.cuda) == (None, "12.8")
    assert report.gpus == (
        Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 * 2**30),
        Gpu("NVIDIA H100 80GB HBM3", (9, 0), 48 * 2**30),
    )
    assert [gpu.sm for gpu in report.gpus] == [89, 90]
    assert str(report.gpus[0]) == "NVIDIA GeForce RTX 4090 (SM89, 24 GB)"


@pytest.mark.parametrize(
    ("code", "words"),
    [(100, "finds no GPU"), (803, "CUDA error 803, .*restart"), (5, "CUDA error 5, see the driver's")],
)
def test_a_driver_that_does_not_start_is_named_with_its_error(code: int, words: str) -> None:
    report = parse(json.dumps(ask(FakeDriver(code))))  # type: ignore[arg-type]
    assert report.gpus == ()
    assert report.problem is not None
    assert re.search(words, report.problem)


def test_no_process_is_started_without_the_drivers_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_probe, "_library", lambda: "no_such_library.so")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert probe().problem == "no NVIDIA driver found"
    probe.cache_clear()
    monkeypatch.setattr(cuda_probe, "_library", lambda: None)  # macOS
    assert probe().problem == "no NVIDIA driver found"


def test_a_driver_that_hangs_or_breaks_takes_only_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_probe, "_has_library", lambda: True)

    def hang(command: list[str], **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "does not answer within 20 s" in str(probe().problem)
    probe.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-11))
    assert "crashed the probe process (exit -11)" in str(probe().problem)


def test_the_driver_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answer = json.dumps(ask(FakeDriver()))  # type: ignore[arg-type]
    monkeypatch.setattr(cuda_probe, "_has_library", lambda: True)

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=0, stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)
    assert probe() is probe()
    assert len(asked) == 1


def test_the_process_needs_nothing_but_python() -> None:
    """Without a driver it fails at loading it, and at nothing before."""
    if cuda_probe._has_library():
        pytest.skip("this machine has a driver")
    command = [sys.executable, "-I", "-S", cuda_probe.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "libcuda" in done.stderr or sys.platform != "linux"
    assert "ModuleNotFoundError" not in done.stderr
