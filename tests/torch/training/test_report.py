"""Logs of equal runs are equal, whatever was killed; progress works anywhere; the stopwatch adds up."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from std_rt.core.errors import RecipeError
from std_rt.training.run.report import CudaClock, Report, Stopwatch, histogram_bars
from std_rt.training.run.sheet import save_curve, save_histogram


def _console(*, terminal: bool = False, width: int = 160) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, _environ={"TERM": "xterm"})


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Ticking:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _report(folder: Path, **options: Any) -> Report:
    defaults = {"total_steps": 10, "title": "std", "log_every": 2, "tensorboard": False}
    return Report(folder, **{**defaults, "console": _console(), **options})


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the log --------------------------------------------------------------------------------------------


def test_lines_are_sorted_rounded_and_plain(tmp_path: Path) -> None:
    with _report(tmp_path) as report:
        values = {
            "z": 1 / 3,
            "a": np.float32(0.1),
            "n": np.int64(7),
            "bad": float("nan"),
            "small": 1.23456789e-9,
        }
        report.log(1, values)
        report.log(2, {"t": torch.tensor(2.5)})  # type: ignore[dict-item]
    assert (tmp_path / "log.jsonl").read_bytes() == (
        b'{"a": 0.1, "bad": null, "n": 7, "small": 1.23457e-09, "step": 1, "z": 0.333333}\n'
        b'{"step": 2, "t": 2.5}\n'
    )


def _run(folder: Path, first: int, last: int) -> None:
    with _report(folder, resume_at=first) as report:
        for step in range(first + 1, last + 1):
            report.log(step, {"loss": 1 / step})
            report.timing(step, {"images_per_s": 3.0})


@pytest.mark.parametrize(
    "torn", [b"", b'{"loss": 0.1', b'{"loss": 0.14, "st\xff', b"5\n", b'{"loss": 1}\n', b"\x00" * 9]
)
def test_a_killed_and_resumed_run_has_the_log_of_an_unbroken_one(torn: bytes, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(whole, 0, 9)
    _run(broken, 0, 7)  # the checkpoint was that of step 4
    for name in ("log.jsonl", "timing.jsonl"):
        with (broken / name).open("ab") as file:
            file.write(torn)
    _run(broken, 4, 9)
    assert (broken / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert [row["step"] for row in _rows(broken / "timing.jsonl")] == list(range(1, 10))
    assert {p.name for p in broken.iterdir()} == {"log.jsonl", "timing.jsonl"}


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"loss": 1.0, "step": 1}\n{"loss": 0.5, "step": 2}')
    _run(tmp_path, 2, 3)
    assert [row["step"] for row in _rows(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_a_run_without_a_checkpoint_starts_its_log_over(tmp_path: Path) -> None:
    _run(tmp_path, 0, 3)
    _run(tmp_path, 0, 2)
    assert [row["step"] for row in _rows(tmp_path / "log.jsonl")] == [1, 2]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = _report(tmp_path)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RecipeError, match=r"^[^\n]*log\.jsonl could not be written \(No space left[^\n]*$"):
        report.log(1, {"loss": 1.0})
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="could not be written"):
        _report(tmp_path / "file" / "run")


def test_other_processes_do_nothing(tmp_path: Path) -> None:
    console = _console(terminal=True)
    with _report(tmp_path / "run", main=False, tensorboard=True, console=console) as report:
        report.log(1, {"loss": 1.0})
        report.timing(1, {"images_per_s": 1.0})
        report.progress(2, {"loss": 1.0}, histogram=[1, 2])
        report.sheet(1, tmp_path / "none.png")
        report.say("hello")
        report.curves()
        report.histogram()
    assert not (tmp_path / "run").exists()
    assert _text(console) == ""


# --- progress -------------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_line_every_so_often(tmp_path: Path) -> None:
    console, clock = _console(), Ticking()
    with _report(tmp_path, console=console, clock=clock, total_steps=5) as report:
        for step in range(1, 6):
            clock.now += 2
            report.timing(step, {"images_per_s": 12.345})
            report.progress(step, {"consistency": 0.0123456}, histogram=np.array([1, 2, 0, 4]))
    assert _text(console).splitlines() == [
        "std  2/5  12.3 images/s  0:00:06 left  consistency 0.01235  t ▂▄·█",
        "std  4/5  12.3 images/s  0:00:02 left  consistency 0.01235  t ▂▄·█",
        "std  5/5  12.3 images/s  0:00:00 left  consistency 0.01235  t ▂▄·█",
    ]
    assert [row["eta_s"] for row in _rows(tmp_path / "timing.jsonl")] == [8, 6, 4, 2, 0]


def test_what_was_said_last_stays_and_lines_are_never_wrapped(tmp_path: Path) -> None:
    console = _console(width=20)
    with _report(tmp_path, console=console, title="std of [bold]a base[/]") as report:
        report.progress(1, {"consistency": 0.5})
        report.progress(2)
    lines = _text(console).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("std of [bold]a base[/]  2/10")
    assert "consistency 0.5" in lines[0]


def test_the_time_left_is_that_of_the_recent_pace(tmp_path: Path) -> None:
    clock = Ticking()
    with _report(tmp_path, clock=clock, total_steps=1000, resume_at=500) as report:
        clock.now += 50  # slow at first: five seconds a step
        report.timing(510, {})
        for step in range(511, 541):
            clock.now += 1
            report.timing(step, {})
    rows = _rows(tmp_path / "timing.jsonl")
    assert rows[0]["eta_s"] == 5 * 490
    assert rows[-1]["eta_s"] == 460


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    console = _console(terminal=True)
    with _report(tmp_path, console=console) as report:
        report.progress(4, {"loss": 0.25}, histogram=[1, 1])
        report.advance(5)
        report.say("three files are broken")
    text = _text(console)
    assert "5/10" in text
    assert "loss 0.25" in text
    assert "██" in text
    assert "three files are broken" in text
    report.close()  # again: nothing happens


def test_histograms_are_drawn_in_few_characters() -> None:
    assert histogram_bars([0, 1, 2, 3, 4, 5, 6, 7, 8]) == "·▁▂▃▄▅▆▇█"
    assert histogram_bars([0, 1, 8], ascii_only=True).isascii()
    assert histogram_bars([5] * 37) == "█" * 12  # 37 do not divide by 12
    assert histogram_bars([0, 0]) == "··"
    assert histogram_bars([]) == ""
    # One visit among a thousand shows.
    assert "·" not in histogram_bars([1, 1000])


# --- TensorBoard ----------------------------------------------------------------------------------------


def test_without_tensorboard_it_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    console = _console()
    with _report(tmp_path, tensorboard=True, console=console) as report:
        report.log(1, {"loss": 1.0})
        report.sheet(1, tmp_path / "none.png")
    assert _text(console).count("pip install tensorboard") == 1


def test_tensorboard_gets_scalars_and_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: Path, purge_step: int | None) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
            calls.append((name, picture.shape, tuple(picture[0, 0]), step, dataformats))

        def flush(self) -> None: ...
        def close(self) -> None:
            calls.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    cv2.imwrite(str(tmp_path / "sheet.png"), np.full((4, 6, 3), (0, 0, 255), np.uint8))
    with _report(tmp_path, tensorboard=True, resume_at=4) as report:
        report.log(5, {"loss": 0.5})
        report.timing(5, {"images_per_s": 2.0})
        report.sheet(5, tmp_path / "sheet.png")
    assert calls[0] == (tmp_path / "tensorboard", 5)
    assert ("loss", 0.5, 5) in calls
    assert ("timing/images_per_s", 2.0, 5) in calls
    assert ("sheet", (4, 6, 3), (255, 0, 0), 5, "HWC") in calls
    assert calls[-1] == "closed"


# --- curves ---------------------------------------------------------------------------------------------


def _picture(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    assert picture is not None
    return picture


def test_curves_show_every_series_of_the_log(tmp_path: Path) -> None:
    with _report(tmp_path) as report:
        for step in range(1, 30):
            values = {"consistency": 1 / step, "gradient": 2.0 + step, "learning_rate": 1e-5}
            report.log(step, values | ({"generator": (-1.0) ** step} if step > 10 else {}))
        report.progress(30, histogram=[1, 5, 2])
        report.curves()
        report.histogram()
    # The generator's loss is signed and stands below, on a linear scale.
    assert _picture(tmp_path / "loss.png").shape == (560, 640, 3)
    assert _picture(tmp_path / "visits.png").shape == (200, 640, 3)


def test_curves_of_nothing_are_an_empty_picture(tmp_path: Path) -> None:
    with _report(tmp_path) as report:
        report.curves()
        assert _picture(tmp_path / "loss.png").shape == (280, 640, 3)
        report.log(1, {"loss": 1.0})
        report.curves()
        report.histogram()
    assert not (tmp_path / "visits.png").exists()


def test_a_positive_curve_falls_on_a_log_scale(tmp_path: Path) -> None:
    save_curve(tmp_path / "a.png", {"loss": (range(50), [10.0 ** -(i / 10) for i in range(50)])}, "loss")
    ink = np.argwhere(_picture(tmp_path / "a.png")[..., 0] == 40)  # blue of the first colour
    left, right = ink[ink[:, 1] < 100, 0].mean(), ink[abs(ink[:, 1] - 440) < 30, 0].mean()
    middle = ink[abs(ink[:, 1] - 265) < 5, 0].mean()
    assert left < middle < right
    assert abs(middle - (left + right) / 2) < 15  # an exponential is straight there
    save_curve(tmp_path / "zero.png", {"loss": (range(3), [1.0, 0.0, 0.5])}, "loss")


def test_each_series_has_a_colour(tmp_path: Path) -> None:
    steps = list(range(40))
    series = {"a": (steps, [2.0 + i for i in steps]), "b": (steps[20:], [50.0 - i for i in steps[20:]])}
    save_curve(tmp_path / "a.png", series, "two")
    colours = {tuple(c) for c in _picture(tmp_path / "a.png").reshape(-1, 3).tolist()}
    assert {(40, 90, 200), (180, 110, 20)} <= colours
    save_curve(tmp_path / "short.png", {"a": ([1], [1.0])}, "one point")


def test_histogram_bars_stand_on_the_axis(tmp_path: Path) -> None:
    save_histogram(tmp_path / "h.png", [0, 4, 2], "visits")
    blue = (_picture(tmp_path / "h.png")[:180, :, 0] == 40).sum(0)  # ink per column, without the axis' row
    first, second, third = blue[60:240].max(), blue[260:430].max(), blue[460:620].max()
    assert first == 0
    assert second == pytest.approx(2 * third, abs=4)
    save_histogram(tmp_path / "empty.png", [], "none")


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"^picture [^\n]* could not be written"):
        save_curve(tmp_path / "file" / "a.png", {"x": ([1, 2], [1.0, 2.0])}, "x")


# --- the stopwatch --------------------------------------------------------------------------------------


class FakeClock:
    """Moves when told to; what it marked is reached as far as ``done`` says, as on a GPU."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, float("inf")

    def mark(self) -> float:
        return self.now

    def seconds(self, a: float, b: float) -> float:
        return b - a

    def reached(self, mark: float) -> bool:
        return mark <= self.done


@contextmanager
def _lasting(clock: FakeClock, watch: Stopwatch, name: str, seconds: float) -> Iterator[None]:
    with watch(name):
        clock.now += seconds / 2
        yield
        clock.now += seconds / 2


def _step(clock: FakeClock, watch: Stopwatch) -> None:
    watch.start()
    clock.now += 1  # the loop's own
    with _lasting(clock, watch, "data", 2), _lasting(clock, watch, "teacher", 4):
        pass
    with _lasting(clock, watch, "student", 3):
        pass
    watch.stop()


def test_shares_add_up_and_inner_spans_count_for_themselves() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock=clock)
    with watch("before any step"):
        clock.now += 99
    for _ in range(3):
        _step(clock, watch)
        clock.now += 50  # a checkpoint, between steps
    values = watch.summary(images_per_step=20)
    assert values == pytest.approx(
        {
            "step_s": 10.0,
            "images_per_s": 2.0,
            "share_data": 0.2,
            "share_teacher": 0.4,
            "share_student": 0.3,
            "share_overhead": 0.1,
            "overhead_to_spans": 1 / 9,
        }
    )
    assert watch.summary() == {}


def test_a_summary_does_not_wait() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock=clock)
    clock.done = 10.0  # the device has finished the first step of three
    for _ in range(3):
        _step(clock, watch)
    assert watch.summary(images_per_step=10)["images_per_s"] == pytest.approx(1.0)
    assert watch.summary() == {}
    clock.done = clock.now
    values = watch.summary(images_per_step=10)
    assert (values["images_per_s"], values["step_s"]) == (pytest.approx(1.0), pytest.approx(10.0))


def test_an_error_in_a_span_leaves_the_watch_usable() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock=clock)
    watch.start()
    with pytest.raises(ValueError, match="inside"), watch("teacher"):
        raise ValueError("inside")
    _step(clock, watch)
    assert watch.summary()["step_s"] == 10.0


def test_the_stopwatch_is_cheap_and_right_on_the_cpu() -> None:
    watch = Stopwatch("cpu")
    watch.start()
    for _ in range(2000):
        with watch("nothing"):
            pass
    watch.stop()
    assert watch.summary()["step_s"] < 0.5  # 2000 spans; a step has some dozens
    x = torch.randn(300, 300)
    watch.start()
    with watch("work"):
        for _ in range(20):
            x @ x
    watch.stop()
    assert watch.summary()["share_work"] > 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_is_not_waited_for() -> None:
    watch = Stopwatch("cuda")
    assert isinstance(watch.clock, CudaClock)
    x = torch.randn(8192, 8192, device="cuda")
    watch.start()
    with watch("work"):
        for _ in range(50):
            x = torch.nn.functional.normalize(x @ x)
    watch.stop()
    assert watch.summary() == {}  # still at work
    torch.cuda.synchronize()
    values = watch.summary()
    assert values["share_work"] > 0.9
    assert values["step_s"] > 0.05
