"""`make gpu`: its steps on the made-up GPU, and what becomes of commands that fail, hang or cannot run."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from support import fake_gpu

pytest.importorskip("onnxruntime")

from std_rt.core.errors import BackendError
from std_rt.engines.gpu.probe import Report
from std_rt.engines.tensorrt.gpu_runner import GpuRunner
from std_rt.pipeline.stylizer import Stylizer
from tools import gpu_session
from tools.gpu_session import Command, main


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.FakeBackend:
    monkeypatch.setattr(gpu_session, "FRAMES", 2)
    return fake_gpu.install(monkeypatch.setattr)


def test_the_driver_replays_and_says_when_memory_is_short(installed: fake_gpu.FakeBackend) -> None:
    found = gpu_session.step_driver()
    assert found["replays"] == 1000
    assert "bytes free" in found["short"]
    installed.device.synchronize = lambda stream: None  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="replay 0 brought back"):
        gpu_session.step_driver()


def test_frames_stay_the_same_while_engines_are_opened(
    installed: fake_gpu.FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_session.step_capture()["frames"]["rtx"] >= 2
    run, count = GpuRunner._collect, iter(range(100))
    monkeypatch.setattr(GpuRunner, "_collect", lambda *given: run(*given) ^ np.uint8(next(count) == 2))
    monkeypatch.setattr(Stylizer, "ready", lambda self, quality: False)  # it fails before the others are open
    with pytest.raises(BackendError, match="another picture after"):
        gpu_session.step_capture()
    assert not [thread for thread in threading.enumerate() if "_disturb" in thread.name]
    monkeypatch.setattr(gpu_session, "MOST_FRAMES", 3)
    with pytest.raises(BackendError, match="192 px is still not open after all frames"):
        gpu_session.step_capture()


def test_both_layouts_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from std_rt.engines.onnxruntime import cuda

    seen: list[str] = []

    def opened() -> Stylizer:
        seen.append(cuda.provider_options("auto", capture=True)["prefer_nhwc"])
        stylizer = Stylizer.load(None, backend="cpu", size=64, steps=1)
        stylizer.set_style(np.zeros((64, 64, 3), np.uint8))
        return stylizer

    monkeypatch.setattr(gpu_session, "_usable", lambda: ["rtx"])
    assert gpu_session.step_nhwc() == {"left out": "backend cuda is not installed"}
    monkeypatch.setattr(gpu_session, "_usable", lambda: ["rtx", "cuda"])
    monkeypatch.setattr(gpu_session, "_opened_cuda", opened)
    monkeypatch.setattr(gpu_session, "TIMED_FRAMES", 2)
    monkeypatch.setattr(gpu_session, "TIMED_PX", 64)
    found = gpu_session.step_nhwc()
    assert seen == ["0", "1", "0", "1"]
    assert "prefer_nhwc" not in cuda.provider_options("auto", capture=True)
    assert {name: len(times) for name, times in found["ms a frame"].items()} == {
        "as it is": 2,
        "channels last": 2,
    }
    assert found["largest difference"] == 0


def test_the_outcome_of_every_command_is_told_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {
        "1": (
            Command("good", ("-c", "print('fine')"), 60),
            Command("bad", ("-c", "raise SystemExit(3)"), 60),
            Command("slow", ("-c", "import time; time.sleep(60)"), 1),
            Command("lacks", ("-c", ""), 60, needs=("no_such_package",)),
            Command("times", ("-c", ""), 60, on_fake=None),
            Command("finds", ("-c", "import only_here"), 60),
            Command("smaller", ("-c", "import sys; print(sys.argv[1:])"), 60, on_fake=("--size", "64")),
        )
    }
    (tmp_path / "tests").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "only_here.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))  # packages that are unpacked, not installed
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_session, "CALLS", calls)
    monkeypatch.setattr(gpu_session, "probe", lambda: Report("no NVIDIA driver found"))
    monkeypatch.setattr(gpu_session, "FAKE_PATIENCE", 1)
    assert main(["1"]) == 1
    out = capsys.readouterr().out
    assert "no NVIDIA driver found: the same commands run on the simulated GPU" in out
    folder = tmp_path / "runs" / "gpu"
    assert (folder / "good.txt").read_text(encoding="utf-8") == "fine\n"
    outcomes = {
        each["name"]: each["outcome"]
        for each in json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    }
    assert outcomes["good"] == "passed"
    assert outcomes["bad"].startswith("failed: exit 3; see ")
    assert outcomes["slow"].startswith("failed: not done after 1 s; see ")
    assert outcomes["lacks"] == "left out: no_such_package is not installed"
    assert outcomes["times"] == "left out: it only times a GPU"
    assert outcomes["finds"] == "passed"
    assert outcomes["smaller"] == "passed"
    assert (folder / "smaller.txt").read_text(encoding="utf-8") == "['--size', '64']\n"
