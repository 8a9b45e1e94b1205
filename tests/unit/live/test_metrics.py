"""The latency contract, on a clock the test moves: what counts, what does not, and the file."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.live_support import Clock

from std_rt.core.errors import MediaError
from std_rt.live import metrics_file
from std_rt.live.metrics import SCHEMA, Metrics, Recent
from std_rt.live.metrics_file import MetricsWriter
from std_rt.streaming.frame_stream import FramePacket

RESOLUTION = 0.006  # of a percentile: half a bin, and the rounding
FRAME = np.zeros((1, 1, 3), np.uint8)


class Session:
    """Metrics and their clock; `frame` presents one that was captured ``latency_s`` before."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.metrics = Metrics(settings, now=self.clock)

    def frame(self, after_s: float = 0.05, latency_s: float = 0.04, **more: Any) -> None:
        self.clock.at += after_s
        captured = self.clock.at - latency_s
        self.metrics.captured(captured)
        self.metrics.presented(FramePacket(FRAME, captured, **more))

    def frames(self, count: int, after_s: float = 0.05, **more: Any) -> None:
        for _ in range(count):
            self.frame(after_s, **more)

    def report(self) -> dict[str, Any]:
        return self.metrics.report()


# Percentiles


@settings(max_examples=30, deadline=None)
@given(
    latencies_ms=st.lists(st.floats(1e-3, 1e7), min_size=2, max_size=100),
    skipped=st.integers(0, 99),
)
def test_percentiles_are_numpys_within_the_resolution(latencies_ms: list[float], skipped: int) -> None:
    """Of the whole session, and of what came after an earlier copy of the counts."""
    session, split = Session(), skipped % len(latencies_ms)
    earlier = session.metrics.counts()
    for i, latency_ms in enumerate(latencies_ms):
        if i == split:
            earlier = session.metrics.counts()
        session.frame(0.05, latency_ms / 1000)
    counts = session.metrics.counts()
    for values, counted in ((latencies_ms, counts), (latencies_ms[split:], counts.since(earlier))):
        found = session.metrics.figures(counted)["latency_ms"]
        for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
            right = float(np.percentile(values, share))
            assert found[name] == pytest.approx(right, rel=0, abs=0.00501 * right + 0.00501)


def test_durations_beyond_the_histogram_count_as_its_ends() -> None:
    session = Session()
    session.frame(latency_s=-1.0)  # clocks that disagree
    assert session.report()["latency_ms"]["p50"] == 0
    session = Session()
    session.frame(latency_s=1e9)
    assert session.report()["latency_ms"]["p50"] == pytest.approx(1e7, rel=RESOLUTION)


# What counts


def test_an_empty_session_reports_nothing_as_none_and_is_json() -> None:
    session = Session(steps=4, size=(256, 320))
    text = json.dumps(session.report(), allow_nan=False)
    found = json.loads(text)
    assert found["schema"] == SCHEMA
    assert found["fps"] is None
    assert found["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert found["style_switch_ms"] == {"count": 0, "p50": None, "p95": None, "worst": None, "last": None}
    assert found["warping_error"] is found["sharpness"] is None
    assert found["frames"] == found["drops"] == found["skips"] == found["stalls"] == 0
    assert found["settings"] == {"steps": 4, "size": [256, 320]}
    assert found["peak_memory_mb"] > 0


def test_the_contract_names_everything_the_docs_promise() -> None:
    promised = (
        "schema fps fps_processed latency_ms interval_ms stages_ms frames skips captured drops stalls "
        "source_stalls seconds first_frame_s style_switch_ms warping_error sharpness levels_s "
        "peak_memory_mb settings"
    )
    assert set(Session().report()) == set(promised.split())


def test_settings_that_json_cannot_hold_are_refused_at_the_start() -> None:
    with pytest.raises(TypeError):
        Metrics({"path": Path("x")})
    with pytest.raises(ValueError, match="JSON"):
        Metrics({"scale": math.nan})


def test_the_clock_starts_with_the_first_presented_frame() -> None:
    session = Session()
    session.frame(after_s=7.0)  # engines were opened, the first call was slow
    session.frames(100, 0.05)
    found = session.report()
    assert found["first_frame_s"] == 7.0
    assert found["seconds"] == pytest.approx(5.0)
    assert found["fps"] == pytest.approx(20.0)
    assert found["frames"] == found["captured"] == 101


def test_skips_count_as_presented_but_not_for_latency_stages_or_processed_frames() -> None:
    session = Session()
    session.frame()
    for _ in range(20):
        session.frame(0.05, 0.04, stages_ms={"unet": 20.0})
        session.frame(0.05, 0.001, skipped=True, stages_ms={"unet": 0.0})
    found = session.report()
    assert (found["frames"], found["skips"]) == (41, 20)
    assert found["fps"] == pytest.approx(20)
    assert found["fps_processed"] == pytest.approx(10)
    assert found["latency_ms"]["p50"] == pytest.approx(40, rel=RESOLUTION)
    assert found["stages_ms"]["unet"] == pytest.approx(20, rel=RESOLUTION)


def test_stages_are_medians_over_the_frames_that_had_them() -> None:
    session = Session()
    for i in range(99):
        session.frame(stages_ms={"unet": 10.0 + i, **({"follow": 3.0} if i % 3 == 0 else {})})
    found = session.report()["stages_ms"]
    assert found["unet"] == pytest.approx(59.0, rel=RESOLUTION)
    assert found["follow"] == pytest.approx(3.0, rel=RESOLUTION)


def test_intervals_over_twice_the_running_median_are_stalls() -> None:
    session = Session()
    session.frames(20, 0.05)
    session.frame(0.099)
    assert session.report()["stalls"] == 0
    session.frame(0.101)
    assert session.report()["stalls"] == 1
    session.frames(80, 0.12)  # slower from now on: stalls, until the median has followed
    slower = session.report()["stalls"]
    assert 1 < slower <= 33
    session.frames(100, 0.12)
    assert session.report()["stalls"] == slower


def test_a_stall_that_goes_on_at_the_end_is_counted_once() -> None:
    session = Session()
    session.frames(20, 0.05)
    session.clock.at += 3.0
    found = session.report()
    assert found["stalls"] == 1
    assert found["seconds"] == pytest.approx(19 * 0.05 + 3)
    session.frame(0.5)
    assert session.report()["stalls"] == 1


def test_a_slow_source_is_told_apart_from_slow_engines() -> None:
    session = Session()
    session.frames(20, 0.05)
    session.frame(0.5)  # captured 0.5 s after the one before
    assert (session.report()["stalls"], session.report()["source_stalls"]) == (1, 1)
    for _ in range(10):  # frames come, the engines are busy
        session.clock.at += 0.05
        session.metrics.captured(session.clock.at)
    session.metrics.presented(FramePacket(FRAME, session.clock.at - 0.4))
    assert (session.report()["stalls"], session.report()["source_stalls"]) == (2, 1)


def test_a_pause_is_neither_a_stall_nor_time() -> None:
    session = Session()
    session.frames(21, 0.05)
    session.metrics.pause()
    session.frame(0.02)  # was on its way: not counted
    session.clock.at += 60
    session.metrics.dropped(1800)
    session.metrics.resume()
    session.frame(0.3)
    session.frames(20, 0.05)
    found = session.report()
    assert found["stalls"] == found["drops"] == 0
    assert found["frames"] == 42
    assert found["seconds"] == pytest.approx(2.0)
    assert found["fps"] == pytest.approx(20)


def test_a_lost_camera_is_not_a_stall_even_if_it_is_noticed_late() -> None:
    session = Session()
    session.frames(21, 0.05)
    session.clock.at += 2.0  # until the source says so
    session.metrics.pause("source")
    session.metrics.pause()
    session.clock.at += 30
    session.metrics.resume("source")
    session.frame(0.1)
    assert session.report()["seconds"] == pytest.approx(1.0)  # still paused
    session.metrics.resume()
    session.frames(21, 0.05)
    found = session.report()
    assert (found["stalls"], found["source_stalls"]) == (0, 0)
    assert found["seconds"] == pytest.approx(2.0)


def test_a_stall_of_ours_is_not_hidden_by_a_pause() -> None:
    session = Session()
    session.frames(21, 0.05)
    session.clock.at += 5
    session.metrics.pause()
    found = session.report()
    assert found["stalls"] == 1
    assert found["seconds"] == pytest.approx(6)


def test_a_style_switch_lasts_until_a_frame_that_was_painted_after_it() -> None:
    session = Session()
    session.frames(5)
    session.metrics.style_asked()
    asked = session.clock.at
    session.frame(0.05, style_s=asked - 0.01)  # was in the engines already
    assert session.report()["style_switch_ms"]["count"] == 0
    session.frame(0.05, style_s=asked + 0.01)
    found = session.report()["style_switch_ms"]
    assert (found["count"], found["last"]) == (1, 100.0)
    session.frame(0.05, style_s=session.clock.at)
    assert session.report()["style_switch_ms"]["count"] == 1


def test_of_several_commands_the_newest_shown_is_counted() -> None:
    session = Session()
    start = session.clock.at
    for asked in (start, start + 0.02, start + 0.08):
        session.metrics.style_asked(asked)
    session.frame(0.1, style_s=start + 0.05)
    assert session.report()["style_switch_ms"]["last"] == pytest.approx(80)
    session.frame(0.1, style_s=start + 0.15)
    found = session.report()["style_switch_ms"]
    assert (found["count"], found["last"]) == (2, pytest.approx(120))
    assert found["worst"] == pytest.approx(120, rel=RESOLUTION)


def test_a_style_switch_that_meets_a_pause_is_not_counted() -> None:
    session = Session()
    session.metrics.style_asked()
    session.metrics.pause()
    session.metrics.style_asked()
    session.metrics.resume()
    session.frame(style_s=session.clock.at + 1)
    assert session.report()["style_switch_ms"]["count"] == 0


def test_drops_warping_and_qualities_add_up() -> None:
    session = Session()
    session.metrics.quality("256x256, 4 steps")
    session.frames(11, 0.1)
    session.metrics.quality("192x192, 2 steps")
    session.frames(10, 0.05)
    session.metrics.dropped()
    session.metrics.dropped(4)
    for error, sharpness in ((0.02, 0.7), (0.04, 0.9), (math.nan, 5)):
        session.metrics.warped(error, sharpness)
    found = session.report()
    assert found["drops"] == 5
    assert (found["warping_error"], found["sharpness"]) == (0.03, 0.8)
    assert found["levels_s"] == {"256x256, 4 steps": 1.0, "192x192, 2 steps": 0.5}


def test_threads_lose_nothing() -> None:
    metrics = Metrics()
    interval, count = sys.getswitchinterval(), 500

    def capture(i: int) -> None:
        metrics.captured(float(i))
        metrics.dropped()

    jobs: list[Callable[[int], object]] = [
        capture,
        lambda i: metrics.presented(FramePacket(FRAME, stages_ms={"unet": 7.0, f"own {i % 3}": 1.0})),
        lambda i: metrics.presented(FramePacket(FRAME, stages_ms={"unet": 5.0})),
        lambda i: metrics.counts() if i % 50 == 0 else i % 5 or metrics.recent(),
    ]
    threads = [threading.Thread(target=lambda job=job: [job(i) for i in range(count)]) for job in jobs]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    counted = metrics.counts()
    assert (counted.captured, counted.drops, counted.frames) == (count, count, 2 * count)
    assert counted.latency.sum() == counted.stages["unet"].sum() == 2 * count


# The last two seconds


def test_recent_forgets_what_is_older_than_two_seconds() -> None:
    session = Session()
    session.frames(50, 0.1, latency_s=0.2)
    session.metrics.dropped(100)
    session.frames(60, 0.05, latency_s=0.04)
    session.metrics.dropped(4)
    session.frames(2, 0.05, latency_s=0.04)
    found = session.metrics.recent()
    assert found.fps == pytest.approx(20)
    assert found.latency_p50_ms == found.latency_p95_ms == pytest.approx(40)
    assert found.drops_per_s == pytest.approx(2, rel=0.05)
    assert found.skips_per_s == 0


def test_recent_falls_during_a_stall_and_stays_as_it_was_during_a_pause() -> None:
    session = Session()
    assert session.metrics.recent() == Recent(None, None, None, 0, 0)
    session.frames(50, 0.05)
    session.clock.at += 1.0
    stalled = session.metrics.recent().fps
    assert stalled == pytest.approx(20 / 2, rel=0.1)
    session.clock.at += 9.0
    assert session.metrics.recent().fps == 0
    session = Session()
    session.frames(50, 0.05)
    session.metrics.pause()
    session.clock.at += 10
    assert session.metrics.recent().fps == pytest.approx(20)


def test_memory_is_constant_however_long_it_runs() -> None:
    session = Session()

    def play(seconds: int) -> int:
        for i in range(seconds):
            session.frame(0.5, stages_ms={"unet": 1.0 + i % 90}, style_s=0.0)
            session.metrics.style_asked()
        return sum(len(each) for each in vars(session.metrics).values() if hasattr(each, "__len__"))

    assert play(1200) == play(1200) < 1300


# The file


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_file_has_a_start_an_interval_a_second_and_the_summary(tmp_path: Path) -> None:
    session = Session(backend="openvino")
    session.frame()
    writer = MetricsWriter(tmp_path / "m.jsonl", session.metrics, now=session.clock)
    for i in range(48):
        session.frame(1 / 16 if i < 16 else 1 / 8, stages_ms={"unet": 5.0})
        session.metrics.dropped()
        writer.tick()
    writer.close()
    writer.close()
    start, *intervals, summary = lines(tmp_path / "m.jsonl")
    assert (start["kind"], start["settings"]) == ("start", {"backend": "openvino"})
    assert {line["kind"] for line in intervals} == {"interval"}
    assert [line["fps"] for line in intervals] == [16, 8, 8, 8, 8]
    assert [line["at_s"] for line in intervals] == [1, 2, 3, 4, 5]
    assert sum(line["drops"] for line in intervals) == summary["drops"] == 48
    assert sum(line["frames"] for line in intervals) == summary["frames"] == 49
    assert summary == {"kind": "summary", **json.loads(json.dumps(session.report()))}
    assert writer.problem == ""


def test_an_interval_without_a_frame_is_json_and_a_pause_is_not_negative_time(tmp_path: Path) -> None:
    session = Session()
    session.metrics.quality("64x48, 1 step")
    session.frames(30)
    writer = MetricsWriter(tmp_path / "m.jsonl", session.metrics, now=session.clock)
    for _ in range(3):
        session.clock.at += 1
        writer.tick()  # counted as a stall, until the source says that it is lost
    session.metrics.pause("source")
    session.clock.at += 1
    writer.tick()
    writer.close()
    intervals = lines(tmp_path / "m.jsonl")[1:-1]
    assert all(min(line["seconds"], line["stalls"], *line["levels_s"].values()) >= 0 for line in intervals)
    assert intervals[-1]["fps"] is None
    assert lines(tmp_path / "m.jsonl")[-1]["stalls"] == 0


def test_a_killed_session_keeps_its_lines(tmp_path: Path) -> None:
    session = Session()
    writer = MetricsWriter(tmp_path / "m.jsonl", session.metrics, now=session.clock)
    session.clock.at += 2
    writer.tick()
    for _ in range(1000):
        if len(found := lines(tmp_path / "m.jsonl")) == 2:
            break
        threading.Event().wait(0.01)
    assert [line["kind"] for line in found] == ["start", "interval"]
    writer.close()


def test_an_existing_file_is_refused_and_overwritten_on_request(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(MediaError, match="already exists"):
        MetricsWriter(path, Metrics())
    assert path.read_text(encoding="utf-8") == "mine"
    MetricsWriter(path, Metrics(), overwrite=True).close()
    assert len(lines(path)) == 2


def test_an_unwritable_path_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "m.jsonl", tmp_path):
        with pytest.raises(MediaError, match="cannot be written"):
            MetricsWriter(path, Metrics(), overwrite=path is tmp_path)


class Disk:
    """A file that takes ``room`` lines."""

    def __init__(self, room: int, error: OSError) -> None:
        self.room, self.error, self.closed = room, error, False

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def write(self, text: str) -> None:
        self.room -= 1
        if self.room < 0:
            raise self.error

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(28, "No space left on device"), "the disk is full"), (OSError(5, "I/O error"), "I/O error")],
)
def test_a_disk_that_takes_no_more_ends_the_file_with_one_note(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk = Disk(3, error)
    monkeypatch.setattr(metrics_file, "_open", lambda path, overwrite: disk)
    session = Session()
    writer = MetricsWriter(tmp_path / "m.jsonl", session.metrics, now=session.clock)
    for _ in range(200):
        session.frame(1.0)
        writer.tick()
    writer.close()
    assert said in writer.problem
    assert writer.problem.count("\n") == 0
    assert disk.closed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux'")
def test_a_disk_that_is_full_from_the_start_does_not_end_the_session() -> None:
    writer = MetricsWriter(Path("/dev/full"), Metrics(), overwrite=True)
    writer.close()
    assert "the disk is full" in writer.problem


def test_a_disk_that_hangs_holds_up_neither_frames_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    go, ended, written = threading.Event(), threading.Event(), []

    class Hanging(Disk):
        def write(self, text: str) -> None:
            go.wait(60)
            written.append(json.loads(text)["kind"])

        def __exit__(self, *_: object) -> None:
            ended.set()

    monkeypatch.setattr(metrics_file, "_open", lambda path, overwrite: Hanging(0, OSError()))
    monkeypatch.setattr(metrics_file, "_LAST_LINES_S", 0.05)
    session = Session()
    writer = MetricsWriter(tmp_path / "m.jsonl", session.metrics, now=session.clock)
    for _ in range(200):
        session.frame(1.0)
        writer.tick()
    writer.close()
    assert "is incomplete" in writer.problem
    go.set()
    assert ended.wait(60)
    assert written[-1] == "summary"
    assert len(written) < 70
