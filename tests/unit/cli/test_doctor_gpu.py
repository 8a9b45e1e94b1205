"""`std-rt doctor --gpu` on a made-up GPU, and where there is none."""

from __future__ import annotations

import json

import pytest
from support import fake_gpu
from support.cli_support import Cli

from std_rt.core.errors import BackendError
from std_rt.engines.gpu import probe

pytest.importorskip("onnxruntime")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.FakeBackend:
    return fake_gpu.install(monkeypatch.setattr)


def test_without_a_gpu_it_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda: probe.Report("no NVIDIA driver found"))
    error = cli("doctor", "--gpu").error
    assert error == "error: there is no GPU to test: no NVIDIA driver found; std-rt doctor shows the rest"


def test_a_backend_that_works_has_a_row_and_the_last_line_is_json(
    cli: Cli, installed: fake_gpu.FakeBackend
) -> None:
    result = cli("doctor", "--gpu")
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    assert found["gpus"] == ["Fake 9000 (SM89, 8 GB)"]
    rtx = found["backends"]["rtx"]
    assert (rtx["problem"], rtx["one_graph"], rtx["precision"]) == ("", True, "fp32")
    assert rtx["difference"] <= 2
    assert min(rtx[key] for key in ("open_s", "frame_ms", "p95_ms", "matrix_tflops", "memory_mb")) >= 0
    assert "not installed; run:" in found["backends"]["tensorrt"]["problem"]
    assert any(line.split()[:2] == ["ok", "rtx"] for line in result.out.splitlines())
    assert not installed.device.memory  # everything was given back


def test_a_wrong_picture_is_a_failure(
    cli: Cli, installed: fake_gpu.FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost wait: the picture is taken before the GPU has it."""
    monkeypatch.setattr(installed.device, "wait", lambda event: None)
    result = cli("doctor", "--gpu")
    assert result.code == 1
    assert "its picture differs from the CPU's by" in result.out


def test_a_backend_that_fails_does_not_hide_the_others(
    cli: Cli, installed: fake_gpu.FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(size: int) -> int:
        raise BackendError("Fake 9000 has 0 MB free")

    monkeypatch.setattr(installed.device, "allocate", refuse)
    result = cli("doctor", "--gpu")
    assert result.code == 1
    problems = {n: r["problem"] for n, r in json.loads(result.out.splitlines()[-1])["backends"].items()}
    assert problems["rtx"] == "Fake 9000 has 0 MB free"
    assert problems.keys() == {"tensorrt", "rtx", "cuda"}
