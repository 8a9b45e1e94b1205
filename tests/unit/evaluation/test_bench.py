"""The clock, the statistics and the tables of `std-rt bench`, without waiting."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.handmade import write_handmade

from std_rt.core.bundle import Bundle
from std_rt.core.errors import BackendError, UsageError
from std_rt.engines import BackendInfo
from std_rt.evaluation import bench_table
from std_rt.evaluation.bench import (
    STAGES,
    Settings,
    Timing,
    _print,
    measure,
    run_first_frame,
    sample_frame,
    stage_times,
    stream_step,
)
from std_rt.evaluation.bench_table import Column, columns_here, run_table
from std_rt.pipeline.stylizer import Stylizer


def test_the_clock_gives_every_millisecond_to_one_stage() -> None:
    times = iter([0.0, 0.010, 0.030, 0.035])

    def paint(mark: Callable[[str], None]) -> None:
        for stage in ("unet", "scheduler", "unet"):
            mark(stage)

    assert stage_times(paint, lambda: next(times)) == pytest.approx({"unet": 15.0, "scheduler": 20.0})


def test_medians_percentiles_and_fps() -> None:
    frames = [{"unet": float(ms), "total": 2.0 * ms} for ms in range(1, 102)]
    timing = Timing.of(frames)
    assert timing.median_ms["unet"] == 51
    assert timing.p95_ms["total"] == pytest.approx(192)
    assert timing.fps == pytest.approx(1000 / 102)
    assert timing.median_ms["vae_encoder"] == 0
    assert set(timing.median_ms) == set(STAGES)


def test_warm_up_frames_are_run_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    counted: list[dict[str, float]] = []
    monkeypatch.setattr(Timing, "of", counted.extend)

    def step() -> dict[str, float]:
        calls.append(len(calls))
        return {"unet": float(calls[-1])}

    measure({"": step}, frames=5, warmup=3)
    assert len(calls) == 8
    assert [frame["unet"] for frame in counted] == [3, 4, 5, 6, 7]
    assert all(frame["total"] >= 0 for frame in counted)


def test_a_step_is_a_frame_of_a_stream(handmade: Bundle) -> None:
    with Stylizer.load(handmade, backend="openvino", precision="fp32", steps=2) as stylizer:
        step = stream_step(stylizer, (32, 64))
        first, second = step(), step()
    assert set(STAGES) - {"total"} <= first.keys() == second.keys()


def test_the_test_frame_is_the_same_every_time() -> None:
    assert (sample_frame(24, 40) == sample_frame(24, 40)).all()
    assert sample_frame(24, 40).shape == (24, 40, 3)


def test_what_is_compared_takes_turns_and_the_first_frame_of_a_turn_is_not_counted() -> None:
    order: list[str] = []

    def noted(name: str) -> Callable[[], dict[str, float]]:
        return lambda: order.append(name) or {}  # type: ignore[func-returns-value]

    timings = measure({"a": noted("a"), "b": noted("b")}, frames=12, warmup=2)
    assert "".join(order) == "aabb" + "a" * 11 + "b" * 11 + "aaa" + "bbb"
    assert set(timings) == {"a", "b"}


def test_only_counted_frames_reach_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(Timing, "of", lambda frames: counted.append(len(frames)))
    measure({"a": dict, "b": dict}, frames=12, warmup=2)
    measure({"a": dict}, frames=25, warmup=0)
    assert counted == [12, 12, 25]


def test_what_no_engine_takes_is_outside() -> None:
    stages = {"convert": 3.0, "vae_encoder": 20.0, "unet": 50.0, "scheduler": 2.0, "vae_decoder": 25.0}
    slow = dict.fromkeys(stages, 500.0)  # one frame that was held up does not change it
    frames = [stages | {"total": 100.0}] * 5 + [slow | {"total": 2500.0}]
    assert Timing.of(frames).outside == pytest.approx(0.05)


def test_a_frame_in_one_piece_is_one_stage_and_not_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    """The GPU backends replay a frame as one CUDA graph, beside stages that diffusers is timed in."""
    whole = Timing.of([{"convert": 1.0, "frame": 9.0, "total": 10.0}] * 3)
    assert whole.median_ms == {"convert": 1.0, "frame": 9.0, "total": 10.0}
    assert whole.outside == pytest.approx(0.1)
    parts = Timing.of([{"unet": 15.0, "vae_encoder": 1.0, "vae_decoder": 3.0, "total": 20.0}] * 3)
    result = {"bundle": "b", "size": [8, 8], "steps": 1, "precision_reason": "", "peak_memory_mb": None}
    _print(result | {"outside_engines": 0.1, "against": {}}, {"ours": whole, "theirs": parts})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["frame"] == ["9.00", "9.00", "-", "-"]
    assert rows["unet"] == ["-", "-", "15.00", "15.00"]
    assert rows["total"] == ["10.00", "10.00", "20.00", "20.00"]


def test_first_frame_is_timed_in_new_processes(
    handmade: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("std_rt.evaluation.bench._STARTS", 1)
    run_first_frame(Settings(bundle=str(handmade.path), size=(32, 64), steps=2))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.05 < result["first_frame_s"] < 60
    assert (result["size"], result["steps"], result["bundle"]) == ([64, 32], 2, "handmade")


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no first frame: .*there is no bundle or folder"):
        run_first_frame(Settings(bundle=str(tmp_path / "none")))


@pytest.fixture
def quick_table(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Small sizes, one frame a cell, and no torch."""
    monkeypatch.setattr(bench_table, "SIZES", (32, 64))
    monkeypatch.setattr(bench_table, "_MOST_FRAMES", 1)
    columns = (Column("openvino", "fp32"), Column("openvino", "int8"))
    monkeypatch.setattr(bench_table, "COLUMNS", columns)
    return Settings(bundle=str(handmade.path))


def test_the_table_has_every_combination_and_ends_with_json(
    quick_table: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    run_table(quick_table)
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    cells = [(row["size"], row["steps"], row["backend"], row["precision"]) for row in result["table"]]
    assert cells == [(size, steps, "openvino", "fp32") for size in (32, 64) for steps in (1, 2, 4)]
    assert all(row["fps"] > 0 and set(row["stages_ms"]) == set(STAGES) for row in result["table"])
    assert "left out: openvino int8: the bundle has no int8 form; see: std-rt bundles int8 --help" in out


def test_a_bundle_with_an_int8_form_fills_that_column(
    quick_table: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = write_handmade(tmp_path / "both", int8=True)
    run_table(replace(quick_table, bundle=str(both.path)))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    assert [row["precision"] for row in rows] == ["fp32", "int8"] * 6


def test_a_combination_that_cannot_run_is_left_out_and_said(
    quick_table: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(bundle: Bundle, size_px: int, *_: object) -> Timing:
        if size_px == 64:
            raise BackendError("too little memory")
        return Timing(dict.fromkeys(STAGES, 8.0))

    monkeypatch.setattr(bench_table, "_measure", failing)
    run_table(quick_table)
    out = capsys.readouterr().out
    assert "left out: openvino fp32: too little memory" in out
    rows = json.loads(out.splitlines()[-1])["table"]
    assert [(row["size"], row["steps"], row["fps"]) for row in rows] == [(32, n, 125) for n in (1, 2, 4)]


def test_backends_that_are_not_installed_are_left_out_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    infos = [
        BackendInfo("openvino", True, "", ""),
        BackendInfo("onnxruntime", False, "", "pip install -e '.[onnx]'"),
    ]
    monkeypatch.setattr(bench_table, "backends", lambda: infos)
    found, left_out = columns_here(has_int8=True)
    assert Column("openvino", "int8") in found
    assert left_out["onnxruntime fp32"] == "not installed; run: pip install -e '.[onnx]'"
