"""`std-rt live` through its entry point, on clips that stand in for a camera."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli_support import Cli, files_in, picture
from support.handmade import write_handmade
from support.live_support import ScriptedSource
from support.media_samples import ClipSpec, frame_times, make_clip

from std_rt.live.metrics import SCHEMA
from std_rt.live.session import Session
from std_rt.media.camera import camera as camera_module
from std_rt.streaming.frame_stream import FramePacket

CONTRACT = {
    "schema",
    "fps",
    "latency_ms",
    "stages_ms",
    "drops",
    "skips",
    "stalls",
    "style_switch_ms",
    "warping_error",
    "sharpness",
    "peak_memory_mb",
    "settings",
}
FRAMES = 10  # of the clip
SPEC = ClipSpec(pts=tuple(range(0, FRAMES * 512, 512)))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """0.4 s of 64 x 48 px at 25 fps."""
    return make_clip(tmp_path / "clip.mp4", SPEC)


@pytest.fixture
def live(cli: Cli, bundle: Path, art: Path, clip: Path) -> Cli:
    """``std-rt live --style art.png --camera clip.mp4 --no-window ARGUMENTS`` on the bundle made by hand."""

    def run(*arguments: object) -> Any:
        usual = ["--style", art, "--camera", clip, "--no-window", "--bundle", bundle, "--size", "64x48"]
        return cli("live", *usual, *arguments)

    return run


def report_of(out: str) -> dict[str, Any]:
    return dict(json.loads(out.splitlines()[-1]))


def test_the_last_line_is_the_contract(live: Cli) -> None:
    result = live("--once")
    assert result.code == 0, result.err
    report = report_of(result.out)
    assert report.keys() >= CONTRACT
    assert report["schema"] == SCHEMA
    late = report["settings"]["source_faults"].get("late", 0)  # a machine that is busy plays less
    assert report["frames"] > 0
    assert report["frames"] + report["drops"] == report["captured"]
    assert report["captured"] + late == FRAMES
    assert report["settings"]["source"] == "clip.mp4"


def test_a_video_to_video_bundle_says_how_late_its_results_are(
    cli: Cli, art: Path, clip: Path, tmp_path: Path
) -> None:
    v2v = write_handmade(tmp_path / "v2v", window=(4, 1)).path
    flags = ["--style", art, "--camera", clip, "--no-window", "--bundle", v2v, "--size", "64x48", "--once"]
    result = cli("live", *flags, "--record", tmp_path / "out.mp4")
    assert result.code == 0, result.err
    said = " ".join(result.err.split())
    assert "windows of 4 frames, 3 of them new" in said
    assert "2 frames (0.08 s at 25 fps) and the time of a window" in said
    report = report_of(result.out)
    assert report["settings"]["window"] == [4, 1]
    assert report["frames"] + report["drops"] == report["captured"] > 0
    assert len(frame_times(tmp_path / "out.mp4")) == report["frames"] > 0
    assert "--stream-batch does not work with" in cli("live", *flags, "--stream-batch").error


def test_colours_are_kept_if_asked(live: Cli) -> None:
    for flags in ((), ("--keep-colours",)):
        report = report_of(live("--once", *flags).out)
        assert ("colours" in report["stages_ms"]) == bool(flags)


def test_a_style_file_of_another_stroke_size_is_refused(
    cli: Cli, bundle: Path, art: Path, clip: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    cli("styles", "save", art, "-o", kept, "--bundle", bundle, "--stroke-size", 2)
    result = cli("live", "-s", kept, "-c", clip, "--no-window", "--bundle", bundle, "--stroke-size", 1)
    assert "was saved at stroke size 2 without its picture" in result.error


def test_any_camera_source_takes_camera_flags(live: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    source = ScriptedSource(time.perf_counter, *[np.zeros((48, 64, 3), np.uint8)] * 3)
    source.end()

    def open_source(spec: str, **wishes: Any) -> ScriptedSource:
        asked.update(wishes, spec=spec)
        return source

    monkeypatch.setattr(camera_module, "open_source", open_source)
    result = live("--camera", "mine", "--camera-size", "640x480", "--camera-fps", 60)
    assert result.code == 0, result.err
    assert asked == {"spec": "mine", "size": (480, 640), "fps": 60.0, "loop": True}
    assert report_of(result.out)["settings"]["source"] == "script"
    assert source.closed


def test_it_records_what_it_shows_and_streams_figures(live: Cli, tmp_path: Path) -> None:
    result = live("--record", tmp_path / "out.mp4", "--metrics", tmp_path / "m.jsonl", "--duration", 1.5)
    assert result.code == 0, result.err
    report = report_of(result.out)
    times = frame_times(tmp_path / "out.mp4")
    assert len(times) == report["frames"] > 5
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["kind"] for line in lines][:1] == ["start"]
    assert any(line["kind"] == "interval" for line in lines)
    assert lines[-1]["kind"] == "summary"
    assert lines[-1]["frames"] == report["frames"]
    assert lines[-1]["settings"]["size"] == [64, 48]
    # Opening and closing are no running time.
    assert 1 < report["seconds"] == pytest.approx(float(times[-1]), abs=0.3)
    assert lines[-1]["seconds"] == report["seconds"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--stream-batch",),
        ("--temporal", "noise"),
        ("--temporal", "full", "--stream-batch"),
        ("--skip-similar", 0.9),
        ("--target-fps", 5),
        ("--mirror", "--crossfade", 0, "--cycle", 0.2),
    ],
)
def test_every_way_to_run(live: Cli, tmp_path: Path, flags: tuple[object, ...]) -> None:
    other = picture(tmp_path / "other.png", 40, 40, seed=5)
    result = live("--duration", 0.6, "--style", other, *flags)
    assert result.code == 0, result.err
    assert report_of(result.out)["frames"] > 0


def test_with_a_window(live: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    result = live("--window", "--once")
    assert result.code == 0, result.err
    assert "present" in report_of(result.out)["stages_ms"]


def test_a_folder_of_styles_and_a_style_file(live: Cli, cli: Cli, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "styles"
    for seed in range(3):
        picture(folder / f"{seed}.png", 32, 32, seed=seed)
    assert cli("styles", "save", folder / "0.png", "-o", folder / "z.safetensors", "-b", bundle).code == 0
    result = live("--style", folder, "--once")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--camera", "nowhere.mp4"), "neither a camera nor a file"),
        (("--camera", "97"), "camera 97"),
        (("--style", "nowhere.png"), "does not exist"),
        (("--style-strength", 9), "strength"),
        (("--stroke-size", 9), "stroke size must be in 0.5..2, got 9"),
        (("--duration", 0), "--duration"),
        (("--skip-similar", 1), "--skip-similar"),
        (("--target-fps", 0), "--target-fps"),
        (("--record", "out.gif"), ".gif"),
        (("--record", "/dev/null/out.mp4"), "out.mp4"),
        (("--snapshots", "nowhere"), "not a folder"),
        (("--fullscreen",), "--fullscreen"),
        (("--cycle", 1, "--crossfade", 2), "--crossfade"),
        (("--cycle", -1), "--cycle"),
        (("--skip-similar", 0.9, "--stream-batch"), "--stream-batch"),
        (("--camera-fps", 30), "--camera-fps"),
        (("--style", "x" * 300), "check the path" if sys.platform == "linux" else "x"),
        (("--steps", 77), "77-step"),
        (("--negative-prompt", "x"), "--negative-prompt"),
        (("--size", 9999), "9999"),
    ],
)
def test_what_cannot_be_is_one_line(
    live: Cli, tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    before = files_in(tmp_path)
    assert words in live("--duration", 1, *arguments).error
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(("flag", "name"), [("--record", "out.mp4"), ("--metrics", "m.jsonl")])
def test_a_taken_name_is_refused(live: Cli, tmp_path: Path, flag: str, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    assert "--overwrite" in live(flag, tmp_path / name, "--once").error
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("flag", ["--record", "--metrics"])
def test_no_output_replaces_an_input(live: Cli, clip: Path, art: Path, flag: str) -> None:
    for path in (clip, art):
        before = path.read_bytes()
        assert flag in live(flag, path, "--overwrite", "--once").error
        assert path.read_bytes() == before


def test_two_outputs_are_two_files(live: Cli, tmp_path: Path) -> None:
    both = tmp_path / "same.mp4"
    assert "--metrics" in live("--record", both, "--metrics", both, "--overwrite").error
    assert not both.exists()


def test_a_refusal_leaves_no_file_behind(live: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "no_such_driver")
    before = files_in(tmp_path)
    assert live("--window", "--metrics", tmp_path / "m.jsonl", "--record", tmp_path / "out.mp4").code == 2
    assert files_in(tmp_path) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminal that hangs up")
def test_a_hangup_that_is_ignored_stays_so(live: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup has it."""
    presented, frames = Session.presented, []

    def hung_up(self: Session, packet: FramePacket) -> None:
        presented(self, packet)
        frames.append(packet)
        if len(frames) == 3:
            signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(Session, "presented", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        report = report_of(live("--duration", 1.5).out)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert report["frames"] == len(frames) > 6


def test_no_screen_is_one_line(live: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("a screen is always there")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "SDL_VIDEO_DRIVER"):
        monkeypatch.delenv(name, raising=False)
    assert "--no-window" in live("--window", "--once").error
